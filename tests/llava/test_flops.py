"""FLOPs by formula are those that PyTorch counts while a real step runs."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.constants import IGNORE_INDEX
from llava.train.arguments import parse_arguments
from llava.train.flops import ModelFlops, peak_tflops
from llava.train.train import build_stage
from tests.llava import tiny

TOWER, ADAPTER, LLM = "mm_vision_tower", "mm_mlp_adapter", "mm_language_model"


def one_batch(trainer):
    dataset = trainer.train_dataset
    batch = trainer.data_collator([dataset[index] for index in range(4)])
    for name in ("ids", "num_samples", "bad_samples"):
        batch.pop(name)
    return batch


def counted(trainer, batch):
    """What matrix products of linear layers cost, by PyTorch's own count, which knows addmm but not in place."""
    trainer.model.train()
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
    in_place = {torch.ops.aten.addmm_: lambda into, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        trainer.model(**batch).loss.backward()
    return sum(counter.get_flop_counts()["Global"].get(product, 0) for product in products)


@pytest.mark.parametrize(
    "flags",
    [
        {"mm_tunable_parts": ADAPTER},
        {"mm_tunable_parts": LLM},
        {"mm_tunable_parts": f"{TOWER},{ADAPTER}"},
        {"mm_tunable_parts": f"{TOWER},{ADAPTER},{LLM}"},
        {"mm_tunable_parts": f"{ADAPTER},{LLM}", "lora_enable": True, "lora_r": 4, "lora_dropout": 0},
    ],
    ids=lambda flags: "+".join(map(str, flags.values())),
)
def test_linear_layers_cost_what_pytorch_counts(llm, siglip, data, tmp_path, flags):
    """But for the gradient of the pixels, which nobody asks for."""
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **flags, force_resize="none")
    trainer, _ = build_stage(*parse_arguments(arguments))
    batch = one_batch(trainer)
    expected = counted(trainer, batch)
    grids, borders = batch["image_grid_thw"], batch["cu_seqlens"]
    patches = sum(rows * cols for _, rows, cols in grids)
    trains_tower = TOWER in flags["mm_tunable_parts"]
    expected += trains_tower * 2 * (3 * 8 * 8) * 24 * patches
    # Width 24 and 2 layers; width 32 and 2 layers, half of it under the causal mask.
    attention = sum((rows * cols) ** 2 for _, rows, cols in grids) * 4 * 24 * 2 * (3 if trains_tower else 1)
    squares = sum((end - start) ** 2 for start, end in pairwise(borders))
    attention += squares * 2 * 32 * 2 * 3
    supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    flops = ModelFlops(trainer.model)
    assert flops.of_batch(batch) + flops.of_supervised(supervised) == expected + attention


def test_the_text_of_the_alignment_loss_is_read_forward_only(llm, siglip, data, tmp_path):
    prior = tiny.save_prior(tmp_path / "prior.safetensors")
    options = {"use_alignment_loss": True, "word_prior": prior}
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **options)
    trainer, _ = build_stage(*parse_arguments(arguments))
    batch = one_batch(trainer)
    flops = ModelFlops(trainer.model)
    borders = batch["align_cu_seqlens"]
    without = {name: value for name, value in batch.items() if not name.startswith("align_")}
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # two layers: q and o, k and v, and the MLP
    squares = sum((end - start) ** 2 for start, end in pairwise(borders))
    assert flops.of_batch(batch) - flops.of_batch(without) == 2 * weights * borders[-1] + 2 * 2 * 32 * squares


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", None),
        ("NVIDIA H20", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_a_gpu_is_known_by_its_name_or_not_at_all(name, peak):
    assert peak_tflops(name) == peak
