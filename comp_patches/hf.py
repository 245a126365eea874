"""Towers as Hugging Face models: `import comp_patches.hf`, then AutoConfig, AutoModel and AutoImageProcessor know them.

    import comp_patches.hf
    from transformers import AutoImageProcessor, AutoModel

    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
    maps = model(**processor(images), layout="maps").last_hidden_state  # one (h, w, D) per image

A folder is the same whether `save_pretrained` or `comp_patches.towers.save_vision_transformer` wrote it, and either
side reads it. P = patches of the batch, N = images, D = width, p = patch size in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import ModelOutput

from comp_patches.image_processor import NativeImageProcessor
from comp_patches.packing import frames_on_host
from comp_patches.vision_config import MODEL_TYPE, VisionTransformerConfig, refuse_unknown
from comp_patches.vision_transformer import PackedVisionTransformer

LAYOUTS = ("packed", "maps", "padded")
_FIELDS = tuple(field.name for field in fields(VisionTransformerConfig) if field.name != "model_type")


class CompVisionConfig(PreTrainedConfig):
    """`VisionTransformerConfig`'s fields as attributes. transformers' own settings are neither kept nor saved."""

    model_type = MODEL_TYPE

    def __init__(self, **values: Any):
        own = {name: values.pop(name) for name in _FIELDS if name in values}
        tower = VisionTransformerConfig(**own)  # refuses what is no tower
        refuse_unknown(name for name in values if not hasattr(PreTrainedConfig, name))
        super().__init__(**values)
        for name in _FIELDS:
            setattr(self, name, getattr(tower, name))

    def tower_config(self) -> VisionTransformerConfig:
        """The same as the core's config."""
        return VisionTransformerConfig(**{name: getattr(self, name) for name in _FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """What `save_vision_transformer` writes."""
        return self.tower_config().to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: a config.json leaves nothing to defaults that a later version may change."""
        return self.to_dict()

    @property
    def _attn_implementation(self) -> str:
        """transformers' private name for it: what `from_pretrained(..., attn_implementation=...)` sets."""
        return self.attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        if value is not None:
            self.attn_implementation = value


@dataclass
class CompVisionOutput(ModelOutput):
    """Features of every patch.

    Attributes:
        last_hidden_state: by layout, "packed" (P, D), "maps" a list of (h, w, D), "padded" (N, most patches, D).
        attention_mask: (N, most patches) bool, True where a patch is; only for "padded".
    """

    last_hidden_state: Tensor | list[Tensor] | None = None
    attention_mask: Tensor | None = None


class CompVisionModel(PreTrainedModel):
    """A packed vision transformer behind transformers' interface."""

    config_class = CompVisionConfig
    base_model_prefix = "tower"  # transformers finds unprefixed keys of a file under this name
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)

    def __init__(self, config: CompVisionConfig):
        super().__init__(config)
        self.tower = PackedVisionTransformer(config.tower_config())
        self.register_load_state_dict_pre_hook(_accept_unprefixed)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, image_grid_thw: Tensor | Sequence[Sequence[int]], *, layout: str = "packed"
    ) -> CompVisionOutput:
        """Features of every patch.

        Args:
            pixel_values: (P, 3*p*p), the image processor's.
            image_grid_thw: (N, 3) frames, rows and columns of patches; on the host it costs no device sync.
            layout: "packed" keeps the input's order (blocks); "maps" and "padded" are in raster order, an entry per
                image (of a video: per frame).
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} is unknown. Known: {', '.join(LAYOUTS)}.")
        grids = image_grid_thw.tolist() if isinstance(image_grid_thw, Tensor) else image_grid_thw
        features = self.tower(pixel_values, grids)
        if layout == "packed":
            return CompVisionOutput(last_hidden_state=features)
        maps = feature_maps(features, grids, self.config.merge_size)
        if layout == "maps":
            output = CompVisionOutput()
            output["last_hidden_state"] = maps  # the constructor takes an empty list for no value
            return output
        rows = [each.flatten(0, 1) for each in maps]
        padded = pad_sequence(rows, batch_first=True) if rows else features.reshape(0, 0, self.config.hidden_size)
        lengths = torch.tensor([len(each) for each in rows], device=features.device)
        mask = torch.arange(padded.shape[1], device=features.device) < lengths[:, None]
        return CompVisionOutput(last_hidden_state=padded, attention_mask=mask)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any):
        """transformers' loader, but a missing weight is an error."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(key.removeprefix("tower.") for key in info["missing_keys"])
            raise ValueError(
                f"The checkpoint lacks {len(missing)} tensors that its config asks for, first {missing[0]}. "
                "Do config.json and the weights belong together?"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """transformers' writer, under the core's names."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        unprefixed = {name.removeprefix("tower."): tensor for name, tensor in state_dict.items()}
        super().save_pretrained(save_directory, state_dict=unprefixed, **kwargs)

    def set_attn_implementation(self, attn_implementation: str, **_: Any) -> None:
        """Change the tower's attention backend, as for any model of transformers."""
        self.tower.config = self.tower.config.with_overrides({"attn_implementation": attn_implementation})
        self.config.attn_implementation = attn_implementation

    def _check_and_adjust_attn_implementation(self, attn_implementation: str, **_: Any) -> str:
        return attn_implementation  # a name of the tower's own backends, which the tower checks


class CompImageProcessor(NativeImageProcessor, BaseImageProcessor):
    """`NativeImageProcessor` behind transformers' interface; its arguments are that one's."""

    model_input_names = ("pixel_values", "image_grid_thw")

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        force_resize: int | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Patches of one image or several: pixel_values (P, 3*p*p), image_grid_thw (N, 3)."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: the image processor gives torch tensors, 'pt', only.")
        return BatchFeature(super().__call__(images, force_resize))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **overrides: Any):
        """Read a preprocessor_config.json; an unknown option is an error."""
        return_unused = overrides.pop("return_unused_kwargs", False)
        values = {name: value for name, value in image_processor_dict.items() if name != "image_processor_type"}
        processor = super().from_dict(values | overrides)
        return (processor, {}) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """What preprocessor_config.json holds."""
        return self.description()


def feature_maps(features: Tensor, image_grid_thw: Tensor | Sequence[Sequence[int]], merge_size: int) -> list[Tensor]:
    """Packed features (P, D) in block order -> a (rows, columns, D) map of each image (of a video: of each frame)."""
    frames = frames_on_host(image_grid_thw)
    maps = []
    for part, (rows, cols) in zip(features.split([rows * cols for rows, cols in frames]), frames, strict=True):
        blocks = part.unflatten(0, (rows // merge_size, cols // merge_size, merge_size, merge_size))
        maps.append(blocks.transpose(1, 2).reshape(rows, cols, -1))
    return maps


def _accept_unprefixed(model: CompVisionModel, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """`load_state_dict` takes a file's own keys too: a Trainer resumes so."""
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(f"{prefix}tower.")]:
        state_dict[f"{prefix}tower.{key[len(prefix) :]}"] = state_dict.pop(key)


AutoConfig.register(MODEL_TYPE, CompVisionConfig)
AutoModel.register(CompVisionConfig, CompVisionModel)
AutoImageProcessor.register(
    CompVisionConfig, image_processor_classes={"pil": CompImageProcessor, "torchvision": CompImageProcessor}
)
