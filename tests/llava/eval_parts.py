"""A tiny run for the tests of evaluation and chat: a model that learned to name the colour of an image, and its data.

Colour and size of the images have nothing to do with each other, so whoever does not see cannot know.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, run_stage
from tests.llava import tiny

SIZES = ((64, 48), (32, 64), (80, 32), (48, 48))


def save_colours(folder: Path) -> Path:
    """`data.json` and `images/`: 16 images, every colour at every size; each record has `kind`, `facts` and size."""
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(16):
        colour, size = tiny.COLOURS[number % 4], SIZES[number // 4]
        Image.new("RGB", size, colour).save(folder / "images" / f"{number}.png")
        kind = "warm" if colour in ("red", "yellow") else "cold"
        about = {"kind": kind, "facts": [colour], "width": size[0], "height": size[1]}
        records.append(tiny.record(f"c{number}", f"{number}.png", colour) | about)
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    return save_colours(tmp_path_factory.mktemp("eval") / "colours")


@pytest.fixture(scope="session")
def run(llm, siglip, colours, tmp_path_factory) -> Path:
    """RUN/stage1, its adapter alone, and RUN/stage2_native, which names the colours; template `plain`."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    trained = tiny.FULL_STAGE | {"max_steps": 32, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    native = {"force_resize": "none", "per_device_train_batch_size": 8}
    prior = {"use_alignment_loss": True, "word_prior": tiny.save_prior(folder.parent / "prior.safetensors")}
    for stage, changes in (("stage1", {"max_steps": 2, **prior}), ("stage2_native", trained | native)):
        arguments = tiny.stage_arguments(llm, siglip, colours, folder / stage, **changes)
        run_stage(*build_stage(*parse_arguments(arguments)))
    return folder
