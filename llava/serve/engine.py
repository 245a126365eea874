"""Answers to many clients from one model: a queue, and threads that generate for several requests at a time.

A thread takes what waits, as many rows as are free, and generates for all of them in one batch; each row ends by
itself. Rows are padded to the left and masked, and each draws its tokens with its own generator, so an answer does not
depend on what else is in the batch (but for the rounding of the device's matrix products).
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TemperatureLogitsWarper, TopPLogitsWarper

from llava.inference import generation_options
from llava.serve.limits import Limits
from llava.serve.requests import Refused, Sampling
from llava.serve.served_model import Prompt, ServedModel

logger = logging.getLogger(__name__)

CLOSING = "The server is shutting down."
LEAST_TEMPERATURE = 1e-4  # below it the likeliest token is all that is left, and the division leaves floats' range
LANES = 2  # threads, so that a newcomer need not wait for the end of a long answer


@dataclass(frozen=True)
class Update:
    """How far an answer is. `finish_reason` is "stop" or "length" at its end; `error` ends it too.

    `status` is the HTTP status that says of which kind the error is: 500, 503 shutting down, 504 too late.
    """

    text: str
    tokens: int
    finish_reason: str | None = None
    error: str | None = None
    status: int = 200

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Job:
    """A request in the engine. `listener` is called from a generating thread and must return at once."""

    def __init__(self, prompt: Prompt, listener: Callable[[Update], None], deadline: float):
        self.prompt = prompt
        self.listener = listener
        self.deadline = deadline
        self.cancelled = False
        self.told = False
        self.ended = False

    def cancel(self) -> None:
        """Nobody waits for the answer any more: its row is free after the step that runs."""
        self.cancelled = True

    def tell(self, update: Update) -> None:
        """Pass on news, nothing after the last."""
        if self.ended:
            return
        self.told, self.ended = True, update.is_last
        if self.cancelled:
            return
        try:
            self.listener(update)
        except Exception:  # the client's side is gone, an event loop that was closed for example
            logger.debug("a listener failed", exc_info=True)
            self.cancelled = True


class Engine:
    """Generates for one model.

    Args:
        rows: Requests in a batch; each of the threads runs one batch.
        stream_interval: Tokens between two updates.
    """

    def __init__(self, served: ServedModel, limits: Limits, *, rows: int = 5, stream_interval: int = 1):
        self.served = served
        self.limits = limits
        self.rows = rows
        self.stream_interval = stream_interval
        self._waiting: deque[Job] = deque()
        self._running: set[Job] = set()
        self._closed = False
        self._condition = threading.Condition()  # its lock is reentrant
        self._threads = [
            threading.Thread(target=self._run, name=f"generate-{served.name}-{lane}", daemon=True)
            for lane in range(LANES)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        with self._condition:
            return sum(not (job.cancelled or job.ended) for job in (*self._waiting, *self._running))

    def submit(self, prompt: Prompt, listener: Callable[[Update], None]) -> Job:
        """Put a request into the queue; a full one refuses it."""
        job = Job(prompt, listener, time.monotonic() + self.limits.request_seconds)
        with self._condition:
            if self._closed:
                raise Refused(CLOSING, 503)
            if self.load >= self.limits.requests:
                raise Refused(full(self.limits), 429)
            self._waiting.append(job)
            self._condition.notify()
        return job

    def close(self, seconds: float = 10.0) -> None:
        """Answer nothing more: requests that wait or run end with an error."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join(seconds)

    @property
    def closed(self) -> bool:
        return self._closed

    def _run(self) -> None:
        while batch := self._take():
            try:
                self._generate_or_say_why(batch)
            finally:
                with self._condition:
                    self._running.difference_update(batch)

    def _take(self) -> list[Job]:
        """Jobs for a batch, first come first served: as many as there are rows and `batch_tokens` allows."""
        with self._condition:
            while True:
                self._condition.wait_for(lambda: self._closed or self._waiting)
                batch: list[Job] = []
                longest = 0
                while self._waiting and len(batch) < self.rows:
                    job = self._waiting[0]
                    longest = max(longest, job.prompt.length)
                    if batch and longest * (len(batch) + 1) > self.limits.batch_tokens:
                        break
                    self._waiting.popleft()
                    if not self._over(job):
                        batch.append(job)
                if batch:
                    self._running.update(batch)
                    return batch
                if self._closed:
                    return []

    def _over(self, job: Job) -> bool:
        """Whether nothing more is to be generated for `job`; says why, if somebody listens."""
        if self._closed:
            job.tell(Update("", 0, error=CLOSING, status=503))
        elif time.monotonic() > job.deadline:
            job.tell(Update("", 0, error=late(self.limits), status=504))
        return job.cancelled or job.ended

    def _end_the_late(self) -> None:
        """Tell those that wait longer than they may, while others are answered."""
        with self._condition:
            for job in self._waiting:
                self._over(job)

    def _generate_or_say_why(self, batch: list[Job]) -> None:
        """A batch that fails, for lack of memory say, is tried again row by row; what fails alone is told why.

        So is an answer that has begun: tried again, it could go on in other words than those its client has.
        """
        try:
            self._generate(batch)
        except Exception as error:
            logger.exception("%s failed in a batch of %d", self.served.name, len(batch))
            reason = f"{self.served.name} failed: {type(error).__name__}: {error}"
            for job in batch:
                if len(batch) == 1 or job.told:
                    job.tell(Update("", 0, error=reason, status=500))
                elif not self._over(job):
                    self._generate_or_say_why([job])

    @torch.inference_mode()
    def _generate(self, batch: list[Job]) -> None:
        served, device = self.served, self.served.model.device
        prompts = [job.prompt for job in batch]
        inputs = {name: torch.cat([prompt.inputs[name] for prompt in prompts]).to(device) for name in prompts[0].inputs}
        rows = [Row(job, served) for job in batch]
        served.model.generate(
            [prompt.input_ids.to(device) for prompt in prompts],
            **inputs,
            **generation_options(
                served.template,
                served.tokenizer,
                max_new_tokens=max(prompt.sampling.max_new_tokens for prompt in prompts),
            ),
            logits_processor=[Draw([prompt.sampling for prompt in prompts], device)],
            stopping_criteria=[Watch(rows, self._over, self._end_the_late, self.stream_interval)],
        )


