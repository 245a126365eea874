"""The alignment loss (CoMP 2.3, Eq. 5-10): an image should point at the words that its text points at.

B = samples, H = LLM width, V = vocabulary. Each sample has a visual and a text feature; both are compared with all
prototypes W (V, H), the word embeddings, by cosine. The text's scores become targets Q_t (B, V), the image's a
prediction P_v, and the loss is their cross-entropy. Gradients reach the visual features only.

Everything stays in log space, float32 or wider: exp(1 / 0.005) overflows float32.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from comp_patches.alignment_cross_entropy import cross_entropy_per_sample, mean_over_processes
from comp_patches.alignment_targets import TargetRule, check_temperature, target_distribution
from comp_patches.cosine_scores import cosine_scores, unit_rows

PROTOTYPES = ("word_embeddings", "learnable")


class Alignment(NamedTuple):
    """The loss, and the entropy (B,) of each sample's targets in nats, which tells how sharp the text's words are."""

    loss: Tensor
    target_entropy: Tensor


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
    prototypes: str = "word_embeddings",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean over samples of the cross-entropy between the text's and the image's word distribution (Eq. 10).

    Args:
        visual: (B, H), not normalised: the mean of a sample's visual tokens. The gradient of a row is of the order of
            1 / (tau |row|): too much for float16 below a length of about 0.003, unless the row is 0, which gets none.
        text: (B, H), not normalised; detached.
        word_embeddings: W (V, H). Never copied or normalised: its row norms divide the scores. (The gradient of
            learnable ones is as large as they are, and takes a normalised copy.)
        prior: (V,) share of each word, or None for a uniform one. A 0 marks a row that is no word: it gets no mass.
            Never negative; that is not looked at here, where it would make a GPU wait.
        temperature: tau, of the image's distribution.
        epsilon, iterations, mode, row_strength, prior_temperature: how targets are made, see `TargetRule`.
        prototypes: `word_embeddings`: W gets no gradient (else training collapses, Sec. 2.3). `learnable`: W are free
            parameters (Tab. 5(b)) and get the prediction's gradient; the targets' is cut all the same, as in DINO.
        group: the processes that share the micro-batch. Each then returns the mean over all samples of all of them, and
            the *average* of their gradients is the gradient of that mean.

    Returns:
        A scalar; exactly 0, but connected to `visual`, where there is no sample.
    """
    rule = TargetRule(mode, epsilon, iterations, row_strength, prior_temperature)
    check_prototypes(prototypes)
    if prototypes == "word_embeddings":
        word_embeddings = word_embeddings.detach()
    return align(visual, text, word_embeddings, prior, rule, temperature=temperature, group=group).loss


def align(
    visual: Tensor,
    text: Tensor,
    prototypes: Tensor,
    prior: Tensor | None,
    rule: TargetRule,
    *,
    temperature: float,
    valid: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Alignment:
    """`alignment_loss` and what its targets are like.

    Args:
        prototypes: (V, H); get gradients if they require them.
        valid: (B,) bool marks the samples that take part: a selection would make the device wait.
    """
    if visual.shape != text.shape or visual.shape[-1] != prototypes.shape[-1]:
        raise ValueError(
            f"visual {tuple(visual.shape)}, text {tuple(text.shape)} and prototypes {tuple(prototypes.shape)} "
            "should be (B, H), (B, H) and (V, H)."
        )
    check_temperature("temperature", temperature)
    if valid is None:
        valid = _all_valid(visual)
    visual = unit_rows(visual)
    text = unit_rows(text.detach().to(visual.dtype).masked_fill(~valid[:, None], 0.0))
    prior = _checked_prior(prior, prototypes, visual.dtype)
    scores, inverse_norms = cosine_scores(torch.cat((visual, text)), prototypes)  # one pass over W for both (Eq. 6-8)
    visual_scores, text_scores = scores.tensor_split(2)
    target, entropy = target_distribution(text_scores, prior, rule, valid, group)
    per_sample = cross_entropy_per_sample(visual, prototypes, visual_scores, inverse_norms, target, prior, temperature)
    return Alignment(mean_over_processes(per_sample, valid, group), entropy)


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
    scores, _ = cosine_scores(text_normalised.detach().to(dtype), word_embeddings)
    prior = _checked_prior(prior, word_embeddings, dtype)
    return target_distribution(scores, prior, rule, _all_valid(scores), group)[0]


def cross_entropy(
    visual_normalised: Tensor,
    target: Tensor,
    word_embeddings: Tensor,
    prior: Tensor | None = None,
    *,
    temperature: float = 0.005,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """-mean_b sum_i Q_t[b, i] log P_v[b, i] (Eq. 8 and 10); rows of prior 0 are left out."""
    dtype = torch.promote_types(visual_normalised.dtype, torch.float32)
    visual = visual_normalised.to(dtype)
    scores, inverse_norms = cosine_scores(visual, word_embeddings)
    prior = _checked_prior(prior, word_embeddings, dtype)
    per_sample = cross_entropy_per_sample(
        visual, word_embeddings.detach(), scores, inverse_norms, target, prior, temperature
    )
    return mean_over_processes(per_sample, _all_valid(visual), group)


def check_prototypes(prototypes: str) -> None:
    """Refuses an unknown kind."""
    if prototypes not in PROTOTYPES:
        raise ValueError(
            f"Alignment prototypes {prototypes!r} are unknown (--alignment_prototypes). Known: {', '.join(PROTOTYPES)}."
        )


def _all_valid(features: Tensor) -> Tensor:
    return torch.ones(len(features), dtype=torch.bool, device=features.device)


def _checked_prior(prior: Tensor | None, prototypes: Tensor, dtype: torch.dtype) -> Tensor | None:
    if prior is None:
        return None
    if prior.shape != prototypes.shape[:1]:
        raise ValueError(
            f"The word prior has shape {tuple(prior.shape)}, but there are {prototypes.shape[0]} word embeddings."
        )
    return prior.to(device=prototypes.device, dtype=dtype)
