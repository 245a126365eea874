"""The plug-in inside lmms-eval itself, offline, with a tiny trained model."""

import json
import shlex
import shutil
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.held_out import main as held_out
from llava.eval.results import summary_path
from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, run_stage
from playground.lmms_task import TASK, write_task
from tests.llava import tiny
from tests.scripts.launching import ROOT, clean_environment, run_script

pytest.importorskip("lmms_eval", reason="bash scripts/install_lmms_eval.sh")
pytest.importorskip("datasets", reason="extra `eval`")
pytest_plugins = ["tests.llava.eval_parts"]


@pytest.fixture(scope="module")
def installed():
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", include_path=str(ROOT / "llava/eval/lmms_tasks"))


def test_the_installed_lmms_eval_has_every_task_and_metric(installed):
    missing = {each.task for each in BENCHMARKS.values()} - set(installed.all_subtasks)
    assert not missing
    for benchmark in BENCHMARKS.values():
        assert benchmark.metric in metrics_near(installed.task_index[benchmark.task]["yaml_path"]), benchmark


def metrics_near(path: str) -> str:
    """The task's YAML and those beside it that it may include."""
    files = Path(path).parent.iterdir()
    return "".join(file.read_text() for file in files if file.suffix == ".yaml" or "_yaml" in file.name)


@pytest.fixture(scope="module")
def model(llm, siglip, colours, tmp_path_factory):
    """A checkpoint that answers questions, in a template with roles."""
    changes = {"version": "qwen_2_5", "max_steps": 48, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    changes |= {"force_resize": "none", "per_device_train_batch_size": 8, **tiny.FULL_STAGE}
    folder = tmp_path_factory.mktemp("lmms") / "model"
    run_stage(*build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, colours, folder, **changes))))
    return folder


@pytest.fixture(scope="module")
def task(colours, tmp_path_factory):
    """The colours' records, and between them one whose image is no image."""
    folder = tmp_path_factory.mktemp("task")
    records = json.loads((colours / "data.json").read_text())
    shutil.copytree(colours / "images", folder / "images")
    (folder / "images/broken.png").write_bytes(b"no image")
    broken = records[0] | {"id": "broken", "image": "broken.png"}
    write_task([*records[:3], broken, *records[3:]], folder / "images", folder)
    return folder


def evaluate(model, task, results, *flags, **environment) -> dict:
    done = run_script(
        "eval", str(model), TASK, "--", "--include_path", str(task), *flags,
        NUM_GPUS="0", RESULTS=str(results), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(results / "hf"),
        MODEL_ARGS="max_num_vistoken=64", PYTHONPATH=str(ROOT), **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answered with nothing" in done.stderr  # the broken image's request
    return json.loads((results / "scores.json").read_text())


@pytest.mark.slow
def test_a_local_task_scores_as_the_project_s_own_exact_match(model, task, colours, tmp_path):
    measurement = evaluate(model, task, tmp_path / "results")
    assert measurement["command"].startswith(f"MODEL_ARGS=max_num_vistoken=64 bash scripts/comp/eval.sh {model} {TASK}")
    scores = measurement["scores"]
    output = tmp_path / "own.jsonl"
    questions = ["--questions", str(colours / "data.json"), "--image-folder", str(colours / "images")]
    held_out(["--model-path", str(model), *questions, "--output", str(output)])
    own = json.loads(summary_path(output).read_text())
    assert own["accuracy"] > 0.5
    assert scores[f"{TASK}/exact_match"] == pytest.approx(own["accuracy"] * own["n"] / (own["n"] + 1), abs=1e-3)


@pytest.mark.slow
def test_two_processes_score_as_one(model, task, tmp_path):
    alone = evaluate(model, task, tmp_path / "one")
    printed = run_script("eval", str(model), TASK, DRY_RUN="1", NUM_GPUS="0").stdout
    command = shlex.split(printed)
    command[command.index("--num_processes") + 1] = "2"
    command += ["--include_path", str(task), "--output_path", str(tmp_path / "two")]
    command[command.index("--model_args") + 1] += ",max_num_vistoken=64"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    environment = clean_environment(PYTHONPATH=str(ROOT), **offline)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "two").rglob("*results.json")
    assert json.loads(file.read_text())["results"][TASK]["exact_match,none"] == pytest.approx(
        alone["scores"][f"{TASK}/exact_match"], abs=1e-3
    )


class Asked:
    """A request as lmms-eval hands it over."""

    def __init__(self, text, images, number, **options):
        visuals = list(images)
        self.args = (text, {"max_new_tokens": 8, "until": ["\n\n"]} | options, lambda doc: visuals, number, "t", "s")


