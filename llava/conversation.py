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
    TWO = auto()  # role, colon, space, text, then `sep` after a question and `sep2` after an answer
    MPT = auto()  # role (with its newline), text, `sep`
    LLAMA_2 = auto()  # `sep`, [INST], question, [/INST], answer, `sep2`; the system prompt is in the first question
    LLAMA_3 = auto()  # role between two markers, two newlines, text without space around it, `sep`
    GEMMA = auto()  # role (with its newline), text, `sep`


class Part(Enum):
    """What a piece of the rendered text is."""

    CONTEXT = auto()  # system prompt and questions, with their markup
    HEADER = auto()  # opens an assistant's turn
    LEAD = auto()  # the space between that and the answer: part of the answer's first token
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
        sep: Ends a turn; where `sep2` is set, that ends an answer.
        version: Family of the template.
        stop_str: Generation ends where the model says this.
        bos: What `get_prompt` writes first. The tokenizer adds the same by itself, so `turns` go without.
        image_marks: Where set, a turn's images stand before its words, each between these two.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[str | None]] = field(default_factory=list)
    sep_style: SeparatorStyle = SeparatorStyle.CHATML
    sep: str = IM_END
    sep2: str | None = None
    version: str = "Unknown"
    stop_str: str | None = None
    bos: str = ""
    image_marks: tuple[str, str] | None = None

    def append_message(self, role: str, message: str | None) -> None:
        """Add a turn; None leaves it open for the model to say."""
        self.messages.append([role, message])

    def set_system_message(self, text: str) -> None:
        """Put a conversation's own system prompt in the place of the template's. `plain` and gemma have none."""
        style = self.sep_style
        if style in (SeparatorStyle.CHATML, SeparatorStyle.MPT):
            self.system = self.system[: self.system.index("\n") + 1] + text
        elif style not in (SeparatorStyle.PLAIN, SeparatorStyle.GEMMA):
            self.system = text

    def turns(self) -> list[list[Span]]:
        """The rendered text, turn by turn, each turn in spans; the system prompt, where there is one, is the first."""
        render = getattr(self, f"_{self.sep_style.name.lower()}_turn")
        turns = [render(index, role, text) for index, (role, text) in enumerate(self.messages)]
        if self.system and self.sep_style is not SeparatorStyle.LLAMA_2:  # that one's is in the first question
            turns.insert(0, [Span(self._system_text(), Part.CONTEXT)])
        return turns

    def _system_text(self) -> str:
        if self.sep_style is SeparatorStyle.CHATML:
            return f"{self.system}{self.sep}\n"
        if self.sep_style is SeparatorStyle.LLAMA_3:
            return f"{_llama_3_header('system')}{self.system.strip()}{self.sep}"
        return f"{self.system}{self.sep}"

    def _two_turn(self, index: int, role: str, text: str | None) -> list[Span]:
        if text is None:
            return [Span(f"{role}:", Part.HEADER)]
        if role == self.roles[1]:
            return [
                Span(f"{role}:", Part.HEADER),
                Span(" ", Part.LEAD),
                Span(text, Part.ANSWER),
                Span(self.sep2, Part.END),
            ]
        return [Span(f"{role}: {text}{self.sep}", Part.CONTEXT)]

    def _llama_2_turn(self, index: int, role: str, text: str | None) -> list[Span]:
        if text is None:
            return []
        if role == self.roles[1]:
            return [Span(" ", Part.LEAD), Span(text, Part.ANSWER), Span(f" {self.sep2}", Part.END)]
        if index == 0:
            text = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n{text}" if self.system else text
            return [Span(f"[INST] {text} [/INST]", Part.CONTEXT)]
        return [Span(f"{self.sep}[INST] {text} [/INST]", Part.CONTEXT)]

    def _llama_3_turn(self, index: int, role: str, text: str | None) -> list[Span]:
        header = Span(_llama_3_header(role), Part.HEADER if role == self.roles[1] else Part.CONTEXT)
        if text is None:
            return [header]
        if role == self.roles[1]:
            return [header, Span(text.strip(), Part.ANSWER), Span(self.sep, Part.END)]
        return [Span(f"{header.text}{text.strip()}{self.sep}", Part.CONTEXT)]

    def _mpt_turn(self, index: int, role: str, text: str | None) -> list[Span]:
        """Roles end with a newline, and nothing stands between the turns."""
        if role == self.roles[1]:
            answer = [] if text is None else [Span(text, Part.ANSWER), Span(self.sep, Part.END)]
            return [Span(role, Part.HEADER), *answer]
        return [Span(role if text is None else f"{role}{text}{self.sep}", Part.CONTEXT)]

    def _gemma_turn(self, index: int, role: str, text: str | None) -> list[Span]:
        if role == self.roles[1]:
            end = [Span(self.sep.rstrip("\n"), Part.END), Span("\n", Part.TAIL)]
            return [Span(role, Part.HEADER), *([] if text is None else [Span(text, Part.ANSWER), *end])]
        return [Span(role if text is None else f"{role}{text}{self.sep}", Part.CONTEXT)]

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
        return self.bos + "".join(span.text for turn in self.turns() for span in turn)

    @property
    def markers(self) -> tuple[str, ...]:
        """The template's markup, each piece one token. LLaVA's label mask supervises these wherever they stand."""
        if self.sep_style is SeparatorStyle.CHATML:
            return (IM_START, self.sep, "\n")
        if self.sep_style is SeparatorStyle.LLAMA_3:
            return ("<|start_header_id|>", "<|end_header_id|>", self.sep)
        return ()

    @property
    def learned_by_llava(self) -> set[Part]:
        """The parts that LLaVA's label mask supervises."""
        learned = {Part.LEAD, Part.ANSWER, Part.END}
        if self.sep_style is SeparatorStyle.GEMMA:
            learned |= {Part.TAIL}
        if self.sep_style in (SeparatorStyle.CHATML, SeparatorStyle.LLAMA_3):
            learned |= {Part.HEADER, Part.TAIL}
        return learned

    @property
    def is_one_text(self) -> bool:
        """Whether turns are plain text to a tokenizer, so that only all of it together has the right tokens.

        Elsewhere special tokens part the pieces, and each is tokenised alone.
        """
        return self.sep_style in (SeparatorStyle.TWO, SeparatorStyle.MPT, SeparatorStyle.LLAMA_2, SeparatorStyle.GEMMA)

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


