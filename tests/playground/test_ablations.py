"""The experiments' bookkeeping, and what the text-free pre-training assumes: which block of the other view is which."""

import json
import multiprocessing
import random

import pytest
import torch
from PIL import Image

from playground import pretrain_tower_without_text
from playground.ablations import held_out_sizes, run, runner
from playground.ablations.rows import ROWS, TABLES
from playground.ablations.runner import Row, Unit
from playground.mosaic import BLOCK
from playground.pretrain_tower_without_text import TEMPERATURE, images, place_logits
from playground.splits import TRAIN

LINE = {
    "facts": "0.5",
    "large": "0.25",
    "document": "0.5",
    "chart": "0.5",
    "scene": "0.5",
    "minutes": "1",
    "steps": "1+2",
}
STEPS = {"stage1": 1, "stage2_native": 2}


def line(row, seed, **values):
    return LINE | {"row": row, "seed": str(seed)} | values


@pytest.fixture
def measured(monkeypatch):
    """Units that were trained, which takes minutes, in place of training them."""
    units = []

    def measure(unit, work):
        units.append(unit)
        return line(unit.row.name, unit.seed)

    monkeypatch.setattr(runner, "measure", measure)
    return units


def test_what_the_file_holds_is_not_run_again(tmp_path, measured):
    results = tmp_path / "deep/results.csv"
    units = [Unit(Row(name, "tower"), seed, STEPS) for seed in (0, 1) for name in ("a", "b, with a comma")]
    runner.append(results, line("a", 0, facts="0.75"))
    runner.run_units(units, results, tmp_path / "work")
    assert measured == units[1:]
    runner.run_units(units, results, tmp_path / "work")
    assert measured == units[1:]
    found = {(each["row"], each["seed"]): each["facts"] for each in runner.read(results)}
    assert found == {
        ("a", "0"): "0.75",
        ("b, with a comma", "0"): "0.5",
        ("a", "1"): "0.5",
        ("b, with a comma", "1"): "0.5",
    }


def test_other_numbers_of_steps_are_another_unit(tmp_path, measured):
    results = tmp_path / "results.csv"
    runner.append(results, line("a", 0, steps="1+3"))
    unit = Unit(Row("a", "tower"), 0, STEPS)
    runner.run_units([unit], results, tmp_path / "work")
    assert measured == [unit]


def _hold(folder, held, release):
    with runner._claimed(folder):
        held.set()
        release.wait(60)


def test_a_unit_that_another_process_runs_is_left_to_it(tmp_path, measured):
    unit = Unit(Row("a", "tower"), 0, STEPS)
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / unit.folder, held, release))
    other.start()
    try:
        assert held.wait(60)
        runner.run_units([unit], tmp_path / "results.csv", tmp_path)
        assert not measured
        other.kill()
        other.join()
        runner.run_units([unit], tmp_path / "results.csv", tmp_path)
        assert measured == [unit]
    finally:
        other.kill()


def test_table_gives_mean_and_spread_over_seeds(tmp_path, capsys):
    results = tmp_path / "results.csv"
    for seed, facts in enumerate(("0.5", "0.6", "0.7")):
        runner.append(results, line("no loss", seed, facts=facts, steps="1+1+1"))
    runner.append(results, line("no loss", 0, facts="0.9", steps="9+9+9"))
    run.main(["tab6", "--report", "--results", str(results), "--steps", "1", "1", "1", "--work", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert [text for text in printed if text.startswith("| no loss | 3 | 60.0 ± 10.0 | 25.0 ± 0.0 |")]
    assert len(printed) == 6
    assert (tmp_path / "tab6.png").stat().st_size > 1000


def test_a_pair_is_compared_over_the_seeds_that_both_have(tmp_path, capsys):
    steps = dict(zip(runner.STEPS, (1, 1, 1), strict=True))
    for name, hits in (("C-RoPE, 192 px", (0, 1)), ("C-RoPE, native", (1, 1))):
        for seed in (0, 1):
            file = runner.captions_of(Unit(ROWS[name], seed, steps), tmp_path)
            file.parent.mkdir(parents=True)
            row = {
                "id": "a",
                "kind": "scene",
                "image": "a.png",
                "width": 9,
                "height": 9,
                "question": "?",
                "answer": "x y",
            }
            row |= {"question": "?", "answer": "x y", "prediction": "", "facts": ["x", "y"], "hits": list(hits)}
            file.write_text(json.dumps(row) + "\n")
    run.main(
        ["tab5a", "--report", "--results", str(tmp_path / "r.csv"), "--steps", "1", "1", "1", "--work", str(tmp_path)]
    )
    assert (
        "C-RoPE, native against C-RoPE, 192 px, 2 seed(s), 4 facts: 100.0 % against 50.0 %" in capsys.readouterr().out
    )


def test_every_row_stands_in_a_table_and_changes_something_of_its_own():
    assert set(ROWS) == {row for rows in TABLES.values() for row in rows}
    told_apart = {(row.tower, row.flags, tuple(sorted(row.in_stage.items()))) for row in ROWS.values()}
    assert len(told_apart) == len(ROWS)


def test_pictures_by_area_have_it_and_no_size_of_the_training(tmp_path):
    (tmp_path / "images").mkdir()
    records = json.loads(held_out_sizes.draw(tmp_path, per_area=4).read_text())
    times = {"x0.5": 0.5, "x1": 1, "x2": 2, "x4": 4}
    assert [record["kind"] for record in records] == [area for area in times for _ in range(4)]
    for record in records:
        width, height = Image.open(tmp_path / record["image"]).size
        assert width * height / 128**2 == pytest.approx(times[record["kind"]], rel=0.1)
        assert (width, height) not in TRAIN.sizes
        assert record["facts"]


class _Pixels:
    """Takes a block's ink itself for its vector."""

    def block_vectors(self, pixels):
        blocks = pixels.unflatten(2, (-1, BLOCK)).unflatten(4, (-1, BLOCK)).permute(0, 2, 4, 1, 3, 5)
        flat = blocks.flatten(3).flatten(1, 2)
        return torch.nn.functional.normalize(flat - flat.mean(dim=-1, keepdim=True), dim=-1)


@pytest.mark.parametrize("seed", range(4))
def test_the_block_to_find_is_the_one_that_shows_the_same(seed, monkeypatch):
    monkeypatch.setattr(pretrain_tower_without_text, "_JITTER", 0)
    logits, place = place_logits(_Pixels(), images(random.Random(0), TRAIN, 4), seed)
    cosines = logits * TEMPERATURE
    rows = torch.arange(len(place))
    assert len(place) > 16
    assert cosines[rows, place].mean() > 0.7  # noise takes the rest
    assert cosines[rows, place.roll(1)].mean() < 0.3


@pytest.mark.slow
def test_a_unit_trains_captions_and_leaves_its_line(tmp_path):
    results = tmp_path / "results.csv"
    command = ["--only", "no loss", "--seeds", "0", "--steps", "2", "2", "2"]
    run.main([*command, "--results", str(results), "--work", str(tmp_path / "work")])
    (found,) = runner.read(results)
    assert (found["row"], found["steps"]) == ("no loss", "2+2+2")
    assert 0 <= float(found["facts"]) < 0.2
