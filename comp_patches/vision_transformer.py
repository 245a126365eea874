"""ONE packed vision transformer, described by a config; every VFM is an instance of it (CoMP 2.1, Eq. 1-4).

P = patches of the batch, N = images, D = width, p = patch size in pixels, h = heads, d = D / h.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from comp_patches.attention import packed_attention
from comp_patches.packing import frames_on_host, patch_coordinates, segment_bounds
from comp_patches.position_embedding import LearnedPositionEmbedding
from comp_patches.rope import apply_rope, rope_2d
from comp_patches.vision_config import VisionTransformerConfig

__all__ = ["PackedVisionTransformer", "VisionTransformerConfig"]

ACTIVATIONS = {"gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "gelu": F.gelu}

# A CPU takes the widest activations of a packed batch in pieces that stay in its cache: 5-15 % of a forward pass.
CPU_MLP_ROWS = 1024


class PackedVisionTransformer(nn.Module):
    """Images of any sizes, packed end to end, to one feature per patch. All layers, no final norm, no pooling head."""

    def __init__(self, config: VisionTransformerConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        if config.position_embedding_kind == "learned":
            self.position_embedding = LearnedPositionEmbedding(
                *config.position_grid, config.hidden_size, config.position_interpolation
            )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def patch_size(self) -> int:
        return self.config.patch_size

    @property
    def merge_size(self) -> int:
        return self.config.merge_size

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again."""
        self.gradient_checkpointing = enable

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Features of every patch.

        Args:
            pixel_values: (P, 3*p*p), a patch flattened as (C, p, p); patches in block order, images back to back.
            image_grid_thw: (N, 3) frames, rows and columns of patches; on the host it costs no device sync.

        Returns:
            (P, D), in the order of the input.
        """
        frames = frames_on_host(image_grid_thw)
        cu_seqlens = segment_bounds(frames)
        if cu_seqlens[-1] != pixel_values.shape[0]:
            raise ValueError(
                f"image_grid_thw describes {cu_seqlens[-1]} patches in {len(frames)} frame(s), but pixel_values holds "
                f"{pixel_values.shape[0]}. Both must come from the same image processor."
            )
        states, position_embeddings = self.embed(pixel_values, frames)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                states = checkpoint(layer, states, cu_seqlens, position_embeddings, use_reentrant=False)
            else:
                states = layer(states, cu_seqlens, position_embeddings)
        return states

    def embed(
        self, pixel_values: Tensor, frames: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """z_0 (P, D) and the rotary tables (cos, sin) that all layers share."""
        config = self.config
        states = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        coordinates = patch_coordinates(frames, config.merge_size, states.device)
        if config.position_embedding_kind == "learned":
            # "raster" repeats a bug that the released weights were trained with: rows of the embedding in raster order
            # beside patches in block order.
            order = config.merge_size if config.position_embedding_order == "block" else 1
            at = coordinates if order == config.merge_size else patch_coordinates(frames, order, states.device)
            states = states + self.position_embedding(at).to(states.dtype)
        if not config.use_rope:
            return states, None
        tables = rope_2d(
            coordinates.y,
            coordinates.x,
            config.head_dim,
            theta=config.rope_theta,
            dtype=getattr(torch, config.rope_dtype),
        )
        return states, tables


class Block(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: VisionTransformerConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(
        self, states: Tensor, cu_seqlens: Sequence[int], position_embeddings: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        states = states + self.attention(self.norm1(states), cu_seqlens, position_embeddings)
        return states + self.mlp(self.norm2(states))


class Attention(nn.Module):
    """Multi-head attention within a frame, queries and keys rotated by RoPE-2D."""

    def __init__(self, config: VisionTransformerConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.backend = config.attn_implementation
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, states: Tensor, cu_seqlens: Sequence[int], position_embeddings: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        query, key, value = self.qkv(states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # (P, h, d) each
        if position_embeddings is not None:
            query, key = apply_rope(query, *position_embeddings), apply_rope(key, *position_embeddings)
        attended = packed_attention(query, key, value, cu_seqlens, backend=self.backend)
        return self.proj(attended.flatten(1))


class Mlp(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: VisionTransformerConfig):
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={config.hidden_act!r} is unknown. Known: {', '.join(ACTIVATIONS)}.")
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        if states.device.type != "cpu" or len(states) <= CPU_MLP_ROWS:
            return self.fc2(self.activation(self.fc1(states)))
        parts = states.split(CPU_MLP_ROWS)
        return torch.cat([self.fc2(self.activation(self.fc1(part))) for part in parts])
