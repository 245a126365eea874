"""The alignment loss (CoMP 2.3, Eq. 5-10; METHOD 4): an image should point at the words that its text points at.

B = samples, H = LLM width, V = vocabulary. Each sample has a visual and a text feature; both are compared with all
word embeddings W (V, H) by cosine. The text's scores become targets Q_t (B, V), the image's a prediction P_v, and the
loss is their cross-entropy. Gradients reach the visual features only.

Everything stays in log space, float32 or wider: exp(1 / 0.005) overflows float32.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from comp_patches.cosine_scores import cosine_scores

MODES = ("prior_softmax", "sinkhorn")


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
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean over samples of the cross-entropy between the text's and the image's word distribution (Eq. 10).

    Args:
        visual: (B, H), not normalised: the mean of a sample's visual tokens.
        text: (B, H), not normalised; detached.
        word_embeddings: W (V, H); detached. Never copied or normalised: its row norms divide the scores.
        prior: (V,) share of each word, or None for a uniform one. A 0 marks a row that is no word: it gets no mass.
        temperature: tau, of the image's distribution.
        epsilon: of the text's.
        iterations: of Sinkhorn-Knopp; in `prior_softmax` the prior's exponent.
        mode: see `targets`.
        row_strength: see `targets`.
        prior_temperature: see `targets`.
        valid: (B,) bool; samples marked False take no part. It spares the caller a selection, hence a device sync.
        group: the processes that share the micro-batch. Each then returns the mean over all samples of all of them, and
            the *average* of their gradients is the gradient of that mean.

    Returns:
        A scalar; exactly 0, but connected to `visual`, where no sample is valid.
    """
    loss, _ = alignment_loss_and_targets(
        visual,
        text,
        word_embeddings,
        prior,
        temperature=temperature,
        epsilon=epsilon,
        iterations=iterations,
        mode=mode,
        row_strength=row_strength,
        prior_temperature=prior_temperature,
        valid=valid,
        group=group,
    )
    return loss


