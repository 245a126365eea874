"""Parts of the data tests: a byte-level BPE tokenizer as Qwen2.5's is built, drawn images, records, a dataset."""

from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from comp_patches.image_processor import NativeImageProcessor
from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.data.dataset import LLaVADataset

QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5 has 13 of them; LLaVA-NeXT's preprocessing unpacks exactly two and fails.
SPECIALS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
CORPUS = ["The square is red.\n", "What colour is it?\n", "user assistant system\n", "A chart of sales.\n"] * 20


@cache
def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Trained here on a few sentences; with `bos` it puts `<|endoftext|>` before every text."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>" if bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIALS,
    )


def make_processor(**options) -> NativeImageProcessor:
    return NativeImageProcessor(**{"patch_size": 4, "min_num_vistoken": 1, "max_num_vistoken": 64} | options)


def draw(folder: Path, name: str, size: tuple[int, int] = (24, 16)) -> str:
    """A red square on white; at these sizes a visual token is 8 × 8 pixels."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((4, 4, 9, 9), fill="red")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / name)
    return name


def make_record(*texts: str, image: str | list[str] | None = None, id: str = "r") -> dict:
    """A LLaVA record: question, answer, question, ..."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"id": id, "conversations": turns} | ({} if image is None else {"image": image})


def make_dataset(records: list[dict], image_folder: Path | None = None, **options) -> LLaVADataset:
    defaults = {
        "tokenizer": make_tokenizer(),
        "image_processor": make_processor(),
        "conversation": conv_templates["qwen_2_5"],
        "image_folder": None if image_folder is None else str(image_folder),
        "model_max_length": 4096,
    }
    return LLaVADataset(records, **defaults | options)


def supervised_text(sample: dict, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """What the labels decode to."""
    labels = sample["labels"]
    return (tokenizer or make_tokenizer()).decode(labels[labels != IGNORE_INDEX], clean_up_tokenization_spaces=False)
