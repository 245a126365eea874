"""The worker over HTTP: both protocols as their own clients speak them, the key, hanging up, many at once."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import openai
import pytest

from llava.serve.limits import Limits
from llava.serve.pool import ModelPool
from llava.serve.requests import Dialogue, Request, Sampling, Turn
from llava.serve.worker_app import Worker
from tests.llava.serve_parts import base64_png, chat_body, colour_image, running

pytest_plugins = ["tests.llava.eval_parts", "tests.llava.serve_parts"]


def client(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def test_the_openai_client_gets_answers(address):
    models = client(address).models.list().data
    assert [model.id for model in models] == ["colours", "babble"]
    for colour in ("red", "blue"):
        completion = client(address).chat.completions.create(**chat_body("", colour_image(colour), model="colours"))
        assert completion.choices[0].message.content == colour
        assert completion.choices[0].finish_reason == "stop"
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
        assert completion.usage.prompt_tokens == 12  # plain: an image of 3x4 visual tokens and nothing else


def test_the_openai_client_streams_the_same_answer(address):
    body = chat_body("Which colour?", colour_image("green"), max_tokens=24)
    whole = client(address).chat.completions.create(**body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client(address).chat.completions.create(**body, **options))
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(deltas) == whole.choices[0].message.content != ""
    assert len([delta for delta in deltas if delta]) > 2
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage


def test_a_conversation_with_a_system_prompt_is_read_turn_by_turn(address, pool, chat_model):
    body = chat_body("Which colour?", colour_image("green"))
    body["messages"] = [
        {"role": "system", "content": "Answer in rhymes."},
        *body["messages"],
        {"role": "assistant", "content": "Green."},
        *chat_body("And this?", colour_image("red"), colour_image("blue", (32, 64)))["messages"],
    ]
    seen = []
    prepare = pool.prepare
    pool.prepare = lambda request: seen.append(prepare(request)) or seen[-1]
    try:
        client(address).chat.completions.create(**body)
    finally:
        del pool.prepare
    text = chat_model.tokenizer.decode([token if token >= 0 else ord("#") - 33 + 3 for token in seen[0].input_ids])
    im = "<|im_start|>"
    assert text.replace("<|im_end|>", "$") == (
        f"{im}system\nAnswer in rhymes.$\n{im}user\n#\nWhich colour?$\n{im}assistant\nGreen.$\n"
        f"{im}user\n#\n#\nAnd this?$\n{im}assistant\n"
    )
    assert seen[0].inputs["image_grid_thw"].tolist() == [[1, 6, 8], [1, 6, 8], [1, 8, 4]]


def llava_messages(address, body):
    reply = httpx.post(f"{address}/worker_generate_stream", json=body, timeout=60)
    *messages, rest = reply.content.split(b"\0")
    assert rest == b""
    return reply.status_code, [json.loads(message) for message in messages]


def test_llavas_protocol_repeats_the_prompt_and_grows(address):
    prompt = "<image>"
    body = {"model": "colours", "prompt": prompt, "images": [base64_png(colour_image("red"))], "temperature": 0}
    status, messages = llava_messages(address, body | {"max_new_tokens": 8, "top_p": 0.7, "stop": "\n"})
    assert status == 200
    assert messages[-1] == {"text": "<image>red", "error_code": 0}
    assert all(set(message) == {"text", "error_code"} and message["error_code"] == 0 for message in messages)
    for before, after in pairwise(messages):
        assert after["text"].startswith(before["text"])
    status, messages = llava_messages(address, body | {"images": []})
    assert (status, len(messages), messages[0]["error_code"]) == (400, 1, 1)
    assert "1 <image>, but 0 image(s)" in messages[0]["text"]


def test_status_says_what_the_controller_asks(address):
    status = httpx.post(f"{address}/worker_get_status").json()
    assert status == {"model_names": ["colours", "babble"], "speed": 1, "queue_length": 0}


def test_an_inspection_comes_with_words_and_pictures(address):
    body = {"model": "colours", "images": [base64_png(colour_image("red", (160, 96)))], "word": "red"}
    found = httpx.post(f"{address}/worker_inspect", json=body | {"max_num_vistoken": 15}).json()
    assert (found["rows"], found["columns"]) == (3, 5)
    assert [len(line) for line in found["words"]] == [len(line) for line in found["cosines"]] == [5, 5, 5]
    assert found["seen"].startswith("iVBOR")
    reply = httpx.post(f"{address}/worker_inspect", json=body | {"word": "colourless"})
    assert reply.status_code == 400
    assert "no single token" in reply.json()["error"]["message"]


def test_the_key_is_asked_for_and_compared(colour_model):
    worker = Worker(ModelPool([colour_model], Limits()), api_key="secret")
    body = chat_body("", colour_image("red"), model="colours")
    with running(worker.app()) as address:
        for wrong in ("other", "x", "sécret"):
            reply = httpx.post(
                f"{address}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {wrong}".encode()}
            )
            assert reply.status_code == 401
            assert httpx.get(f"{address}/v1/models").status_code == 401
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            client(address).chat.completions.create(**body)
        answer = client(address, "secret").chat.completions.create(**body)
        assert answer.choices[0].message.content == "red"


def test_40_requests_of_8_clients_each_get_their_own_answer(address, pool):
    colours = ("red", "green", "blue", "yellow")
    sizes = ((64, 48), (32, 64), (80, 32), (160, 96), (16, 16))
    bodies = [
        chat_body(
            f"Number {number}?",
            *[colour_image(colours[(number + place) % 4], sizes[number % 5]) for place in range(number % 3)],
            max_tokens=4 + number % 9,
            temperature=(0, 1.2)[number % 2],
            seed=number,
        )
        for number in range(40)
    ]
    api = client(address)

    def text(body):
        return api.chat.completions.create(**body).choices[0].message.content

    alone = [text(body) for body in bodies]
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(text, bodies))
    assert together == alone
    assert len(set(alone)) > 30
    assert pool.load == 0


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_frees_the_slot(chat_model, stream):
    pool = ModelPool([chat_model], Limits(), rows=1)
    engine = pool.engine("babble")
    began, go_on = threading.Event(), threading.Event()
    generate = engine._generate

    def late(batch):
        began.set()
        assert go_on.wait(30)
        generate(batch)

    engine._generate = late
    with running(Worker(pool).app()) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{address}/v1/chat/completions",
                json=chat_body("Say much", max_tokens=400, stream=stream),
                timeout=httpx.Timeout(30, read=0.5),
            )
        assert began.wait(30)
        until = time.monotonic() + 30
        while pool.load:
            assert time.monotonic() < until
        go_on.set()
        answer = client(address).chat.completions.create(**chat_body("Short", max_tokens=2))
        assert answer.usage.completion_tokens <= 2


def test_a_full_worker_says_429_before_it_reads(chat_model):
    pool = ModelPool([chat_model], Limits(requests=1), rows=1)
    engine = pool.engine("babble")
    go_on = threading.Event()
    engine._generate = lambda batch: go_on.wait(30)
    first = Request("babble", Dialogue((Turn("user", "Who?"),)), (), Sampling())
    engine.submit(chat_model.prepare(first), lambda update: None)
    with running(Worker(pool).app()) as address:
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting or running"):
            client(address).chat.completions.create(**chat_body("And me?"))
        status, messages = llava_messages(address, {"model": "babble", "prompt": "And me?"})
        assert (status, messages[0]["error_code"]) == (429, 1)
        go_on.set()
