"""The controller over real sockets, with workers that come, die in the middle of an answer, and come back."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from starlette.responses import PlainTextResponse

from llava.serve import test_message as sender
from llava.serve.controller_app import Controller, Registry
from llava.serve.limits import Limits
from llava.serve.model_worker import Heartbeat
from tests.llava.serve_parts import base64_png, chat_body, colour_image, running

pytest_plugins = ["tests.llava.eval_parts", "tests.llava.serve_parts"]

STATUS = {"model_names": ["a", "b"], "speed": 1, "queue_length": 0}


def test_the_shortest_queue_is_taken_and_grows():
    registry = Registry()
    for name, speed, length in (("one", 1, 4), ("two", 2, 6), ("three", 1, 9)):
        registry.register(name, True, STATUS | {"speed": speed, "queue_length": length})
    assert [registry.choose("a") for _ in range(4)] == ["two", "two", "one", "two"]
    assert registry.choose("c") is None
    registry.beat("three", 0)
    assert registry.choose("b") == "three"


def test_the_lottery_follows_the_speeds():
    registry = Registry("lottery")
    registry.register("slow", True, STATUS)
    registry.register("fast", True, STATUS | {"speed": 3})
    registry.register("still", True, STATUS | {"speed": 0})
    random.seed(0)
    drawn = [registry.choose("a") for _ in range(400)]
    assert 270 < drawn.count("fast") < 330
    assert "still" not in drawn


def test_who_misses_its_heart_beats_is_dropped_and_taken_back():
    registry = Registry(expiration=-1.0)
    registry.register("gone", True, STATUS)
    registry.register("by hand", False, STATUS | {"model_names": ["b"]})
    assert registry.models() == ["b"]
    assert registry.beat("gone", 0) is False
    registry.expiration = 30
    registry.register("gone", True, STATUS)
    assert registry.beat("gone", 0) is True
    assert registry.models() == ["a", "b"]


@pytest.fixture
def controller():
    with running(Controller(Registry(), Limits()).app()) as controller:
        yield controller


def post(controller, path, **body):
    return httpx.post(f"{controller}/{path}", json=body, timeout=60)


def test_llavas_routes_and_shapes(controller, address, capsys):
    assert post(controller, "list_models").json() == {"models": []}
    assert post(controller, "receive_heart_beat", worker_name=address, queue_length=0).json() == {"exist": False}
    assert post(controller, "get_worker_address", model="colours").json() == {"address": ""}
    assert (
        post(controller, "register_worker", worker_name=address, check_heart_beat=True, worker_status=None).json()
        is None
    )
    assert post(controller, "list_models").json() == {"models": ["babble", "colours"]}
    assert post(controller, "get_worker_address", model="colours").json() == {"address": address}
    assert post(controller, "receive_heart_beat", worker_name=address, queue_length=3).json() == {"exist": True}
    status = post(controller, "worker_get_status").json()
    assert status == {"model_names": ["babble", "colours"], "speed": 1, "queue_length": 3}
    body = {"model": "colours", "prompt": "<image>", "images": [base64_png(colour_image("blue"))], "temperature": 0}
    reply = post(controller, "worker_generate_stream", **body)
    assert json.loads(reply.content.split(b"\0")[-2]) == {"text": "<image>blue", "error_code": 0}
    reply = post(controller, "worker_generate_stream", **body | {"prompt": "no place for it"})
    assert (reply.status_code, json.loads(reply.content[:-1])["error_code"]) == (400, 1)
    reply = post(controller, "worker_generate_stream", **body | {"model": "other"})
    assert (reply.status_code, json.loads(reply.content[:-1])["error_code"]) == (404, 2)
    sender.main(["--controller-address", controller, "--model-name", "babble", "--message", "Tell"])
    assert capsys.readouterr().out.startswith("Tell")
    with pytest.raises(SystemExit, match="knows no worker with the model other"):
        sender.main(["--controller-address", controller, "--model-name", "other"])


def test_openais_routes_go_through(controller, address):
    post(controller, "register_worker", worker_name=address, check_heart_beat=True, worker_status=None)
    api = openai.OpenAI(base_url=f"{controller}/v1", api_key="none", max_retries=0)
    assert [model.id for model in api.models.list().data] == ["colours", "babble"]
    body = chat_body("", colour_image("green"), model="colours")
    assert api.chat.completions.create(**body).choices[0].message.content == "green"
    chunks = list(api.chat.completions.create(**body, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "green"
    with pytest.raises(openai.BadRequestError, match="expected a number"):
        api.chat.completions.create(**body | {"temperature": -1})
    with pytest.raises(openai.NotFoundError, match="No worker has the model 'other'"):
        api.chat.completions.create(**body | {"model": "other"})


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{",
        b'{"worker_name": 5}',
        b'{"worker_name": "file:///etc"}',
        b'{"worker_name": "http://["}',
        b'{"worker_name": "http://"}',
        b'{"worker_name": "http://a:99999999/"}',
        b'{"worker_name": "http://a", "worker_status": {"model_names": ["\\ud800"]}}',
        b'{"worker_name": "http://a", "worker_status": {"model_names": [5]}}',
        b'{"worker_name": "http://a", "worker_status": {"speed": 1e999}}',
    ],
)
def test_a_registration_that_is_none_is_refused(controller, body):
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(f"{controller}/register_worker", content=body, headers=headers)
    assert reply.status_code == 400
    assert post(controller, "list_models").json() == {"models": []}


def test_an_unknown_model_is_404_where_others_live_and_503_where_none_does(controller, address):
    body = chat_body("", model="other")
    assert post(controller, "v1/chat/completions", **body).status_code == 503
    post(controller, "register_worker", worker_name=address, check_heart_beat=True, worker_status=None)
    assert post(controller, "v1/chat/completions", **body).status_code == 404


def test_a_heart_beat_outlives_whatever_answers_it():
    """A 200 that is no JSON, of a page that took the controller's port say."""
    beats = []

    async def stranger(scope, receive, send):
        if scope["type"] == "http":
            beats.append(scope["path"])
            await PlainTextResponse("hello")(scope, receive, send)

    with running(stranger) as address:
        heartbeat = Heartbeat(address, "http://a", lambda: STATUS, interval=0.02)
        heartbeat.start()
        wait_for(lambda: beats.count("/register_worker") > 1 and "/receive_heart_beat" in beats)
        heartbeat.stop()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_no_web_page_can_register_a_worker(controller, kind):
    """These types a browser sends to any site that a page names."""
    about = json.dumps({"worker_name": "http://a", "worker_status": STATUS})
    for route in ("register_worker", "receive_heart_beat"):
        reply = httpx.post(f"{controller}/{route}", content=about, headers={"Content-Type": kind})
        assert reply.status_code == 415
    assert post(controller, "list_models").json() == {"models": []}