def _llama_3_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _vicuna(user: str) -> Conversation:
    return Conversation(
        system=f"A chat between a curious {user} and an artificial intelligence assistant. The assistant gives "
        f"helpful, detailed, and polite answers to the {user}'s questions.",
        roles=("USER", "ASSISTANT"),
        sep_style=SeparatorStyle.TWO,
        sep=" ",
        sep2="</s>",
        version="v1",
        stop_str="</s>",
    )


def _llama_2(system: str, sep: str = "<s>") -> Conversation:
    return Conversation(
        system=system,
        roles=("USER", "ASSISTANT"),
        sep_style=SeparatorStyle.LLAMA_2,
        sep=sep,
        sep2="</s>",
        version="llama_v2",
        stop_str="</s>",
    )


def _mpt(system: str, user: str, assistant: str, sep: str = IM_END) -> Conversation:
    return Conversation(
        system=system,
        roles=(f"{user}\n", f"{assistant}\n"),
        sep_style=SeparatorStyle.MPT,
        sep=sep,
        version="mpt",
        stop_str=sep,
    )


_OF_LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_CHATML_ROLES = (f"{IM_START}user", f"{IM_START}assistant")

conv_plain = Conversation(system="", roles=("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n", stop_str="\n")
conv_vicuna_v1 = _vicuna("user")
conv_llava_v1 = _vicuna("human")
conv_llava_llama_2 = _llama_2(_OF_LLAVA)
conv_llava_llama_2_simple = _llama_2("Answer the questions about the visual content that the user provides.")
conv_mistral_instruct = _llama_2("", sep="")
conv_llava_llama_3 = Conversation(
    system=_OF_LLAVA,
    roles=("user", "assistant"),
    sep_style=SeparatorStyle.LLAMA_3,
    sep="<|eot_id|>",
    version="llama_v3",
    stop_str="<|eot_id|>",
    bos="<|begin_of_text|>",
)
conv_gemma_instruct = Conversation(
    system="",
    roles=("<start_of_turn>user\n", "<start_of_turn>model\n"),
    sep_style=SeparatorStyle.GEMMA,
    sep="<end_of_turn>\n",
    version="gemma",
    stop_str="<end_of_turn>",
)
conv_mpt = _mpt(
    f"{IM_START}system\nA conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers.",
    *_CHATML_ROLES,
)
conv_chatml_direct = _mpt(f"{IM_START}system\nAnswer the questions.", *_CHATML_ROLES)
conv_mistral_zephyr = _mpt("<|system|>\nYou are a helpful AI assistant.", "<|user|>", "<|assistant|>", "</s>")
conv_qwen = _chatml("You are a helpful assistant.")
conv_qwen_2_5 = _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
conv_qwen_2_vl = replace(conv_qwen, image_marks=("<|vision_start|>", "<|vision_end|>"))

conv_templates: dict[str, Conversation] = {
    "plain": conv_plain,
    "v0_plain": conv_plain,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llava_v1": conv_llava_v1,
    "llava_llama_2": conv_llava_llama_2,
    "llava_llama_2_simple": conv_llava_llama_2_simple,
    "llava_llama_3": conv_llava_llama_3,
    "mistral_instruct": conv_mistral_instruct,
    "llava_mistral_instruct": conv_mistral_instruct,
    "mistral_direct": conv_chatml_direct,
    "mistral_zephyr": conv_mistral_zephyr,
    "chatml_direct": conv_chatml_direct,
    "mpt": conv_mpt,
    "gemma_instruct": conv_gemma_instruct,
    "qwen_1_5": conv_qwen,
    "qwen_2": conv_qwen,
    "qwen_2_5": conv_qwen_2_5,
    "qwen_2_vl": conv_qwen_2_vl,
}
default_conversation = conv_templates["vicuna_v1"]  # which LLaVA's scripts import
