"""Next-token cross-entropy on supervised rows only: the (L, V) logits of a packed row never exist.

L = text row, R = its supervised rows, H = LLM width, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llava.constants import IGNORE_INDEX

ROWS_PER_CHUNK = 1024  # (1024, 151 936) fp32 logits are 0.6 GB, the largest that this loss ever holds


def decoding_loss(
    hidden_states: Tensor, word_head: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """L_dec (paper, Eq. 6): the mean cross-entropy over supervised tokens.

    The head comes as its weight, read once by the caller: the number of chunks differs between ranks, and under ZeRO-3
    every call of the head's module would be a collective one.

    Args:
        hidden_states: (1, L, H), after the final norm.
        word_head: (V, H), the weight of the LLM's head.
        labels: (1, L), not shifted; the first label of every packed sample is `IGNORE_INDEX`.
        num_items_in_batch: supervised tokens of the *global* batch, gradient accumulation included; None = of this row.
    """
    targets = labels[0, 1:]
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    hidden_states, targets = hidden_states[0, rows], targets[rows]
    total = 0.0 * hidden_states[:1].float().sum()  # part of the graph even where nothing is supervised
    for hidden, target in zip(hidden_states.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True):
        if len(rows) > ROWS_PER_CHUNK and torch.is_grad_enabled():
            total = total + checkpoint(_summed_cross_entropy, hidden, word_head, target, use_reentrant=False)
        else:
            total = total + _summed_cross_entropy(hidden, word_head, target)
    count = len(rows) if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)  # a batch of bad samples alone has none


def _summed_cross_entropy(hidden: Tensor, word_head: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, word_head).float(), target, reduction="sum")
