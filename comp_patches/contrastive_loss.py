"""The contrastive loss that CoMP's Tab. 5(b) compares the alignment loss with: an image should find its own text.

B = samples of one process, N = samples of all, H = LLM width. Symmetric InfoNCE, as in CLIP, between the pooled
features that the alignment loss sees, at the same fixed temperature ("all temperature coefficients are 0.005",
appendix). As there, the text is read without gradients, which reach the visual features only.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from comp_patches.alignment_cross_entropy import for_averaging
from comp_patches.alignment_module import pool_by_sample, processes_of, share_of
from comp_patches.alignment_targets import check_temperature
from comp_patches.cosine_scores import full_float32, unit_rows


def contrastive_loss(
    visual: Tensor, text: Tensor, *, temperature: float = 0.005, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Half the sum of two cross-entropies: an image's text among all texts, and a text's image among all images.

    Args:
        visual: (B, H), not normalised.
        text: (B, H), not normalised; detached. Row by row the text of that image.
        temperature: of the cosines.
        group: the processes whose samples are told apart; they may hold different numbers of them, also none. Each
            returns the loss of all N, and the *average* of their gradients is that loss's gradient.

    Returns:
        A scalar; exactly 0, but connected to `visual`, where there are fewer than two samples.
    """
    if visual.shape != text.shape:
        raise ValueError(f"visual {tuple(visual.shape)} and text {tuple(text.shape)} should both be (B, H).")
    visual = unit_rows(visual)
    text = unit_rows(text.detach().to(visual.dtype))
    if group is None:
        return _info_nce(visual, text, temperature)
    parts = gather_rows(torch.cat((visual.detach(), text), dim=1), group)
    all_visual, all_text = (list(side) for side in zip(*(part.chunk(2, dim=1) for part in parts), strict=True))
    all_visual[dist.get_rank(group)] = visual  # the others' are constants here: their own processes hold the gradients
    loss = _info_nce(torch.cat(all_visual), torch.cat(all_text), temperature)
    return for_averaging(loss.detach(), loss, group)


def _info_nce(visual: Tensor, text: Tensor, temperature: float) -> Tensor:
    """(N, H), (N, H) normalised -> a scalar."""
    with torch.autocast(visual.device.type, enabled=False):
        logits = _Cosines.apply(visual, text) / temperature
    own = torch.arange(len(logits), device=logits.device)
    total = sum(F.cross_entropy(rows, own, reduction="sum") for rows in (logits, logits.T))
    return total / (2 * max(len(logits), 1))


class _Cosines(torch.autograd.Function):
    """(N, H), (M, H) normalised -> (N, M); the former get gradients. Autograd's own product would go back in TF32."""

    @staticmethod
    @full_float32()
    def forward(ctx, visual: Tensor, text: Tensor) -> Tensor:
        ctx.save_for_backward(text)
        return visual @ text.T

    @staticmethod
    @once_differentiable
    @full_float32()
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (text,) = ctx.saved_tensors
        return grad @ text, None


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """(B, H) of each process -> the list of all processes' rows, their numbers being different."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group)
    counts = torch.cat(counts).tolist()
    padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows))).contiguous()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


class ContrastiveLoss(nn.Module):
    """`contrastive_loss` as a host calls it, over the samples that have both an image and a text."""

    def __init__(self, *, temperature: float = 0.005):
        super().__init__()
        check_temperature("temperature", temperature)
        self.temperature = temperature

    def forward(
        self,
        visual_tokens: Tensor,
        visual_sample: Tensor,
        text_features: Tensor,
        text_valid: Tensor,
        word_embeddings: Tensor,
        num_samples: int,
    ) -> dict[str, Tensor]:
        """The loss under its name, and which share of the samples took part. All as `AlignmentLoss`'s."""
        visual, tokens_per_sample = pool_by_sample(visual_tokens, visual_sample, num_samples)
        valid = text_valid & (tokens_per_sample > 0)
        loss = contrastive_loss(
            visual[valid], text_features[valid], temperature=self.temperature, group=processes_of(self)
        )
        return {"contrastive": loss, "contrastive_sample_share": share_of(valid)}