def alignment_loss_and_targets(
    visual: Tensor,
    text: Tensor,
    word_embeddings: Tensor,
    prior: Tensor | None,
    *,
    temperature: float,
    epsilon: float,
    iterations: int,
    mode: str,
    row_strength: float,
    prior_temperature: float,
    valid: Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """`alignment_loss` and the targets (B, V) behind it, which tell how sharp the text's words are."""
    if visual.shape != text.shape or visual.shape[-1] != word_embeddings.shape[-1]:
        raise ValueError(
            f"visual {tuple(visual.shape)}, text {tuple(text.shape)} and word_embeddings "
            f"{tuple(word_embeddings.shape)} should be (B, H), (B, H) and (V, H)."
        )
    valid = torch.ones(len(visual), dtype=torch.bool, device=visual.device) if valid is None else valid
    text = text.detach().masked_fill(~valid[:, None], 0.0)
    dtype = torch.promote_types(visual.dtype, torch.float32)
    # One product over W for both (Eq. 6-8).
    visual_scores, text_scores = cosine_scores(
        F.normalize(visual.to(dtype), dim=-1), F.normalize(text.to(dtype), dim=-1), word_embeddings
    )
    word_prior = _checked_prior(prior, word_embeddings, dtype)
    with torch.no_grad():
        bias = _word_bias(
            text_scores / epsilon, word_prior, iterations, mode, row_strength, prior_temperature, valid, group
        )
        target = torch.softmax(text_scores / epsilon + bias, dim=-1)
    return _mean_cross_entropy(visual_scores / temperature, target, word_prior, valid, group), target


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
    """Q_t (B, V) of Eq. 9: for each sample a distribution over the words.

    Two modes, both a softmax of the scores plus one bias per word:
    - `prior_softmax`: softmax(s_t / eps + iterations * log softmax(prior / prior_temperature)): what the authors' code
      computes, sample by sample.
    - `sinkhorn`: Eq. 9 as written: Sinkhorn-Knopp on s_t / eps with the words' marginal `prior` and the samples'
      marginal 1 / B, over the samples of all processes in `group`. `row_strength` r in [0, 1] raises the row scaling to
      that power (unbalanced transport): 1 is the equation, 0 a plain softmax. With V >> B the full constraint deals the
      prior out among the samples, hardly looking at the text; at B = 1 the targets are the prior itself.
    """
    dtype = torch.promote_types(text_normalised.dtype, torch.float32)
    with torch.no_grad():
        _, scores = cosine_scores(text_normalised[:0].to(dtype), text_normalised.to(dtype), word_embeddings)
        scores = scores / epsilon
        valid = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        word_prior = _checked_prior(prior, word_embeddings, dtype)
        bias = _word_bias(scores, word_prior, iterations, mode, row_strength, prior_temperature, valid, group)
        return torch.softmax(scores + bias, dim=-1)


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
    scores, _ = cosine_scores(visual_normalised.to(dtype), visual_normalised[:0].to(dtype), word_embeddings)
    valid = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    return _mean_cross_entropy(
        scores / temperature, target, _checked_prior(prior, word_embeddings, dtype), valid, group
    )


def _checked_prior(prior: Tensor | None, word_embeddings: Tensor, dtype: torch.dtype) -> Tensor | None:
    if prior is None:
        return None
    if prior.shape != word_embeddings.shape[:1]:
        raise ValueError(
            f"The word prior has shape {tuple(prior.shape)}, but there are {word_embeddings.shape[0]} word embeddings."
        )
    return prior.to(device=word_embeddings.device, dtype=dtype)


def _word_bias(
    logits: Tensor,
    prior: Tensor | None,
    iterations: int,
    mode: str,
    row_strength: float,
    prior_temperature: float,
    valid: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """(V,) what is added to every sample's logits before the softmax; -inf where the prior is 0."""
    if mode not in MODES:
        raise ValueError(f"Alignment mode {mode!r} is unknown. Known: {', '.join(MODES)}.")
    if not 0.0 <= row_strength <= 1.0:
        raise ValueError(f"row_strength={row_strength} must lie in [0, 1]: 1 is Eq. 9, 0 a plain softmax.")
    no_word = torch.zeros_like(logits[:0].sum(0)) if prior is None else torch.where(prior > 0, 0.0, -torch.inf)
    if mode == "sinkhorn":
        share = no_word if prior is None else torch.log(prior / prior.sum())
        return _row_scaling(logits + no_word, share, iterations, row_strength, valid, group) + no_word
    if prior is None:
        return no_word
    return no_word + iterations * prior / prior_temperature  # log softmax but for a constant, which the softmax drops


def _row_scaling(
    logits: Tensor,
    log_prior: Tensor,
    iterations: int,
    row_strength: float,
    valid: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """log u (V,) of Sinkhorn-Knopp, u = (p / K v)^r and v = 1 / K^T u, K = exp(logits), after `iterations` rounds.

    The samples' marginal 1 / B is a constant factor of v and cancels in the final normalisation.
    """
    log_u = torch.zeros_like(log_prior)
    log_v = torch.zeros_like(logits[:, 0])
    for _ in range(iterations):
        log_v = log_v.masked_fill(~valid, -torch.inf)
        log_mass = _logsumexp_over_samples(logits + log_v[:, None], group)
        # A word that no sample can reach (prior 0, or no sample at all) keeps scaling 1.
        log_u = torch.where(log_mass.isfinite() & log_prior.isfinite(), row_strength * (log_prior - log_mass), 0.0)
        log_v = -torch.logsumexp(logits + log_u, dim=-1)
    return log_u


def _logsumexp_over_samples(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(B, V) -> (V,), over the samples of every process in the group: a maximum and a sum are exchanged."""
    none = torch.full_like(logits[:0].sum(0), -torch.inf)
    largest = torch.cat((logits, none[None])).amax(dim=0)  # a process may have no sample
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    reference = torch.where(largest.isfinite(), largest, 0.0)
    total = torch.exp(logits - reference).sum(dim=0)
    if group is not None:
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return torch.log(total) + reference


def _mean_cross_entropy(
    logits: Tensor, target: Tensor, prior: Tensor | None, valid: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Mean over the valid samples of every process. `target` rows sum to 1."""
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
