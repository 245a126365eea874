"""Packed (variable-length) attention: tokens see their own segment and nothing else. One function, several backends.

P = tokens of the batch, h = heads, d = channels of a head, S = segments; segment i is
[cu_seqlens[i], cu_seqlens[i + 1]).
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from comp_patches.sdpa import is_compiling, sdpa_by_length, sdpa_operator

logger = logging.getLogger(__name__)

FLASH_MODULES = {"flash_attention_2": "flash_attn", "varlen": "torch.nn.attention.varlen"}
FLEX_BLOCK = 128  # tokens of a side of flex_attention's blocks


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the segments of a packed batch lie, and which backend is to attend within them.

    Attributes:
        bounds: cu_seqlens (S + 1) int32 on the host.
        cu_seqlens: the same on the tokens' device.
        max_seqlen: length of the longest segment.
        backend: a key of BACKENDS; `choose_backend` says which can run.
        block_mask: flex_attention's, None for the others.
    """

    bounds: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    backend: str = "sdpa"
    block_mask: object | None = None

    @classmethod
    def of_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", backend: str = "sdpa"
    ) -> "Segments":
        """Segments of these lengths, end to end. The copy to a GPU does not wait for it."""
        bounds = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
        mask = _block_mask(bounds, device) if backend == "flex" else None
        return cls(bounds, bounds.to(device, non_blocking=True), max(lengths, default=0), backend, mask)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.bounds.diff().tolist())


def _block_mask(bounds: Tensor, device: torch.device | str):
    """Pairs of one segment, as flex_attention wants them: for a block of queries, the blocks of keys from the start of
    its first token's segment to the end of its last token's."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens, bounds = int(bounds[-1]), bounds.long()
    segment = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())
    first = torch.arange(0, tokens, FLEX_BLOCK)
    last = (first + FLEX_BLOCK - 1).clamp(max=tokens - 1)
    low = bounds[segment[first]] // FLEX_BLOCK
    count = (bounds[segment[last] + 1] - 1) // FLEX_BLOCK + 1 - low
    key_blocks = (low[:, None] + torch.arange(len(first))).clamp(max=len(first) - 1)
    on_device = segment.to(device, non_blocking=True)
    return BlockMask.from_kv_blocks(
        count.int()[None, None].to(device, non_blocking=True),
        key_blocks.int()[None, None].to(device, non_blocking=True),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda batch, head, q, k: on_device[q] == on_device[k],
        seq_lengths=(tokens, tokens),
    )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """softmax(q kT / sqrt(d)) v within each segment (CoMP Eq. 2).

    Args:
        query, key, value: (P, h, d).
        segments: they cover the P tokens.

    Returns:
        (P, h, d).
    """
    if not is_compiling() and segments.bounds[-1] != len(query):
        raise ValueError(f"The segments cover {int(segments.bounds[-1])} tokens, but there are {len(query)}.")
    if not segments.max_seqlen:
        return query + 0 * (key + value)  # no tokens; the graph still reaches every weight
    return BACKENDS[segments.backend](query, key, value, segments)


@lru_cache
def choose_backend(asked: str, device: torch.device, dtype: torch.dtype, head_dim: int, trains: bool = False) -> str:
    """The backend to use; the choice, and why it is not the one asked for, is logged once.

    Args:
        asked: "auto" or a key of BACKENDS.
        device, dtype, head_dim: of queries, keys and values.
        trains: whether a backward pass may follow.
    """
    if asked != "auto" and asked not in BACKENDS:
        raise ValueError(f"attn_implementation={asked!r} is unknown. Known: auto, {', '.join(BACKENDS)}.")
    candidates = ("flash_attention_2", "varlen", "sdpa") if asked == "auto" else (asked, "varlen", "sdpa")
    obstacles = {name: _obstacle(name, device, dtype, head_dim, trains) for name in candidates}
    chosen = next(name for name in candidates if not obstacles[name])
    if asked not in ("auto", chosen):
        _log_once(logging.WARNING, f"attn_implementation={asked}: {obstacles[asked]}; using {chosen}")
    else:
        _log_once(logging.INFO, f"packed attention on {device} in {dtype}: {chosen}")
    return chosen


@lru_cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, trains: bool) -> str:
    """Why a backend cannot run here, or nothing."""
    if backend == "sdpa":
        return ""
    if backend == "flex":
        if device.type not in ("cuda", "cpu"):
            return f"it runs on GPUs and CPUs, not on {device.type}"
        if device.type == "cpu" and trains:
            return "on a CPU it has no backward pass"
    if backend in FLASH_MODULES:
        if device.type != "cuda" or torch.version.hip:
            return f"it needs an NVIDIA GPU, not {device.type}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs a GPU of the Ampere generation or later"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it takes half precision, not {dtype}"
        if head_dim % 8 or head_dim > 256:
            return f"it takes head widths that are multiples of 8 up to 256, not {head_dim}"
    module = FLASH_MODULES.get(backend, "torch.nn.attention.flex_attention")
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"{module} cannot be imported ({error})"
    return ""


def _sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """scaled_dot_product_attention, one call for all segments of a length: the only loop over images in the tower."""
    if is_compiling():
        return sdpa_operator(query, key, value, segments.bounds)
    return sdpa_by_length(query, key, value, segments.lengths)


def _flash_attention_2(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    bounds, longest = segments.cu_seqlens, segments.max_seqlen
    return flash_attn_varlen_func(query, key, value, bounds, bounds, longest, longest)


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """PyTorch's own variable-length flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = segments.cu_seqlens, segments.max_seqlen
    return varlen_attn(query, key, value, bounds, bounds, longest, longest)


def _flex(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    states = [x.transpose(0, 1)[None] for x in (query, key, value)]  # (1, h, P, d)
    return _flex_attention(query.device.type)(*states, block_mask=segments.block_mask)[0].transpose(0, 1)


@lru_cache
def _flex_attention(device: str) -> Callable[..., Tensor]:
    """On a GPU flex_attention is a kernel only once it is compiled; elsewhere it runs as it is."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Segments], Tensor]] = {
    "sdpa": _sdpa,
    "flash_attention_2": _flash_attention_2,
    "varlen": _varlen,
    "flex": _flex,
}
