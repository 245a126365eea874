"""The alignment loss over upstream's batches.

S = samples, N = images, T = visual tokens, H = LLM width, V = vocabulary, A = tokens of a sample's answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from comp_patches.alignment_module import AlignmentLoss

IMAGE_TOKEN_INDEX = -200  # LLaVA's placeholder


class Alignment:
    """The loss, its weight, and the visual tokens that the step's forward pass made. No module: nothing to save.

    Args:
        loss: without weights of its own.
        weight: in the total.
    """

    def __init__(self, loss: AlignmentLoss, weight: float):
        self.loss = loss
        self.weight = weight
        self._tokens: list[Tensor] = []

    def note(self, tokens: list[Tensor]) -> None:
        """Keep the visual tokens of each frame or tile, in the order of `images`."""
        self._tokens += tokens

    def __call__(
        self, model: Any, input_ids: Tensor, images: Sequence[Tensor], answers: list[Tensor]
    ) -> dict[str, Tensor]:
        """Named values for the visual tokens noted since the last call.

        Args:
            model: upstream's.
            input_ids: (S, L) as they were before the forward pass, padded.
            images: the batch's.
            answers: S times (A,).
        """
        tokens, self._tokens = self._tokens, []
        sample_of_frame = [
            sample
            for sample, image in zip(samples_of_images(input_ids), images, strict=False)
            for _ in range(_frames(image))
        ]
        kept = [(frame, sample) for frame, sample in zip(tokens, sample_of_frame, strict=False) if sample is not None]
        words = model.get_output_embeddings().weight
        visual = torch.cat([frame for frame, _ in kept] or [tokens[0][:0]])
        samples = [sample for frame, sample in kept for _ in range(len(frame))]
        text, has_text = text_features(model.get_model(), answers)
        with gathered(words) as embeddings:
            return self.loss(
                visual,
                torch.tensor(samples, dtype=torch.long, device=visual.device),
                text,
                has_text,
                embeddings,
                num_samples=len(input_ids),
            )


def samples_of_images(input_ids: Tensor) -> list[int | None]:
    """The sample of each image, as upstream's splicing takes them in turn: a sample without a placeholder has one
    image that stands for none."""
    counts = (input_ids == IMAGE_TOKEN_INDEX).sum(dim=1).tolist()
    return [owner for row, count in enumerate(counts) for owner in ([row] * count or [None])]


def _frames(image: Tensor) -> int:
    return len(image) if image.ndim == 4 else 1


@torch.no_grad()
def text_features(llm: nn.Module, answers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """F_t (S, H): per sample the mean last hidden state over its answers' text alone; and (S,), where there is text."""
    device = next(llm.parameters()).device
    lengths = torch.tensor([len(ids) for ids in answers], device=device)
    # A sample without text reads one token too: a row that sees nothing has no attention, and all ranks must run.
    rows = [ids if len(ids) else ids.new_zeros(1) for ids in answers]
    input_ids = pad_sequence(rows, batch_first=True).to(device)
    mask = torch.arange(input_ids.shape[1], device=device) < lengths.clamp(min=1)[:, None]
    with evaluating(llm):
        hidden = llm(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)[0]
    weights = mask.to(torch.float32) / lengths.clamp(min=1)[:, None]
    return (hidden.float() * weights[:, :, None]).sum(dim=1), lengths > 0


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout and gradient checkpointing off inside, every submodule's mode as it was afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


@contextmanager
def gathered(weight: Tensor) -> Iterator[Tensor]:
    """All of a weight of which ZeRO-3 keeps shards: a copy, since the backward pass reads it after they have parted."""
    if not hasattr(weight, "ds_id"):
        yield weight
        return
    from deepspeed import zero

    with zero.GatheredParameters([weight]):
        whole = weight.detach().clone()
    yield whole
