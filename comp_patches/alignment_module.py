"""The alignment loss as a module that a host calls: it pools, it keeps the prior, and it names its values.

T = visual tokens of the micro-batch, S = samples, H = LLM width, V = vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from comp_patches.alignment_loss import align, check_prototypes
from comp_patches.alignment_targets import TargetRule, check_temperature
from comp_patches.cosine_scores import cosine_scores, unit_rows
from comp_patches.word_prior import fit_prior, load_prior


class AlignmentLoss(nn.Module):
    """Pools a sample's visual tokens over all its images and compares them with its text.

    Without weights of its own, but for `prototypes="learnable"`: then V prototypes (V, H) take the place of the word
    embeddings, start as random directions, and train with the rest. They stand for no words, so their prior is uniform.

    Args:
        prior: file made by `python -m comp_patches.word_prior`, or None for a uniform prior.
        vocab_size: the model's V; a prior that does not fit it is refused here, before the first step. Needed, like H,
            for learnable prototypes.
        hidden_size: the LLM's H.
        temperature, epsilon, iterations, mode, row_strength, prior_temperature, prototypes: as in `alignment_loss`.
    """

    def __init__(
        self,
        *,
        prior: str | None = None,
        vocab_size: int | None = None,
        hidden_size: int | None = None,
        temperature: float = 0.005,
        epsilon: float = 0.005,
        iterations: int = 3,
        mode: str = "prior_softmax",
        row_strength: float = 1.0,
        prior_temperature: float = 0.05,
        prototypes: str = "word_embeddings",
    ):
        super().__init__()
        check_prototypes(prototypes)
        if prototypes == "learnable" and (prior is not None or None in (vocab_size, hidden_size)):
            raise ValueError(
                "Learnable prototypes need vocab_size and hidden_size, and take no prior: they are no words."
            )
        check_temperature("temperature", temperature)
        self.temperature = temperature
        self.rule = TargetRule(mode, epsilon, iterations, row_strength, prior_temperature)
        # Not a buffer: casting the model to bf16 must not round it, and meta initialisation must not lose it.
        self._file_prior = None if prior is None else load_prior(prior)
        self._prior: Tensor | None = None
        if self._file_prior is not None and vocab_size is not None:
            self._prior = fit_prior(self._file_prior, vocab_size)
        self.prototypes = None
        if prototypes == "learnable":
            self.prototypes = random_directions(vocab_size, hidden_size)

    def forward(
        self,
        visual_tokens: Tensor,
        visual_sample: Tensor,
        text_features: Tensor,
        text_valid: Tensor,
        word_embeddings: Tensor,
        num_samples: int,
    ) -> dict[str, Tensor]:
        """The loss under its name; beside it, detached, the targets' entropy and the share of samples that took part.

        The latter are pairs of a total and of what it is to be divided by, once both are summed over micro-batches and
        processes: a micro-batch may have no sample that takes part.

        Args:
            visual_tokens: (T, H), the adapter's output.
            visual_sample: (T,) int64, the sample each token belongs to.
            text_features: (S, H), not normalised.
            text_valid: (S,) bool, False where a sample has no text.
            word_embeddings: (V, H); not looked at where prototypes are learnable.
            num_samples: S.
        """
        prototypes = word_embeddings.detach() if self.prototypes is None else self.prototypes
        visual, tokens_per_sample = pool_by_sample(visual_tokens, visual_sample, num_samples)
        valid = text_valid & (tokens_per_sample > 0)
        loss, entropy = align(
            visual,
            text_features,
            prototypes,
            self._prior_for(prototypes),
            self.rule,
            temperature=self.temperature,
            valid=valid,
            group=processes_of(self),
        )
        entropy = torch.stack((entropy.masked_fill(~valid, 0.0).sum(), valid.sum()))
        return {"alignment": loss, "alignment_target_entropy": entropy, "alignment_sample_share": share_of(valid)}

    @torch.no_grad()
    def word_scores(self, visual_tokens: Tensor, word_embeddings: Tensor) -> Tensor:
        """(T, H), (V, H) -> (T, V), float32 or wider: the cosines by which the loss sees what a feature says."""
        return cosine_scores(unit_rows(visual_tokens), word_embeddings)[0]

    def _prior_for(self, word_embeddings: Tensor) -> Tensor | None:
        if self._file_prior is None:
            return None
        if self._prior is None or self._prior.device != word_embeddings.device:
            self._prior = fit_prior(self._file_prior, word_embeddings.shape[0]).to(word_embeddings.device)
        return self._prior


def share_of(valid: Tensor) -> Tensor:
    """(S,) bool -> (2,): how many are True, of how many."""
    return torch.stack((valid.sum(), valid.new_full((), len(valid), dtype=torch.long))).float()


def processes_of(loss: nn.Module) -> dist.ProcessGroup | None:
    """All of them while training: a loss is the global micro-batch's. Every process calls every time."""
    if loss.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def random_directions(number: int, width: int) -> nn.Parameter:
    """(number, width) rows of about unit length, the same on every process, however much each has drawn before."""
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    return nn.Parameter(torch.randn(number, width, generator=generator) / width**0.5)


def pool_by_sample(visual_tokens: Tensor, visual_sample: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """F_v (Eq. 5): the mean of each sample's tokens in float32, (S, H), and their number (S,). No tokens: zeros."""
    dtype = torch.promote_types(visual_tokens.dtype, torch.float32)
    sums = torch.zeros(num_samples, visual_tokens.shape[-1], dtype=dtype, device=visual_tokens.device)
    sums = sums.index_add(0, visual_sample, visual_tokens.to(dtype))
    counts = torch.zeros(num_samples, dtype=dtype, device=visual_tokens.device)
    counts = counts.index_add(0, visual_sample, torch.ones_like(visual_sample, dtype=dtype))
    return sums / counts.clamp(min=1)[:, None], counts
