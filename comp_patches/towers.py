"""Tower names and how a packed vision transformer gets its weights.

A tower's full name is `name:weights`, for example `comp-siglip:google/siglip-so400m-patch14-384` or
`comp-siglip:./my/siglip`. Behaviour depends on the checkpoint's config, never on what its folder is called.
"""

import difflib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comp_patches.checkpoint import TensorFiles, read_config, read_processor_config, resolve, save_checkpoint
from comp_patches.families import families_of, family_of
from comp_patches.image_processor import NativeImageProcessor, processor_options
from comp_patches.tower_weights import read_tower_weights
from comp_patches.vision_config import VisionTransformerConfig
from comp_patches.vision_transformer import PackedVisionTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerName:
    """What a tower name stands for.

    Attributes:
        families: that its checkpoint may be of.
        default_weights: hub id of the weights that a bare name means.
        released: whether these are the authors' CoMP weights, and not an original VFM's.
    """

    families: tuple[str, ...]
    default_weights: str
    released: bool = False


# A bare name means the released CoMP weights where there are any, else the original VFM.
TOWERS: dict[str, TowerName] = {
    "comp-siglip": TowerName(("siglip",), "SliMM-X/CoMP-SigLIP-So400M", released=True),
    "comp-siglip-base": TowerName(("siglip",), "google/siglip-base-patch16-384"),
    # SigLIP 2 of fixed resolution is SigLIP, by its config.json too.
    "comp-siglip2": TowerName(("siglip2", "siglip"), "google/siglip2-so400m-patch16-naflex"),
    "comp-siglip2-base": TowerName(("siglip2", "siglip"), "google/siglip2-base-patch16-naflex"),
    "comp-dinov2": TowerName(("dinov2",), "SliMM-X/CoMP-DINOv2-Large", released=True),
    "comp-dinov2-small": TowerName(("dinov2",), "facebook/dinov2-small"),
    "comp-dinov2-base": TowerName(("dinov2",), "facebook/dinov2-base"),
    "comp-dinov2-giant": TowerName(("dinov2",), "facebook/dinov2-giant"),
    "comp-dinov2-registers": TowerName(("dinov2",), "facebook/dinov2-with-registers-large"),
    "comp-aimv2": TowerName(("aimv2",), "apple/aimv2-large-patch14-336"),
    "comp-aimv2-huge": TowerName(("aimv2",), "apple/aimv2-huge-patch14-336"),
    "comp-aimv2-1b": TowerName(("aimv2",), "apple/aimv2-1B-patch14-336"),
    "comp-aimv2-native": TowerName(("aimv2",), "apple/aimv2-large-patch14-native"),
    "comp-clip": TowerName(("clip",), "openai/clip-vit-large-patch14-336"),
    "comp-clip-base": TowerName(("clip",), "openai/clip-vit-base-patch16"),
}


def parse_tower_name(full_name: str) -> tuple[str, str]:
    """ "comp-siglip:./my/siglip" -> ("comp-siglip", "./my/siglip"); a bare name means its default weights."""
    name, _, weights = full_name.partition(":")
    if name not in TOWERS:
        nearest = difflib.get_close_matches(name, TOWERS, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"Vision tower {name!r} is unknown.{hint} Known: {', '.join(TOWERS)}, each also as NAME:WEIGHTS."
        )
    if not weights:
        weights = TOWERS[name].default_weights
        released = TOWERS[name].released
        meaning = "means the released CoMP weights" if released else "has no released CoMP weights: the original"
        logger.info("%s %s %s", name, meaning, weights)
    return name, weights


def load_vision_config(
    name_or_path: str,
    *,
    merge_size: int | None = None,
    use_rope: bool | None = None,
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> VisionTransformerConfig:
    """The config of a tower; no weights are read. None leaves what the checkpoint says."""
    checkpoint, tower = _open(name_or_path, weights=False)
    options = {"merge_size": merge_size, "use_rope": use_rope, "attn_implementation": attn_implementation}
    return checkpoint.config(tower, options | config_overrides)


def load_image_processor(name_or_path: str, **options: Any) -> NativeImageProcessor:
    """The image processor that belongs to a tower; no weights are read. `options` are the processor's own.

    A folder of this project, and the authors' released ones, remember the bounds that their tower was trained with.
    """
    checkpoint, tower = _open(name_or_path, weights=False)
    config = checkpoint.config(tower, {"merge_size": options.pop("merge_size", None)})
    block = config.patch_size * config.merge_size
    return build_image_processor(config, **processor_options(read_processor_config(checkpoint.path), block) | options)


def build_image_processor(config: VisionTransformerConfig, **options: Any) -> NativeImageProcessor:
    """The image processor for a config. `force_resize="pretrained"` means the VFM's own size."""
    if options.get("force_resize") == "pretrained":
        options["force_resize"] = config.image_size
    return NativeImageProcessor(
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        image_mean=config.image_mean,
        image_std=config.image_std,
        **options,
    )


def load_vision_transformer(
    name_or_path: str,
    *,
    merge_size: int | None = None,
    use_rope: bool | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> PackedVisionTransformer:
    """Build a tower and fill it from a checkpoint: an original VFM's, or one that `save_vision_transformer` wrote.

    Args:
        name_or_path: `name:weights`, a known name, a local folder, a .safetensors file, or a hub id.
        merge_size: side of a block; 1 is raster order and takes odd grids. None means what the checkpoint says, here
            and below (an original VFM: 2, RoPE, "auto").
        use_rope: RoPE-2D.
        dtype: of the parameters; None keeps the checkpoint's.
        attn_implementation: attention backend.
        config_overrides: other fields of `VisionTransformerConfig`.
    """
    checkpoint, tower = _open(name_or_path, weights=True)
    options = {"merge_size": merge_size, "use_rope": use_rope, "attn_implementation": attn_implementation}
    config = checkpoint.config(tower, options | config_overrides)
    families = families_of(checkpoint.description)
    state_dict = read_tower_weights(TensorFiles(checkpoint.path), config, families, checkpoint.path)
    dtype = dtype or state_dict["patch_embedding.weight"].dtype
    with torch.device("meta"):  # no random initialisation of what is about to be overwritten
        model = PackedVisionTransformer(config)
    _check_shapes(model, state_dict, checkpoint.path)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state_dict.items()}, assign=True)
    return model


