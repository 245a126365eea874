"""What serving costs: `python scripts/bench/serving.py`. Server and clients run in this process, over real sockets.

1. Against bare `generate`: from an image file's bytes to the first token, and tokens a second after it, with an LLM of
   110 M random parameters over the shipped tower. Bare is what one would write without a server.
2. Under load: requests of many sizes from several clients at once to the shipped LLM, each answer compared with the one
   that its request gets alone; latencies.

The exit status says whether the answers are alike and what the server adds is no more than a tenth.
"""

import argparse
import base64
import io
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import torch
import uvicorn
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import machine, parse, show
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from llava.conversation import Conversation, conv_templates
from llava.inference import decode_answer, generation_options, prompt_ids, question
from llava.mm_utils import load_image
from llava.model.builder import default_device
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from llava.model.loading import attach_vision, load_config
from llava.model.multimodal_encoder.builder import checkpoint_image_processor
from llava.serve.backends import openai_body
from llava.serve.limits import Limits
from llava.serve.pool import ModelPool
from llava.serve.requests import Dialogue, Request, Sampling, Turn
from llava.serve.served_model import ServedModel
from llava.serve.worker_app import Worker

LLM, TOWER = "playground/models/llm", "comp-siglip:playground/models/tower"
LARGE = {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 14}
LARGE |= {"num_attention_heads": 12, "num_key_value_heads": 12, "layer_types": ["full_attention"] * 14}
SIZES = ((384, 160), (160, 384), (320, 320), (640, 480), (64, 64))
OVERHEAD = 0.1  # of the first token and of the tokens a second after it; more is a failure


def random_model(name: str, **config: object) -> ServedModel:
    """The shipped tower under an LLM of the shipped one's kind with random weights; `config` sets its size."""
    torch.manual_seed(0)
    llm = load_config(LLM)
    for key, value in config.items():
        setattr(llm, key, value)
    model = LlavaQwenForCausalLM(llm)
    attach_vision(model, TOWER, base_model=LLM, projector_type="downsample_mlp", dtype=torch.float32)
    model = model.to(default_device()).eval()
    processor = checkpoint_image_processor(model.config)
    tokenizer = AutoTokenizer.from_pretrained(LLM)
    return ServedModel(name, model, tokenizer, processor, conv_templates["qwen_2_5"], llm.max_position_embeddings)


