"""The speed comparison runs, and what it compares is equal work."""

import subprocess
import sys

import pytest

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
