"""LLaVA's own towers: CLIP and SigLIP at their one resolution, transformers' models inside.

T = tiles, s = a tile's side in patches, P = T·s·s, D = tower width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PretrainedConfig, SiglipVisionConfig, SiglipVisionModel
from transformers.image_processing_base import ImageProcessingMixin

from llava.model.multimodal_encoder.plain_image_processor import PlainImageProcessor, patches_to_tiles
from llava.model.patch_merge import PatchMerge

TOWER_KEYS = ("mm_vision_select_layer", "mm_vision_select_feature")
PIXEL_KEYS = ("image_mean", "image_std", "shorter_side")
PROCESSOR_KEYS = {
    "image_aspect_ratio": "image_aspect_ratio",
    "image_grid_pinpoints": "image_grid_pinpoints",
    "mm_patch_merge_type": "merge_type",
    "mm_newline_position": "newline_position",
    "mm_spatial_pool_mode": "pool_mode",
    "mm_spatial_pool_stride": "pool_stride",
}

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# A config's model_type -> its vision part's config and model.
FAMILIES: dict[str, tuple[type[PretrainedConfig], type[nn.Module]]] = {
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
}
OF_DUAL_ENCODERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}

# The towers of LLaVA's releases, so that their checkpoints load without a network.
RELEASED = {
    "openai/clip-vit-large-patch14": {"model_type": "clip_vision_model"}
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"image_size": 224, "patch_size": 14, "projection_dim": 768},
    "google/siglip-so400m-patch14-384": {"model_type": "siglip_vision_model"}
    | {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    | {"image_size": 384, "patch_size": 14},
}
RELEASED["openai/clip-vit-large-patch14-336"] = RELEASED["openai/clip-vit-large-patch14"] | {"image_size": 336}

_SLICES = {"slicefour_": "four evenly spaced layers", "slice_m25811_f6_": "layers -2, -5, -8, -11 and 6"}


class PlainVisionTower(nn.Module):
    """Tiles -> the hidden states of one layer.

    The weights lie under LLaVA's names, `vision_tower.vision_model.*`; of SigLIP's layers the last is left out.

    Args:
        select_layer: index of CLIP's hidden state; SigLIP always gives its last layer's.
        select_feature: `patch`, or `cls_patch` with the class token before each tile's patches; after `slicefour_` or
            `slice_m25811_f6_` several layers side by side.
    """

    merge_size = 1

    def __init__(self, config: PretrainedConfig, *, select_layer: int = -2, select_feature: str = "patch"):
        super().__init__()
        self.config = config
        is_siglip = config.model_type == "siglip_vision_model"
        self.kind, self.layers = _features(select_feature, config.num_hidden_layers, select_layer, is_siglip)
        model = FAMILIES[config.model_type][1](_trimmed(config) if is_siglip else config)
        if is_siglip and hasattr(model, "head"):
            del model.head
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = model
        self.patch_size = config.patch_size
        self.per_side = config.image_size // config.patch_size
        self.num_layers = config.num_hidden_layers - is_siglip
        self.hidden_size = config.hidden_size * len(self.layers)
        self.tokens_per_tile = self.per_side**2 + (self.kind == "cls_patch")

    def forward(self, pixel_values: Tensor, image_grid_thw: Any) -> Tensor:
        """(P, 3·p·p) -> (P, D); with the class token (P + T, D)."""
        states = self._states(pixel_values, self.layers)
        return self._patches(torch.cat([states[layer] for layer in self.layers], dim=-1), self.kind)

    def layer_features(self, pixel_values: Tensor, image_grid_thw: Any, layers: Sequence[int]) -> list[Tensor]:
        """(P, D) of each of `layers`, counted from 1, without class tokens."""
        states = self._states(pixel_values, layers)
        return [self._patches(states[layer], "patch") for layer in layers]

    def _states(self, pixel_values: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """What each of `layers` gives, 0 being the embeddings, (T, tokens, D)."""
        tiles = patches_to_tiles(pixel_values, self.per_side, self.patch_size)
        model = self.vision_tower.vision_model
        beyond = self.config.image_size - tiles.shape[-1]  # of 384 px, 14-px patches leave 6 that nothing reads
        state = model.embeddings(nn.functional.pad(tiles, (0, beyond, 0, beyond)) if beyond else tiles)
        if hasattr(model, "pre_layrnorm"):
            state = model.pre_layrnorm(state)
        kept = {0: state} if 0 in layers else {}
        for number, layer in enumerate(model.encoder.layers[: max(layers)], 1):
            state = layer(state, attention_mask=None)
            if number in layers:
                kept[number] = state
        return kept

    def _patches(self, states: Tensor, kind: str) -> Tensor:
        has_class = self.config.model_type == "clip_vision_model"
        return (states[:, 1:] if has_class and kind == "patch" else states).flatten(0, 1)

    def off_path(self) -> list[nn.Module]:
        """What checkpoints hold and no feature comes through: it gets no gradient."""
        model = self.vision_tower.vision_model
        return [model.post_layernorm, *model.encoder.layers[max(self.layers) :]]


def _features(select_feature: str, num_layers: int, select_layer: int, is_siglip: bool) -> tuple[str, list[int]]:
    """patch or cls_patch, and the hidden states, counted from the embeddings' 0."""
    if is_siglip:
        return "patch", [num_layers - 1]
    slices, kind = next(
        ((start, select_feature[len(start) :]) for start in _SLICES if select_feature.startswith(start)),
        ("", select_feature),
    )
    if kind not in ("patch", "cls_patch"):
        raise ValueError(
            f"mm_vision_select_feature {select_feature!r} is unknown. Known: patch, cls_patch, and both after "
            f"{' or '.join(_SLICES)}."
        )
    states = range(num_layers + 1)
    if slices == "slicefour_":
        step = len(states) // 4
        layers = list(range(step + select_layer, len(states), step))
    else:
        layers = [-2, -5, -8, -11, 6] if slices else [select_layer]
    try:
        return kind, [states[layer] for layer in layers]
    except IndexError:
        raise ValueError(
            f"mm_vision_select_layer {select_layer} ({select_feature}): the tower has {num_layers} layers."
        ) from None


