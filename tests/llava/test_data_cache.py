"""The first pass over a source: made once, anew when the source changes, whole or not at all."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys

import pytest

from llava.data import cache
from llava.data.mixture import load_records
from tests.llava.data_parts import draw, make_dataset, make_record

LOGGER = "llava.data.cache"


def write(path, texts) -> None:
    path.write_text(json.dumps([make_record("Hi", text, id=text) for text in texts]))


def ids_of(records) -> list[str]:
    return [record["id"] for record in records]


def passes(caplog) -> int:
    return sum("records read in" in message for message in caplog.messages)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger=LOGGER)
    return caplog


def test_a_later_start_reads_the_cache_and_a_changed_file_is_read_anew(tmp_path, log):
    write(tmp_path / "a.json", "abc")
    for _ in range(2):
        assert ids_of(load_records(tmp_path / "a.json")) == ["a", "b", "c"]
    assert passes(log) == 1
    before = load_records(tmp_path / "a.json")
    stat = (tmp_path / "a.json").stat()
    write(tmp_path / "a.json", "xyz")  # of the same size
    os.utime(tmp_path / "a.json", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert ids_of(load_records(tmp_path / "a.json")) == ["x", "y", "z"]
    assert passes(log) == 2
    assert ids_of(before) == ["a", "b", "c"]  # a run that goes on keeps what it began with


def the_cache(folder):
    (file,) = folder.glob("*.records")
    return file


@pytest.mark.parametrize("left", [0, 5, 200, -1])
def test_a_cache_that_is_cut_short_is_made_anew(tmp_path, log, left):
    write(tmp_path / "a.json", "abc")
    load_records(tmp_path / "a.json")
    file = the_cache(tmp_path / ".llava_cache")
    file.write_bytes(file.read_bytes()[:left])
    assert ids_of(load_records(tmp_path / "a.json")) == ["a", "b", "c"]
    assert passes(log) == 2


def test_a_first_pass_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "a.json").write_text('[{"id": 1, "conversations": [1]}, 3]')
    with pytest.raises(ValueError, match="record 1: expected an object"):
        load_records(tmp_path / "a.json")
    assert [file.suffix for file in (tmp_path / ".llava_cache").iterdir()] in ([], [".lock"])


def test_what_a_killed_first_pass_left_is_gone_after_the_next(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from llava.data import cache;"
        "cache._copy = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "cache.load_source(Path(os.sys.argv[1]))"
    )
    write(tmp_path / "a.json", "abc")
    write(tmp_path / "b.json", "ab")
    for name in ("a.json", "b.json"):
        killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], timeout=120, check=False)
        assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / ".llava_cache"
    left = sorted(file.name for file in folder.iterdir() if file.name.startswith("."))
    assert [name[:7] for name in left] == [".a.json", ".b.json"]
    load_records(tmp_path / "a.json")
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == left[1:], "another's is not touched"


def test_another_layout_is_made_anew(tmp_path, log, monkeypatch):
    write(tmp_path / "a.json", "abc")
    load_records(tmp_path / "a.json")
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    load_records(tmp_path / "a.json")
    assert passes(log) == 2


def test_processes_that_start_together_make_it_once(tmp_path):
    write(tmp_path / "a.json", map(str, range(2000)))
    code = (
        "import logging, sys; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "from llava.data.mixture import load_records\n"
        "print(input() + str(len(load_records(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.json")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(3)]
    outputs = [process.communicate("found ", timeout=100) for process in running]
    assert [out for out, _ in outputs] == ["found 2000\n"] * 3
    assert sum("2000 records read in" in log for _, log in outputs) == 1


def test_the_variable_says_where_it_lies(tmp_path, monkeypatch, log):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.json", "abc")
    monkeypatch.setenv("LLAVA_DATA_CACHE", str(tmp_path / "elsewhere"))
    load_records(tmp_path / "data" / "a.json")
    assert the_cache(tmp_path / "elsewhere").stat().st_size > 0
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["a.json"]


def test_beside_data_that_cannot_be_written_to_it_lies_in_the_home(tmp_path, monkeypatch, log):
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.json", "abc")
    (data / ".llava_cache").write_text("a file, so that no folder can be made")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for _ in range(2):
        assert ids_of(load_records(data / "a.json")) == ["a", "b", "c"]
    assert the_cache(tmp_path / "home" / "llava" / "data")
    assert passes(log) == 1


def test_records_are_a_sequence_that_travels_light(tmp_path):
    write(tmp_path / "a.json", map(str, range(1000)))
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: a.json, image_folder: x}, {json_path: a.json}]")
    records = load_records(tmp_path / "mix.yaml")
    sent = pickle.dumps(records)
    assert len(sent) < 2000
    found = pickle.loads(sent)
    assert list(found) == list(records)
    assert found[-1] == records[1999]
    assert ids_of(found[998:1002]) == ["998", "999", "0", "1"]
    assert ("image_folder" in found[999], "image_folder" in found[1000]) == (True, False)
    for index in (2000, -2001):
        with pytest.raises(IndexError):
            records[index]


OUTSIDE = ["../secret.png", "/etc/passwd", "sub/../../secret.png", ".", "a/..", "../images2/a.png"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("field", ["image", "video"])
def test_a_path_out_of_the_folder_stops_at_the_start_from_the_cache_too(tmp_path, name, field):
    """Among absolute paths that are inside, which the first pass sums up by their common folder."""
    images = tmp_path / "images"
    draw(images, "sub/a.png")
    records = [
        make_record("<image>", "A.", image=str(images / "sub" / "a.png"), id=f"fine{number}") for number in (1, 2)
    ]
    records.insert(1, make_record("<image>", "A.", id="bad") | {field: name})
    (tmp_path / "a.json").write_text(json.dumps(records))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"record bad: image path .* lies outside --image_folder"):
            make_dataset(load_records(tmp_path / "a.json"), images)


def test_only_drawn_records_are_held_to_the_folder(tmp_path):
    images = tmp_path / "images"
    draw(images, "a.png")
    names = ["a.png", str(images / "a.png"), "b/../a.png", "/etc/passwd", "../secret.png"]
    records = [make_record("<image>", "A.", image=name, id=name) for name in names]
    (tmp_path / "a.json").write_text(json.dumps(records))
    mixture = "datasets: [{json_path: a.json, image_folder: images, sampling_strategy: 'first:%d'}]"
    (tmp_path / "mix.yaml").write_text(mixture % 3)
    dataset = make_dataset(load_records(tmp_path / "mix.yaml"))
    assert [dataset[number]["id"] for number in range(3)] == names[:3]
    (tmp_path / "mix.yaml").write_text(mixture % 4)
    with pytest.raises(ValueError, match="record /etc/passwd"):
        make_dataset(load_records(tmp_path / "mix.yaml"))


def test_a_folder_that_is_missing_stops_at_the_start_from_the_cache_too(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([make_record("Hi", "A."), make_record("<image>", "A.", image="a.png")]))
    records = load_records(tmp_path / "a.json")
    with pytest.raises(ValueError, match="record r has an image, but --image_folder is not set"):
        make_dataset(records)
    with pytest.raises(FileNotFoundError, match=r"--image_folder .*gone: no such folder"):
        make_dataset(records, tmp_path / "gone")


def test_lengths_from_the_cache_are_those_of_the_records(tmp_path):
    records = [
        make_record("<image>\nWhat is it?", "A square.", image="a.png"),
        make_record("<image> <image>", "Two.", image=["a.png", "a.png"]),
        make_record("Hi there", "Hello."),
        make_record("", ""),
    ]
    draw(tmp_path, "a.png")
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n"
        "  - {json_path: a.json, sampling_strategy: 'end:3'}\n"
        "  - {json_path: a.json, sampling_strategy: 'random:2'}\n"
    )
    lazy = load_records(tmp_path / "mix.yaml")
    lengths = make_dataset(lazy, tmp_path).modality_lengths.tolist()
    assert lengths == make_dataset(list(lazy), tmp_path).modality_lengths.tolist()
    found = make_dataset(load_records(tmp_path / "a.json"), tmp_path).modality_lengths.tolist()
    assert min(found[:2]) > 0 > found[3] > found[2]


def test_an_image_counts_as_the_mean_of_its_source(tmp_path):
    """16 visual tokens and 8 of one source, 2 of the other; a missing one tells nothing."""
    for name, size in (("a.png", (32, 32)), ("b.png", (32, 16)), ("c.png", (16, 8))):
        draw(tmp_path, name, size)
    pages = [make_record("<image>", "A page.", image=name) for name in ("a.png", "b.png", "missing.png")]
    icons = [make_record("<image><image>", "Icons.", image=["c.png", "c.png"]), make_record("Hi", "Hello.")]
    for name, records in (("pages", pages), ("icons", icons)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: pages.json}, {json_path: icons.json}]")
    dataset = make_dataset(load_records(tmp_path / "mix.yaml"), tmp_path)
    assert dataset._tokens_of_an_image().tolist() == [12, 12, 12, 2, 2]
    assert dataset.modality_lengths[0] == dataset.modality_lengths[2]
    text_alone = len(dataset[0]["input_ids"]) - 16
    assert abs(dataset.modality_lengths[0] - 12 - text_alone) <= 5
