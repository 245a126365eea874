"""How a text's scores over the vocabulary become targets (CoMP Eq. 9). B = samples, V = vocabulary.

Both modes are a softmax of the scores plus one bias per word, the same for all samples; they differ in the bias.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

MODES = ("prior_softmax", "sinkhorn")


@dataclass(frozen=True)
class TargetRule:
    """The settings of the targets.

    Attributes:
        mode: `prior_softmax`: softmax(s_t / epsilon + iterations * log softmax(prior / prior_temperature)), which is
            what the authors' code computes, sample by sample. `sinkhorn`: Eq. 9 as written, Sinkhorn-Knopp on
            s_t / epsilon with the words' marginal `prior` and the samples' marginal 1 / B.
        epsilon: temperature of the text's scores.
        iterations: rounds of Sinkhorn-Knopp; in `prior_softmax` the exponent of the prior.
        row_strength: r in [0, 1], of `sinkhorn`: the row scaling is raised to that power (unbalanced transport); 1 is
            the equation, 0 a plain softmax. With V >> B the full constraint deals the prior out among the samples and
            hardly looks at the text; with one sample the targets are the prior itself.
        prior_temperature: of `prior_softmax`; at 0.05 real word counts come out nearly uniform.
    """

    mode: str = "prior_softmax"
    epsilon: float = 0.005
    iterations: int = 3
    row_strength: float = 1.0
    prior_temperature: float = 0.05

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Alignment mode {self.mode!r} is unknown (--alignment_mode). Known: {', '.join(MODES)}.")
        if not 0.0 <= self.row_strength <= 1.0:
            raise ValueError(f"row_strength={self.row_strength} must lie in [0, 1] (--alignment_row_strength).")


@torch.no_grad()
def target_distribution(
    scores: Tensor, prior: Tensor | None, rule: TargetRule, valid: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Q_t (B, V), each row a distribution over the words.

    Args:
        scores: (B, V) cosines.
        prior: (V,) or None for a uniform one; rows of exactly 0 get no mass.
        rule: the settings.
        valid: (B,) bool; the others have no say in the marginals.
        group: processes whose samples share `sinkhorn`'s marginals.
    """
    logits = scores / rule.epsilon
    no_word = torch.zeros_like(scores[:0].sum(dim=0)) if prior is None else torch.where(prior > 0, 0.0, -torch.inf)
    bias = no_word
    if rule.mode == "sinkhorn":
        log_prior = no_word if prior is None else torch.log(prior / prior.sum())
        bias = no_word + _row_scaling(logits + no_word, log_prior, rule, valid, group)
    elif prior is not None:  # log softmax(prior / prior_temperature) but for a constant, which the softmax drops
        bias = no_word + rule.iterations * prior / rule.prior_temperature
    return torch.softmax(logits + bias, dim=-1)


def _row_scaling(
    logits: Tensor, log_prior: Tensor, rule: TargetRule, valid: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """log u (V,) of Sinkhorn-Knopp: u = (p / K v)^r, v = 1 / K^T u, with K = exp(logits).

    The samples' marginal 1 / B and a prior's scale are constant factors, which the final softmax drops.
    """
    log_u = torch.zeros_like(log_prior)
    log_v = torch.zeros_like(logits[:, 0])
    for _ in range(rule.iterations):
        log_v = log_v.masked_fill(~valid, -torch.inf)
        log_mass = _logsumexp_over_samples(logits + log_v[:, None], group)
        # A word that no sample can reach (prior 0, or no sample anywhere) keeps scaling 1.
        reached = log_mass.isfinite() & log_prior.isfinite()
        log_u = torch.where(reached, rule.row_strength * (log_prior - log_mass), 0.0)
        log_v = -torch.logsumexp(logits + log_u, dim=-1)
    return log_u


def _logsumexp_over_samples(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(B, V) -> (V,) over the samples of every process in the group: a maximum and a sum are exchanged."""
    nothing = torch.full_like(logits[:0].sum(dim=0), -torch.inf)
    largest = torch.cat((logits, nothing[None])).amax(dim=0)  # a process may have no sample
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    reference = torch.where(largest.isfinite(), largest, 0.0)
    total = torch.exp(logits - reference).sum(dim=0)
    if group is not None:
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return torch.log(total) + reference