@pytest.fixture(scope="module")
def loaded_plugin(model):
    """The model object itself; a new process would cost more than all its tests."""
    from llava.eval.lmms import LlavaComp

    plugin = LlavaComp(str(model), device="cpu", batch_size=3)
    plugin.task_dict = {"t": {"s": dict.fromkeys(range(20))}}
    return plugin


@pytest.fixture
def plugin(loaded_plugin):
    """It, with nothing asked yet."""
    for record in (loaded_plugin.asked, loaded_plugin.failed, loaded_plugin.first_errors):
        record.clear()
    return loaded_plugin


def test_batches_answer_as_single_requests_do(plugin):
    """Several images, none, and text around a placeholder of the task's own."""
    red, blue = (Image.new("RGB", size, colour) for size, colour in (((64, 48), "red"), ((32, 64), "blue")))
    requests = [
        Asked(tiny.QUESTION, [red], 0),
        Asked(tiny.QUESTION, [blue], 1),
        Asked(tiny.QUESTION, [red, blue], 2),
        Asked("Which colour?", [], 3),
        Asked(f"Look: <image> {tiny.QUESTION}", [blue], 4),
        Asked(tiny.QUESTION, [red], 5, max_new_tokens=2),
    ]
    together = plugin.generate_until(requests)
    assert together == [plugin.generate_until([request])[0] for request in requests]
    assert together[:2] == ["red", "blue"]


def test_what_fails_is_answered_with_nothing_and_the_rest_is_not(plugin, caplog):
    red = Image.new("RGB", (64, 48), "red")
    answers = plugin.generate_until(
        [Asked(tiny.QUESTION, [red], 0), Asked(tiny.QUESTION, ["video.mp4"], 1), Asked(tiny.QUESTION, [red], 99)]
    )
    assert answers == ["red", "", ""]
    assert plugin.failed["t"] == 2
    assert "reads images only" in caplog.text
    plugin.refuse_failed_tasks()


def test_a_task_whose_every_request_failed_is_refused_after_the_last_answer(plugin):
    """And not before: no process may leave the others alone in generate_until."""
    red, bad = Asked(tiny.QUESTION, [Image.new("RGB", (64, 48), "red")], 0), Asked(tiny.QUESTION, ["video.mp4"], 1)
    bad.args = (*bad.args[:4], "u", "s")
    plugin.task_dict["u"] = plugin.task_dict["t"]
    assert plugin.generate_until([red, bad, red, bad]) == ["red", "", "red", ""]
    with pytest.raises(ValueError, match="every one of 2 requests of u failed: ValueError: a visual of u is a str"):
        plugin.refuse_failed_tasks()


def test_few_images_are_open_at_a_time(plugin):
    from llava.eval import lmms

    opened, most = [], 0

    def open_image(_):
        nonlocal most
        image = Image.new("RGB", (64, 48), "red")
        opened.append(weakref.ref(image))
        most = max(most, sum(each() is not None for each in opened))
        return [image]

    requests = [Asked(tiny.QUESTION, [], number % 20) for number in range(40)]
    for request in requests:
        request.args = (*request.args[:2], open_image, *request.args[3:])
    assert plugin.generate_until(requests) == ["red"] * 40
    assert most <= (lmms.BATCHES_OPEN + 1) * plugin.batch_size


def test_a_failed_batch_s_tensors_are_gone_before_its_requests_are_tried_alone(plugin, monkeypatch):
    whole, kept = plugin._generate, []

    def fail_on_many(batch):
        if len(batch) == 1:
            assert kept[0]() is None
            return whole(batch)
        tensor = torch.zeros(9)
        kept.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(plugin, "_generate", fail_on_many)
    image = Image.new("RGB", (64, 48), "red")
    assert plugin.generate_until([Asked(tiny.QUESTION, [image], i) for i in range(2)]) == ["red", "red"]


def test_a_batch_that_fails_is_answered_one_by_one(plugin, monkeypatch):
    whole = plugin._generate
    monkeypatch.setattr(plugin, "_generate", lambda batch: whole(batch) if len(batch) == 1 else 1 / 0)
    images = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue")]
    answers = plugin.generate_until([Asked(tiny.QUESTION, [image], i) for i, image in enumerate(images)])
    assert answers == ["red", "green", "blue"]
    assert not plugin.failed


def test_options_of_the_model(plugin, model):
    from llava.eval.lmms import LlavaComp

    small = LlavaComp(str(model), device="cpu", max_num_vistoken=2, strip_period=True)
    assert (small.image_processor.max_num_vistoken, small.image_processor.min_num_vistoken) == (2, 2)
    assert plugin.image_processor.max_num_vistoken > 2
    assert small._finish("It is red.", {}) == "It is red"
    assert plugin._finish("It is red.\n\nUser: no", {"until": ["\n\n"]}) == "It is red."
