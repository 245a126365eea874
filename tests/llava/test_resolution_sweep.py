"""Scores over the budget of visual tokens."""

import pytest
from PIL import Image

from llava.eval import resolution_sweep
from llava.eval.held_out import main as held_out
from llava.eval.resolution_sweep import read_lines
from llava.eval.results import read_rows
from tests.scripts.launching import ROOT, run_script

pytest_plugins = ["tests.llava.eval_parts"]


def sweep(run, colours, output, *budgets, **more):
    flags = ["--questions", str(colours / "data.json"), "--image-folder", str(colours / "images")]
    words = [str(word) for budget in budgets for word in [budget]]
    flags += [f"--{name}={value}" for name, value in more.items()]
    resolution_sweep.main(["--model-path", str(run / "stage2_native"), *flags, "--max-num-vistoken", *words,
                           "--output", str(output)])  # fmt: skip
    return read_lines(output.with_suffix(".csv"))


def test_a_line_for_every_budget_and_kind_and_a_picture(run, colours, tmp_path):
    lines = sweep(run, colours, tmp_path / "out/sweep", 16, 4)
    assert [(line["max_num_vistoken"], line["score"]) for line in lines] == [
        ("4", "all"), ("4", "cold"), ("4", "warm"), ("16", "all"), ("16", "cold"), ("16", "warm"),
    ]  # fmt: skip
    assert [line["n"] for line in lines[:3]] == ["16", "8", "8"]
    tokens = {line["max_num_vistoken"]: float(line["visual_tokens"]) for line in lines}
    assert 1 < tokens["4"] <= 4 < tokens["16"] <= 16
    with Image.open(tmp_path / "out/sweep.png") as picture:
        assert picture.width > 500


def test_at_the_model_s_own_budget_it_is_the_held_out_score(run, colours, tmp_path):
    (line, *_) = sweep(run, colours, tmp_path / "sweep", 1024)
    flags = ["--questions", str(colours / "data.json"), "--image-folder", str(colours / "images")]
    held_out(["--model-path", str(run / "stage2_native"), *flags, "--output", str(tmp_path / "own.jsonl")])
    rows = read_rows(tmp_path / "own.jsonl")
    assert float(line["value"]) == pytest.approx(100 * sum(row["correct"] for row in rows) / len(rows), abs=0.01)


def test_budgets_that_are_there_are_not_run_again(run, colours, tmp_path, monkeypatch):
    sweep(run, colours, tmp_path / "sweep", 4)
    asked = []
    whole = resolution_sweep.sweep_questions
    monkeypatch.setattr(resolution_sweep, "sweep_questions", lambda args, new: asked.append(new) or whole(args, new))
    lines = sweep(run, colours, tmp_path / "sweep", 4, 8)
    assert asked == [[8]]
    assert {line["max_num_vistoken"] for line in lines} == {"4", "8"}


def test_budgets_of_another_measurement_are_refused(run, colours, tmp_path):
    sweep(run, colours, tmp_path / "sweep", 4)
    with pytest.raises(SystemExit, match="limit was None, is now 3: choose another --output"):
        sweep(run, colours, tmp_path / "sweep", 4, 8, limit=3)


def test_a_stop_loses_no_budget_that_is_measured(run, colours, tmp_path, monkeypatch):
    whole = resolution_sweep.checkpoint_image_processor

    def stop_at_8(*args, **options):
        if options["max_num_vistoken"] == 8:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(resolution_sweep, "checkpoint_image_processor", stop_at_8)
    with pytest.raises(KeyboardInterrupt):
        sweep(run, colours, tmp_path / "sweep", 4, 8)
    assert {line["max_num_vistoken"] for line in read_lines(tmp_path / "sweep.csv")} == {"4"}


def test_questions_without_their_images_are_one_line(run, tmp_path):
    with pytest.raises(SystemExit, match="--questions needs --image-folder"):
        resolution_sweep.main(
            ["--model-path", "x", "--questions", "y", "--max-num-vistoken", "4", "--output", str(tmp_path / "z")]
        )


@pytest.mark.parametrize(
    ("table", "rows", "stages"), [("tab6", ["none", "all"], 4), ("tab8", ["with"], 3), ("tab5b", [], 2)]
)
def test_a_table_s_script_trains_scores_and_renders_its_rows(table, rows, stages):
    done = run_script("ablation", table, *rows, DRY_RUN="1", NUM_GPUS="8")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    count = len(rows) or 6
    trained = [line for line in lines if "llava.train.train_mem" in line]
    assert len(trained) == stages * count
    assert lines[-1] == f"python -m llava.eval.tables --tables {table} --output runs/{table}/table"
    scored = [line for line in lines[:-1] if "llava.train.train_mem" not in line]
    if table == "tab8":
        tasks = [("classification", 224), ("classification", 448), ("segmentation", 504), ("segmentation", 672)]
        for line, (task, size) in zip(scored, tasks, strict=True):
            assert f"-m llava.eval.{task} --tower comp-siglip:runs/tab8/with/stage2_native" in line
            assert f"--size {size} " in line
            assert line.endswith("--row tab8/with")
    else:
        assert all("ai2d,chartqa,docvqa_val" in line for line in scored)
        assert len(scored) == count


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "TABLE is missing"), (["tab77"], "there is no scripts/comp/presets/tab77.sh"),
     (["embedded"], "has no rows"), (["tab6", "some"], "tab6 has the rows: none fixed all")],
)  # fmt: skip
def test_a_table_that_is_not_there_is_one_line(words, said):
    done = run_script("ablation", *words, DRY_RUN="1", NUM_GPUS="8")
    assert done.returncode != 0
    assert said in done.stderr
    assert (ROOT / "scripts/comp/ablation.sh").stat().st_mode & 0o100
