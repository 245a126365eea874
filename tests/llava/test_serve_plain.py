"""LLaVA's own checkpoints, whose towers cut images into tiles, are served as the others are."""

import json
import queue
import shutil
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from llava.serve.backends import LocalBackend
from llava.serve.engine import Engine
from llava.serve.limits import Limits
from llava.serve.page import Page
from llava.serve.pool import ModelPool
from llava.serve.requests import Dialogue, Refused, Request, Sampling, Turn
from llava.serve.served_model import load_served_model
from tests.llava.serve_parts import colour_image
from tests.llava.upstream import GOLDEN

pytest_plugins = ["tests.llava.eval_parts", "tests.llava.serve_parts"]


@pytest.fixture(scope="module", params=[("v15", "clip"), ("onevision", "siglip")], ids=["v15", "onevision"])
def plain(request, tmp_path_factory, llm):
    name, tower = request.param
    folder = tmp_path_factory.mktemp("plain") / name
    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": str(GOLDEN / tower)}
    (folder / "config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(llm).save_pretrained(folder)
    return load_served_model(str(folder), name=name, device="cpu", template="qwen_2_5")


def asked(name, *images, budget=None):
    dialogue = Dialogue((Turn("user", "a b", len(images)),))
    return Request(name, dialogue, images, Sampling(6), budget)


def test_images_of_many_sizes_are_answered_together_as_alone(plain):
    shown = [(), (colour_image("red", (90, 40)),), (colour_image("blue", (40, 40)), colour_image("red", (64, 200)))]
    prompts = [plain.prepare(asked(plain.name, *images)) for images in shown]
    alone = []
    engine = Engine(plain, Limits(), rows=len(prompts))
    for together in (False, True):
        updates = [queue.SimpleQueue() for _ in prompts]
        with engine._condition:
            for prompt, each in zip(prompts, updates, strict=True):
                if together:
                    engine.submit(prompt, each.put)
        if not together:
            for prompt, each in zip(prompts, updates, strict=True):
                engine.submit(prompt, each.put)
                alone.append(last(each))
        else:
            assert [last(each) for each in updates] == alone
    assert all(update.error is None for update in alone)
    engine.close()


def test_the_page_asks_it_beside_a_model_with_a_budget(plain, chat_model, tmp_path):
    pool = ModelPool([chat_model, plain], Limits())
    page = Page(LocalBackend(pool), Limits())
    assert [page.choose_model(name).value for name in ("babble", plain.name)] == [1024, 0]
    colour_image("red", (160, 96)).save(tmp_path / "red.png")
    settings = (None, 0.0, 1.0, 8)  # system prompt, temperature, top-p, most tokens
    *_, end = page.compare(str(tmp_path / "red.png"), "a b", *settings, "babble", 15, plain.name, 0)
    alone = []
    image = colour_image("red", (160, 96))
    for request in (asked("babble", image, budget=15), asked(plain.name, image)):
        *_, update = pool.answer(replace(request, sampling=Sampling(8)))
        alone.append(update.text)
    assert [end[0], end[2]] == alone
    assert "failed" not in end[1] + end[3]
    pool.close()


def last(updates):
    while not (update := updates.get(timeout=60)).is_last:
        pass
    return update


def test_there_is_a_number_of_tokens_but_no_grid_and_no_budget(plain):
    rows, columns, tokens = plain.token_grid(90, 40)
    assert (rows, columns) == (None, None)
    length = plain.prepare(asked(plain.name, colour_image("red", (90, 40)))).length
    assert length - plain.prepare(asked(plain.name)).length >= tokens > 0
    with pytest.raises(Refused, match="fixed number of visual tokens"):
        plain.prepare(asked(plain.name, colour_image("red"), budget=16))
    pool = ModelPool([plain], Limits())
    with pytest.raises(Refused, match="cuts its images into tiles"):
        pool.inspect(asked(plain.name, colour_image("red")), None)
    pool.close()
