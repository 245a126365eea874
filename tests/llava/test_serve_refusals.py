"""What a worker refuses: each kind with its reason, and 300 drawn at random, of which none may hurt it."""

import base64
import json
import random
import struct
import zlib
from pathlib import Path

import httpx
import pytest

from llava.serve.limits import MIB
from tests.llava.serve_parts import LIMITS, base64_png, chat_body, colour_image, png

pytest_plugins = ["tests.llava.eval_parts", "tests.llava.serve_parts"]

CHAT, LLAVA = "/v1/chat/completions", "/worker_generate_stream"


def bomb(width=60_000, height=60_000):
    """A PNG of a few bytes whose header promises gigabytes."""

    def part(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(1000))) + part(b"IEND", b"")


def text64(content):
    return base64.b64encode(content).decode()


GOOD = base64_png(colour_image("red"))
CUT = text64(png(colour_image("red", (300, 300)))[:-300])
EPS = text64(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")

# What stands in the place of an image's base64 -> status, reason
BAD_IMAGES = {
    "url": ("https://example.com/a.png", 400, "URLs"),
    "file url": ("file:///etc/passwd", 400, "URLs"),
    "path": ("/etc/passwd", 400, "not"),
    "relative path": ("../../a.png", 400, "URLs"),
    "cut base64": (GOOD[:-3] + "!", 400, "not base64"),
    "odd base64": (GOOD[:-1], 400, "not base64"),
    "cut image": (CUT, 400, "cut short"),
    "no image": (text64(b"hello"), 400, "not a readable image"),
    "empty": ("", 400, "not a readable image"),
    "postscript": (EPS, 400, "not a readable image"),
    "bomb": (text64(bomb()), 413, "pixels"),
    "pillow's own bomb": (text64(bomb(10_000, 20_000)), 413, "pixels"),
    "small bomb": (text64(bomb(1001, 1000)), 413, "more than 1000000 pixels"),
    "many bytes": (text64(bytes(LIMITS.image_bytes + 1)), 413, "200001 bytes; the limit is 200000"),
    "more bytes": ("A" * 300_000, 413, "200000 bytes"),
    "no text": (7, 400, "expected"),
    "nothing": (None, 400, "."),
}

# Fields of a chat request -> reason
BAD_FIELDS = {
    "model": [(7, "expected a text"), ("", "model is missing"), (["colours"], "expected a text")],
    "messages": [
        (None, "missing or empty"),
        ([], "missing or empty"),
        ("hi", "expected a list"),
        (["hi"], "expected an object"),
        ([{"role": "user"}], "expected a text or a list"),
        ([{"role": "tool", "content": "hi"}], "take turns"),
        ([{"role": "assistant", "content": "hi"}], "take turns"),
        (
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
            "last message must be the user's",
        ),
        ([{"role": "user", "content": "hi"}] * 2, "take turns"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}] * 40, "80 messages"),
        ([{"role": "user", "content": "hi <image>"}], "1 <image>, but 0 image"),
        ([{"role": "system", "content": "<image>"}, {"role": "user", "content": "hi"}], "system prompt holds"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "type text or image_url"),
        ([{"role": "user", "content": [{"type": "text", "text": 4}]}], "expected a text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "expected an object"),
        ([{"role": "user", "content": "x" * 2001}], "2001 characters"),
    ],
    "temperature": [
        (-1, "from 0 to 2"),
        (2.5, "from 0 to 2"),
        ("hot", "from 0 to 2"),
        (10**400, "from 0"),
        (True, "0"),
    ],
    "top_p": [(1.5, "from 0 to 1"), ([], "from 0 to 1")],
    "max_tokens": [(0, "whole number"), (-5, "whole"), (1.5, "whole"), (10**30, "from 1 to"), ("5", "whole")],
    "seed": [(2**70, "whole number"), ("x", "whole number")],
    "stop": [(5, "text or a list"), ([5], "list of texts"), (["x"] * 17, "up to 16"), ("x" * 300, "256")],
    "stream": [("yes", "true or false"), (1, "true or false")],
    "n": [(2, "not supported"), ("x", "not supported")],
    "tools": [([{"type": "function"}], "not supported")],
    "response_format": [({"type": "json_object"}, "not supported")],
    "max_num_vistoken": [(0, "whole number"), (10**9, "whole number"), (-1, "whole number")],
}

BAD_BODIES = {
    b"": "not JSON",
    b"{": "not JSON",
    b"[1, 2]": "expected an object",
    b"null": "expected an object",
    b'{"model": "colours", "temperature": NaN}': "no JSON number",
    b'{"model": "\xff"}': "not JSON",
    b"[" * 100_000: "nested too deeply",
    b'{"max_tokens": ' + b"9" * 10_000 + b"}": "not JSON",
}


def reason(reply):
    """The reason of a refusal, in whichever protocol."""
    if reply.content.endswith(b"\0"):
        message = json.loads(reply.content[:-1])
        assert message["error_code"] == 1
        return message["text"]
    return reply.json()["error"]["message"]


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_is_none_is_refused_on_both_routes(address, name):
    content, status, why = BAD_IMAGES[name]
    body = {"model": "colours", "prompt": "<image>", "images": [content]}
    reply = httpx.post(address + LLAVA, json=body)
    assert reply.status_code == status
    assert why in reason(reply)
    url = content if isinstance(content, str) and "/" in content[:8] else f"data:image/png;base64,{content}"
    body = chat_body("What?", model="colours")
    body["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": url}})
    reply = httpx.post(address + CHAT, json=body)
    assert reply.status_code in (400, 413)
    assert len(reason(reply)) < 300


