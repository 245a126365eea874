"""ONE packed vision transformer, described by a config; every VFM is an instance of it (CoMP 2.1, Eq. 1-4).

P = patches of the batch, N = images, F = frames, D = width, p = patch size in pixels, k = prefix tokens of a frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comp_patches.attention import Segments, choose_backend
from comp_patches.layers import Block, build_norm
from comp_patches.packing import PatchCoordinates, frames_on_host, patch_coordinates
from comp_patches.position_embedding import LearnedPositionEmbedding, sincos_position_embedding
from comp_patches.rope import RotaryTables, rope_2d
from comp_patches.vision_config import VisionTransformerConfig

__all__ = ["PackedVisionTransformer", "VisionTransformerConfig"]

# A CPU takes a packed batch through all layers in pieces of whole frames, about so many tokens each: the activations of
# a larger piece leave its caches, and every layer would fetch them again.
CPU_TOKENS = 2048


@dataclass(frozen=True)
class Piece:
    """Some frames of a batch, ready for the layers.

    Attributes:
        states: (T, D), patches and prefix tokens.
        segments: who sees whom.
        rotary: cos and sin (T, d/2), or None without RoPE.
        patch_rows: (P,) which tokens are the patches, or None where all are.
    """

    states: Tensor
    segments: Segments
    rotary: RotaryTables | None
    patch_rows: Tensor | None

    def patches_of(self, states: Tensor) -> Tensor:
        """(T, D) -> (P, D): without the prefix tokens."""
        return states if self.patch_rows is None else states[self.patch_rows]


class PackedVisionTransformer(nn.Module):
    """Images of any sizes, packed end to end, to one feature per patch. No pooling head."""

    def __init__(self, config: VisionTransformerConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, width, bias=config.patch_bias)
        if config.embedding_norm:
            self.embedding_norm = build_norm(config)
        if config.position_embedding_kind == "learned":
            self.position_embedding = LearnedPositionEmbedding(
                *config.position_grid, width, config.position_interpolation
            )
        if config.class_token:
            self.class_token = nn.Parameter(torch.randn(width) * width**-0.5)
        if config.has_class_position:
            self.class_position = nn.Parameter(torch.randn(width) * width**-0.5)
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.randn(config.num_register_tokens, width) * width**-0.5)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_used_layers))
        if config.has_final_norm:
            self.final_norm = build_norm(config)
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

    @torch.compiler.disable(recursive=False)  # what it calls compiles, but for `_prepare`
    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Features of every patch.

        Args:
            pixel_values: (P, 3*p*p), a patch flattened as (C, p, p); patches in block order, images back to back.
            image_grid_thw: (N, 3) frames, rows and columns of patches; on the host it costs no device sync.

        Returns:
            (P, D), in the order of the input.
        """
        pieces = self._split(pixel_values, image_grid_thw)
        return torch.cat([self._features(self._prepare(pixels, frames)) for pixels, frames in pieces])

    def _features(self, piece: Piece) -> Tensor:
        """Of a piece's patches (P, D)."""
        states = piece.patches_of(self.run_layers(piece.states, piece.segments, piece.rotary))
        return self.final_norm(states) if self.config.has_final_norm else states

    def layer_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | Sequence[Sequence[int]], layers: Sequence[int]
    ) -> list[Tensor]:
        """What several layers give for every patch, for heads that want a pyramid of them.

        Args:
            pixel_values, image_grid_thw: as for `forward`.
            layers: ascending, 1 is the first; the last layer's features are `forward`'s, final norm included.

        Returns:
            (P, D) of each layer asked for.
        """
        known = range(1, len(self.layers) + 1)
        if list(layers) != sorted(set(layers)) or not set(layers) <= set(known):
            raise ValueError(
                f"layers={list(layers)} should ascend within 1 to {len(self.layers)}, this tower's layers."
            )
        pieces = [self._prepare(pixels, frames) for pixels, frames in self._split(pixel_values, image_grid_thw)]
        found = [self._layer_features(piece, set(layers)) for piece in pieces]
        return [torch.cat(of_one_layer) for of_one_layer in zip(*found, strict=True)]

    def _layer_features(self, piece: Piece, wanted: set[int]) -> list[Tensor]:
        """Of a piece's patches, (P, D) each."""
        states, found = piece.states, []
        for number, layer in enumerate(self.layers, start=1):
            states = layer(states, piece.segments, piece.rotary)
            if number in wanted:
                found.append(piece.patches_of(states))
        if len(self.layers) in wanted and self.config.has_final_norm:
            found[-1] = self.final_norm(found[-1])
        return found

    @torch.compiler.disable
    def _split(
        self, pixel_values: Tensor, image_grid_thw: Tensor | Sequence[Sequence[int]]
    ) -> list[tuple[Tensor, list[tuple[int, int]]]]:
        """Patches and frames of the whole batch, or, on a CPU, of pieces of it."""
        frames = frames_on_host(image_grid_thw)
        patches = sum(rows * cols for rows, cols in frames)
        if patches != pixel_values.shape[0]:
            raise ValueError(
                f"image_grid_thw describes {patches} patches in {len(frames)} frame(s), but pixel_values holds "
                f"{pixel_values.shape[0]}. Both must come from the same image processor."
            )
        # Under ZeRO-3 every pass through a layer gathers its weights from all processes: each must make as many.
        is_sharded = hasattr(self.patch_embedding.weight, "ds_id")
        if self.patch_embedding.weight.device.type != "cpu" or is_sharded:
            return [(pixel_values, frames)]
        groups = pieces_of(frames, self.config.num_prefix_tokens)
        sizes = [sum(rows * cols for rows, cols in group) for group in groups]
        return list(zip(pixel_values.split(sizes), groups, strict=True))

    @torch.compiler.disable
    def _prepare(self, pixel_values: Tensor, frames: Sequence[tuple[int, int]]) -> Piece:
        """All that depends on the grids' values."""
        config = self.config
        states, coordinates = self.embed(pixel_values, frames)
        rotary = self.rotary_tables(coordinates)
        patch_rows = None
        if config.num_prefix_tokens:
            states, rotary, patch_rows = self._insert_prefix(states, rotary, coordinates.frame, len(frames))
        if config.embedding_norm == "after_position":
            states = self.embedding_norm(states)
        lengths = [rows * cols + config.num_prefix_tokens for rows, cols in frames]
        segments = Segments.of_lengths(lengths, states.device, self._attention_backend(states))
        return Piece(states, segments, rotary, patch_rows)

    def _attention_backend(self, states: Tensor) -> str:
        device = states.device
        dtype = autocast_dtype(device.type) or states.dtype  # queries, keys and values leave a linear layer
        asked, trains = self.config.attn_implementation, torch.is_grad_enabled()
        return choose_backend(asked, device, dtype, self.config.head_dim, trains)

    def embed(self, pixel_values: Tensor, frames: Sequence[tuple[int, int]]) -> tuple[Tensor, PatchCoordinates]:
        """Patches with their position embedding (P, D), and where each stands (Eq. 1)."""
        config = self.config
        states = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        if config.embedding_norm == "before_position":
            states = self.embedding_norm(states)
        coordinates = patch_coordinates(frames, config.merge_size, states.device)
        if config.position_embedding_kind != "none":
            # "raster" repeats a bug that the released weights were trained with: rows of the embedding in raster order
            # beside patches in block order.
            raster = config.position_embedding_order == "raster" and config.merge_size > 1
            at = patch_coordinates(frames, 1, states.device) if raster else coordinates
            states = states + self._positions(at).to(states.dtype)
        return states, coordinates

    def _positions(self, at: PatchCoordinates) -> Tensor:
        """The absolute position embedding (P, D) in float32."""
        if self.config.position_embedding_kind == "sincos":
            return sincos_position_embedding(at.y, at.x, self.config.hidden_size)
        return self.position_embedding(at)

    def rotary_tables(self, coordinates: PatchCoordinates) -> RotaryTables | None:
        """cos and sin (P, d/2) that all layers share, or None without RoPE."""
        config = self.config
        if not config.use_rope:
            return None
        dtype = getattr(torch, config.rope_dtype)
        return rope_2d(coordinates.y, coordinates.x, config.head_dim, theta=config.rope_theta, dtype=dtype)

    def prefix_tokens(self) -> Tensor:
        """Class token and registers (k, D). Registers have no position."""
        rows = []
        if self.config.class_token:
            rows.append(self.class_token + self.class_position if self.config.has_class_position else self.class_token)
        if self.config.num_register_tokens:
            rows.extend(self.register_tokens)
        return torch.stack(rows)

    def _insert_prefix(
        self, states: Tensor, rotary: RotaryTables | None, frame: Tensor, frames: int
    ) -> tuple[Tensor, RotaryTables | None, Tensor]:
        """Prefix tokens, which do not turn, in front of each frame's patches.

        Returns:
            (P + F*k, D) tokens, their rotary tables, and the rows (P,) at which the patches stand.
        """
        prefix = self.prefix_tokens()
        patches, count = len(states), len(prefix)
        patch_rows = torch.arange(patches, device=states.device) + count * (frame + 1)
        is_prefix = torch.ones(patches + frames * count, dtype=torch.bool, device=states.device)
        is_prefix.index_fill_(0, patch_rows, False)
        # Row r reads patch r minus the prefix tokens up to it, or the next prefix token of the list below.
        source = torch.arange(len(is_prefix), device=states.device) - is_prefix.cumsum(0)
        source = torch.where(is_prefix, patches + is_prefix.cumsum(0) - 1, source)
        states = torch.cat((states, prefix.to(states.dtype).repeat(frames, 1)))[source]
        if rotary is not None:
            cos, sin = rotary
            still = cos.new_ones(frames * count, cos.shape[1])
            rotary = torch.cat((cos, still))[source], torch.cat((sin, torch.zeros_like(still)))[source]
        return states, rotary, patch_rows

    def run_layers(self, states: Tensor, segments: Segments, rotary: RotaryTables | None) -> Tensor:
        """All layers over tokens (T, D). Reads nothing of the grids but tensors: compiled once, it serves any batch."""
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                states = checkpoint(layer, states, segments, rotary, use_reentrant=False)
            else:
                states = layer(states, segments, rotary)
        return states


def pieces_of(frames: Sequence[tuple[int, int]], num_prefix_tokens: int = 0) -> list[list[tuple[int, int]]]:
    """Runs of frames, rows and columns, that sum to at most CPU_TOKENS; a larger frame stands alone."""
    pieces: list[list[tuple[int, int]]] = [[]]
    total = 0
    for rows, cols in frames:
        length = rows * cols + num_prefix_tokens
        if pieces[-1] and total + length > CPU_TOKENS:
            pieces.append([])
            total = 0
        pieces[-1].append((rows, cols))
        total += length
    return pieces


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes linear layers in on such a device, or None where it is off."""
    if not hasattr(torch, "get_autocast_dtype"):  # before PyTorch 2.4, two kinds of device have a function each
        if device_type == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if device_type == "cuda" and torch.is_autocast_enabled() else None
    autocasts = torch.amp.is_autocast_available(device_type)  # the meta device cannot even be asked
    return torch.get_autocast_dtype(device_type) if autocasts and torch.is_autocast_enabled(device_type) else None
