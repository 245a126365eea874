"""The web page in a real browser: what a person does with it, and what a forged request cannot."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse

from llava.serve.backends import LocalBackend
from llava.serve.controller_app import Controller, Registry
from llava.serve.engine import Update
from llava.serve.gradio_web_server import make_app, make_parser
from llava.serve.limits import Limits
from llava.serve.page import Page
from llava.serve.pool import ModelPool
from tests.llava.serve_parts import colour_image, png, running

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
expect = playwright.expect

pytest_plugins = ["tests.llava.eval_parts", "tests.llava.serve_parts"]
pytestmark = pytest.mark.slow

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--limit-image-bytes", "100000", "--limit-image-pixels", "200000", "--device", "cpu", "--port", "0"]
PATIENCE = 60_000  # ms


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Debian's chromium, or what `playwright install chromium` has put there."""
    with playwright.sync_playwright() as engine:
        try:
            browser = engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            if "Executable doesn't exist" in str(error):
                pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
            raise
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(run: Path) -> Iterator[str]:
    args = ["--model-path", str(run / "stage2_native"), str(run / "stage1"), *FLAGS]
    with running(make_app(make_parser().parse_args(args))) as site:
        yield site


@pytest.fixture
def page(browser, site: str) -> Iterator:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(site)
    page.locator("#box textarea").wait_for()
    yield page
    foreign = [url for url in requests if not url.startswith((site, "data:", "blob:"))]
    assert not foreign, "the page fetches from elsewhere"
    page.close()


def upload(page, folder: Path, name: str, content: bytes, where: str = "#box") -> None:
    (folder / name).write_bytes(content)
    page.locator(f"{where} input[type=file]").first.set_input_files(folder / name)


def ask(page, text: str) -> None:
    page.locator("#box textarea").fill(text)
    page.locator("#box textarea").press("Enter")


def answer(page):
    return page.locator("#chat [data-testid=bot]").last


def test_a_conversation(page, tmp_path):
    upload(page, tmp_path, "red.png", png(colour_image("red", (160, 96))))
    count = page.locator("#token-count")
    expect(count).to_contain_text("6 \N{MULTIPLICATION SIGN} 10 = 60", timeout=PATIENCE)
    ask(page, "Which colour?")
    expect(answer(page)).to_have_text("red", timeout=PATIENCE)
    page.locator("#budget input[type=range]").fill("15")
    expect(count).to_contain_text("3 \N{MULTIPLICATION SIGN} 5 = 15", timeout=PATIENCE)
    page.get_by_role("button", name="Retry").last.click()
    expect(page.locator("#box .stop-button, #box button[aria-label=Stop]")).to_have_count(0, timeout=PATIENCE)
    expect(answer(page)).to_have_text(re.compile("red|green|blue|yellow"), timeout=PATIENCE)
    page.get_by_role("button", name="Undo").last.click()
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(0, timeout=PATIENCE)
    expect(page.locator("#box textarea")).to_have_value("Which colour?")
    upload(page, tmp_path, "blue.png", png(colour_image("blue", (96, 96))))
    expect(count).to_contain_text("together", timeout=PATIENCE)
    expect(count).to_contain_text("blue.png", timeout=PATIENCE)
    expect(count).to_contain_text("red.png")


def test_what_the_model_sees(page, tmp_path):
    page.get_by_role("tab", name="What it sees").click()
    upload(page, tmp_path, "green.png", png(colour_image("green", (160, 96))), "#see")
    words = page.locator("#words .cell")
    expect(words).to_have_count(60, timeout=PATIENCE)
    assert re.search(r"\w+ -?\d\.\d\d, ", words.first.get_attribute("title"))
    page.locator("#word input").fill("yellow")
    page.locator("#word input").press("Enter")
    page.get_by_role("tab", name="Heat map").click()
    expect(page.locator("#heat .cell")).to_have_count(60, timeout=PATIENCE)
    expect(page.locator("#heat .scale")).to_contain_text("“yellow”", timeout=PATIENCE)
    for tab, picture in (("As the model saw it", "#seen img"), ("Features", "#features img")):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(picture)).to_be_visible(timeout=PATIENCE)
    page.locator("#word input").fill("notaword")
    page.locator("#word input").press("Enter")
    expect(page.locator(".toast-body")).to_contain_text("no single token", timeout=PATIENCE)


def test_two_models_side_by_side(page, tmp_path):
    page.get_by_role("tab", name="Side by side").click()
    upload(page, tmp_path, "blue.png", png(colour_image("blue", (64, 48))), "#compare-image")
    page.get_by_label("Question").fill("Which colour?")
    expect(page.locator("#compare-image img")).to_be_visible(timeout=PATIENCE)
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#answer-A textarea")).to_have_value("blue", timeout=PATIENCE)
    expect(page.get_by_text(re.compile(r"\d+ tokens, "))).to_have_count(2, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corrupt.png", png(colour_image("red"))[:60], "corrupt.png"),
        ("no.png", b"no image at all", "no.png is not a readable image"),
        ("wide.png", png(colour_image("red", (1000, 201))), "wide.png has more than 200000 pixels"),
    ],
    ids=["corrupt", "none", "wide"],
)
def test_a_bad_upload_says_what_is_wrong(page, tmp_path, name, content, message):
    """Beside the chat as soon as it is chosen, and again if it is sent all the same; then it stays in the box."""
    upload(page, tmp_path, name, content)
    expect(page.locator("#token-count")).to_contain_text(message, timeout=PATIENCE)
    ask(page, "What is it?")
    expect(page.locator(".toast-body").first).to_contain_text(message, timeout=PATIENCE)
    expect(page.locator("#chat [data-testid=user]")).to_have_count(0)
    expect(page.locator("#box textarea")).to_have_value("What is it?")


