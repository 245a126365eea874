"""A tower of one's own from a file outside the package: docs/own_tower.md as it stands, and what can go wrong."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.model.multimodal_encoder.builder import register_vision_tower, tower_factory
from llava.registry import Registry, load_plugin_files
from tests.llava import tiny

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/own_tower.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the page's file, its data, and the models it names."""
    folder = tmp_path_factory.mktemp("own")
    tiny.save_data(folder / "squares")
    (folder / "squares/data.json").rename(folder / "data.json")
    records = [record | {"kind": "colour"} for record in json.loads((folder / "data.json").read_text())]
    (folder / "questions.json").write_text(json.dumps(records[:3]))
    (folder / "squares/images").rename(folder / "images")
    (folder / "playground").symlink_to(ROOT / "playground")
    (folder / "my_tower.py").write_text(block("python"))
    return folder


def commands():
    """The page's shell lines -> [(module, arguments)]; what `export` sets."""
    lines = block("bash").replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines]
    return words[0][1].split("="), [(line[2], line[3:]) for line in words[1:] if line[:2] == ["python", "-m"]]


def test_the_page_s_commands_train_and_answer(place, monkeypatch, capsys, caplog):
    (variable, file), steps = commands()
    monkeypatch.chdir(place)
    monkeypatch.setenv(variable, file)
    load_plugin_files.cache_clear()
    load_plugin_files()
    with caplog.at_level("INFO"):
        for module, arguments in steps:
            importlib.import_module(module).main(
                [*arguments, *(["--use_cpu"] if "train" in module else ["--device", "cpu"])]
            )
    assert [module for module, _ in steps] == ["llava.train.train_mem", "llava.serve.cli", "llava.eval.held_out"]
    assert re.search(r"model\.vision_tower +mm_vision_tower +9,264 +9,264", caplog.text)  # it trains
    assert load_file("runs/my_tower/model.safetensors")["model.vision_tower.vision_tower.patches.weight"].any()
    assert "colour" in capsys.readouterr().out  # the scores, by kind
    assert len(Path("answers.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_as_a_user_types_them(place):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    shutil.rmtree(place / "runs", ignore_errors=True)
    done = subprocess.run(
        ["bash", "-e", "-c", block("bash")], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_a_file_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("LLAVA_PLUGINS", "nowhere/tower.py")
    load_plugin_files.cache_clear()
    with pytest.raises(ValueError, match=r"LLAVA_PLUGINS names nowhere/tower\.py, and there is no such file"):
        Registry("thing", "no.group").names()
    monkeypatch.delenv("LLAVA_PLUGINS")
    load_plugin_files.cache_clear()


def test_files_and_modules_are_loaded_once(monkeypatch, tmp_path):
    (tmp_path / "plugin_one.py").write_text("import llava.registry as r\nr.loaded = getattr(r, 'loaded', 0) + 1\n")
    (tmp_path / "plugin_two.py").write_text("import llava.registry as r\nr.loaded = getattr(r, 'loaded', 0) + 10\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LLAVA_PLUGINS", os.pathsep.join([str(tmp_path / "plugin_one.py"), "plugin_two"]))
    load_plugin_files.cache_clear()
    for _ in range(2):
        Registry("thing", "no.group").names()
    import llava.registry

    assert llava.registry.loaded == 11
    monkeypatch.delattr(llava.registry, "loaded")
    monkeypatch.delenv("LLAVA_PLUGINS")
    load_plugin_files.cache_clear()


def test_weights_after_the_colon_go_to_the_module(tmp_path):
    @register_vision_tower("test-with-weights")
    class Tower(torch.nn.Module):
        image_size, patch_size, hidden_size, image_mean = 16, 8, 4, (0.1, 0.2, 0.3)

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def load_weights(self, file):
            self.load_state_dict(torch.load(file, weights_only=True))

        def forward(self, images):
            return self.scale * images.flatten(2)[..., :4, None].mean(1).expand(-1, -1, 4)

    torch.save({"scale": torch.tensor(3.0)}, tmp_path / "w.pt")
    factory = tower_factory("test-with-weights")
    name = f"test-with-weights:{tmp_path / 'w.pt'}"
    assert factory.build_tower(name).vision_tower.scale == 3
    assert factory.build_tower("test-with-weights").vision_tower.scale == 1
    assert factory.build_tower(name, config=factory.tower_config(name)).vision_tower.scale == 1  # a checkpoint fills it
    assert factory.build_image_processor(name).image_mean == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match=r"^--use_rope True: the tower test-with-weights:.* has no such option"):
        factory.build_tower(name, use_rope=True)
    with pytest.raises(ValueError, match="registered twice"):
        register_vision_tower("test-with-weights")(Tower)


def test_a_wrong_shape_and_a_missing_attribute_are_told():
    class Tower(torch.nn.Module):
        image_size, patch_size, hidden_size = 16, 8, 4

        def forward(self, images):
            return images.flatten(1)

    register_vision_tower("test-wrong-shape")(Tower)
    tower = tower_factory("test-wrong-shape").build_tower("test-wrong-shape")
    with pytest.raises(ValueError, match=r"Tower gave features of shape \(2, 768\), expected \(2, 4, 4\)"):
        tower(torch.zeros(8, 192), None)
    with pytest.raises(
        ValueError, match=r"Bare cannot be a vision tower: it lacks .* image_size, patch_size, hidden_size"
    ):
        register_vision_tower("test-bare")(type("Bare", (torch.nn.Module,), {}))