def full(limits: Limits) -> str:
    """Why a request is turned away with 429."""
    return f"{limits.requests} requests are waiting or running, the limit. Try again later."


def late(limits: Limits) -> str:
    """Why a request ends with 504."""
    return f"The answer was not finished within {limits.request_seconds} s."


class Draw(LogitsProcessor):
    """Lets greedy search sample: a row with a temperature draws its token here, and no other is left to choose."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device):
        self.rows = [
            (row, [TemperatureLogitsWarper(each.temperature), TopPLogitsWarper(each.top_p)], _generator(each, device))
            for row, each in enumerate(samplings)
            if each.temperature >= LEAST_TEMPERATURE
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) -> the same, where a sampled row is −inf but for its token."""
        scores = scores.clone() if self.rows else scores
        for row, warpers, generator in self.rows:
            row_scores = scores[row : row + 1].float()
            for warper in warpers:
                row_scores = warper(input_ids[row : row + 1], row_scores)
            token = torch.multinomial(row_scores.softmax(dim=-1), 1, generator=generator)
            scores[row] = -torch.inf
            scores[row, token[0]] = 0
        return scores


def _generator(sampling: Sampling, device: torch.device) -> torch.Generator:
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return torch.Generator(device).manual_seed(seed)


class Row:
    """A job's place in a batch: collects its tokens, and tells when it is over."""

    def __init__(self, job: Job, served: ServedModel):
        self.job = job
        self.tokenizer = served.tokenizer
        self.stop_ids = set(served.stop_ids)
        self.ids: list[int] = []

    def add(self, token: int, *, tell: bool) -> None:
        """One more token. `tell` says whether it is time for an update; the last one always is."""
        sampling = self.job.prompt.sampling
        self.ids.append(token)
        finish_reason = None
        if token in self.stop_ids:
            finish_reason = "stop"
        elif len(self.ids) >= sampling.max_new_tokens:
            finish_reason = "length"
        if not (tell or finish_reason or sampling.stop):
            return
        said = self.ids[:-1] if finish_reason == "stop" else self.ids
        text, met_stop = readable(self.tokenizer.decode(said, skip_special_tokens=True), sampling.stop, finish_reason)
        finish_reason = "stop" if met_stop else finish_reason
        if tell or finish_reason:
            self.job.tell(Update(text, len(self.ids), finish_reason))


def readable(text: str, stop: Sequence[str], finish_reason: str | None) -> tuple[str, bool]:
    """What of a decoded text can be shown for good, and whether it has come to a stop text.

    White space around the answer is no part of it. Until the end, what may still change is held back: white space, half
    a character, and what may become a stop text.
    """
    ends = [place for each in stop if (place := text.find(each)) >= 0]
    if ends:
        return text[: min(ends)].strip(), True
    if finish_reason is not None:
        return text.strip(), False
    held = max((_overlap(text, each) for each in stop), default=0)
    return text[: len(text) - held].rstrip("\ufffd").strip(), False


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Watch(StoppingCriteria):
    """After each step: every row's new token to its job, and which rows are over."""

    def __init__(
        self, rows: list[Row], over: Callable[[Job], bool], each_step: Callable[[], None], stream_interval: int
    ):
        self.rows = rows
        self.over = over
        self.each_step = each_step
        self.stream_interval = stream_interval
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B, L) of which the last column is new -> (B,) bool."""
        self.step += 1
        self.each_step()
        tell = self.step % self.stream_interval == 0
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not self.over(row.job):
                row.add(token, tell=tell)
        return torch.tensor([row.job.ended or row.job.cancelled for row in self.rows], device=input_ids.device)
