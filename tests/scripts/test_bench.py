"""The speed comparison runs, and what it compares is equal work."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.data.sampler import BalancedBatchSampler
from tests.scripts.launching import BENCH, printed_by_bench


@pytest.fixture
def encoders(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import encoders

    return encoders


@pytest.mark.parametrize(
    ("height", "width", "crops"),
    [(224, 224, 3), (300, 1000, 4), (1000, 300, 4), (700, 500, 5), (384, 768, 3), (768, 384, 3)],
)
def test_anyres_takes_the_tiling_of_llava_next(encoders, height, width, crops):
    assert encoders.anyres_crops(height, width) == crops


@pytest.mark.slow
def test_every_encoder_runs_forward_and_backward():
    sizes = ["--vit", "width384", "--layers", "1", "--images", "2", "--rounds", "1"]
    printed = printed_by_bench("tower.py", *sizes, "--parts", "forward", "backward")
    for encoder in ("floor", "ours, one by one", "SigLIP 2 NaFlex", "Qwen2.5-VL", "AnyRes"):
        assert encoder in printed
    assert printed.count("Qwen2-VL ViT") == 2


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import encoders
    import llava_steps

    vit = encoders.ViT(width=24, heads=2, layers=2, mlp=40)
    llm = llava_steps.LLM(width=32, heads=4, kv_heads=2, mlp=64, words=300, layers=2)
    return llava_steps, llava_steps.Model(vit, llm, prompt=3, answer=5)


GRIDS = ((4, 6), (2, 2), (8, 4))


def in_place(total, left, right, **kwargs):
    """torch counts this product only where it makes a new matrix."""
    return 2 * left[0] * left[1] * right[1]


def test_the_floor_of_a_training_step_makes_the_products_of_the_step(steps):
    """As many multiplications, but for attention, of which torch counts only kernels of GPUs."""
    llava_steps, model = steps
    counts = []
    for make in (llava_steps.packed, llava_steps.floor):
        run = make(model, [GRIDS])
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
            run()
        operations = counter.get_flop_counts()["Global"]
        counts.append(sum(count for operation, count in operations.items() if "attention" not in str(operation)))
    assert counts[0] == counts[1] > 0


def test_padded_micro_batches_do_the_work_of_packed_ones(steps):
    """The same loss and gradients, of the same tokens."""
    llava_steps, setting = steps
    torch.manual_seed(0)
    model, batch = setting.build(), setting.micro_batch(GRIDS)
    gradients = []
    for loss in (model(**batch).loss, llava_steps.padded_loss(model, batch)):
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_every_training_step_runs(steps):
    llava_steps, model = steps
    for make in (llava_steps.updated, llava_steps.padded_text, llava_steps.padded):
        make(model, [GRIDS[:2], GRIDS[2:]])()


@pytest.mark.slow
def test_the_comparison_of_training_steps_prints_its_tables():
    sizes = ["--layers", "1", "--images", "4", "--tokens", "100", "--words", "500", "--rounds", "1"]
    printed = printed_by_bench("train_step.py", *sizes)
    for cell in ("with AdamW's update", "full logits", "% of full", "text and images padded", "16x16 20x28"):
        assert cell in printed


def test_the_order_comparison_sees_what_is_trained_on_twice(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import sampler

    lengths, _ = sampler.draw_mix(33, np.random.default_rng(0))
    theirs = sampler.transformers_order(33, batch_size=2, num_ranks=4)
    ours = lambda rank: list(BalancedBatchSampler(lengths, batch_size=2, num_ranks=4, rank=rank))  # noqa: E731
    seen = [sampler.figures(order, np.abs(lengths), num_ranks=4, turns=1)[0] for order in (theirs, ours)]
    assert seen == ["7, 0", "0, 0"]


@pytest.mark.slow
def test_the_data_bench_prints_its_table():
    sizes = ["--records", "2000", "--samples", "24", "--workers", "1", "--rounds", "1"]
    printed = printed_by_bench("data.py", *sizes)
    for cell in ("2000 records", "the cache is made", "private memory of a worker", "batches on their way"):
        assert cell in printed


def test_a_table_is_also_written_as_markdown(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    import timing
    from rich.console import Console
    from rich.table import Table

    monkeypatch.setenv(timing.TABLES_FILE, str(tmp_path / "tables.md"))
    for title in ("One", None):
        table = Table("way", "s", title=title)
        table.add_row("ours", "1.5")
        table.add_row("peer", "3")
        timing.show(table, Console(quiet=True))
    written = (tmp_path / "tables.md").read_text()
    body = "| way | s |\n|---|---|\n| ours | 1.5 |\n| peer | 3 |\n\n"
    assert written == f"One\n\n{body}{body}"


@pytest.mark.slow
def test_all_comparisons_run_and_are_written(tmp_path):
    printed_by_bench("all.py", "--small", "--output", str(tmp_path / "bench.md"))
    written = (tmp_path / "bench.md").read_text()
    for name in ("tower", "alignment_loss", "alignment_step", "train_step", "sampler", "data"):
        section = written.partition(f"scripts/bench/{name}.py")[2].partition("\n## ")[0]
        assert section.count("|---|") == 1, name
