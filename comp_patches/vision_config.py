"""The description of a packed vision transformer: architecture, the method's switches, and what its images need."""

import difflib
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from comp_patches.attention import BACKENDS
from comp_patches.layers import ACTIVATIONS, MLPS, NORMS
from comp_patches.position_embedding import INTERPOLATIONS

MODEL_TYPE = "comp_vision"  # namespaced, so that it never collides with a VFM's own

_CHOICES = {
    "norm": tuple(NORMS),
    "mlp": tuple(MLPS),
    "hidden_act": tuple(ACTIVATIONS),
    "embedding_norm": (None, "before_position", "after_position"),
    "position_embedding_kind": ("learned", "sincos", "none"),
    "position_embedding_order": ("block", "raster"),
    "position_interpolation": INTERPOLATIONS,
    "rope_dtype": ("float32", "bfloat16"),
    "attn_implementation": ("auto", *BACKENDS),
}


@dataclass(frozen=True)
class VisionTransformerConfig:
    """One VFM as an instance of the packed transformer. Defaults are the method's, and SigLIP's architecture."""

    # Architecture: what the weights fix.
    family: str  # the original's model_type prefix: "siglip"
    hidden_size: int
    intermediate_size: int  # of a gated MLP: the width of one of its halves
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int  # pre-training size in pixels
    position_grid: tuple[int, int]  # rows and columns of the learned table
    norm: str = "layernorm"
    layer_norm_eps: float = 1e-6
    mlp: str = "plain"
    hidden_act: str = "gelu_pytorch_tanh"
    patch_bias: bool = True
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    layer_scale: bool = False
    class_token: bool = False
    num_register_tokens: int = 0
    embedding_norm: str | None = None  # AIMv2 normalises before the position embedding is added, CLIP after
    final_norm: bool = False
    # The method's switches.
    merge_size: int = 2  # side of a block; 1 = raster order, any grid
    use_rope: bool = True
    rope_theta: float = 10000.0
    rope_dtype: str = "float32"
    position_embedding_kind: str = "learned"
    position_interpolation: str = "bilinear"
    position_embedding_order: str = "block"
    feature_layer: int | None = None  # index into (embeddings, layer 1, ...), no final norm; None = the VFM's output
    attn_implementation: str = "auto"
    # What the VFM's images need.
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    model_type: str = MODEL_TYPE

    def __post_init__(self) -> None:
        for name in ("position_grid", "image_mean", "image_std"):  # lists when they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Known: {', '.join(map(str, choices))}.")
        for field in fields(self):
            value, optional = getattr(self, field.name), field.type == int | None
            if (field.type is int or (optional and value is not None)) and type(value) is not int:
                raise ValueError(f"{field.name}={value!r} should be a whole number{' or None' * optional}.")
        for name in ("merge_size", "rope_theta", "patch_size", "num_attention_heads", "num_hidden_layers"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} should be above 0.")
        for name, length in (("position_grid", 2), ("image_mean", 3), ("image_std", 3)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name}={getattr(self, name)} should be {length} numbers.")
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens={self.num_register_tokens} should be 0 or more.")
        if not isinstance(self.use_rope, bool):
            raise ValueError(f"use_rope={self.use_rope!r} should be True or False.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.position_embedding_kind == "sincos" and self.hidden_size % 4:
            raise ValueError(f"A sin-cos embedding needs a width that is a multiple of 4, not {self.hidden_size}.")
        if self.use_rope and self.head_dim % 4:
            raise ValueError(
                f"RoPE-2D needs a head width that is a multiple of 4, but hidden_size={self.hidden_size} over "
                f"{self.num_attention_heads} heads is {self.head_dim}. Set use_rope=False for this tower."
            )
        if self.feature_layer is not None and not -self.num_hidden_layers <= self.feature_layer + 1 <= (
            self.num_hidden_layers + 1
        ):
            raise ValueError(
                f"feature_layer={self.feature_layer} does not exist: {self.num_hidden_layers} layers are numbered "
                f"0 (the embeddings) to {self.num_hidden_layers}, or from -1 (the last) down."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of each frame's patches: the class token and the registers."""
        return self.class_token + self.num_register_tokens

    @property
    def num_used_layers(self) -> int:
        """Layers that the features need; the others are neither built nor loaded."""
        if self.feature_layer is None:
            return self.num_hidden_layers
        return self.feature_layer % (self.num_hidden_layers + 1)

    @property
    def has_final_norm(self) -> bool:
        return self.final_norm and self.feature_layer is None

    @property
    def has_class_position(self) -> bool:
        return self.class_token and self.position_embedding_kind == "learned"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VisionTransformerConfig":
        """Read `to_dict`'s result; an unknown key is an error."""
        if values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ValueError(f"Expected a config of model_type {MODEL_TYPE!r}, found {values['model_type']!r}.")
        refuse_unknown(values)
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in values]
        if missing:
            raise ValueError(f"The config of a vision tower lacks {', '.join(missing)}.")
        return cls(**values)

    def with_overrides(self, overrides: dict[str, Any]) -> "VisionTransformerConfig":
        """This config with some fields replaced. None leaves a field as it is; an unknown name is an error."""
        refuse_unknown(overrides)
        return replace(self, **{name: value for name, value in overrides.items() if value is not None})


def refuse_unknown(names: Iterable[str]) -> None:
    """An error that names the nearest field, if one of the names is none."""
    known = [field.name for field in fields(VisionTransformerConfig)]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{name!r} is no field of a vision tower's config.{hint} Known: {', '.join(known)}.")