def test_with_a_key_only_those_register_that_know_it():
    registry = Registry()
    with running(Controller(registry, Limits(), "secret").app()) as controller:
        for route in ("register_worker", "receive_heart_beat", "refresh_all_workers"):
            assert post(controller, route, worker_name="http://a", worker_status=STATUS).status_code == 401
        assert registry.workers == {}
        heartbeat = Heartbeat(controller, "http://a", lambda: STATUS, 0.02, "secret")
        heartbeat.start()
        wait_for(lambda: "http://a" in registry.workers)
        heartbeat.stop()


def test_a_dead_worker_is_dropped_when_asked_and_another_answers(controller, address):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
    status = {"model_names": ["colours"], "speed": 1, "queue_length": 0}
    post(controller, "register_worker", worker_name=dead, check_heart_beat=True, worker_status=status)
    status["queue_length"] = 5
    post(controller, "register_worker", worker_name=address, check_heart_beat=True, worker_status=status)
    body = chat_body("", colour_image("red"), model="colours")
    assert post(controller, "v1/chat/completions", **body).json()["choices"][0]["message"]["content"] == "red"
    assert post(controller, "receive_heart_beat", worker_name=dead, queue_length=0).json() == {"exist": False}
    post(controller, "register_worker", worker_name=dead, check_heart_beat=True, worker_status=status)
    post(controller, "refresh_all_workers")
    assert post(controller, "receive_heart_beat", worker_name=dead, queue_length=0).json() == {"exist": False}


def test_a_controller_that_forgot_its_workers_hears_of_them_again(address):
    registry = Registry()
    with running(Controller(registry, Limits()).app()) as controller:
        heartbeat = Heartbeat(controller, address, lambda: STATUS, interval=0.02)
        heartbeat.start()
        wait_for(lambda: address in registry.workers)
        registry.workers.clear()
        wait_for(lambda: address in registry.workers)
        heartbeat.stop()


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_an_answer(run: Path):
    """Clients get the protocol's own error; the controller drops the worker at once and takes its successor."""
    registry = Registry(expiration=5)
    with running(Controller(registry, Limits()).app()) as controller:
        worker = start_worker(run, controller)
        try:
            wait_for(lambda: registry.models() == ["stage2_native"])
            api = openai.OpenAI(base_url=f"{controller}/v1", api_key="none", max_retries=0)
            body = chat_body("Talk on", model="stage2_native", max_tokens=1024, temperature=2, seed=5)
            stream = api.chat.completions.create(**body, stream=True)
            for _ in range(3):
                next(stream)
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(openai.APIError, match="broke off in the middle of its answer"):
                list(stream)
            assert registry.models() == []
        finally:
            worker.kill()
            worker.wait(30)
        successor = start_worker(run, controller, port=worker.args[-1])
        try:
            wait_for(lambda: registry.models() == ["stage2_native"])
            assert post(controller, "v1/chat/completions", **body | {"max_tokens": 2}).status_code == 200
            successor.terminate()
            assert successor.wait(60) in (0, -signal.SIGTERM)
        finally:
            successor.kill()


def start_worker(run, controller, port=None):
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
    flags = ["--model-path", str(run / "stage2_native"), "--device", "cpu", "--heart-beat-interval", "0.2"]
    flags += ["--conv-mode", "qwen_2_5", "--controller-address", controller, "--port", port]
    return subprocess.Popen([sys.executable, "-m", "llava.serve.model_worker", *flags])