def save_vision_transformer(
    model: PackedVisionTransformer, folder: str | Path, image_processor: NativeImageProcessor | None = None
) -> None:
    """Write config.json, preprocessor_config.json (of a default processor) and model.safetensors: `comp_patches.hf`'s
    format, under the names of this module."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    processor = image_processor or build_image_processor(model.config)
    save_checkpoint(Path(folder), model.config.to_dict(), tensors, processor.description())


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint on this machine.

    Attributes:
        path: where its tensors are.
        description: config.json's content for the vision model: an original VFM's, or a tower's own.
        options: fields of the tower's config that the checkpoint says elsewhere than in the description.
    """

    path: Path
    description: dict[str, Any]
    options: dict[str, Any]

    def config(self, tower: TowerName | None, overrides: dict[str, Any]) -> VisionTransformerConfig:
        """The tower's config under the caller's options. A tower name that means another VFM is an error."""
        config = family_of(self.description).config_from_hf(self.description)
        if tower is not None and config.family not in tower.families:
            raise ValueError(
                f"The tower name asks for a {tower.families[0]!r} checkpoint, but {self.path} has model_type "
                f"{self.description['model_type']!r} ({config.family}). Choose the tower name that fits the weights."
            )
        return config.with_overrides(self.options).with_overrides(overrides)


def _open(name_or_path: str, *, weights: bool) -> tuple[_Checkpoint, TowerName | None]:
    """The checkpoint, and what the tower name, if one was given, says that it must be."""
    name, separator, _ = name_or_path.partition(":")
    is_tower_name = name in TOWERS or (separator and not Path(name_or_path).exists())
    if not is_tower_name and not Path(name_or_path).exists() and "/" not in name_or_path:
        is_tower_name = True  # neither a path nor a hub id: a misspelt name, which the error below explains
    if not is_tower_name:
        return _describe(resolve(name_or_path, weights=weights)), None
    name, weights_name = parse_tower_name(name_or_path)
    return _describe(resolve(weights_name, weights=weights)), TOWERS[name]


def _describe(path: Path) -> _Checkpoint:
    raw = read_config(path)
    if "mm_vision_config" in raw:  # a LLaVA checkpoint of this project
        return _Checkpoint(path, raw["mm_vision_config"], {})
    if "mm_vision_tower" in raw:
        return _describe_llava(path, raw["mm_vision_tower"], raw.get("mm_vision_select_layer"))
    # A LLaVA checkpoint of transformers describes its vision model and says which layer's output it reads.
    return _Checkpoint(path, raw, _normalisation(path) | {"feature_layer": raw.get("vision_feature_layer")})


def _describe_llava(path: Path, original: str, feature_layer: int | None) -> _Checkpoint:
    """A LLaVA checkpoint of another code base has the tower's weights, and of its architecture the original's name."""
    try:
        home = resolve(original, weights=False)
    except ValueError as error:
        raise ValueError(
            f"{path} is a LLaVA checkpoint whose config.json describes its tower by mm_vision_tower={original!r} only. "
            f"{error}"
        ) from error
    return _Checkpoint(path, read_config(home), _normalisation(home) | {"feature_layer": feature_layer})


def _normalisation(path: Path) -> dict[str, Any]:
    """The checkpoint's own mean and std, where it ships a preprocessor_config.json; else the family's stay."""
    processor = read_processor_config(path)
    return {name: processor.get(name) for name in ("image_mean", "image_std")}


def _check_shapes(model: PackedVisionTransformer, state_dict: dict[str, Tensor], path: Path) -> None:
    for name, parameter in model.state_dict().items():
        if state_dict[name].shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(state_dict[name].shape)} in {path}, but its config says "
                f"{tuple(parameter.shape)}. Do config.json and the weights belong together?"
            )
