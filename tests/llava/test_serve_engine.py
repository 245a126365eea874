"""The engine: batches, streams, stops and slots, with a real tiny model."""

import queue
import threading
from itertools import pairwise

import pytest
import torch

from llava.inference import decode_answer, generation_options
from llava.serve.engine import Engine, Update, readable
from llava.serve.limits import Limits
from llava.serve.pool import ModelPool
from llava.serve.requests import Dialogue, Refused, Request, Sampling, Turn
from tests.llava.serve_parts import colour_image

pytest_plugins = ["tests.llava.eval_parts", "tests.llava.serve_parts"]


def asked(text="Which colour?", *, model="babble", images=(), budget=None, **sampling):
    sampling = {"max_new_tokens": 16} | sampling
    dialogue = Dialogue((Turn("user", text, len(images)),))
    return Request(model, dialogue, tuple(images), Sampling(**sampling), budget)


def answer(pool, request):
    *_, last = pool.answer(request)
    assert last.error is None
    return last


def requests():
    """Many that differ in text, images, length and sampling."""
    sizes = ((64, 48), (32, 64), (80, 32), (160, 96))
    for number in range(12):
        images = [
            colour_image(colour, sizes[(number + place) % 4])
            for place, colour in enumerate(("red", "green", "blue")[: number % 4])
        ]
        yield asked(
            f"question {'again ' * number}",
            images=images,
            max_new_tokens=4 + number,
            temperature=(0.0, 1.5)[number % 2],
            top_p=0.9,
            seed=number,
        )


def test_the_answer_is_bare_generate_s(pool, chat_model):
    request = asked(images=[colour_image("red")], max_new_tokens=12)
    prompt = chat_model.prepare(request)
    options = generation_options(chat_model.template, chat_model.tokenizer, max_new_tokens=12)
    with torch.inference_mode():
        ids = chat_model.model.generate([prompt.input_ids], **prompt.inputs, **options)[0]
    last = answer(pool, request)
    assert last.text == decode_answer(ids, chat_model.tokenizer, options["eos_token_id"]) != ""
    assert (last.tokens, last.finish_reason) == (12, "length")


def test_in_a_batch_each_answer_is_the_single_request_s(chat_model):
    """All wait before the first is taken, so they do run together; sampled ones too."""
    single = ModelPool([chat_model], Limits(), rows=1)
    alone = [answer(single, request) for request in requests()]
    single.close()
    assert len({last.text for last in alone}) > 6
    sizes = []
    engine = Engine(chat_model, Limits(), rows=6)
    generate = engine._generate
    engine._generate = lambda batch: (sizes.append(len(batch)), generate(batch))
    updates = [queue.SimpleQueue() for _ in alone]
    prompts = [chat_model.prepare(request) for request in requests()]
    with engine._condition:
        for prompt, each in zip(prompts, updates, strict=True):
            engine.submit(prompt, each.put)
    assert [until_the_end(each) for each in updates] == alone
    assert sorted(sizes) == [6, 6]
    engine.close()


def until_the_end(updates):
    while not (update := updates.get(timeout=60)).is_last:
        pass
    return update


def test_updates_only_ever_add_and_end_with_the_answer(pool):
    updates = list(pool.answer(asked(images=[colour_image("blue")])))
    assert len(updates) > 3
    for before, after in pairwise(updates):
        assert after.text.startswith(before.text)
    assert [update.is_last for update in updates].index(True) == len(updates) - 1


