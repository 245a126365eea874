"""Chat in the terminal, with a real tiny model."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch

from llava.serve.cli import main, make_parser, start_chat
from tests.llava import tiny

pytest_plugins = ["tests.llava.eval_parts"]


def flags(run, colours, *more, image="1.png"):
    files = ["--model-path", str(run / "stage2_native"), "--image-file", str(colours / "images" / image)]
    return [*files, "--device", "cpu", "--max-new-tokens", "12", *more]


def test_one_shot_writes_the_answer_and_nothing_else(run, colours):
    """In a process of its own: what the libraries say must not reach stdout either."""
    command = [sys.executable, "-m", "llava.serve.cli", *flags(run, colours, "--prompt", "What is it?")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "green\n"


def test_the_template_is_the_checkpoints_unless_another_is_asked_for(run, colours):
    chat = start_chat(make_parser().parse_args(flags(run, colours)))
    assert chat.conversation.version == "Unknown"  # plain
    assert chat.ask("anything") == "green"
    assert chat.conversation.messages == [["", "<image>"], ["", "green"]]
    chat = start_chat(make_parser().parse_args(flags(run, colours, "--conv-mode", "qwen_2_5")))
    chat.ask("Which?")
    chat.ask("And now?")
    roles = chat.conversation.roles
    assert [role for role, _ in chat.conversation.messages] == [*roles, *roles]
    assert [text for _, text in chat.conversation.messages][::2] == ["<image>\nWhich?", "And now?"]


def test_several_images_stand_before_the_first_question(run, colours):
    more = ["--conv-mode", "qwen_2_5", "--image-file", *(str(colours / "images" / name) for name in ("0.png", "4.png"))]
    chat = start_chat(make_parser().parse_args(flags(run, colours, *more)))
    chat.ask("Same?")
    assert chat.conversation.messages[0][1] == "<image>\n<image>\nSame?"
    assert chat.inputs["image_grid_thw"].tolist() == [[1, 6, 8], [1, 8, 4]]


def test_a_conversation_streams_its_answers_and_ends_with_the_input(run, colours, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\nAgain?\n\nnot reached\n"))
    main(flags(run, colours))
    answers = capsys.readouterr().out.splitlines()
    assert answers[0] == "green"
    assert len([line for line in answers if line]) <= 2


def test_a_temperature_samples(run, colours):
    torch.manual_seed(0)
    chat = start_chat(make_parser().parse_args(flags(run, colours, "--temperature", "50")))
    answers = []
    for _ in range(3):
        answers.append(chat.ask("What is it?"))
        chat.forget_last()
    assert len(set(answers)) == 3


def test_mistakes_are_one_line(run, llm, colours, tmp_path, capsys):
    image = str(colours / "images" / "0.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes((colours / "images" / "0.png").read_bytes()[:40])
    model = str(run / "stage2_native")
    for model_path, image_file, message in (
        (model, str(tmp_path / "no.png"), "no.png"),
        (model, str(broken), "cannot read image"),
        (model, str(colours / "data.json"), "cannot read image"),
        (str(tmp_path / "nothing"), image, "nothing"),
        (str(tmp_path), image, "config.json"),
        (str(run), image, "holds some"),
        (str(llm), image, "no vision tower"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["--model-path", model_path, "--image-file", image_file, "--prompt", "What?"])
        assert message in exit_info.value.code
        assert "\n" not in exit_info.value.code
    assert capsys.readouterr().out == ""


def folder_flags(run, folder, out, *more):
    files = ["--model-path", str(run / "stage2_native"), "--image-folder", str(folder), "--out", str(out)]
    return [*files, "--device", "cpu", "--prompt", "Which colour?", "--max-new-tokens", "8", "--batch-size", "3", *more]


def test_a_folder_is_answered_image_by_image_and_gone_on_with(run, colours, tmp_path, capsys):
    folder, out = tmp_path / "images", tmp_path / "deep" / "answers.jsonl"
    shutil.copytree(colours / "images", folder / "below")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an image, and not asked about")
    main(folder_flags(run, folder, out))
    whole = out.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    answers = {line["image"]: line.get("answer") for line in lines}
    assert len(lines) == len(answers) == 17
    assert [answers[f"below/{number}.png"] for number in range(16)] == list(tiny.COLOURS) * 4
    assert "cannot read image broken.png" in next(line for line in lines if line["image"] == "broken.png")["error"]
    kept = whole.splitlines(keepends=True)[:5]
    out.write_text("".join(kept) + '{"image": "below/9')  # killed in the middle of a line
    main(folder_flags(run, folder, out))
    assert out.read_text() == whole
    capsys.readouterr()
    main(folder_flags(run, folder, out))
    assert "nothing left to answer" in capsys.readouterr().err
    assert out.read_text() == whole


def test_a_folder_s_mistakes_are_one_line(run, colours, tmp_path):
    images, foreign, listed = colours / "images", tmp_path / "foreign.jsonl", tmp_path / "list.json"
    listed.write_text("[1,\n2]\n")
    before = (colours / "data.json").read_bytes()
    foreign.write_text('{"image": "0.png", "prompt": "Other?", "model": "x", "answer": "y"}\n')
    for arguments, message in (
        (folder_flags(run, tmp_path / "nothing", tmp_path / "out"), "is no folder"),
        (folder_flags(run, run, tmp_path / "out"), "holds no image file"),
        (folder_flags(run, images, foreign), "another prompt or by another model"),
        (folder_flags(run, images, colours / "data.json"), "ends with something else than a line"),
        (folder_flags(run, images, listed), "line 1: not a line of this command's"),
        (["--model-path", str(run), "--image-folder", str(images)], "needs --prompt"),
    ):
        with pytest.raises(SystemExit, match=message) as exit_info:
            main(arguments)
        assert "\n" not in exit_info.value.code
    assert (colours / "data.json").read_bytes() == before


def test_the_budget_of_visual_tokens_is_a_flag(run, colours):
    chat = start_chat(make_parser().parse_args(flags(run, colours, "--max-num-vistoken", "4")))
    assert chat.inputs["image_grid_thw"].tolist() == [[1, 2, 8]]  # 1 x 4 tokens