def _trimmed(config: PretrainedConfig) -> PretrainedConfig:
    """SigLIP without its last layer and its pooling head, as LLaVA has it."""
    trimmed = type(config).from_dict(config.to_dict())
    trimmed.num_hidden_layers -= 1
    trimmed.vision_use_head = False
    return trimmed


class PlainTowerFactory:
    """`openai/clip-...`, `google/siglip-...`, a local folder, or any of them after `clip:` or `siglip:`.

    What a tower is, is said by the `model_type` of its config, never by its name.
    """

    config_keys = (*TOWER_KEYS, *PROCESSOR_KEYS)
    # What a run that starts a tower writes into its config where no flag says otherwise. LLaVA's training has `grid`;
    # `one_token`, PatchMerge's own, is what it reads out of configs that lack the key. Its flag's layer is -1, which no
    # recipe of it takes.
    starting_keys = {key: getattr(PatchMerge, rule) for key, rule in PROCESSOR_KEYS.items()} | {
        "mm_newline_position": "grid",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }

    def build_tower(
        self, name: str, *, config: dict[str, Any] | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> PlainVisionTower:
        """The tower with its weights; given a config, of that architecture and without weights."""
        arguments = {
            "select_layer": options.pop("mm_vision_select_layer", None),
            "select_feature": options.pop("mm_vision_select_feature", None),
        }
        options = {key: value for key, value in options.items() if key not in PROCESSOR_KEYS}
        _refuse(options, name, "of native towers (comp-*)")
        arguments = {key: value for key, value in arguments.items() if value is not None}
        tower = PlainVisionTower(_config_of(config or self.tower_config(name)), **arguments)
        if config is None:
            load_plain_weights(tower, weights_of(name))
        return tower if dtype is None else tower.to(dtype)

    def tower_config(self, name: str, **options: Any) -> dict[str, Any]:
        """The vision part of the config that the name leads to."""
        config, prefix = read_tower_config(weights_of(name)), name.partition(":")[0]
        if prefix in OF_DUAL_ENCODERS and config["model_type"] != OF_DUAL_ENCODERS[prefix]:
            raise ValueError(f"--vision_tower {name}: the checkpoint is a {config['model_type']}. Name it as such.")
        return config

    def processor_config(self, name: str) -> dict[str, Any]:
        """What a checkpoint keeps of CLIP's preprocessor_config.json (`PIXEL_KEYS`). LLaVA reads none of SigLIP's."""
        config = self.tower_config(name)
        return read_pixel_keys(weights_of(name), config["image_size"]) if "clip" in config["model_type"] else {}

    def build_image_processor(
        self, name: str, *, config: dict[str, Any] | None = None, **options: Any
    ) -> PlainImageProcessor:
        """`options` are LLaVA's config keys (`image_aspect_ratio`, ...), and what `processor_config` says."""
        config = config or self.tower_config(name)
        known = {*self.config_keys, *PIXEL_KEYS}
        _refuse({key: options[key] for key in options.keys() - known}, name, "of native towers (comp-*)")
        is_clip = config["model_type"] == "clip_vision_model"
        return PlainImageProcessor(
            patch_size=config["patch_size"],
            image_mean=options.pop("image_mean", CLIP_MEAN if is_clip else HALF),
            image_std=options.pop("image_std", CLIP_STD if is_clip else HALF),
            shorter_side=options.pop("shorter_side", config["image_size"]) if is_clip else None,
            merge=self.build_patch_merge(config, **options),
        )

    def build_patch_merge(self, config: dict[str, Any], **options: Any) -> PatchMerge:
        """How the tower's tiles become visual tokens, by LLaVA's config keys."""
        per_side = config["image_size"] // config["patch_size"]
        has_class = config["model_type"] == "clip_vision_model" and str(
            options.get("mm_vision_select_feature")
        ).endswith("cls_patch")
        rules = {ours: options.get(key) for key, ours in PROCESSOR_KEYS.items()}
        return PatchMerge(
            tile_side=config["image_size"],
            per_side=per_side,
            tokens_per_tile=per_side**2 + has_class,
            **{key: value for key, value in rules.items() if value is not None},
        )


def weights_of(name: str) -> str:
    """`clip:PATH` -> PATH; a bare name is its own."""
    prefix, _, weights = name.partition(":")
    return weights if prefix in OF_DUAL_ENCODERS and weights else name


def read_tower_config(path: str) -> dict[str, Any]:
    """The vision config of a released name, a folder, or a hub id, with the `model_type` of its vision part."""
    file = Path(path) / "config.json"
    if file.is_file():
        try:
            values = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
    elif path in RELEASED:
        values = RELEASED[path]
    elif Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise FileNotFoundError(
            f"The vision tower {path} has no config.json here, and is no hub id (ORGANISATION/NAME). Where a "
            'checkpoint names a folder of another machine, load it with overwrite_config={"mm_vision_tower": FOLDER}.'
        )
    else:
        values = PretrainedConfig.get_config_dict(path)[0]
    model_type = values.get("model_type")
    if model_type in OF_DUAL_ENCODERS:
        model_type, values = OF_DUAL_ENCODERS[model_type], values.get("vision_config", {})
    if model_type not in FAMILIES:
        raise ValueError(
            f"The vision tower {path} has model_type {model_type!r}; a plain tower is one of "
            f"{', '.join([*OF_DUAL_ENCODERS, *FAMILIES])}. Other families run as comp-*: give comp-NAME:{path}."
        )
    return _config_of(values | {"model_type": model_type}).to_dict()


def read_pixel_keys(path: str, image_size: int) -> dict[str, Any]:
    """Mean, standard deviation and shorter side by a folder's or hub id's preprocessor_config.json; none for a released
    name, whose values are the constants here, or where a folder has no such file."""
    if Path(path).is_dir():
        if not (Path(path) / "preprocessor_config.json").is_file():
            return {}
    elif path in RELEASED:
        return {}
    values = ImageProcessingMixin.get_image_processor_dict(path)[0]
    shorter, crop = (_side(values.get(key, image_size)) for key in ("size", "crop_size"))
    if crop != image_size:
        raise ValueError(
            f"{path}: its preprocessor_config.json cuts images to {crop} px, but its vision config has {image_size} "
            "px. Correct crop_size there."
        )
    found = {"image_mean": values.get("image_mean"), "image_std": values.get("image_std"), "shorter_side": shorter}
    return {key: value for key, value in found.items() if value is not None}


def _side(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]


def _config_of(values: dict[str, Any]) -> PretrainedConfig:
    return FAMILIES[values["model_type"]][0].from_dict(values)


def load_plain_weights(tower: PlainVisionTower, path: str) -> None:
    """Fill the tower from its own checkpoint; every weight of the tower has to be there."""
    whole = FAMILIES[tower.config.model_type][1].from_pretrained(path, dtype=torch.float32)
    missing, _ = tower.vision_tower.vision_model.load_state_dict(whole.state_dict(), strict=False)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weight(s) of the vision tower, the first {missing[0]}.")


def _refuse(options: dict[str, Any], name: str, whose: str) -> None:
    set_ones = [key for key, value in options.items() if value is not None]
    if set_ones:
        raise ValueError(f"--{set_ones[0]} {options[set_ones[0]]}: an option {whose}, and {name} is a plain one.")
