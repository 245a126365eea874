"""The web page: chat, what the model sees, two models side by side. Layout and events; answers come from a backend."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import gradio.components.chatbot
from gradio import processing_utils

from llava.serve import page_parts
from llava.serve.backends import Backend, ModelInfo
from llava.serve.chat_history import (
    Messages,
    image_files,
    last_question,
    parts,
    read_files,
    to_request,
    user_messages,
    without_last_answer,
)
from llava.serve.examples import save_examples
from llava.serve.images import decode_images, image_sizes, preparing
from llava.serve.limits import Limits
from llava.serve.requests import Refused, Sampling
from llava.serve.side_by_side import compare

FONT = ["ui-sans-serif", "system-ui", "sans-serif"]  # the machine's own: no font is fetched
THEME = gr.themes.Default(
    primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=FONT, font_mono=["ui-monospace", "monospace"]
)
DARK = "() => document.body.classList.toggle('dark')"
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
UPLOADS_KEPT = (3600, 24 * 3600)  # seconds: how often uploads are looked through, and how old they become
LOUD = {"api_visibility": "private"}


@contextmanager
def shown_errors() -> Iterator[None]:
    """A refusal appears on the page with its reason, until it is closed."""
    try:
        yield
    except Refused as refused:
        raise gr.Error(str(refused), duration=None, print_exception=False) from refused


async def _fetch_nothing(url: str, cache_dir: str) -> str:
    raise gr.Error("URLs are not fetched here: upload the image.", print_exception=False)


def _build_nothing(component: str) -> None:
    raise gr.Error("A conversation holds texts and files only.", print_exception=False)


@dataclass
class Settings:
    """The controls beside the chat, in the order in which handlers get them."""

    model: gr.Dropdown
    budget: gr.Slider
    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    max_tokens: gr.Slider

    def all(self) -> list[Any]:
        return [self.model, self.budget, self.system, self.temperature, self.top_p, self.max_tokens]


class Page:
    """Event handlers over a backend, and the layout that calls them."""

    def __init__(self, backend: Backend, limits: Limits, *, concurrency: int = 10):
        self.backend = backend
        self.limits = limits
        self.concurrency = concurrency  # answers at a time; Gradio's own default is one for everybody
        # Gradio would download a URL that a forged request names in the place of an uploaded file.
        processing_utils.async_ssrf_protected_download = _fetch_nothing
        # And build any component that a forged conversation describes: an image from a file of the server.
        gradio.components.chatbot.import_component_and_data = _build_nothing

    def build(self) -> gr.Blocks:
        """The page, to be mounted or launched."""
        models = self.backend.models()
        with gr.Blocks(
            title="LLaVA-CoMP", fill_width=True, analytics_enabled=False, delete_cache=UPLOADS_KEPT
        ) as blocks:
            with gr.Row(elem_id="bar"):
                gr.Markdown("# LLaVA-CoMP\nImages at their own resolution, read by a language model.", elem_id="title")
                dark = gr.Button("◐ Dark / light", size="sm", scale=0, min_width=130)
            dark.click(None, js=DARK, **QUIET)
            with gr.Tab("Chat", id="chat-tab"):
                chatbot, settings = self._chat_tab(models)
            with gr.Tab("What it sees", id="see-tab") as see_tab:
                self._see_tab(see_tab, chatbot, settings)
            with gr.Tab("Side by side", id="compare-tab"):
                self._compare_tab(models, settings)
            blocks.load(self.refresh_models, settings.model, [settings.model, settings.budget], **QUIET)
        return blocks.queue(default_concurrency_limit=self.concurrency)

    def _chat_tab(self, models: list[ModelInfo]) -> tuple[gr.Chatbot, Settings]:
        self._folder = tempfile.TemporaryDirectory(prefix="llava-examples-")  # removed with the page
        found = save_examples(Path(self._folder.name))
        examples = [{"text": text, "files": [str(file)], "icon": str(file)} for text, file in found]
        with gr.Row():
            with gr.Column(scale=7, min_width=320):
                chatbot = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    editable="user",
                    buttons=["copy"],
                    layout="bubble",
                    examples=examples,
                    placeholder="### Ask about an image\nAdd one below, paste it, or take a picture.",
                )
                box = gr.MultimodalTextbox(
                    elem_id="box",
                    show_label=False,
                    sources=["upload"],
                    file_types=["image"],
                    file_count="multiple",
                    placeholder="Ask about your images",
                    submit_btn=True,
                    autofocus=True,
                )
                with gr.Accordion("Camera or clipboard", open=False):
                    camera = gr.Image(sources=["webcam", "clipboard"], type="filepath", show_label=False, height=280)
            with gr.Column(scale=3, min_width=280):
                settings = self._settings(models)
                count = gr.HTML(page_parts.token_count([], [], []), elem_id="token-count", padding=False)
                clear = gr.Button("New conversation", size="sm")
        self._chat_events(chatbot, box, camera, settings, count, clear)
        return chatbot, settings

    def _settings(self, models: list[ModelInfo]) -> Settings:
        first = models[0] if models else None
        model = gr.Dropdown([each.name for each in models], value=first and first.name, label="Model")
        budget = _budget_slider(first, "budget")
        with gr.Accordion("Answer", open=False):
            return Settings(
                model,
                budget,
                gr.Textbox(label="System prompt", placeholder="the template's own", lines=2),
                gr.Slider(0, 2, value=0.2, step=0.05, label="Temperature", info="0 always says the likeliest"),
                gr.Slider(0, 1, value=0.7, step=0.05, label="Top-p"),
                gr.Slider(
                    1, self.limits.new_tokens, value=min(512, self.limits.new_tokens), step=1, label="Most tokens"
                ),
            )

    def _chat_events(self, chatbot, box, camera, settings, count, clear) -> None:
        asking = [chatbot, *settings.all()]
        submit = box.submit(self.submit, [box, chatbot], [box, chatbot], **LOUD, show_progress="hidden")
        answers = [submit.success(self.answer, asking, [box, chatbot], **LOUD, show_progress="hidden")]
        for event, handler in ((chatbot.retry, self.retry), (chatbot.edit, self.edit)):
            changed = event(handler, chatbot, [box, chatbot], **QUIET)
            answers.append(changed.success(self.answer, asking, [box, chatbot], **LOUD, show_progress="hidden"))
        box.stop(ready, None, box, cancels=answers, **QUIET)
        chatbot.undo(self.undo, chatbot, [box, chatbot], **QUIET)
        chatbot.example_select(self.example, None, box, **QUIET)
        camera.change(self.add_picture, [box, camera], [box, camera], **QUIET)
        clear.click(lambda: ([], ready()), None, [chatbot, box], cancels=answers, **QUIET)
        counted = [box, chatbot, settings.model, settings.budget]
        for event in (box.change, chatbot.change, settings.budget.change):
            event(self.count, counted, count, trigger_mode="always_last", **QUIET)
        settings.model.change(self.choose_model, settings.model, settings.budget, **QUIET)

    # Handlers of the chat.

    def submit(self, message: dict[str, Any], history: Messages) -> Iterator[tuple[Any, Messages]]:
        """Put the question into the conversation; a bad image is refused here and stays in the box."""
        text, files = (message.get("text") or "").strip(), message.get("files") or []
        if not text and not files:
            raise gr.Error("Write a question, or add an image.", print_exception=False)
        with shown_errors(), preparing:
            decode_images(read_files([*image_files(history), *files], self.limits), self.limits)
        yield busy(), [*history, *user_messages(text, files)]

    def answer(self, history, model, budget, system, temperature, top_p, max_tokens) -> Iterator[tuple[Any, Messages]]:
        """Stream the answer to the last question. What goes wrong is said, and the box is ready again."""
        sampling = Sampling(int(max_tokens), temperature, top_p)
        try:
            with shown_errors():
                with preparing:
                    updates = self.backend.answer(
                        to_request(model, history, sampling, system=system, budget=budget, limits=self.limits)
                    )
                for update in updates:
                    if update.error is not None:
                        raise Refused(update.error)
                    yield gr.skip(), [*history, {"role": "assistant", "content": update.text}]
        except gr.Error as error:
            gr.Warning(str(error.message), duration=None, title="Not answered")
        yield ready(), gr.skip()

    def retry(self, history: Messages) -> tuple[Any, Messages]:
        return busy(), without_last_answer(history)

    def edit(self, history: Messages, edited: gr.EditData) -> tuple[Any, Messages]:
        """The conversation goes on from the edited question."""
        history = history[: edited.index + 1]
        history[-1] = history[-1] | {"content": edited.value}
        return busy(), history

    def undo(self, history: Messages) -> tuple[Any, Messages]:
        """Take back the last question and put it into the box again."""
        before, asked = last_question(history)
        text, files = parts(asked)
        return gr.MultimodalTextbox(value={"text": text, "files": files}), before

    def example(self, chosen: gr.SelectData) -> Any:
        files = [(file.get("path") if isinstance(file, dict) else file) for file in chosen.value.get("files") or []]
        return gr.MultimodalTextbox(value={"text": chosen.value.get("text", ""), "files": files})

    def add_picture(self, message: dict[str, Any], picture: str | None) -> tuple[Any, Any]:
        if picture is None:
            return gr.skip(), gr.skip()
        files = [*(message.get("files") or []), picture]
        return gr.MultimodalTextbox(value={"text": message.get("text") or "", "files": files}), None

    def count(self, message: dict[str, Any], history: Messages, model: str, budget: int) -> str:
        """The grids of the conversation's images and of those in the box, or what is wrong with one."""
        files = [*image_files(history or []), *((message or {}).get("files") or [])]
        try:
            sizes = image_sizes(read_files(files, self.limits), self.limits)
            grids = self.backend.token_grids(model, sizes, budget or None) if sizes else []
        except Refused as refused:
            return page_parts.warning(str(refused))
        return page_parts.token_count([Path(file).name for file in files], sizes, grids)

    def choose_model(self, name: str) -> Any:
        """The slider goes to what the model was trained with."""
        info = next((each for each in self.backend.models() if each.name == name), None)
        return gr.Slider(**_budget(info))

    def refresh_models(self, chosen: str | None) -> tuple[Any, Any]:
        """Which models there are may change while the page is up: workers come and go."""
        with shown_errors():
            models = self.backend.models()
        names = [each.name for each in models]
        if not names:
            gr.Warning("No model is being served yet. Start a model_worker and load this page again.")
        chosen = chosen if chosen in names else next(iter(names), None)
        return gr.Dropdown(choices=names, value=chosen), self.choose_model(chosen)

    # What the model sees.

    def _see_tab(self, tab: gr.Tab, chatbot: gr.Chatbot, settings: Settings) -> None:
        gr.Markdown(
            "The image through the model's eyes, with the model and the budget chosen beside the chat. Visual tokens "
            "are compared with the embeddings of the language model's words, as the alignment loss does in training.",
            elem_classes="soft",
        )
        picture = {"show_label": False, "format": "png", "buttons": ["fullscreen", "download"], "height": 560}
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                image = gr.Image(
                    sources=["upload", "webcam", "clipboard"], type="filepath", label="Image", elem_id="see", height=260
                )
                word = gr.Dropdown([], label="Heat map of the word", allow_custom_value=True, elem_id="word")
                about = gr.HTML(elem_id="see-count", padding=False)
            with gr.Column(scale=7, min_width=320):
                with gr.Tab("Words"):
                    words = gr.HTML(elem_id="words", padding=False)
                with gr.Tab("Heat map"):
                    heat = gr.HTML(elem_id="heat", padding=False)
                with gr.Tab("As the model saw it"):
                    seen = gr.Image(elem_id="seen", **picture)
                with gr.Tab("Features"):
                    gr.Markdown("The tower's features, a square per patch: three principal components as colours.")
                    colours = gr.Image(elem_id="features", **picture)
        looking = [image, word, settings.model, settings.budget]
        shows = [word, about, words, heat, seen, colours]
        tab.select(self.take_image, [image, chatbot], image, **QUIET)
        for event in (image.change, word.input, settings.budget.release, settings.model.change):
            event(self.look, looking, shows, trigger_mode="always_last", **LOUD)

    def take_image(self, image: str | None, history: Messages) -> Any:
        """The chat's last image, unless one was chosen here."""
        files = image_files(history or [])
        return gr.skip() if image or not files else files[-1]

    def look(self, image: str | None, word: str | None, model: str, budget: int) -> tuple[Any, ...]:
        """Everything that this tab shows; the word is the nearest of all, unless another is asked for."""
        if image is None:
            return (gr.Dropdown(choices=[], value=None), "", "", "", None, None)
        history = user_messages("", [image])
        with shown_errors():
            with preparing:
                request = to_request(model, history, Sampling(), system="", budget=budget, limits=self.limits)
            if not word:
                word = page_parts.nearest_word(self.backend.inspect(request, None))
            found = self.backend.inspect(request, word)
            size = request.images[0].size
            count = page_parts.token_count(
                [Path(image).name], [size], self.backend.token_grids(model, [size], budget or None)
            )
        return (
            gr.Dropdown(choices=page_parts.words_by_number(found), value=word),
            count,
            page_parts.word_figure(found, word),
            page_parts.heat_figure(found, word),
            found.seen,
            page_parts.enlarged(found.colours, 640),
        )

    # Two models, or one with two budgets.

    def _compare_tab(self, models: list[ModelInfo], settings: Settings) -> None:
        gr.Markdown("One question to two models, or to one with two budgets of visual tokens.", elem_classes="soft")
        with gr.Row():
            sources = ["upload", "webcam", "clipboard"]
            image = gr.Image(sources=sources, type="filepath", label="Image", height=240, elem_id="compare-image")
            with gr.Column():
                text = gr.Textbox(label="Question", lines=3)
                ask = gr.Button("Ask both", variant="primary")
        sides = []
        with gr.Row():
            for place, letter in enumerate("AB"):
                info = models[min(place, len(models) - 1)] if models else None
                with gr.Column(min_width=300):
                    model = gr.Dropdown(
                        [each.name for each in models], value=info and info.name, label=f"Model {letter}"
                    )
                    budget = _budget_slider(info, f"budget-{letter}")
                    model.change(self.choose_model, model, budget, **QUIET)
                    answer = gr.Textbox(label="Answer", lines=6, buttons=["copy"], elem_id=f"answer-{letter}")
                    about = gr.HTML()
                    sides.append((model, budget, answer, about))
        asked = [model_or_budget for side in sides for model_or_budget in side[:2]]
        told = [output for side in sides for output in side[2:]]
        common = [image, text, settings.system, settings.temperature, settings.top_p, settings.max_tokens]
        event = {"trigger_mode": "once", **LOUD}
        gr.on([ask.click, text.submit], self.compare, [*common, *asked], told, show_progress="hidden", **event)

    def compare(self, image, text, system, temperature, top_p, max_tokens, *models_and_budgets) -> Iterator[tuple]:
        """Both answers as they grow. An error is shown in its side's place, and the other side goes on."""
        history = user_messages((text or "").strip(), [image] if image else [])
        sampling = Sampling(int(max_tokens), temperature, top_p)
        pairs = list(zip(models_and_budgets[::2], models_and_budgets[1::2], strict=True))
        with shown_errors():
            requests = [
                to_request(model, history, sampling, system=system, budget=budget, limits=self.limits)
                for model, budget in pairs
            ]
        begin = time.monotonic()
        shown: list[str] = ["", "", "", ""]
        for side, update in compare(self.backend, requests):
            about = f"{update.tokens} tokens, {time.monotonic() - begin:.1f} s" if update.error is None else "failed"
            shown[2 * side] = update.text if update.error is None else update.error
            shown[2 * side + 1] = f'<span class="soft">{about}</span>'
            yield tuple(shown)


def busy() -> Any:
    """The box while an answer is made: emptied, with a stop button."""
    return gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)


def ready() -> Any:
    """The box when a question can be asked."""
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)


def _budget(info: ModelInfo | None) -> dict[str, Any]:
    if info is None or info.token_budget is None:
        return {"minimum": 0, "value": 0, "interactive": False, "info": "this model's number is fixed"}
    most = max(16, info.token_budget * 4)
    about = f"at most; {info.token_budget} in training"
    return {"minimum": 4, "maximum": most, "value": info.token_budget, "interactive": True, "info": about}


def _budget_slider(info: ModelInfo | None, name: str) -> gr.Slider:
    values = {"minimum": 4, "maximum": 4096, "value": 1024} | _budget(info)
    return gr.Slider(**values, step=1, label="Visual tokens per image", elem_id=name)
