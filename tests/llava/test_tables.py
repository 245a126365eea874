"""Measured scores beside the paper's."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.eval import tables
from llava.eval.benchmarks import BENCHMARKS, TAB1, TAB2
from llava.eval.measurement import make_measurement, write_measurement
from llava.eval.tables import cell, read_paper
from llava.eval.text_table import NOT_MEASURED
from tests.scripts.launching import PRESETS, rows_of


def measure(folder, name, scores, rows, label="mine"):
    path = folder / f"{name}.json"
    write_measurement(path, make_measurement(label, scores, rows=rows, command=["python", "-m", "x|y"], details={}))
    return str(path)


def test_numbers_of_the_paper():
    """Some of each table, typed from the paper a second time."""
    paper = read_paper()
    found = {(name, row.id): row.paper for name, each in paper.items() for row in each.rows}
    assert list(found["tab1", "comp_1b_siglip"].values()) == [66.7, 75.9, 61.9, 50.1, 60.4, 33.0, 56.4, 58.3]
    assert found["tab1", "comp_7b_comp_siglip"]["docvqa"] == 92.3
    assert "gqa" not in found["tab1", "llava_ov_7b"]
    assert list(found["tab2", "comp_siglip"].values()) == [61.0, 62.5, 34.0, 26.0, 25.0, 74.3, 1543]
    assert list(found["tab3a", "dinov2"].values()) == [86.3, 87.6]
    assert list(found["tab3b", "comp_aimv2"].values()) == [51.0, 51.8]
    assert list(found["tab4", "10"].values()) == [60.0, 66.1, 71.0]
    assert found["tab5a", "rope_768"]["chartqa"] == 8.24
    assert list(found["tab5b", "alignment"].values()) == [52.3, 46.4, 43.4]
    assert list(found["tab6", "all"].values()) == [54.1, 60.2, 67.5]
    assert found["tab7", "comp_1b_clip"]["docvqa"] == 78.6
    assert list(found["tab8", "without"].values()) == [86.0, 87.0, 49.2, 48.9]
    assert list(found["tab9", "qwen2"].values()) == [63.9, 76.7]


def test_columns_are_scores_that_something_measures():
    paper = read_paper()
    assert tuple(paper["tab1"].columns) == TAB1
    assert tuple(paper["tab2"].columns) == TAB2
    probes = {"classification_224", "classification_448", "segmentation_504", "segmentation_672"}
    assert {column for each in paper.values() for column in each.columns} <= BENCHMARKS.keys() | probes


def test_rows_are_the_presets_that_train_them():
    paper = read_paper()
    for name in ("tab4", "tab5a", "tab5b", "tab6", "tab8", "tab9"):
        assert set(rows_of(name)) <= {row.id for row in paper[name].rows}, name
    trained = {row.id for name in ("tab1", "tab7") for row in paper[name].rows if row.id.startswith("comp_")}
    assert trained <= set(PRESETS)


@pytest.mark.parametrize(
    ("paper", "measured", "text"),
    [
        (66.7, 66.1, "66.7 → 66.1 (-0.6)"),
        (None, 3.14, "3.1"),
        (None, 0.7708, "0.771"),
        (1543, None, "1543"),
        (None, None, NOT_MEASURED),
    ],
)
def test_a_cell(paper, measured, text):
    assert cell(paper, measured) == text


def test_a_measurement_stands_in_every_row_that_it_names(tmp_path, capsys):
    rows = ["tab1/comp_1b_clip", "tab7/comp_1b_clip"]
    one = measure(tmp_path, "one", {"chartqa": 60.0, "docvqa": 79.0}, rows, label="runs/clip")
    tables.main([one])
    text = capsys.readouterr().out
    assert "| CLIP-Large | 61.6 | 67.3 → 60.0 (-7.3) | 78.6 → 79.0 (+0.4) | 33.1 |" in text
    assert "| runs/clip | 60.0 | 79.0 |" in text  # Tab. 1 has no CLIP
    assert "python -m 'x\\|y'" in text
    assert "tab3a" not in text


def test_the_newest_measurement_counts_and_others_are_listed(tmp_path, capsys):
    files = [measure(tmp_path, str(score), {"chartqa": score}, ["tab9/qwen2"]) for score in (1.0, 2.0)]
    for number, file in enumerate(files):
        content = json.loads(Path(file).read_text()) | {"time": f"2026-01-0{number + 1}"}
        Path(file).write_text(json.dumps(content))
    other = measure(tmp_path, "other", {"playground_qa/exact_match": 0.7}, [], label="quickstart")
    tables.main([files[1], other, files[0]])
    text = capsys.readouterr().out
    assert "63.9 → 2.0 (-61.9)" in text
    assert "## own: Measured, and not in the paper\n\n|  | playground_qa/exact_match |" in text
    assert "| quickstart | 0.700 |" in text


def test_a_page_and_pictures(tmp_path):
    one = measure(tmp_path, "one", {"chartqa": 60.0}, ["tab9/qwen2"], label="<b>")
    tables.main([one, "--output", str(tmp_path / "out/results")])
    assert "63.9 → 60.0" in (tmp_path / "out/results.md").read_text()
    page = (tmp_path / "out/results.html").read_text()
    assert "&lt;b&gt;" in page
    assert "http" not in page
    with Image.open(tmp_path / "out/results-tab9.png") as picture:
        assert picture.width > 300
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "results-tab9.png", "results.html", "results.md",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"rows": []}', "is no measurement"),
        ("{", "malformed JSON"),
        ('{"label": "m", "rows": ["tab77/x"], "scores": {}, "command": "", "code": {}}', "--row tab77/x: expected"),
    ],
)
def test_a_mistake_is_one_line(content, said, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SystemExit, match=said):
        tables.main([str(tmp_path / "x.json")])


def test_an_unknown_table_is_one_line():
    with pytest.raises(SystemExit, match=r"--tables tab99: unknown\. Known: tab1"):
        tables.main(["--tables", "tab99"])


def test_the_own_table_alone_under_a_name_with_a_dot(tmp_path):
    both = [measure(tmp_path, "own", {"mine": 70.0}, []), measure(tmp_path, "qwen2", {"chartqa": 1.0}, ["tab9/qwen2"])]
    tables.main([*both, "--tables", "own", "--output", str(tmp_path / "out/v1.0")])
    assert "tab9" not in (tmp_path / "out/v1.0.md").read_text()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"v1.0.md", "v1.0.html", "v1.0-own.png"}
