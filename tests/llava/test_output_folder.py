"""One training writes into a folder, on one set of data, and an old checkpoint goes only when the new one is safe."""

import errno
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from llava.train import output_folder
from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, main
from tests.llava import tiny
from tests.llava.ranks import launch, train_alone


def test_a_second_training_into_the_folder_is_refused(llm, siglip, data, tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "SECONDS", 0.1)
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", max_steps=1)
    lock = tmp_path / ".out.lock"
    with FileLock(lock), pytest.raises(SystemExit, match=r"--output_dir .*/out: another training writes into it"):
        main(arguments)
    assert not (tmp_path / "out").exists()
    with FileLock(lock):
        monkeypatch.setenv(output_folder.HELD, str(tmp_path / "elsewhere" / ".." / ".out.lock"))
        main(arguments)  # by a script that holds it for this training
    monkeypatch.delenv(output_folder.HELD)
    with output_folder.locked(str(tmp_path / "out")), pytest.raises(SystemExit):
        main(arguments)
    main([*arguments, "--max_steps", "2"])  # it is free again


def test_what_a_checkpoint_holds_is_on_the_disk_before_its_mark_and_before_an_older_one_goes(
    llm, siglip, data, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    mark, older = out / "checkpoint-2/trainer_state.json", out / "checkpoint-1"
    before_mark, before_deletion = set(), set()
    sync = os.fsync

    def seen(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if not mark.exists():
            before_mark.add(path)
        if older.exists():
            before_deletion.add(path)
        sync(handle)

    limits, save = set(), torch.save

    def recorded(content, file, *arguments, **options):
        if str(file).endswith("training_args.bin"):
            limits.add(content.save_total_limit)
        save(content, file, *arguments, **options)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(torch, "save", recorded)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    train_alone(tiny.stage_arguments(llm, siglip, data, out, **tiny.FULL_STAGE, **options))
    assert not older.exists()
    assert limits == {1}
    written = {str(path) for path in (mark.parent, *mark.parent.iterdir())}
    assert str(mark.parent / "optimizer.pt") in written
    assert written - {str(mark)} <= before_mark
    assert written <= before_deletion


def started(arguments):
    return build_stage(*parse_arguments(arguments))[1]


def test_a_run_is_not_continued_on_other_data(llm, siglip, tmp_path):
    data = tiny.save_data(tmp_path / "data")
    out, other = tmp_path / "out", tmp_path / "other"
    mixture = data / "mix.yaml"
    mixture.write_text("datasets:\n  - json_path: data.json\n    sampling_strategy: first:8\n")
    options = {"data_path": mixture, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments = tiny.stage_arguments(llm, siglip, data, out, **options)
    train_alone(arguments)
    assert started(arguments).endswith("checkpoint-1")
    shutil.copytree(data, other)
    moved = [*arguments, "--data_path", str(other / "mix.yaml")]
    assert started(moved).endswith("checkpoint-1")

    (other / "mix.yaml").write_text("datasets:\n  - json_path: data.json\n    sampling_strategy: first:9\n")
    with pytest.raises(ValueError, match=r"data\.json: 8 drawn are 9 now\. .*--allow_changed_data True"):
        started(moved)
    records = json.loads((data / "data.json").read_text())
    records[0]["conversations"][1]["value"] = "The square is pink."
    (data / "data.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit, match=r"data/data\.json has another content"):
        main(arguments)
    mixture.write_text(f"{mixture.read_text()}  - json_path: {other}/data.json\n")
    with pytest.raises(ValueError, match=r"has another content, and 1 more"):
        started(arguments)
    assert started([*arguments, "--allow_changed_data", "True"]).endswith("checkpoint-1")
    assert started(arguments).endswith("checkpoint-1")  # these are its data from here on
    shutil.rmtree(out / "checkpoint-1")
    assert started(moved) is None  # nothing to go on from


def test_a_run_is_not_continued_on_another_drawing_or_in_another_order(llm, siglip, tmp_path):
    """As many records as before, of the same file."""
    data = tiny.save_data(tmp_path / "data")
    mixture = data / "mix.yaml"

    def draw(strategy):
        mixture.write_text(f"datasets:\n  - json_path: data.json\n    sampling_strategy: {strategy}\n")

    draw("first:8")
    options = {"data_path": mixture, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out", **options)
    train_alone(arguments)
    draw("end:8")
    with pytest.raises(ValueError, match=r"data\.json: other 8 records are drawn\."):
        started(arguments)
    draw("first:8")
    changes = {
        "seed": ("7", r"--seed 42 is 7 now, and 1 more"),  # by which the order is drawn, too
        "data_seed": ("7", r"--data_seed 42 is 7 now\."),
        "gradient_accumulation_steps": ("3", r"the global batch \d+ is \d+ now\."),
        "model_max_length": ("777", r"--model_max_length \d+ is 777 now\."),
        "group_by_modality_length": ("True", r"--group_by_modality_length False is True now\."),
        "pack_to_max_length": ("True", r"--pack_to_max_length False is True now\."),
    }
    for flag, (value, expected) in changes.items():
        with pytest.raises(ValueError, match=rf"{expected}.*--allow_changed_data True") as refused:
            started([*arguments, f"--{flag}", value])
        assert "\n" not in str(refused.value)
    assert started([*arguments, "--data_seed", "42"]).endswith("checkpoint-1")  # the same order
    assert started([*arguments, "--seed", "7", "--allow_changed_data", "True"]).endswith("checkpoint-1")


def test_a_file_system_without_all_of_fsync_is_no_end_of_a_run(tmp_path, monkeypatch, caplog):
    """Some know none for folders, and on NFS another process's temporary file goes stale. A fault of the disk does."""
    (tmp_path / "weights").touch()
    answers = {}

    def fsync(handle):
        code = answers.get("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    for code in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
        answers["folder"] = code
        output_folder.flush(tmp_path)
    assert caplog.text.count("cannot flush folders") == 1
    answers["file"] = errno.ESTALE
    output_folder.flush(tmp_path)
    for kind, code in (("folder", errno.EIO), ("folder", errno.ENOSPC), ("file", errno.EIO), ("file", errno.EINVAL)):
        answers.clear()
        answers[kind] = code
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            output_folder.flush(tmp_path)


def test_a_folder_whose_parent_is_not_ours_holds_its_lock_itself(tmp_path, monkeypatch):
    """Root may write everywhere, so the answer is given here."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    monkeypatch.setattr(output_folder, "SECONDS", 0.1)
    out = tmp_path / "out"
    out.mkdir()
    refusal = pytest.raises(ValueError, match=r"another training writes into it \(it holds .*/out/\.lock\)")
    with output_folder.locked(str(out)), refusal, output_folder.locked(str(out)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_processes_go_on_from_the_checkpoint_that_the_first_one_sees(llm, siglip, data, tmp_path):
    """What is asserted stands in `chosen_checkpoint.py`, which both ranks run."""
    arguments = tiny.stage_arguments(llm, siglip, data, tmp_path / "out")
    for step in (1, 2):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
    launch(arguments, module="tests.llava.chosen_checkpoint")
