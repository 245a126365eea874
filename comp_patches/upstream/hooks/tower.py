"""Towers and adapter under the names by which upstream asks for them."""

from __future__ import annotations

from typing import Any

from torch import nn

from comp_patches.adapter import DownsampleMLP
from comp_patches.checkpoint import read_config, resolve
from comp_patches.llava_plugin import CompTowerFactory, CompVisionTower
from comp_patches.towers import TOWERS
from comp_patches.upstream.hooks.arguments import processor_options, tower_options
from comp_patches.upstream.hooks.processor import UpstreamImageProcessor
from comp_patches.vision_transformer import PackedVisionTransformer

PROJECTOR = "downsample_mlp"
FACTORY = CompTowerFactory()


class UpstreamTower(CompVisionTower):
    """A tower with all that upstream reads of one. State-dict keys are those of this project.

    Args:
        name: `name:weights`.
        options: its image processor's, kept in the checkpoint's config.
        is_loaded: whether its weights are there, or come with the checkpoint that is being read. If not, upstream calls
            `load_model` for those of `name`.
    """

    def __init__(self, name: str, vision_tower: PackedVisionTransformer, options: dict[str, Any], *, is_loaded: bool):
        super().__init__(vision_tower)
        self.vision_tower_name = name
        self.is_loaded = is_loaded
        self.alignment = None  # `training.prepare_training` sets it
        self.set_processor(options)

    def set_processor(self, options: dict[str, Any], *, tiles: bool = False) -> None:
        """Use an image processor of these options from now on."""
        self.processor_options = options
        native = FACTORY.build_image_processor(self.vision_tower_name, config=self.config.to_dict(), **options)
        self.image_processor = UpstreamImageProcessor(native, self.image_size, tiles=tiles)

    def change(self, options: dict[str, Any]) -> None:
        """Set switches of the method in a tower that a checkpoint brought; its weights stay."""
        config = self.config.with_overrides(options)
        if config != self.config:
            weight = next(self.vision_tower.parameters())
            changed = PackedVisionTransformer(config).to(weight.device, weight.dtype)
            changed.load_state_dict(self.vision_tower.state_dict())
            self.vision_tower = changed

    def load_model(self, *_: Any, **__: Any) -> None:
        """Fill in the starting weights where no checkpoint has brought any."""
        if not self.is_loaded:
            switches = {key: value for key, value in self.config.to_dict().items() if key != "model_type"}
            self.is_loaded = True
            self.vision_tower.load_state_dict(
                FACTORY.build_tower(self.vision_tower_name, **switches).vision_tower.state_dict()
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """What trained beside a LoRA is read over the starting weights, whose turn would else come after it."""
        if any(key.startswith(prefix) for key in state_dict):
            self.load_model()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def num_patches_per_side(self) -> int:
        return self.image_processor.tokens_per_side

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    @property
    def device(self):
        return next(self.parameters()).device


def names_comp_tower(config: Any) -> bool:
    """Whether a config, or training arguments, name a tower of the method."""
    return _tower_name(config).partition(":")[0] in TOWERS


def has_comp_tower(model: Any) -> bool:
    """Whether a model has a tower of the method: upstream trains bare LLMs too."""
    return isinstance(getattr(model, "get_vision_tower", lambda: None)(), UpstreamTower)


def merges_patches(config: Any) -> bool:
    """Whether the projector is the method's, of which a visual token is a block of patches."""
    return getattr(config, "mm_projector_type", None) == PROJECTOR


def build_tower(config: Any) -> UpstreamTower:
    """The tower with its starting weights where `config` are training arguments; else the architecture that a
    checkpoint's config describes."""
    name, described = _tower_name(config), getattr(config, "mm_vision_config", None)
    if described is None:
        # Upstream's own projectors see patches one by one, and its tiles are laid out row by row.
        switches = tower_options(config) | {"merge_size": 2 if merges_patches(config) else 1}
        built = FACTORY.build_tower(name, **switches).vision_tower
        built.requires_grad_(False)  # as upstream's towers: whoever trains it says so
        return UpstreamTower(name, built, processor_options(config), is_loaded=True)
    built = FACTORY.build_tower(name, config=described).vision_tower
    options = getattr(config, "mm_image_processor", None) or {}
    tower = UpstreamTower(name, built, options, is_loaded=_comes_with_checkpoint(config))
    if getattr(config, "image_aspect_ratio", None) is None:  # a checkpoint of this project
        config.image_aspect_ratio = "square"
    tower.set_processor(options, tiles=config.image_aspect_ratio != "square")
    return tower


def build_projector(config: Any) -> DownsampleMLP:
    """`downsample_mlp` for a model's config."""
    described = getattr(config, "mm_vision_config", None)
    if described is None:
        raise ValueError(
            f"--mm_projector_type {PROJECTOR} merges 2x2 patches of a comp-* tower, but the tower is "
            f"{_tower_name(config)!r}. Give --vision_tower comp-..., or another projector."
        )
    return DownsampleMLP(config.mm_hidden_size, config.hidden_size, described["merge_size"])


def describe_tower(config: Any, tower: nn.Module, arguments: Any) -> None:
    """Write into the model's config how to build its tower again, after what the training's flags change in it."""
    if not isinstance(tower, UpstreamTower):
        return
    if tower.config.merge_size != (2 if merges_patches(arguments) else 1):
        raise ValueError(
            f"--mm_projector_type {arguments.mm_projector_type}: the checkpoint's tower was trained for "
            f"{getattr(config, 'mm_projector_type', 'another one')}. Give that one, or start from the LLM."
        )
    tower.change(tower_options(arguments))
    tower.set_processor(tower.processor_options | processor_options(arguments))
    config.mm_vision_tower = tower.vision_tower_name
    config.mm_vision_config = tower.config.to_dict()
    config.mm_image_processor = tower.processor_options
    config.mm_base_model = arguments.model_name_or_path


def fit_config(config: Any) -> None:
    """A checkpoint of newer transformers says RoPE's base where older ones do not look for it."""
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        config.rope_theta = parameters["rope_theta"]


def _tower_name(config: Any) -> str:
    name = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None) or ""
    weights = getattr(config, "vision_tower_pretrained", None)
    return f"{name}:{weights}" if weights and ":" not in name and name in TOWERS else name


def _comes_with_checkpoint(config: Any) -> bool:
    """Whether the checkpoint that is being read is LLaVA's, and not the bare LLM below an adapter or a LoRA."""
    folder = getattr(config, "name_or_path", "")
    return not folder or "mm_vision_tower" in read_config(resolve(folder, weights=False))