def test_a_file_of_too_many_bytes_is_refused_in_the_browser(page, tmp_path):
    upload(page, tmp_path, "heavy.png", bytes(100_001))
    expect(page.locator(".toast-body").first).to_contain_text("size", timeout=PATIENCE)


def test_stop_frees_the_model(browser, chat_model):
    pool = ModelPool([chat_model], Limits())

    def endless(batch) -> None:
        words = 0
        while not batch[0].cancelled:
            words += 1
            batch[0].tell(Update("word " * words, words))
            time.sleep(0.02)

    pool.engine("babble")._generate = endless
    app = gr.mount_gradio_app(FastAPI(), Page(LocalBackend(pool), Limits()).build(), path="/")
    with running(app) as site:
        page = browser.new_page()
        page.goto(site)
        ask(page, "Go on for ever")
        expect(answer(page)).to_contain_text("word word word", timeout=PATIENCE)
        other = browser.new_page()  # is answered at the same time
        other.goto(site)
        ask(other, "Me too")
        expect(answer(other)).to_contain_text("word word word", timeout=PATIENCE)
        assert pool.load == 2
        other.close()
        page.get_by_role("button", name="Stop").click()
        until = time.monotonic() + 30
        while pool.load:
            assert time.monotonic() < until
        expect(page.get_by_role("button", name="Submit")).to_be_visible(timeout=PATIENCE)
        expect(answer(page)).to_contain_text("word word word")
        page.close()
    pool.close()


def test_the_page_fits_a_phone(browser, site):
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.goto(site)
    page.locator("#box textarea").wait_for(timeout=PATIENCE)
    for tab in ("Chat", "What it sees", "Side by side"):
        page.get_by_role("tab", name=tab).first.click(timeout=PATIENCE)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_the_page_before_a_controller(browser, address, tmp_path):
    """The same page over HTTP: what the worker refuses or says arrives as it was said."""
    registry = Registry()
    with running(Controller(registry, Limits()).app()) as controller:
        about = {"worker_name": address, "check_heart_beat": False, "worker_status": None}
        httpx.post(f"{controller}/register_worker", json=about).raise_for_status()
        with running(make_app(make_parser().parse_args(["--controller-url", controller]))) as site:
            page = browser.new_page()
            page.goto(site)
            upload(page, tmp_path, "blue.png", png(colour_image("blue", (160, 96))))
            expect(page.locator("#token-count")).to_contain_text("60 visual tokens", timeout=PATIENCE)
            ask(page, "Which colour?")
            expect(answer(page)).to_have_text("blue", timeout=PATIENCE)
            page.get_by_role("tab", name="What it sees").click()
            expect(page.locator("#words .cell")).to_have_count(60, timeout=PATIENCE)
            page.get_by_role("tab", name="Chat").click()
            registry.workers.clear()
            ask(page, "And now?")
            expect(page.locator(".toast-body").first).to_contain_text("No worker has the model", timeout=PATIENCE)
            page.close()


def joined(site: str, handler: str, data: list) -> dict:
    """What Gradio answers to a request that no page of ours sends."""
    config = httpx.get(f"{site}/config").json()
    number = next(each["id"] for each in config["dependencies"] if each["targets"] and each["targets"][0][1] == handler)
    session = uuid.uuid4().hex
    httpx.post(f"{site}/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": session})
    with httpx.stream("GET", f"{site}/gradio_api/queue/data", params={"session_hash": session}) as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]
    return next(event for event in events if event["msg"] == "process_completed")


@pytest.mark.parametrize("handler", ["retry", "undo"])
def test_a_forged_conversation_opens_no_file(site, handler, tmp_path):
    """Gradio builds components that stand in a conversation; an image of theirs is opened by its path."""
    (tmp_path / "own.png").write_bytes(png(colour_image("red")))
    part = {"type": "component", "component": "image", "props": {}, "constructor_args": {}}
    for name in ("own.png", "missing.png"):
        part["value"] = {"path": str(tmp_path / name)}
        done = joined(site, handler, [[{"role": "user", "content": [part]}]])
        assert (done["success"], "texts and files only" in str(done)) == (False, True), done


def test_a_forged_upload_is_not_fetched(site, tmp_path):
    """Gradio takes files by name; neither a URL nor a file of the server may come through."""
    asked_for: list[str] = []

    async def elsewhere(scope, receive, send) -> None:
        asked_for.append(scope["type"])
        await PlainTextResponse("no")(scope, receive, send)

    (tmp_path / "own.png").write_bytes(png(colour_image("red")))
    with running(elsewhere) as stranger:
        asked_for.clear()
        for path, why in ((f"{stranger}/a.png", "not fetched"), (str(tmp_path / "own.png"), "not uploaded by a user")):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            done = joined(site, "submit", [{"text": "What?", "files": [file]}, []])
            assert (done["success"], why in str(done)) == (False, True), done
    assert asked_for == []


def test_an_open_page_does_not_hold_up_the_end(address):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "llava.serve.gradio_web_server", "--controller-url", address, "--port", port]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in server.stderr:
            if "Uvicorn running" in line:
                break
        url = f"http://127.0.0.1:{port}/gradio_api/heartbeat/someone"
        with httpx.stream("GET", url, timeout=60) as stream:
            next(stream.iter_lines())
            server.terminate()
            _, said = server.communicate(timeout=20)  # it waits 30 s for what does not end
        assert "Traceback" not in said
    finally:
        server.kill()
