"""Chat templates: how a conversation is written as text, and what each piece of that text is.

`Conversation.turns` is the one definition of both. `get_prompt` joins its pieces and the training labels are taken from
the same pieces, so a model is served with the text it was trained on, and no label comes from searching the text.

    qwen_2_5, one exchange          piece     part
    <|im_start|>system ...<|im_end|>\n        CONTEXT
    <|im_start|>user\n<image>\nWhat?<|im_end|>\n  CONTEXT
    <|im_start|>assistant\n                   HEADER
    A cat.                                    ANSWER
    <|im_end|>                                END
    \n                                        TAIL
"""

from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


class SeparatorStyle(Enum):
    """How a template marks where turns begin and end."""

    PLAIN = auto()  # no roles: a question's text, the answer's text, `sep`
    CHATML = auto()  # role, newline, text, `sep`, newline


class Part(Enum):
    """What a piece of the rendered text is."""

    CONTEXT = auto()  # system prompt and questions, with their markup
    HEADER = auto()  # opens an assistant's turn
    ANSWER = auto()  # the answer's own text
    END = auto()  # ends the answer's turn: what the model says to stop
    TAIL = auto()  # markup between the end of an answer and the next turn


class Span(NamedTuple):
    """A piece of rendered text."""

    text: str
    part: Part


@dataclass
class Conversation:
    """A chat template together with the messages said so far.

    Attributes:
        system: The system prompt as it stands in the text, with the markup that opens it.
        roles: What stands for the user and for the assistant.
        messages: `[role, text]` pairs; a text of None is a turn still to be said.
        sep: Ends a turn.
        version: Family of the template.
        stop_str: Generation ends where the model says this.
        image_marks: Where set, a turn's images stand before its words, each between these two.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[str | None]] = field(default_factory=list)
    sep_style: SeparatorStyle = SeparatorStyle.CHATML
    sep: str = IM_END
    version: str = "Unknown"
    stop_str: str | None = None
    image_marks: tuple[str, str] | None = None

    def append_message(self, role: str, message: str | None) -> None:
        """Add a turn; None leaves it open for the model to say."""
        self.messages.append([role, message])

    def set_system_message(self, text: str) -> None:
        """Put a conversation's own system prompt in the place of the template's. `plain` has none and ignores it."""
        if self.sep_style is SeparatorStyle.CHATML:
            self.system = f"{IM_START}system\n{text}"

    def turns(self) -> list[list[Span]]:
        """The rendered text, turn by turn, each turn in spans; the system prompt, where there is one, is the first."""
        render = {SeparatorStyle.PLAIN: self._plain_turn, SeparatorStyle.CHATML: self._chatml_turn}[self.sep_style]
        turns = [render(index, role, text) for index, (role, text) in enumerate(self.messages)]
        if self.system:
            turns.insert(0, [Span(f"{self.system}{self.sep}\n", Part.CONTEXT)])
        return turns

    def _chatml_turn(self, index: int, role: str, text: str | None) -> list[Span]:
        is_answer = role == self.roles[1]
        if text is None:
            return [Span(f"{role}\n", Part.HEADER if is_answer else Part.CONTEXT)]
        if is_answer:
            return [
                Span(f"{role}\n", Part.HEADER),
                Span(text, Part.ANSWER),
                Span(self.sep, Part.END),
                Span("\n", Part.TAIL),
            ]
        return [Span(f"{role}\n{self._images_first(text)}{self.sep}\n", Part.CONTEXT)]

    def _images_first(self, text: str) -> str:
        """A question with its images where the template wants them: in the text, or before all of it."""
        if self.image_marks is None:
            return text
        start, end = self.image_marks
        words = text.replace(f"{DEFAULT_IMAGE_TOKEN}\n", "").replace(DEFAULT_IMAGE_TOKEN, "")
        return f"{start}{DEFAULT_IMAGE_TOKEN}{end}" * text.count(DEFAULT_IMAGE_TOKEN) + words

    def _plain_turn(self, index: int, role: str, text: str | None) -> list[Span]:
        """No role is written, so the place in the conversation tells an answer. Unlike LLaVA's `get_prompt`, nothing is
        put between question and answer: LLaVA's own training has `<image>` followed by the caption at once."""
        if text is None:
            return []
        if index % 2 == 1:
            return [Span(text, Part.ANSWER), Span(self.sep, Part.END)]
        return [Span(text, Part.CONTEXT)]

    def get_prompt(self) -> str:
        """The conversation as the text that a model reads."""
        return "".join(span.text for turn in self.turns() for span in turn)

    @property
    def markers(self) -> tuple[str, ...]:
        """The template's markup, each piece one token. LLaVA's label mask supervises these wherever they stand."""
        return (IM_START, self.sep, "\n") if self.sep_style is SeparatorStyle.CHATML else ()

    def copy(self) -> "Conversation":
        """A conversation that can be continued without changing this one."""
        return replace(self, messages=[list(message) for message in self.messages])


def _chatml(system_prompt: str) -> Conversation:
    return Conversation(
        system=f"{IM_START}system\n{system_prompt}",
        roles=(f"{IM_START}user", f"{IM_START}assistant"),
        sep_style=SeparatorStyle.CHATML,
        sep=IM_END,
        version="qwen",
        stop_str=IM_END,
    )


conv_plain = Conversation(system="", roles=("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n", stop_str="\n")
conv_qwen = _chatml("You are a helpful assistant.")
conv_qwen_2_5 = _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
conv_qwen_2_vl = replace(conv_qwen, image_marks=("<|vision_start|>", "<|vision_end|>"))

conv_templates: dict[str, Conversation] = {
    "plain": conv_plain,
    "qwen_1_5": conv_qwen,
    "qwen_2": conv_qwen,
    "qwen_2_5": conv_qwen_2_5,
    "qwen_2_vl": conv_qwen_2_vl,
}
