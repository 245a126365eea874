"""The quickstart as a stranger runs it, from a fresh copy of the repository to the report; and what it must reach.

Some 20 minutes on two cores. The bars are the main job's: the model answers, by looking, and native resolution shows.
"""

import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from llava.eval.results import BLANK, CAPTIONS, QUESTIONS, RANDOM_TOWER, STAGE_TITLES, STAGES, UNTRAINED
from llava.eval.run_results import read_run
from llava.eval.scoring import accuracy, accuracy_by
from tests.scripts.launching import ROOT, clean_environment

NEEDED = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "comp_patches", "llava", "playground", "scripts")
TIMEOUT = 2 * 60 * 60  # seconds; the tests beside it take one of the two cores
LAST = "stage3_sft"


def layered_environment(folder: Path) -> Path:
    """A virtual environment that has the running one's packages, and into which the copy installs itself."""
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "running.pth").write_text(
        "".join(f"{path}\n" for path in dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib"))))
    )
    return folder


def copy_repository(folder: Path) -> Path:
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.slow
def test_a_fresh_copy_learns_to_read_in_one_command(tmp_path):
    """One test, since parallel pytest would train once more for each test that wants to look."""
    copy, environment = copy_repository(tmp_path / "copy"), layered_environment(tmp_path / "environment")
    path = f"{environment / 'bin'}:{clean_environment()['PATH']}"
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=copy,
        env=clean_environment(VIRTUAL_ENV=str(environment), PATH=path),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = read_run(copy / "runs/embedded")
    check_it_prints_the_table_of_stages_and_leaves_the_report(done.stdout, results)
    check_it_answers_held_out_questions_and_only_by_looking(results)
    check_before_stage_one_and_without_its_tower_it_guesses(results)
    check_native_resolution_reads_large_images_that_the_fixed_stage_does_not(results)


def share(rows) -> float:
    """Of the questions or facts, those that are right."""
    assert rows, "not evaluated"
    return accuracy(rows)["accuracy"]


def check_it_prints_the_table_of_stages_and_leaves_the_report(stdout, results):
    lines = [re.split(r"\s{2,}", line.strip()) for line in stdout.splitlines()]
    table = {cells[0]: cells[1:] for cells in lines}
    assert table["stage"] == [
        "steps",
        "loss",
        "alignment",
        "decoding",
        "exact match",
        "caption facts",
        "of large images",
    ]
    for stage in STAGES:
        steps, loss, _, decoding, *scores = table[STAGE_TITLES[stage]]
        assert int(steps) > 0
        assert "→" in loss
        assert "→" in decoding
        assert any(score.endswith("%") for score in scores), f"no held-out score for {stage}"
    assert (results.run / "report.html").stat().st_size > 100_000
    assert "report.html" in stdout


def check_it_answers_held_out_questions_and_only_by_looking(results):
    seen, blank = results.get(QUESTIONS, LAST), results.get(QUESTIONS, LAST, BLANK)
    assert len(seen) >= 1000
    assert share(seen) >= 0.60
    with_blank = accuracy_by(blank, lambda row: row["kind"])
    kinds = accuracy_by(seen, lambda row: row["kind"])
    assert len(kinds) >= 4
    for kind, scores in kinds.items():
        assert scores["accuracy"] >= 1.5 * with_blank[kind]["accuracy"], kind


def check_before_stage_one_and_without_its_tower_it_guesses(results):
    before, before_blank = results.get(QUESTIONS, UNTRAINED), results.get(QUESTIONS, UNTRAINED, BLANK)
    assert abs(share(before) - share(before_blank)) <= 0.05
    no_tower, blank = results.get(QUESTIONS, LAST, RANDOM_TOWER), results.get(QUESTIONS, LAST, BLANK)
    assert share(no_tower) <= share(blank) + 0.05


def check_native_resolution_reads_large_images_that_the_fixed_stage_does_not(results):
    comparison = results.native_against_fixed()
    assert comparison.num_images >= 100
    assert comparison.difference > 0
    assert comparison.sign_p < 0.05
    assert share(results.get(CAPTIONS, "stage2_fixed")) < share(results.get(CAPTIONS, "stage2_native"))
