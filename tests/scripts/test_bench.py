"""The speed comparison runs, and what it compares is equal work."""

import subprocess
import sys

import numpy as np
import pytest

from llava.data.sampler import BalancedBatchSampler
from tests.scripts.launching import ROOT

BENCH = ROOT / "scripts/bench"


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
    command = [sys.executable, BENCH / "tower.py", *sizes, "--parts", "forward", "backward"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    for encoder in ("floor", "ours, one by one", "SigLIP 2 NaFlex", "Qwen2.5-VL", "AnyRes"):
        assert encoder in result.stdout
    assert result.stdout.count("Qwen2-VL ViT") == 2


def test_the_order_comparison_sees_what_is_trained_on_twice(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import sampler

    lengths, _ = sampler.draw_mix(33, np.random.default_rng(0))
    theirs = sampler.transformers_order(33, batch_size=2, num_ranks=4)
    ours = lambda rank: list(BalancedBatchSampler(lengths, batch_size=2, num_ranks=4, rank=rank))  # noqa: E731
    seen = [sampler.figures(order, np.abs(lengths), num_ranks=4, turns=1)[0] for order in (theirs, ours)]
    assert seen == ["7, 0", "0, 0"]
