"""Next-token cross-entropy on supervised rows only, its gradient formed beside it: (L, V) logits never exist.

L = text row, R = its supervised rows, r = those of a chunk, H = LLM width, V = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import is_liger_kernel_available
from transformers.utils.generic import maybe_autocast

from llava.constants import IGNORE_INDEX

logger = logging.getLogger(__name__)

ROWS_PER_CHUNK = 512  # (512, 151 936) fp32 logits are 0.3 GB; every chunk reads and writes the head's gradient once
ROWS_PER_SOFTMAX = 16  # few enough that a CPU still has them in its caches when it writes them back


def decoding_loss(
    hidden_states: Tensor, word_head: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """L_dec (paper, Eq. 6): the mean cross-entropy over supervised tokens; exactly 0 where there are none.

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
    total = _summed_cross_entropy(hidden_states[0, rows], word_head, targets[rows])
    count = len(rows) if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)  # a batch of bad samples alone has none


def _summed_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (R, H) hidden states, summed over their (R,) targets: a scalar in fp32."""
    fused = _fused_kernel(hidden.device.type)
    # The kernel divides by the number of rows, and where hidden states need no gradient it forms none of the head's.
    if fused is not None and len(hidden) and hidden.requires_grad:
        return fused(hidden, head, targets, reduction="sum", accum_dtype=torch.float32)
    return _SummedCrossEntropy.apply(hidden, head, targets, torch.is_grad_enabled())


@cache
def _fused_kernel(device_type: str) -> Callable[..., Tensor] | None:
    """liger-kernel's loss where it is installed and can run. Which loss it is, the log says once."""
    if device_type == "cuda" and is_liger_kernel_available():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        logger.info("Decoding loss: liger-kernel's fused cross-entropy.")
        return liger_fused_linear_cross_entropy
    logger.info("Decoding loss: in chunks of %d supervised tokens.", ROWS_PER_CHUNK)
    return None


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradient is known with the loss, so that backward only scales it: in place, hence once."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
        ctx.dtypes, ctx.spent, device = (hidden.dtype, head.dtype), False, hidden.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # a plan's device, which has no autocast
            dtype = torch.get_autocast_dtype(device)
            hidden, head = hidden.to(dtype), head.to(dtype)
        for_hidden, for_head = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        of_hidden = torch.zeros_like(hidden) if for_hidden else None
        # A bf16 sum over chunks would lose what is small beside it: fp32, rounded once, after backward has scaled it.
        exact = torch.promote_types(hidden.dtype, torch.float32)
        of_head = torch.zeros_like(head, dtype=exact) if for_head else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        with maybe_autocast(device, enabled=False):
            for start in range(0, len(targets), ROWS_PER_CHUNK):
                rows = slice(start, start + ROWS_PER_CHUNK)
                of_rows = None if of_hidden is None else of_hidden[rows]
                total += _add_chunk(hidden[rows], head, targets[rows], of_rows, of_head)
        ctx.save_for_backward(of_hidden, of_head)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if ctx.spent or torch.is_grad_enabled():  # enabled: under create_graph
            raise RuntimeError(
                "The decoding loss forms its gradient in the forward pass, for one backward pass and no second "
                "derivative. Compute the loss again for another backward pass."
            )
        ctx.spent = True
        formed = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if grad is None else grad.mul_(upstream).to(dtype) for grad, dtype in formed), None, None


def _add_chunk(
    hidden: Tensor, head: Tensor, targets: Tensor, of_hidden: Tensor | None, of_head: Tensor | None
) -> Tensor:
    """Summed cross-entropy of (r, H) rows. Writes `of_hidden` (r, H), their gradient, and adds to `of_head` (V, H)."""
    logits = F.linear(hidden, head)
    total = _to_gradient(logits, targets)
    if of_hidden is not None:
        torch.mm(logits, head, out=of_hidden)
    if of_head is not None and of_head.dtype == logits.dtype:
        of_head.addmm_(logits.T, hidden)
    elif of_head is not None:
        of_head += logits.T @ hidden
    return total


def _to_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy; (r, V) `logits` become its gradient, softmax less one at the target. Inside all is fp32."""
    total = 0.0
    for rows, wanted in zip(logits.split(ROWS_PER_SOFTMAX), targets[:, None].split(ROWS_PER_SOFTMAX), strict=True):
        log_softmax = rows.log_softmax(dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        at_target = log_softmax.gather(1, wanted)
        torch.exp(log_softmax, out=rows)
        rows.scatter_(1, wanted, at_target.expm1().to(rows.dtype))  # p - 1, before p is rounded to 1
        total = total - at_target.sum()
    return total
