"""The layers of a packed vision transformer: what VFMs differ in, as small modules that a config chooses.

P = tokens of the batch, D = width, h = heads, d = D / h.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comp_patches.attention import Segments, packed_attention
from comp_patches.rope import RotaryTables, apply_rope


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then scaled: the order of AIMv2's original."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalised.to(states.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": RMSNorm}


def build_norm(config) -> nn.Module:
    """A norm of the config's kind over the width D."""
    return NORMS[config.norm](config.hidden_size, eps=config.layer_norm_eps)


class Block(nn.Module):
    """x += scale1 * attention(norm1(x)); x += scale2 * mlp(norm2(x)). Most VFMs have no scales."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = build_norm(config)
        self.attention = Attention(config)
        self.norm2 = build_norm(config)
        self.mlp = MLPS[config.mlp](config)
        if config.layer_scale:
            self.scale1 = nn.Parameter(torch.ones(config.hidden_size))
            self.scale2 = nn.Parameter(torch.ones(config.hidden_size))
        self.layer_scale = config.layer_scale

    def forward(self, states: Tensor, segments: Segments, rotary: RotaryTables | None) -> Tensor:
        attended = self.attention(self.norm1(states), segments, rotary)
        states = states + (attended * self.scale1 if self.layer_scale else attended)
        transformed = self.mlp(self.norm2(states))
        return states + (transformed * self.scale2 if self.layer_scale else transformed)


class Attention(nn.Module):
    """Multi-head attention within a segment, queries and keys rotated by RoPE-2D."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)

    def forward(self, states: Tensor, segments: Segments, rotary: RotaryTables | None) -> Tensor:
        heads = self.qkv(states).unflatten(-1, (3 * self.num_heads, -1))  # (P, 3h, d)
        query_key, value = heads.split((2 * self.num_heads, self.num_heads), dim=1)
        if rotary is not None:
            query_key = apply_rope(query_key, *rotary)
        query, key = query_key.chunk(2, dim=1)
        attended = packed_attention(query, key, value, segments)
        return self.proj(attended.flatten(1))


class Mlp(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(states)))


class GatedMlp(nn.Module):
    """fc2(act(gate) * up), where fc1 gives gate and up side by side (SwiGLU with act = silu)."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.fc1(states).chunk(2, dim=-1)
        return self.fc2(self.activation(gate) * up)


MLPS: dict[str, Callable[..., nn.Module]] = {"plain": Mlp, "gated": GatedMlp}
