"""The alignment loss (CoMP 2.3, Eq. 5-10): an image should point at the words that its text points at.

B = samples, H = LLM width, V = vocabulary. Each sample has a visual and a text feature; both are compared with all
word embeddings W (V, H) by cosine. The text's scores become targets Q_t (B, V), the image's a prediction P_v, and the
loss is their cross-entropy. Gradients reach the visual features only.

Everything stays in log space, float32 or wider: exp(1 / 0.005) overflows float32.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from comp_patches.alignment_targets import TargetRule, target_distribution
from comp_patches.cosine_scores import cosine_scores


class Alignment(NamedTuple):
    """The loss, and the targets (B, V) behind it, which tell how sharp the text's words are."""

    loss: Tensor
    target: Tensor


def alignment_loss(
    visual: Tensor,
    text: Tensor,
    word_embeddings: Tensor,
    prior: Tensor | None,
    *,
    temperature: float = 0.005,
    epsilon: float = 0.005,
    iterations: int = 3,
    mode: str = "prior_softmax",
    row_strength: float = 1.0,
    prior_temperature: float = 0.05,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean over samples of the cross-entropy between the text's and the image's word distribution (Eq. 10).

    Args:
        visual: (B, H), not normalised: the mean of a sample's visual tokens.
        text: (B, H), not normalised; detached.
        word_embeddings: W (V, H); detached. Never copied or normalised: its row norms divide the scores.
        prior: (V,) share of each word, or None for a uniform one. A 0 marks a row that is no word: it gets no mass.
        temperature: tau, of the image's distribution.
        epsilon, iterations, mode, row_strength, prior_temperature: how targets are made, see `TargetRule`.
        group: the processes that share the micro-batch. Each then returns the mean over all samples of all of them, and
            the *average* of their gradients is the gradient of that mean.

    Returns:
        A scalar; exactly 0, but connected to `visual`, where there is no sample.
    """
    rule = TargetRule(mode, epsilon, iterations, row_strength, prior_temperature)
    return align(visual, text, word_embeddings, prior, rule, temperature=temperature, group=group).loss


def align(
    visual: Tensor,
    text: Tensor,
    word_embeddings: Tensor,
    prior: Tensor | None,
    rule: TargetRule,
    *,
    temperature: float,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Alignment:
    """`alignment_loss` with its targets. `valid` (B,) bool marks the samples that take part: a selection would sync."""
    if visual.shape != text.shape or visual.shape[-1] != word_embeddings.shape[-1]:
        raise ValueError(
            f"visual {tuple(visual.shape)}, text {tuple(text.shape)} and word_embeddings "
            f"{tuple(word_embeddings.shape)} should be (B, H), (B, H) and (V, H)."
        )
    if valid is None:
        valid = torch.ones(len(visual), dtype=torch.bool, device=visual.device)
    dtype = torch.promote_types(visual.dtype, torch.float32)
    text = text.detach().to(dtype).masked_fill(~valid[:, None], 0.0)
    visual_scores, text_scores = cosine_scores(  # one pass over W for both (Eq. 6-8)
        F.normalize(visual.to(dtype), dim=-1), F.normalize(text, dim=-1), word_embeddings
    )
    prior = _checked_prior(prior, word_embeddings, dtype)
    target = target_distribution(text_scores, prior, rule, valid, group)
    return Alignment(_mean_cross_entropy(visual_scores / temperature, target, prior, valid, group), target)


def targets(
    text_normalised: Tensor,
    word_embeddings: Tensor,
    prior: Tensor | None,
    *,
    epsilon: float = 0.005,
    iterations: int = 3,
    mode: str = "prior_softmax",
    row_strength: float = 1.0,
    prior_temperature: float = 0.05,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Q_t (B, V) of Eq. 9 for text features (B, H) that are normalised already. Arguments as in `alignment_loss`."""
    dtype = torch.promote_types(text_normalised.dtype, torch.float32)
    rule = TargetRule(mode, epsilon, iterations, row_strength, prior_temperature)
    text = text_normalised.detach().to(dtype)
    _, scores = cosine_scores(text[:0], text, word_embeddings)
    valid = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    return target_distribution(scores, _checked_prior(prior, word_embeddings, dtype), rule, valid, group)


def cross_entropy(
    visual_normalised: Tensor,
    target: Tensor,
    word_embeddings: Tensor,
    prior: Tensor | None = None,
    *,
    temperature: float = 0.005,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """-mean_b sum_i Q_t[b, i] log P_v[b, i], P_v = softmax(s_v / tau) (Eq. 8 and 10); rows of prior 0 are left out."""
    dtype = torch.promote_types(visual_normalised.dtype, torch.float32)
    visual = visual_normalised.to(dtype)
    scores, _ = cosine_scores(visual, visual[:0], word_embeddings)
    valid = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    prior = _checked_prior(prior, word_embeddings, dtype)
    return _mean_cross_entropy(scores / temperature, target, prior, valid, group)


def _checked_prior(prior: Tensor | None, word_embeddings: Tensor, dtype: torch.dtype) -> Tensor | None:
    if prior is None:
        return None
    if prior.shape != word_embeddings.shape[:1]:
        raise ValueError(
            f"The word prior has shape {tuple(prior.shape)}, but there are {word_embeddings.shape[0]} word embeddings."
        )
    return prior.to(device=word_embeddings.device, dtype=dtype)


def _mean_cross_entropy(
    logits: Tensor, target: Tensor, prior: Tensor | None, valid: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Mean over the valid samples of every process. The rows of `target` sum to 1."""
    reachable = logits if prior is None else logits.masked_fill(prior == 0, -torch.inf)
    per_sample = torch.logsumexp(reachable, dim=-1) - (target * logits).sum(dim=-1)
    total = per_sample.masked_fill(~valid, 0.0).sum()
    count = valid.sum().to(total.dtype)
    if group is None:
        return total / count.clamp(min=1)
    shared = torch.stack((total.detach(), count))
    dist.all_reduce(shared, dist.ReduceOp.SUM, group)
    global_total, global_count = shared[0], shared[1].clamp(min=1)
    # Data parallelism averages gradients over processes, so each one's share is scaled up by their number.
    own_share = total * dist.get_world_size(group) / global_count
    return own_share + (global_total / global_count - own_share).detach()