def test_a_stop_text_ends_the_answer_before_it(pool):
    whole = answer(pool, asked(images=[colour_image("blue")], max_new_tokens=24)).text
    stop = whole[len(whole) // 2 :][:3]
    updates = list(pool.answer(asked(images=[colour_image("blue")], max_new_tokens=24, stop=(stop,))))
    assert updates[-1].text == whole[: whole.index(stop)].strip()
    assert updates[-1].finish_reason == "stop"
    assert all(updates[-1].text.startswith(update.text) for update in updates)


@pytest.mark.parametrize(
    ("text", "stop", "finish", "expected"),
    [
        (" a cat \n", (), None, ("a cat", False)),
        ("caf\ufffd", (), None, ("caf", False)),
        ("caf\ufffd", (), "length", ("caf\ufffd", False)),
        ("a cat##", ("###",), None, ("a cat", False)),
        ("a cat##", ("###",), "length", ("a cat##", False)),
        ("a cat### more", ("###",), None, ("a cat", True)),
        ("one two", ("two", "one"), None, ("", True)),
    ],
)
def test_what_may_still_change_is_held_back(text, stop, finish, expected):
    assert readable(text, stop, finish) == expected


def test_who_stops_listening_frees_the_row(chat_model):
    pool = ModelPool([chat_model], Limits(new_tokens=400), rows=1)
    stream = pool.answer(asked(max_new_tokens=400, temperature=5.0, seed=1))
    next(stream)
    assert pool.load == 1
    stream.close()
    assert pool.load == 0
    assert answer(pool, asked(max_new_tokens=2)).finish_reason is not None
    pool.close()


def test_a_full_queue_and_a_closed_engine_refuse(chat_model):
    engine = Engine(chat_model, Limits(requests=3), rows=1)
    prompt = chat_model.prepare(asked())
    release = threading.Event()
    engine._generate = lambda batch: release.wait(30)
    ends = queue.SimpleQueue()
    for listener in (lambda update: None, lambda update: None, ends.put):  # the last waits: there are two threads
        engine.submit(prompt, listener)
    with pytest.raises(Refused, match="3 requests are waiting or running") as refused:
        engine.submit(prompt, lambda update: None)
    assert refused.value.status == 429
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine.closed:
        pass
    with pytest.raises(Refused, match="shutting down"):
        engine.submit(prompt, lambda update: None)
    release.set()
    closing.join(30)
    assert ends.get(timeout=30) == Update("", 0, error="The server is shutting down.", status=503)


def test_an_answer_that_takes_too_long_ends_with_the_reason(chat_model):
    engine = Engine(chat_model, Limits(request_seconds=1))
    engine.limits = Limits(request_seconds=0)
    updates = queue.SimpleQueue()
    engine.submit(chat_model.prepare(asked()), updates.put)
    update = until_the_end(updates)
    assert update.status == 504
    assert "within 0 s" in update.error
    engine.close()


def test_a_request_that_fails_is_told_why_and_the_others_of_its_batch_are_answered(chat_model):
    pool = ModelPool([chat_model], Limits(), rows=4)
    expected = [answer(pool, request) for request in list(requests())[:3]]
    engine = pool.engine("babble")
    good = [chat_model.prepare(request) for request in list(requests())[:3]]
    bad = chat_model.prepare(asked())
    object.__setattr__(bad, "input_ids", torch.tensor([10**6]))  # no such token
    updates = [queue.SimpleQueue() for _ in range(4)]
    with engine._condition:
        for prompt, each in zip([good[0], bad, *good[1:]], updates, strict=True):
            engine.submit(prompt, each.put)
    ends = [until_the_end(each) for each in updates]
    assert ends.pop(1).error.startswith("babble failed: IndexError")
    assert ends == expected
    pool.close()


def test_an_answer_that_has_begun_is_not_begun_again(chat_model):
    """Without a seed it would go on in other words; what has not begun is answered all the same."""
    engine = Engine(chat_model, Limits(), rows=2)
    generate = engine._generate

    def breaks_off(batch):
        if len(batch) > 1:
            batch[0].tell(Update("so", 1))
            raise MemoryError("no more")
        generate(batch)

    engine._generate = breaks_off
    updates = [queue.SimpleQueue() for _ in range(2)]
    with engine._condition:
        for each in updates:
            engine.submit(chat_model.prepare(asked(temperature=1.0)), each.put)
    ends = [until_the_end(each) for each in updates]
    assert (ends[0].status, ends[0].error) == (500, "babble failed: MemoryError: no more")
    assert (ends[1].error, ends[1].finish_reason) == (None, "length")
    engine.close()


def test_who_waits_too_long_is_told_while_others_are_answered(chat_model):
    engine = Engine(chat_model, Limits(new_tokens=400), rows=1)
    request = asked(max_new_tokens=400, temperature=5.0, seed=1)
    told = queue.SimpleQueue()
    jobs = [engine.submit(chat_model.prepare(request), told.put) for _ in range(2)]
    for _ in jobs:
        told.get(timeout=60)
    waits = queue.SimpleQueue()
    with engine._condition:
        late = engine.submit(chat_model.prepare(request), waits.put)
        late.deadline = 0.0
    assert waits.get(timeout=60).status == 504
    assert not all(job.ended for job in jobs)
    for job in jobs:
        job.cancel()
    engine.close()


def test_the_budget_of_visual_tokens_changes_what_the_model_reads(chat_model):
    lengths = [
        chat_model.prepare(asked(images=[colour_image("red", (320, 320))], budget=budget)).length
        for budget in (None, 16, 4)
    ]
    assert lengths[0] > lengths[1] == lengths[2] + 12


def test_what_does_not_fit_is_refused_with_the_numbers(chat_model, pool):
    with pytest.raises(Refused, match=r"The prompt has \d+ tokens, 0 of them visual, and babble's context ends at 512"):
        chat_model.prepare(asked("word " * 500))
    assert chat_model.prepare(asked("word", max_new_tokens=10**6)).sampling.max_new_tokens < 512
    for request, message in (
        (asked("<image> and <image>", images=[colour_image("red")]), "2 <image>, but 1 image"),
        (asked("x" * 3000), "3000 characters; the limit is 2000"),
        (asked(images=[colour_image("red")] * 5), "5 images; the limit is 4"),
        (asked(model="other"), "no model 'other' here"),
    ):
        with pytest.raises(Refused, match=message):
            next(pool.answer(request))
