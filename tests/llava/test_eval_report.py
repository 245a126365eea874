"""The report: one file, everything escaped, nothing missing that was measured."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from llava.eval.charts import bar_chart, loss_chart, nice_ticks
from llava.eval.held_out import main as evaluate
from llava.eval.history import StageHistory, read_histories, reported_names
from llava.eval.models import load_checkpoint
from llava.eval.report import main
from llava.eval.report_page import pick
from llava.eval.results import read_rows, result_path, write_rows
from llava.inspection import token_layout, vocabulary, word_map
from llava.mm_utils import load_image

pytest_plugins = ["tests.llava.eval_parts"]
EVIL = "<script>alert('x')</script> & <b>\""


class Tags(HTMLParser):
    """Every tag with its attributes; unbalanced ones fail."""

    def __init__(self, text):
        super().__init__()
        self.seen, self._open = [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


@pytest.fixture(scope="module")
def reported(run, colours, tmp_path_factory):
    """A copy of the run with evaluations, answers that try to break out of the page among them, and its report."""
    folder = tmp_path_factory.mktemp("reported") / "tiny <run>"
    shutil.copytree(run, folder)
    model = [
        "--model-path",
        str(run / "stage2_native"),
        "--image-folder",
        str(colours / "images"),
        "--fixed-size",
        "32",
    ]
    for task, flag, condition in (
        ("qa", "questions", None), ("qa", "questions", "blank"), ("captions", "captions", None),
    ):  # fmt: skip
        output = ["--output", str(result_path(folder, task, "stage2_native", condition)), "--conv-mode", "plain"]
        evaluate([*model, f"--{flag}", str(colours / "data.json"), *output, *(["--blank"] if condition else [])])
    captions = read_rows(result_path(folder, "captions", "stage2_native"))
    worse = [row | {"hits": [False]} for row in captions]
    for stage in ("stage1", "stage2_fixed"):
        write_rows(result_path(folder, "captions", stage), worse)
    questions = read_rows(result_path(folder, "qa", "stage2_native"))
    rows = [row | {"question": EVIL, "prediction": EVIL, "kind": EVIL} for row in questions[:8]] + questions[8:]
    write_rows(result_path(folder, "qa", "stage2_native"), rows)
    write_rows(result_path(folder, "qa", "untrained"), [row | {"correct": False} for row in rows])
    main(["--run", str(folder)])
    return folder


def test_the_page_is_one_file_with_everything_escaped(reported):
    text = (reported / "report.html").read_text()
    tags = Tags(text).seen
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "base", "object"}
    assert EVIL not in text
    assert "&lt;script&gt;alert(" in text
    for tag, attributes in tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:image/").startswith("data:image/"), (tag, attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)


def test_the_page_shows_curves_scores_images_and_words(reported):
    text = (reported / "report.html").read_text()
    for name in ("loss", "loss_decoding", "loss_alignment", "alignment_target_entropy"):
        assert f"<code>{name}</code>" in text
    assert text.count('<article class="card">') == 12
    assert text.count('class="words"') == 4
    assert text.count('class="cell"') >= 4 * 4
    assert "blank images" in text
    assert "McNemar" in text


def test_the_table_in_the_terminal(reported, capsys):
    main(["--run", str(reported), "--no-word-map"])
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("  ")[0]: re.split(r"\s{2,}", line.strip()) for line in lines}
    assert table["stage"][1:] == [
        "steps", "loss", "alignment", "decoding", "exact match", "caption facts", "of large images",
    ]  # fmt: skip
    assert table["I"][1] == "2"
    assert table["I"][-3:] == ["–", "0.0 %", "0.0 %"]  # noqa: RUF001  asked no questions
    native = table["II native"]
    assert native[1] == "32"
    assert native[3] == "–"  # noqa: RUF001  no alignment loss in this stage
    assert native[5:] == ["100.0 %", "100.0 %", "100.0 %"]
    assert table["II fixed"][-2:] == ["0.0 %", "0.0 %"]
    assert table["before Stage I"][1:6] == ["0", "–", "–", "–", "0.0 %"]  # noqa: RUF001
    titles = next(line for line in lines if line.startswith("kind"))
    assert re.split(r"\s{2,}", titles) == ["kind", "n", "before", "after", "after, blank"]
    before, after, blank = table["all"][2:]
    assert (before, after) == ("0.0 %", "100.0 %")
    assert float(blank.split()[0]) <= 50
    assert any(line.startswith("McNemar: 0 right in A alone") for line in lines)


def test_a_run_without_evaluations_still_has_a_report(run, tmp_path):
    folder = tmp_path / "run"
    (folder / "stage1").mkdir(parents=True)
    shutil.copy(run / "stage1" / "trainer_state.json", folder / "stage1")
    main(["--run", str(folder)])
    text = (folder / "report.html").read_text()
    assert "<h2>Losses</h2>" in text
    assert "<h2>Answers</h2>" not in text


def test_mistakes_are_one_line(reported, tmp_path):
    (tmp_path / "bad" / "stage1").mkdir(parents=True)
    (tmp_path / "bad" / "stage1" / "trainer_state.json").write_text("{")
    for arguments, message in (
        (["--run", str(tmp_path / "no")], "no such folder"),
        (["--run", str(tmp_path)], "neither a stage"),
        (["--run", str(tmp_path / "bad")], "trainer_state.json"),
        (["--run", str(reported), "--data", str(tmp_path / "no")], "--data"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert message in exit_info.value.code
        assert "\n" not in exit_info.value.code


def test_histories_hold_every_named_value_of_every_logged_step(run):
    first, second = read_histories(run)
    log = json.loads((run / "stage1" / "trainer_state.json").read_text())["log_history"]
    logged = [(entry["step"], entry["loss_alignment"]) for entry in log if "loss_alignment" in entry]
    assert first.curves["loss_alignment"] == logged
    assert (first.steps, second.steps) == (2, 32)
    assert "loss_alignment" not in second.curves
    assert not {"learning_rate", "epoch", "grad_norm"} & second.curves.keys()
    assert reported_names([StageHistory("stage1", 2, {"flat": [(1, 4.0), (2, 4.0)]})]) == []


def test_axes_have_round_numbers_around_the_values():
    assert nice_ticks(0.4, 3.7) == [0, 1, 2, 3, 4]
    assert nice_ticks(7.1, 7.9) == [7, 7.2, 7.4, 7.6, 7.8, 8] or len(nice_ticks(7.1, 7.9)) <= 6
    assert nice_ticks(5, 5)[0] <= 5 <= nice_ticks(5, 5)[-1]
    assert nice_ticks(-2, 2) == [-2, -1, 0, 1, 2]


def test_a_curve_of_nothing_but_nan_is_no_chart():
    assert loss_chart("loss", [StageHistory("stage1", 2, {"loss": [(1, float("nan"))]})]) == ""
    assert "NaN" not in loss_chart("loss", [StageHistory("stage1", 2, {"loss": [(1, float("inf")), (2, 1.0)]})])
    assert bar_chart([("all", [("I", "", None)])]) == ""


def test_pick_takes_the_kinds_in_turn_and_every_image_once():
    rows = [{"id": f"{n}", "kind": "abc"[n % 3], "image": f"{n // 2}.png"} for n in range(30)]
    picked = pick(rows, 9)
    assert len({row["image"] for row in picked}) == 9
    assert [row["kind"] for row in picked[:3]] == ["a", "b", "c"]
    assert pick(rows[::-1], 9) == picked


def test_token_layout_of_merged_blocks_and_of_single_patches_in_block_order():
    assert token_layout([1, 4, 6], 4, 2) == (2, 3, [[0, 1, 2], [3, 4, 5]])
    assert token_layout([1, 2, 4], 1, 2) == (2, 4, [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_a_word_map_names_the_words_nearest_to_what_the_llm_is_given(run, colours):
    loaded = load_checkpoint(str(run / "stage2_native"), device="cpu")
    image = load_image(colours / "images" / "0.png")
    ids, texts = vocabulary(loaded.tokenizer)
    assert "<|im_end|>" not in texts
    assert all(any(letter.isalnum() for letter in text) for text in texts)
    found = word_map(loaded.model, loaded.image_processor, image, (ids, texts))
    assert (found.rows, found.columns) == (3, 4)
    tokens = loaded.model.get_model().encode_images(**loaded.image_processor([image]))
    scores = torch.nn.functional.cosine_similarity(tokens[6], loaded.model.get_output_embeddings().weight[ids], dim=-1)
    word, cosine = found.words[1][2][0]
    assert word == texts[int(scores.argmax())]
    assert cosine == pytest.approx(scores.max().item(), abs=1e-5)
