"""Packed (variable-length) attention: tokens see their own segment and nothing else.

P = tokens of the batch, h = heads, d = channels of a head. Segment i is [cu_seqlens[i], cu_seqlens[i + 1]).
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

BACKENDS = ("auto", "sdpa")


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Sequence[int], *, backend: str = "auto"
) -> Tensor:
    """softmax(q kT / sqrt(d)) v within each segment (CoMP Eq. 2).

    Args:
        query, key, value: (P, h, d).
        cu_seqlens: (segments + 1) ints on the host, from 0 to P.
        backend: "sdpa", or "auto", which takes the best there is.

    Returns:
        (P, h, d).
    """
    if backend not in BACKENDS:
        raise ValueError(f"attn_implementation={backend!r} is unknown. Known: {', '.join(BACKENDS)}.")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != query.shape[0]:
        raise ValueError(
            f"cu_seqlens runs from {cu_seqlens[0]} to {cu_seqlens[-1]}, but there are {query.shape[0]} tokens."
        )
    return _sdpa_by_length(query, key, value, tuple(cu_seqlens))


def _sdpa_by_length(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: tuple[int, ...]) -> Tensor:
    """One SDPA call for all segments of a length: the only loop over images in the tower."""
    lengths, by_length = _segments_by_length(cu_seqlens)
    packed = [states.split(lengths) for states in (query, key, value)]
    outputs = list(packed[0])
    for segments in by_length:
        batches = [_batch([states[i] for i in segments]).transpose(1, 2) for states in packed]  # (n, h, length, d)
        attended = F.scaled_dot_product_attention(*batches).transpose(1, 2)
        for i, output in zip(segments, attended.unbind(), strict=True):
            outputs[i] = output
    return torch.cat(outputs) if outputs else torch.zeros_like(query)


def _batch(segments: list[Tensor]) -> Tensor:
    return segments[0][None] if len(segments) == 1 else torch.stack(segments)  # a lone segment needs no copy


@lru_cache(maxsize=16)  # the layers of a tower ask with the same segments
def _segments_by_length(cu_seqlens: tuple[int, ...]) -> tuple[list[int], list[list[int]]]:
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    by_length: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_length.setdefault(length, []).append(i)
    return lengths, list(by_length.values())
