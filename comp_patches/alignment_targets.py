"""How a text's scores over the vocabulary become targets (CoMP Eq. 9). B = samples, V = vocabulary.

Both modes are a softmax of the scores plus one bias per word, the same for all samples; they differ in the bias.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

MODES = ("prior_softmax", "sinkhorn")

# What is worked on at a time, so that passes over it stay in the caches and temporaries small.
SAMPLES_AT_A_TIME = 8  # of whole rows (V,)
WORDS_AT_A_TIME = 8192  # of whole columns (B,)


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
        if not 0 <= self.iterations < math.inf:
            raise ValueError(f"iterations={self.iterations} must be 0 or more.")
        check_temperature("epsilon", self.epsilon)
        check_temperature("prior_temperature", self.prior_temperature)


def check_temperature(name: str, value: float) -> None:
    """Refuses what nothing can be divided by."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name}={value} must be a number above 0 (--alignment_{name}).")


@torch.no_grad()
def target_distribution(
    scores: Tensor, prior: Tensor | None, rule: TargetRule, valid: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Q_t (B, V), each row a distribution over the words, and the entropy (B,) of each in nats.

    Args:
        scores: (B, V) cosines. Q_t is written over them.
        prior: (V,) or None for a uniform one; rows of exactly 0 get no mass.
        rule: the settings.
        valid: (B,) bool; the others have no say in the marginals.
        group: processes whose samples share `sinkhorn`'s marginals.
    """
    bias = not_a_word(prior, scores)
    if rule.mode == "sinkhorn":
        bias = bias + _log_row_scaling(scores, prior, rule, valid, group)
    elif prior is not None:  # log softmax(prior / prior_temperature) but for a constant, which the softmax drops
        bias = bias + rule.iterations * prior / rule.prior_temperature
    entropies = []
    for rows in scores.split(SAMPLES_AT_A_TIME):
        log_target = torch.add(bias, rows, alpha=1 / rule.epsilon).log_softmax(dim=-1)
        torch.exp(log_target, out=rows)
        entropies.append(-(rows * log_target).sum(dim=-1))
    return scores, torch.cat(entropies)


def not_a_word(prior: Tensor | None, scores: Tensor) -> Tensor:
    """(V,) to be added to logits: 0, and so low where the prior is 0 that no mass is left.

    Finite: 0 times the logarithm of no mass must be 0.
    """
    if prior is None:
        return scores.new_zeros(scores.shape[-1])
    return torch.zeros_like(prior).masked_fill(prior <= 0, torch.finfo(prior.dtype).min / 4)


def _log_row_scaling(
    scores: Tensor, prior: Tensor | None, rule: TargetRule, valid: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """log u (V,) of Sinkhorn-Knopp: u = (p / K v)^r, v = 1 / K^T u, with K = exp(scores / epsilon).

    The samples' marginal 1 / B and a prior's scale are constant factors, which the final softmax drops.
    """
    no_word = not_a_word(prior, scores)
    log_prior = 0.0 if prior is None else torch.where(prior > 0, prior.log(), 0.0)
    log_u = torch.zeros_like(no_word)
    log_v = scores.new_zeros(len(scores))
    for _ in range(rule.iterations):
        log_v = log_v.masked_fill(~valid, -torch.inf)
        log_mass = _logsumexp_over_processes(_logsumexp_over_samples(scores, rule.epsilon, log_v), group)
        # Where no sample is valid on any process, there is no mass to scale.
        log_u = torch.where(log_mass.isfinite(), rule.row_strength * (log_prior - log_mass), 0.0)
        log_v = -_logsumexp_over_words(scores, rule.epsilon, log_u + no_word)
    return log_u


def _logsumexp_over_words(scores: Tensor, epsilon: float, bias: Tensor) -> Tensor:
    """(B, V), (V,) -> (B,)."""
    parts = scores.split(SAMPLES_AT_A_TIME)
    return torch.cat([torch.add(bias, rows, alpha=1 / epsilon).logsumexp(dim=-1) for rows in parts])


def _logsumexp_over_samples(scores: Tensor, epsilon: float, bias: Tensor) -> Tensor:
    """(B, V), (B,) -> (V,); -inf where there is no sample."""
    parts = scores.split(WORDS_AT_A_TIME, dim=1)
    return torch.cat([torch.add(bias[:, None], words, alpha=1 / epsilon).logsumexp(dim=0) for words in parts])


def _logsumexp_over_processes(own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(V,) of each process -> (V,) of all: a maximum and a sum are exchanged."""
    if group is None:
        return own
    largest = own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    reference = torch.where(largest.isfinite(), largest, 0.0)
    total = torch.exp(own - reference)
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total.log() + reference
