"""What is found before training is what training would skip, told as a table and a report."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from rich.progress import Progress

from llava.data import validate
from llava.data.bad_samples import BadSample
from llava.data.mixture import load_records
from llava.data.validate import main
from tests.llava import tiny
from tests.llava.data_parts import draw, make_dataset, make_record

BAD = {
    "gone": "missing file",
    "cut": "unreadable file",
    "marks": "wrong number of <image>",
    "turns": "bad turns",
    "mute": "no answer",
}


@pytest.fixture
def mixture(tmp_path):
    """Five records of each kind of bad among twenty good ones, from two sources."""
    draw(tmp_path / "images", "a.png")
    whole = draw(tmp_path / "images", "whole.png", (64, 64))
    (tmp_path / "images" / "cut.png").write_bytes((tmp_path / "images" / whole).read_bytes()[:60])
    records = [make_record("<image>\nWhat?", "A square.", image="a.png", id=f"good{number}") for number in range(20)]
    records.insert(1, make_record("<image>", "A.", image="gone.png", id="gone"))
    records.insert(3, make_record("<image>", "A.", image="cut.png", id="cut"))
    records.insert(5, make_record("Which?", "A.", image="a.png", id="marks"))
    text_only = [
        make_record("Hi", "Hello.", id="fine"),
        make_record("Hi", id="mute"),
        make_record("Hi", "A.", id="turns"),
    ]
    text_only[2]["conversations"][1]["from"] = "human"
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, text_only)))
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: a.json, image_folder: images}, {json_path: b.jsonl}]")
    return tmp_path / "mix.yaml"


def run(*arguments) -> tuple[dict, int | str]:
    """The report, and what the command exits with."""
    report = arguments[0].parent / "out" / "report.json"
    status = 0
    try:
        main([*map(str, arguments), "--report", str(report)])
    except SystemExit as error:
        status = error.code
    return json.loads(report.read_text()), status


@pytest.mark.parametrize("workers", [1, 2])
def test_every_bad_sample_is_found_with_its_kind_and_place(mixture, workers, capsys):
    report, status = run(mixture, "--workers", workers, "--max_bad_samples", 0.25)
    assert status == 0
    assert {sample["id"]: sample["kind"] for sample in report["bad_samples"]} == BAD
    assert report["kinds"] == dict.fromkeys(BAD.values(), 1)
    records = load_records(mixture)
    assert (report["records"], report["bad"], report["share"]) == (len(records), 5, 5 / len(records))
    for sample in report["bad_samples"]:
        assert records[sample["index"]]["id"] == sample["id"]
    table = " ".join(capsys.readouterr().out.split())
    assert "5 of 26 samples are bad" in table
    assert "missing file" in table


def test_its_progress_ends_at_the_number_of_samples(mixture, monkeypatch):
    seen = []
    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda *args, **to: (seen.append(to["completed"]), update(*args, **to)))
    monkeypatch.setattr(validate, "RECORDS_AT_A_TIME", 10)
    records = load_records(mixture)
    list(validate.find_bad(make_dataset(records), workers=1))
    assert seen == [10, 20, 26]


def test_it_finds_what_training_skips_for_the_same_reasons(mixture):
    report, _ = run(mixture)
    dataset = make_dataset(load_records(mixture))
    skipped = [
        sample for sample in (dataset[number] for number in range(len(dataset))) if isinstance(sample, BadSample)
    ]
    found = [(sample["id"], sample["reason"], sample["kind"]) for sample in report["bad_samples"]]
    assert found == [(sample.id, sample.reason, sample.kind) for sample in skipped]


def test_more_bad_samples_than_allowed_is_one_line_and_a_failing_exit(mixture):
    command = [sys.executable, "-m", "llava.data.validate", str(mixture), "--max_bad_samples", "0.1", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 5 of 26 samples are bad, more than --max_bad_samples 0.1")
    assert "Traceback" not in done.stderr


def test_what_stops_training_at_the_start_stops_it_too(mixture, capsys):
    (mixture.parent / "b.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as caught:
        main([str(mixture)])
    assert str(caught.value) == f"error: {mixture.parent / 'b.jsonl'}, record 0: has no conversations. " + (
        'Expected "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}].'
    )
    with pytest.raises(SystemExit, match=r"error: .*gone\.yaml"):
        main([str(mixture.parent / "gone.yaml")])


def test_samples_that_are_too_long_need_the_tokenizer(mixture, tmp_path):
    llm = tiny.save_llm(tmp_path / "llm")
    longest = make_record("Hi", "word " * 300, id="long")
    (mixture.parent / "b.jsonl").write_text(json.dumps(longest))
    lengths = ["--tokenizer", llm, "--model_max_length", 200, "--max_num_vistoken"]
    assert "too long" not in run(mixture)[0]["kinds"]
    assert run(mixture, *lengths, 10)[0]["kinds"]["too long"] == 1
    assert run(mixture, *lengths, 199)[0]["kinds"]["too long"] == 21  # every image counts so


def test_images_above_the_limit_are_told(mixture):
    assert run(mixture, "--max_image_pixels", 100)[0]["kinds"]["unusable image"] == 20


def test_an_image_that_would_fill_the_memory_is_told(mixture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert run(mixture)[0]["kinds"]["unusable image"] == 20 + 2  # those with a.png, and the cut one, which is not read
