"""Next-token cross-entropy on supervised rows only: the (L, V) logits of a packed row never exist.

L = text row, R = its supervised rows, H = LLM width, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llava.constants import IGNORE_INDEX

ROWS_PER_CHUNK = 1024  # (1024, 151 936) fp32 logits are 0.6 GB, the largest that this loss ever holds


def decoding_loss(
    hidden_states: Tensor, lm_head: nn.Module, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """L_dec of METHOD §4 (paper, Eq. 6): the mean cross-entropy over supervised tokens.

    Args:
        hidden_states: (1, L, H), after the final norm.
        lm_head: H -> V.
        labels: (1, L), not shifted; the first label of every packed sample is `IGNORE_INDEX`.
        num_items_in_batch: supervised tokens of the *global* batch, gradient accumulation included; None = of this row.
    """
    targets = labels[0, 1:]
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    hidden_states, targets = hidden_states[0, rows], targets[rows]
    total = hidden_states.new_zeros((), dtype=torch.float32) + 0.0 * hidden_states.float().sum()
    for hidden, target in zip(hidden_states.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True):
        if len(rows) > ROWS_PER_CHUNK and torch.is_grad_enabled():
            total = total + checkpoint(_summed_cross_entropy, hidden, lm_head, target, use_reentrant=False)
        else:
            total = total + _summed_cross_entropy(hidden, lm_head, target)
    count = len(rows) if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)  # a batch of bad samples alone has none


def _summed_cross_entropy(hidden: Tensor, lm_head: nn.Module, target: Tensor) -> Tensor:
    return F.cross_entropy(lm_head(hidden).float(), target, reduction="sum")
