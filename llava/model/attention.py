"""Causal attention of an LLM over a packed row: every sample of the row is an island.

transformers calls the function by its registered name `packed_sdpa`. With flash-attn the same `cu_seq_lens_*` go to its
variable-length kernel; here each segment runs through `scaled_dot_product_attention`, so no (L, L) mask is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available

PACKED_SDPA = "packed_sdpa"


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface; with `segment_lengths` the row (1, heads, L, d) is cut into segments.

    Where an LLM has a `sliding_window`, a token sees that many of its segment, itself the last of them.

    `split` and `cat` have one backward node each; slicing every segment out would write the whole row's gradient once
    per segment.
    """
    if segment_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    segments = zip(*(x.split(segment_lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
            **_causal(q.shape[2], sliding_window, q.device),
        )
        for q, k, v in segments
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _causal(length: int, sliding_window: int | None, device: torch.device) -> dict[str, Any]:
    """What tells SDPA who sees whom in a segment; a mask is only needed beyond the window."""
    if sliding_window is None or length <= sliding_window:
        return {"is_causal": True}
    at = torch.arange(length, device=device)
    distance = at[:, None] - at
    return {"attn_mask": (distance >= 0) & (distance < sliding_window)}


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


def resolve_attention(name: str) -> str:
    """The LLM's attention for `--attn_implementation NAME`: `auto` is flash-attn where it can run, else SDPA."""
    flash = torch.cuda.is_available() and is_flash_attn_2_available()
    if name == "auto":
        return "flash_attention_2" if flash else PACKED_SDPA
    if name in ("sdpa", PACKED_SDPA):
        return PACKED_SDPA
    if name == "flash_attention_2":
        if not flash:
            raise ValueError(
                "--attn_implementation flash_attention_2 needs an NVIDIA GPU and the package flash-attn "
                "(pip install 'llava-comp[flash]'). Give auto or sdpa instead."
            )
        return name
    raise ValueError(f"--attn_implementation {name!r} is unknown. Known: auto, sdpa, flash_attention_2.")


def packed_attention_kwargs(attention: str, cu_seqlens: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What one packed forward hands to the backbone: segment lengths for SDPA, cumulative lengths for flash-attn.

    Args:
        attention: The name that the model runs with.
        cu_seqlens: Where the samples of the row begin and end, S + 1 numbers on the host.
        device: The row's.

    transformers passes a 4-D mask on untouched, so an empty one keeps it from building an (L, L) mask that
    `packed_sdpa` would not read.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    if attention == PACKED_SDPA:
        return {"attention_mask": torch.empty(0, 0, 0, 0, device=device), "segment_lengths": lengths}
    if attention == "flash_attention_2":
        borders = torch.tensor(cu_seqlens, dtype=torch.int32).to(device, non_blocking=True)
        return {
            "attention_mask": None,
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
    raise ValueError(
        f"Packed rows need the attention {PACKED_SDPA} or flash_attention_2, but the model runs with {attention!r}. "
        "Load it through load_pretrained_model or set --attn_implementation auto."
    )
