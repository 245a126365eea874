"""Samples into one padding-free micro-batch.

S = samples, L = their tokens together, P = patches, N = images, A = tokens of the answers' bare text.

    samples  a a a | b b        input_ids     (1, 5)  a a a b b
                                position_ids  (1, 5)  0 1 2 0 1
                                cu_seqlens            [0, 3, 5]

How a batch is laid out is told in Python numbers: on the accelerator, reading them would make the host wait for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from llava.constants import IGNORE_INDEX
from llava.data.bad_samples import BadSample

_NONE = torch.zeros(0, 3, dtype=torch.long)


@dataclass
class PackedCollator:
    """Lays the samples of a micro-batch end to end.

    Attributes:
        patch_dim: Values in a patch, 3 * patch_size**2.
    """

    patch_dim: int

    def __call__(self, slots: Sequence[dict | BadSample]) -> dict:
        """The batch:

        - `input_ids`, `labels`, `position_ids` (1, L) int64; `cu_seqlens`, S + 1 numbers
        - `pixel_values` (P, patch_dim) float32, `image_grid_thw`, N times 3 numbers, `image_sample`, N: whose image
        - from a plain tower's processor, `image_layout`, N times 3 numbers
        - where the samples bring it, the answers' text: `align_input_ids`, `align_position_ids` (1, A) int64;
          `align_cu_seqlens`, S + 1 numbers
        - for the trainer, not the model: `ids` of the samples, `num_samples` asked for, the `bad_samples` among those

        The slots of bad samples are left out. Where all are bad, one unsupervised token stands in, so that every rank
        still runs the whole model and makes the same collective calls.
        """
        bad_samples = [slot for slot in slots if isinstance(slot, BadSample)]
        samples = [slot for slot in slots if not isinstance(slot, BadSample)] or [self._stand_in()]
        grids = [sample["image_grid_thw"].tolist() for sample in samples]
        batch = {
            **_pack("", [sample["input_ids"] for sample in samples]),
            "labels": torch.cat([sample["labels"] for sample in samples])[None],
            "pixel_values": _joined([sample["pixel_values"] for sample in samples]),
            "image_grid_thw": [grid for grids_of_sample in grids for grid in grids_of_sample],
            "image_sample": [number for number, grids_of_sample in enumerate(grids) for _ in grids_of_sample],
            "ids": [sample["id"] for sample in samples],
            "num_samples": len(slots),
            "bad_samples": bad_samples,
        }
        if any("image_layout" in sample for sample in samples):  # a plain tower's
            batch["image_layout"] = [row for sample in samples for row in sample.get("image_layout", _NONE).tolist()]
        if "align_input_ids" in samples[0]:
            batch |= _pack("align_", [sample["align_input_ids"] for sample in samples])
        return batch

    def _stand_in(self) -> dict[str, str | Tensor]:
        return {
            "id": "none",
            "input_ids": torch.zeros(1, dtype=torch.long),
            "labels": torch.full((1,), IGNORE_INDEX),
            "pixel_values": torch.zeros(0, self.patch_dim),
            "image_grid_thw": _NONE,
            "align_input_ids": torch.zeros(1, dtype=torch.long),
        }


def _joined(tensors: list[Tensor]) -> Tensor:
    """Their rows, one after another. A data worker writes them where the trainer will read them, as torch's own
    collation does; else they would be copied there once more."""
    if get_worker_info() is None:
        return torch.cat(tensors)
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    shared = tensors[0]._typed_storage()._new_shared(math.prod(shape))
    return torch.cat(tensors, out=tensors[0].new(shared).resize_(shape))


def _pack(prefix: str, rows: list[Tensor]) -> dict[str, Tensor | list[int]]:
    """Rows of ids end to end, with the positions that restart at each and the borders between them."""
    return {
        f"{prefix}input_ids": torch.cat(rows)[None],
        f"{prefix}position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        f"{prefix}cu_seqlens": list(accumulate((len(row) for row in rows), initial=0)),
    }
