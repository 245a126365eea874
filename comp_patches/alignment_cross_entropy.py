"""Cross-entropy between given targets and a feature's softmax over the vocabulary (CoMP Eq. 8 and 10).

B = samples, H = LLM width, V = vocabulary. The gradient of the scores is known with the loss, P_v - Q_t, so it is
multiplied back at once: from forward to backward there waits a (B, H) gradient and no (B, V) matrix.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from comp_patches.alignment_targets import SAMPLES_AT_A_TIME, not_a_word
from comp_patches.cosine_scores import full_float32, weighted_sum_of_words


def cross_entropy_per_sample(
    visual: Tensor,
    prototypes: Tensor,
    scores: Tensor,
    inverse_norms: Tensor,
    target: Tensor,
    prior: Tensor | None,
    temperature: float,
) -> Tensor:
    """(B,): -sum_i Q_t[i] log P_v[i], P_v = softmax(s_v / tau) without the rows of prior 0.

    Args:
        visual: (B, H) normalised; gets gradients.
        prototypes: (V, H), not normalised; get gradients only where they require them, at the price of `scores` kept.
        scores, inverse_norms: `cosine_scores` of the two. `scores` (B, V) is overwritten.
        target: (B, V), rows that sum to 1.
        prior: (V,) or None.
        temperature: tau.
    """
    no_word = not_a_word(prior, scores)
    return _CrossEntropy.apply(visual, prototypes, scores, inverse_norms, target, no_word, temperature)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, visual, prototypes, scores, inverse_norms, target, no_word, temperature) -> Tensor:
        losses, scale = [], inverse_norms / temperature
        for rows, wanted in zip(scores.split(SAMPLES_AT_A_TIME), target.split(SAMPLES_AT_A_TIME), strict=True):
            log_predicted = torch.add(no_word, rows, alpha=1 / temperature).log_softmax(dim=-1)
            losses.append(-(wanted * log_predicted).sum(dim=-1))
            torch.sub(log_predicted.exp_(), wanted, out=rows)
            rows.mul_(scale)  # the loss's gradient with respect to visual @ prototypes.T
        gradient = weighted_sum_of_words(scores, prototypes) if ctx.needs_input_grad[0] else None
        kept = (scores, visual, prototypes, inverse_norms) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(gradient, *kept)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gradient, *kept = ctx.saved_tensors
        of_visual = None if gradient is None else grad[:, None] * gradient
        of_prototypes = _gradient_of_prototypes(grad, *kept) if kept else None
        return of_visual, of_prototypes, None, None, None, None, None


@full_float32()
def _gradient_of_prototypes(
    grad: Tensor, grad_products: Tensor, visual: Tensor, prototypes: Tensor, inverse_norms: Tensor
) -> Tensor:
    """(V, H). Only directions count, so what points along a prototype itself is no part of its gradient."""
    unit = prototypes * inverse_norms[:, None]
    gradient = grad_products.T @ (grad[:, None] * visual)
    return (gradient - (gradient * unit).sum(dim=-1, keepdim=True) * unit).to(prototypes.dtype)


def mean_over_processes(per_sample: Tensor, valid: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean of (B,) values over the valid samples of every process; exactly 0 where there is none.

    The *average* of the processes' gradients is the gradient of that mean.
    """
    total = per_sample.masked_fill(~valid, 0.0).sum()
    count = valid.sum().to(total.dtype)
    if group is None:
        return total / count.clamp(min=1)
    shared = torch.stack((total.detach(), count))
    dist.all_reduce(shared, dist.ReduceOp.SUM, group)
    global_total, global_count = shared[0], shared[1].clamp(min=1)
    return for_averaging(global_total / global_count, total / global_count, group)


def for_averaging(value: Tensor, own_share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`value`, with the gradient of `own_share` times the number of processes, over which gradients are averaged."""
    scaled = own_share * dist.get_world_size(group)
    return scaled + (value - scaled).detach()
