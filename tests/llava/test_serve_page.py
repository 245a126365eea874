"""The page's handlers without a browser: limits hold before a pixel is decoded, and images are not held for long."""

import gc
import weakref

import gradio as gr
import pytest
from PIL import Image

from llava.serve.backends import LocalBackend
from llava.serve.chat_history import user_messages
from llava.serve.page import Page
from llava.serve.requests import Dialogue, Sampling, Turn
from tests.llava.serve_parts import LIMITS, colour_image

pytest_plugins = ["tests.llava.eval_parts", "tests.llava.serve_parts"]

SETTINGS = ("babble", 0, None, 0.0, 1.0, 4)  # model, budget, system prompt, temperature, top-p, most tokens


@pytest.fixture
def page(pool):
    return Page(LocalBackend(pool), LIMITS)


def files(folder, count, size=(64, 48)):
    for number in range(count):
        colour_image("red", size).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(count)]


def test_the_count_is_of_headers(page, tmp_path, monkeypatch):
    monkeypatch.setattr("llava.serve.images.load_image", None)  # what decodes
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    colour_image("red", (96, 160)).save(tmp_path / "turned.jpg", exif=exif)
    assert "6 &times; 10 = 60" in page.count({"files": [str(tmp_path / "turned.jpg")]}, [], "babble", 0)


@pytest.mark.parametrize(
    ("count", "size", "why"), [(5, (64, 48), "5 images; the limit is 4"), (3, (1000, 990), "toge")]
)
def test_too_many_are_refused_before_one_is_decoded(page, tmp_path, monkeypatch, count, size, why):
    """In the box, in the conversation, or in both together."""
    monkeypatch.setattr("llava.serve.images.load_image", None)
    paths = files(tmp_path, count, size)
    for old, new in ((0, count), (count, 0), (1, count - 1)):
        history = user_messages("", paths[:old])
        assert why in page.count({"files": paths[old:]}, history, "babble", 0)
        if new:
            with pytest.raises(gr.Error, match=why):
                next(page.submit({"text": "What?", "files": paths[old:]}, history))
    warned = []
    monkeypatch.setattr(gr, "Warning", lambda message, **kwargs: warned.append(message))
    list(page.answer(user_messages("What?", paths), *SETTINGS))
    assert why in warned[0]


def test_an_answer_s_images_are_let_go_before_it_ends(page, tmp_path, monkeypatch):
    held = []
    decode = page.answer.__globals__["to_request"]

    def noted(*args, **kwargs):
        request = decode(*args, **kwargs)
        held.extend(weakref.ref(image) for image in request.images)
        return request

    monkeypatch.setitem(page.answer.__globals__, "to_request", noted)
    answer = page.answer(user_messages("What?", files(tmp_path, 2)), *SETTINGS)
    next(answer)
    gc.collect()
    assert [image() for image in held] == [None, None]
    answer.close()


def test_system_prompt_sampling_and_an_edited_question_reach_the_model(page, monkeypatch):
    asked = []
    monkeypatch.setattr(page.backend, "answer", lambda request: asked.append(request) or iter(()))
    history = [*user_messages("Which?", []), {"role": "assistant", "content": "Red."}, *user_messages("Sure?", [])]
    _, edited = page.edit(history, gr.EditData(None, {"index": 0, "value": "What?", "previous_value": "Which?"}))
    list(page.answer(edited, "babble", 16, "Be brief.", 0.5, 0.9, 7))
    assert asked[0].sampling == Sampling(7, 0.5, 0.9)
    assert asked[0].max_num_vistoken == 16
    assert asked[0].prompt == Dialogue((Turn("user", "What?"),), "Be brief.")