@pytest.mark.parametrize(("name", "value", "why"), [(n, v, w) for n, cases in BAD_FIELDS.items() for v, w in cases])
def test_a_field_of_another_type_or_range_is_named(address, name, value, why):
    reply = httpx.post(address + CHAT, content=json.dumps(chat_body("What?", model="colours") | {name: value}))
    assert reply.status_code == 400
    assert why in reason(reply)


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_a_body_that_is_no_object_is_refused(address, body):
    for route in (CHAT, LLAVA, "/worker_inspect"):
        reply = httpx.post(address + route, content=body)
        assert reply.status_code == 400
        assert BAD_BODIES[body] in reason(reply)


@pytest.mark.parametrize("temperature", [1e-5, 1e-39, 1e-300])
def test_a_temperature_next_to_0_is_greedy(address, temperature):
    body = chat_body("What?", seed=1) | {"temperature": temperature}
    answers = [httpx.post(address + CHAT, json=each).json() for each in (body, body | {"temperature": 0})]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_more_tokens_than_the_context_holds_are_cut(address):
    body = chat_body("", colour_image("red"), model="colours", max_tokens=100_000)
    assert httpx.post(address + CHAT, json=body).json()["choices"][0]["message"]["content"] == "red"


@pytest.mark.parametrize("route", [CHAT, LLAVA])
def test_pixels_of_a_whole_request_are_counted_before_any_is_decoded(address, route):
    """Each image is within its own limit, and all together within that on the body."""
    images = [base64_png(colour_image("red", (1000, 990)))] * 3
    assert LIMITS.request_pixels == 2_500_000
    before = memory()
    body = {"model": "colours", "prompt": "<image>" * 3, "images": images}
    if route == CHAT:
        body = chat_body("What?", *[colour_image("red", (1000, 990))] * 3, model="colours")
    reply = httpx.post(address + route, json=body)
    assert reply.status_code == 413
    assert "2970000 pixels together; the limit is 2500000" in reason(reply)
    assert memory() - before < 6 * MIB  # decoded they are 9 MB


def test_too_large_unknown_and_wrongly_asked(address):
    reply = httpx.post(address + CHAT, content=b'{"model": "' + b"x" * LIMITS.body_bytes + b'"}')
    assert (reply.status_code, "larger than 400000 bytes" in reason(reply)) == (413, True)
    reply = httpx.post(address + CHAT, content=(b"x" * 100_000 for _ in range(12)))  # without Content-Length
    assert reply.status_code == 413
    reply = httpx.post(address + CHAT, json=chat_body("What?", model="other\nmodel"))
    assert (reply.status_code, "Models: colours, babble" in reason(reply)) == (404, True)
    assert httpx.get(address + CHAT).status_code == 405
    assert httpx.post(address + "/v1/embeddings", json={}).status_code == 404


def test_300_malformed_requests_get_reasons_and_cost_nothing(address, pool):
    draw = random.Random(0)
    with httpx.Client(timeout=60) as client:
        for _ in range(20):
            malformed(draw, client, address)
        before = memory()
        for number in range(300):
            reply = malformed(draw, client, address)
            assert 400 <= reply.status_code < 500, (number, reply.status_code, reply.request.content[:300])
            assert len(reason(reply)) > 10
    assert memory() - before < 50 * MIB
    assert pool.load == 0
    answer = httpx.post(address + CHAT, json=chat_body("", colour_image("blue"), model="colours")).json()
    assert answer["choices"][0]["message"]["content"] == "blue"


def malformed(draw, client, address):
    """One request with one thing wrong."""
    kind = draw.randrange(4)
    if kind == 0:
        name = draw.choice(sorted(BAD_FIELDS))
        body = chat_body("What?", colour_image("red"), model="colours") | {name: draw.choice(BAD_FIELDS[name])[0]}
        return client.post(address + CHAT, content=json.dumps(body))
    if kind == 1:
        images = [draw.choice(list(BAD_IMAGES.values()))[0], *[GOOD] * draw.randrange(3)]
        draw.shuffle(images)
        body = {"model": "colours", "prompt": "<image>" * len(images), "images": images}
        return client.post(address + LLAVA, json=body)
    if kind == 2:  # anything at all in the place of a field that must be something
        name = draw.choice(("prompt", "images", "max_new_tokens", "temperature", "top_p", "stop"))
        fitting = {"prompt": str, "images": list, "stop": (str, list)}.get(name, int | float)
        value = anything(draw, 3)
        while value is None or (isinstance(value, fitting) and not isinstance(value, bool)):
            value = anything(draw, 3)
        body = {"model": "colours", "prompt": "<image>", "images": [GOOD]} | {name: value}
        return client.post(address + LLAVA, json=body)
    whole = json.dumps(chat_body("What?", colour_image("red"), model="colours")).encode()
    return client.post(address + CHAT, content=whole[: draw.randrange(len(whole))])


def anything(draw, depth):
    leaves = [None, True, -1, 10**30, -1e300, "", "x" * 50, "../..", "\u0000", "\U0001f600"]
    if depth == 0 or draw.random() < 0.5:
        return draw.choice(leaves)
    parts = [anything(draw, depth - 1) for _ in range(draw.randrange(4))]
    return parts if draw.random() < 0.5 else {f"key{place}": part for place, part in enumerate(parts)}


def memory():
    """Resident bytes of this process, in which the worker runs too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")
