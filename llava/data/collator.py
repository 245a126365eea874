"""Samples into one padding-free micro-batch.

S = samples, L = their tokens together, P = patches, N = images, A = tokens of the answers' bare text.

    samples  a a a | b b        input_ids     (1, 5)  a a a b b
                                position_ids  (1, 5)  0 1 2 0 1
                                cu_seqlens    (3,)    0 3 5
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.data.bad_samples import BadSample


@dataclass
class PackedCollator:
    """Lays the samples of a micro-batch end to end.

    Attributes:
        patch_dim: Values in a patch, 3 * patch_size**2.
    """

    patch_dim: int

    def __call__(self, slots: Sequence[dict | BadSample]) -> dict:
        """The batch:

        - `input_ids`, `labels`, `position_ids` (1, L) int64; `cu_seqlens` (S + 1,) int32; `max_seqlen`
        - `pixel_values` (P, patch_dim) float32, `image_grid_thw` (N, 3) int64, `image_sample` (N,) int64: whose image
        - where the samples bring it, the answers' text: `align_input_ids`, `align_position_ids` (1, A) int64;
          `align_cu_seqlens` (S + 1,) int32; `align_max_seqlen`
        - `num_samples` asked for, and those that were `bad_samples`: for the trainer's `BadSampleLedger`, not the model

        The slots of bad samples are left out. Where all are bad, one unsupervised token stands in, so that every rank
        still runs the whole model and makes the same collective calls.
        """
        bad_samples = [slot for slot in slots if isinstance(slot, BadSample)]
        samples = [slot for slot in slots if not isinstance(slot, BadSample)] or [self._stand_in()]
        images_per_sample = torch.tensor([len(sample["image_grid_thw"]) for sample in samples])
        batch = {
            **_pack("", [sample["input_ids"] for sample in samples]),
            "labels": torch.cat([sample["labels"] for sample in samples])[None],
            "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
            "image_grid_thw": torch.cat([sample["image_grid_thw"] for sample in samples]),
            "image_sample": torch.arange(len(samples)).repeat_interleave(images_per_sample),
            "num_samples": len(slots),
            "bad_samples": bad_samples,
        }
        if "align_input_ids" in samples[0]:
            batch |= _pack("align_", [sample["align_input_ids"] for sample in samples])
        return batch

    def _stand_in(self) -> dict[str, Tensor]:
        return {
            "input_ids": torch.zeros(1, dtype=torch.long),
            "labels": torch.full((1,), IGNORE_INDEX),
            "pixel_values": torch.zeros(0, self.patch_dim),
            "image_grid_thw": torch.zeros(0, 3, dtype=torch.long),
            "align_input_ids": torch.zeros(1, dtype=torch.long),
        }


def _pack(prefix: str, rows: list[Tensor]) -> dict[str, Tensor | int]:
    """Rows of ids end to end, with the positions that restart at each and the borders between them."""
    lengths = torch.tensor([0] + [len(row) for row in rows])
    return {
        f"{prefix}input_ids": torch.cat(rows)[None],
        f"{prefix}position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        f"{prefix}cu_seqlens": lengths.cumsum(0).int(),
        f"{prefix}max_seqlen": int(lengths.max()),
    }
