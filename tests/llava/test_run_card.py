"""What a run was made with stands beside it, for each of its starts; the hashes are those of the files."""

import json
import subprocess
from hashlib import sha256

import pytest
import torch
import transformers

from llava.data.mixture import load_records
from llava.train.arguments import parse_arguments
from llava.train.run_card import code_state, read_starts
from llava.train.train import build_stage, run_stage
from tests.llava import tiny
from tests.llava.data_parts import make_record


def git(folder, *arguments):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "__init__.py").write_text("a = 1\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "__init__.py")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


def test_a_continued_run_keeps_its_first_start_and_says_what_changed(llm, siglip, data, tmp_path):
    out = tmp_path / "out"
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 7}
    run_stage(*build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, out, **changes))))
    first = read_starts(out)
    assert [start["step"] for start in first] == [0]
    arguments = first[0]["arguments"]
    assert arguments["model"]["mm_tunable_parts"] == "mm_mlp_adapter"
    assert arguments["data"]["force_resize"] == "pretrained"
    assert (arguments["training"]["seed"], arguments["training"]["adam_beta2"]) == (7, 0.999)
    assert torch.__version__.startswith(first[0]["versions"]["torch"])  # the wheel's, with or without +cpu
    assert first[0]["versions"]["transformers"] == transformers.__version__
    assert first[0]["hardware"]["world_size"] == 1

    changes |= {"max_steps": 6, "logging_steps": 3}
    run_stage(*build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, out, **changes))))
    starts = read_starts(out)
    assert starts[0] == first[0]
    assert [start["step"] for start in starts] == [0, 4]
    page = (out / "run_card.md").read_text()
    assert "arguments.training.max_steps 4 → 6" in page
    assert "arguments.training.logging_steps 1.0 → 3" in page
    assert "learning_rate" not in page
    assert "| 16 | 16 | 1 |" in page  # records, drawn, files


def test_the_manifest_names_every_file_with_its_hash_and_what_an_epoch_draws(tmp_path):
    for name, count in (("a", 10), ("b", 4)):
        records = [make_record("Hi", str(number), id=f"{name}{number}") for number in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n"
        "- {json_path: a.json, sampling_strategy: 'first:20%', weight: 2.5}\n"
        "- {json_path: b.json}\n"
        "- {json_path: b.json, sampling_strategy: 'end:1'}\n"
    )
    for _ in range(2):  # as the first pass leaves it, and from the cache
        first, second = load_records(tmp_path / "mix.yaml").manifest()
        assert (first["records"], first["drawn"]) == (10, 5)
        assert (second["records"], second["drawn"]) == (4, 5)
        for source, name in ((first, "a"), (second, "b")):
            content = (tmp_path / f"{name}.json").read_bytes()
            expected = {"file": str(tmp_path / f"{name}.json"), "bytes": len(content)}
            assert source["files"] == [expected | {"sha256": sha256(content).hexdigest()}]


def test_the_commit_and_whether_anything_changed_after_it(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert code_state(repository) == {"commit": commit, "changes_sha256": None}
    (repository / "notes.txt").write_text("no code that git knows")
    assert code_state(repository)["changes_sha256"] is None
    seen = set()
    for text in ("a = 2\n", "a = 3\n"):
        (repository / "__init__.py").write_text(text)
        assert code_state(repository)["commit"] == commit
        seen.add(code_state(repository)["changes_sha256"])
    assert len(seen) == 2
    assert None not in seen


def test_code_that_git_does_not_know_has_no_commit(repository, tmp_path, monkeypatch):
    nothing = {"commit": None, "changes_sha256": None}
    installed = repository / ".venv" / "llava"  # below a repository, but none of its files
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert code_state(installed) == nothing
    assert code_state(tmp_path) == nothing
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert code_state(repository) == nothing


def test_a_file_that_is_no_card_is_not_written_over(llm, siglip, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run_card.json").write_text('{"starts": [')
    with pytest.raises(ValueError, match=r"run_card\.json is no run card .* Move it away"):
        build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, out)))
    assert (out / "run_card.json").read_text() == '{"starts": ['
