"""How many FLOPs a training step is, counted from the model's shapes, and what a GPU could do at most.

A linear layer of N weights costs 2·N a token forward, 2·N for its input's gradient and 2·N for that of its weights;
attention over a segment of L tokens 4·L²·width a layer forward and twice that backward, half of it where it is causal.
What a step does twice (gradient checkpointing) or needs no matrix product for (norms, softmax) is not counted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from llava.train.parts import part_of

# Dense bf16 TFLOPS of the makers' data sheets, without sparsity, by what stands in the device's name; first match wins.
PEAK_TFLOPS = (
    (("H100", "PCIe"), 756.0),
    (("H100", "NVL"), 835.0),
    (("H200", "NVL"), 835.0),
    (("H100",), 989.0),
    (("H200",), 989.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("L40S",), 362.0),
)
HEAD = "head"


def peak_tflops(device: str) -> float | None:
    """The bf16 peak of a GPU by the name that CUDA gives it; None where it is not known here."""
    words = device.replace("-", " ").split()
    return next((peak for marks, peak in PEAK_TFLOPS if all(mark in words for mark in marks)), None)


class ModelFlops:
    """Of one model, as what trains of it is set now. A part's backward pass runs where it or one before it trains."""

    def __init__(self, model: Any) -> None:
        sizes, trained, trains = _sizes(model)
        tower, adapter, llm = "mm_vision_tower", "mm_mlp_adapter", "mm_language_model"
        flows = {
            tower: trains[tower],
            adapter: trains[tower] or trains[adapter],
            llm: any(trains.values()),
            HEAD: any(trains.values()),
        }
        self._per_token = {part: 2 * (sizes[part] * (1 + flows[part]) + trained[part]) for part in flows}
        self._forward_per_token = 2 * sizes[llm]
        config, vision = model.config, model.get_vision_tower()
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._llm_attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_width
        self._tower_attention = 4 * vision.num_layers * vision.hidden_size * (1 + 2 * flows[tower])
        self._tokens_per_image = model.get_model().tokens_per_image

    def of_batch(self, batch: dict[str, Any]) -> int:
        """A micro-batch as the collator makes it, forward and backward, without the head."""
        grids = batch["image_grid_thw"]
        patches = sum(map(math.prod, grids))
        squares = sum(frames * (rows * cols) ** 2 for frames, rows, cols in grids)
        total = self._per_token["mm_vision_tower"] * patches + self._tower_attention * squares
        total += self._per_token["mm_mlp_adapter"] * sum(self._tokens_per_image(grids, batch.get("image_layout")))
        borders = batch["cu_seqlens"]
        total += self._per_token["mm_language_model"] * borders[-1] + 3 * self._llm_attention * _squares(borders)
        if "align_cu_seqlens" in batch:  # the alignment loss reads the answers once more, without a backward pass
            borders = batch["align_cu_seqlens"]
            total += self._forward_per_token * borders[-1] + self._llm_attention * _squares(borders)
        return total

    def of_supervised(self, rows: Tensor | int) -> Tensor | int:
        """The head's, over so many supervised tokens."""
        return self._per_token[HEAD] * rows


def _sizes(model: Any) -> tuple[dict[str, int], dict[str, int], dict[str, bool]]:
    """By part the weights of all linear layers and of those that train, and whether anything in it does."""
    sizes: dict[str, int] = defaultdict(int)
    trained: dict[str, int] = defaultdict(int)
    trains: dict[str, bool] = defaultdict(bool)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            part = HEAD if module is head else part_of(name)
            size = module.in_features * module.out_features  # whatever ZeRO-3 or QLoRA make of the weight's shape
            sizes[part] += size
            trained[part] += size * module.weight.requires_grad
    for name, parameter in model.named_parameters():
        trains[part_of(name)] |= parameter.requires_grad
    return sizes, trained, trains


def _squares(borders: Sequence[int]) -> int:
    return sum((end - start) ** 2 for start, end in pairwise(borders))