@contextmanager
def served(model: ServedModel) -> Iterator[str]:
    """A worker at a free port of this machine."""
    pool = ModelPool([model], Limits(requests=10_000))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(Worker(pool).app(), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        httpx.post(f"{address}/worker_get_status", timeout=30)
        yield address
        server.should_exit = True
        thread.join()


def picture(size: tuple[int, int], seed: int) -> bytes:
    """A PNG file of a few shapes."""
    draw = random.Random(seed)
    image = Image.new("RGB", size, "white")
    for _ in range(12):
        x, y = draw.randrange(size[0]), draw.randrange(size[1])
        colour = tuple(draw.randrange(256) for _ in range(3))
        ImageDraw.Draw(image).rectangle((x, y, x + draw.randrange(60), y + draw.randrange(60)), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Clock(BaseStreamer):
    """When the first new token came, and the last; the first thing that `generate` puts is the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def bare(model: ServedModel, content: bytes, tokens: int) -> tuple[float, float, str]:
    """Seconds to the first token, tokens a second after it, and the answer, without a server."""
    clock = Clock()
    begin = time.perf_counter()
    inputs = model.image_processor([load_image(content)])
    conversation = asked(model)
    ids = prompt_ids(conversation, model.tokenizer)
    device = model.model.device
    options = generation_options(conversation, model.tokenizer, max_new_tokens=tokens)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.inference_mode():
        new = model.model.generate([ids.to(device)], **inputs, **options, streamer=clock)
    answer = decode_answer(new[0], model.tokenizer, options["eos_token_id"])
    times = clock.times[-tokens:]
    return times[0] - begin, (tokens - 1) / (times[-1] - times[0]), answer


def over_http(client: httpx.Client, address: str, body: dict) -> tuple[float, float, str]:
    """The same for a client of LLaVA's protocol, which has a message for each token, even one that is no text yet."""
    begin = time.perf_counter()
    times: list[float] = []
    received = b""
    with client.stream("POST", f"{address}/worker_generate_stream", json=body) as reply:
        for piece in reply.iter_raw():
            times += [time.perf_counter()] * piece.count(b"\0")
            received += piece
    tokens = body["max_new_tokens"]
    if len(times) != tokens:
        raise ValueError(f"The answer ended after {len(times)} tokens; the comparison needs {tokens}.")
    answer = json.loads(received.split(b"\0")[-2])["text"].removeprefix(body["prompt"])
    return times[0] - begin, (tokens - 1) / (times[-1] - times[0]), answer


def llava_request(model: ServedModel, content: bytes, tokens: int) -> dict:
    """What `bare` asks, in LLaVA's protocol."""
    images = [base64.b64encode(content).decode("ascii")]
    prompt = asked(model).get_prompt()
    return {"model": model.name, "prompt": prompt, "images": images, "max_new_tokens": tokens, "temperature": 0}


def asked(model: ServedModel) -> Conversation:
    """A question about one image, to be answered."""
    conversation = model.template.copy()
    conversation.append_message(conversation.roles[0], question(conversation, "Describe the image.", 1))
    conversation.append_message(conversation.roles[1], None)
    return conversation


def openai_request(content: bytes | None, tokens: int, model: str, text: str, **sampling) -> dict:
    """A request that is not streamed, about one image or none."""
    images = () if content is None else (load_image(content),)
    turn = Turn("user", text, len(images))
    body = openai_body(Request(model, Dialogue((turn,)), images, Sampling(tokens, **sampling)))
    return body | {"stream": False, "stream_options": None}


def compare_with_bare(rounds: int, tokens: int, config: dict, console: Console) -> bool:
    """Whether the server answers as bare `generate` does, and takes no more than `OVERHEAD` longer."""
    model = random_model("large", **config)
    content = picture((640, 480), 0)
    size = sum(parameter.numel() for parameter in model.model.parameters())
    ways: dict[str, list] = {"bare generate": [], "worker, streaming": []}
    with served(model) as address, httpx.Client(timeout=600) as client:
        body = llava_request(model, content, tokens)
        for turn in track(range(rounds + 1), "against bare generate", transient=True):
            for way, run in (
                ("bare generate", lambda: bare(model, content, tokens)),
                ("worker, streaming", lambda: over_http(client, address, body)),
            ):
                found = run()
                ways[way] += [found] * (turn > 0)
    answers = {answer for runs in ways.values() for _, _, answer in runs}
    table = Table(title=f"{size / 1e6:.0f} M parameters, {tokens} tokens, best of {rounds}; {machine()}")
    for column in ("", "first token, ms", "tokens/s", "overhead of the first token", "of tokens/s"):
        table.add_column(column, justify="right")
    first, speed = best(ways["bare generate"])
    for way, runs in ways.items():
        own_first, own_speed = best(runs)
        costs = f"{100 * (own_first / first - 1):+.1f} %", f"{100 * (speed / own_speed - 1):+.1f} %"
        table.add_row(way, f"{1000 * own_first:.0f}", f"{own_speed:.1f}", *costs)
    show(table, console)
    console.print(f"answers alike: {len(answers) == 1}")
    first_served, speed_served = best(ways["worker, streaming"])
    return len(answers) == 1 and max(first_served / first, speed / speed_served) <= 1 + OVERHEAD


def best(runs: list[tuple[float, float, str]]) -> tuple[float, float]:
    """The least time to the first token and the most tokens a second: what the rest of the machine disturbed least."""
    return min(first for first, _, _ in runs), max(speed for _, speed, _ in runs)


def load(count: int, clients: int, console: Console) -> bool:
    """Whether every one of many answers is the one that its request gets alone."""
    model = random_model("small")
    bodies = [
        openai_request(
            None if number % 7 == 6 else picture(SIZES[number % len(SIZES)], number),
            8 + number % 32,
            "small",
            f"Question {number}?",
            temperature=(0.0, 1.0)[number % 2],
            seed=number,
        )
        for number in range(count)
    ]
    with served(model) as address, httpx.Client(timeout=600) as client:

        def ask(body: dict) -> tuple[float, str]:
            begin = time.perf_counter()
            reply = client.post(f"{address}/v1/chat/completions", json=body).raise_for_status().json()
            return time.perf_counter() - begin, reply["choices"][0]["message"]["content"]

        alone = [ask(body) for body in track(bodies, "alone", transient=True)]
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            together = list(pool.map(ask, bodies))
        seconds = time.perf_counter() - begin
    differing = sum(a[1] != b[1] for a, b in zip(alone, together, strict=True))
    table = Table(title=f"{count} requests, {clients} clients; {machine()}")
    for column in ("", "requests/s", "p50, ms", "p95, ms"):
        table.add_column(column, justify="right")
    for name, runs, rate in (
        ("one after another", alone, count / sum(run[0] for run in alone)),
        (f"{clients} at once", together, count / seconds),
    ):
        times = statistics.quantiles([run[0] for run in runs], n=20)
        table.add_row(name, f"{rate:.1f}", f"{1000 * times[9]:.0f}", f"{1000 * times[18]:.0f}")
    show(table, console)
    different = len({answer for _, answer in alone})
    console.print(
        f"{count} answered, {different} different answers, {differing} not the answer that the request gets alone"
    )
    return differing == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("bare", "load"), default=("bare", "load"))
    parser.add_argument("--rounds", type=int, default=9, help="of the comparison with bare generate")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="compare with the shipped LLM: to try the script itself")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    args = parse(parser)
    console = Console(width=120)
    passed = [
        load(args.requests, args.clients, console)
        if part == "load"
        else compare_with_bare(args.rounds, args.tokens, {} if args.small else LARGE, console) or args.small
        for part in args.parts
    ]
    if not all(passed):
        sys.exit(1)


if __name__ == "__main__":
    main()
