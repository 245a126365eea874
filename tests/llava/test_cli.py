"""Chat in the terminal, with a real tiny model."""

import io
import subprocess
import sys

import pytest
import torch

from llava.serve.cli import main, make_parser, start_chat

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
