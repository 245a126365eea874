"""A tiny training and a tiny answer with upstream's own code, on a CPU: what scripts/try_upstream.sh runs.

    python tiny.py make FOLDER      a language model, a SigLIP tower and four records, in upstream's formats
    python tiny.py train FOLDER [FLAGS]
    python tiny.py answer FOLDER [CHECKPOINT]
    python tiny.py chat FOLDER

Run with the Python of upstream's environment from the top folder of the checkout. All happens in FOLDER, under relative
names: upstream looks for "llama", "yi" and "qwen" anywhere in a model's path.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

TEXTS = ("Which colour is the square?", "The square is red.", "The square is blue.", "There are two squares.", "Hello!")
CHECKPOINTS = {"next": "llava_qwen_out", "llava": "llava_v1_out"}


def make(kind: str) -> None:
    """Everything that a run reads, in the current folder."""
    torch.manual_seed(0)
    {"next": make_qwen2, "llava": make_llama}[kind](Path("llm_qwen" if kind == "next" else "llm"))
    make_siglip(Path("siglip"))
    make_records(several_images=kind == "next")


def make_qwen2(folder: Path) -> None:
    """A Qwen2 of width 32 with a byte-level BPE tokenizer of slow and fast form."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    folder.mkdir()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.model.save(str(folder))
    tokenizer = Qwen2Tokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",  # noqa: S106
    )
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=1e6,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def make_llama(folder: Path) -> None:
    """A LLaMA of width 32 with a SentencePiece tokenizer, which alone LLaVA reads."""
    from sentencepiece import SentencePieceTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    folder.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS * 20, "USER: ASSISTANT: A chat between a curious user and an assistant."]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=True)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.unk_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_siglip(folder: Path) -> None:
    """A SigLIP vision model of width 24, patch 8, pre-training size 32, as its original repository has one."""
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config=sizes | {"vocab_size": 32}, vision_config=vision)).save_pretrained(folder)


def make_records(*, several_images: bool) -> None:
    """Four records: images of two sizes, two images in one where upstream takes that, and text alone."""
    Path("images").mkdir()
    for name, size in {"wide": (96, 40), "tall": (40, 72)}.items():
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).rectangle((8, 8, 24, 24), fill="red" if name == "wide" else "blue")
        image.save(f"images/{name}.png")
    records = [
        _record(0, "<image>\nWhich colour is the square?", "The square is red.", image="wide.png"),
        _record(1, "<image>\nWhich colour is the square?", "The square is blue.", image="tall.png"),
        _record(2, "Hello!", "Hello!"),
    ]
    if several_images:
        both = ["wide.png", "tall.png"]
        records.append(_record(3, "<image>\n<image>\nWhich colour?", "There are two squares.", image=both))
    else:
        records.append(_record(3, "<image>\nWhich colour?", "The square is red.", image="wide.png"))
    Path("data.json").write_text(json.dumps(records), encoding="utf-8")


def _record(number: int, question: str, answer: str, **image: object) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"tiny-{number}", "conversations": turns} | image


def train(kind: str, flags: list[str]) -> None:
    """One step of upstream's training over the four records."""
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None  # upstream waits for a GPU before it saves
    given = {
        "model_name_or_path": "llm_qwen" if kind == "next" else "llm",
        "version": "qwen_1_5" if kind == "next" else "v1",
        "data_path": "data.json",
        "image_folder": "images",
        "vision_tower": "comp-siglip:./siglip",
        "mm_projector_type": "downsample_mlp",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "bf16": True,
        "use_cpu": True,
        "output_dir": CHECKPOINTS[kind],
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "model_max_length": 512,
        "disable_tqdm": True,
    }
    if kind == "next":
        given |= {"mm_tunable_parts": "mm_mlp_adapter,mm_vision_tower,mm_language_model", "attn_implementation": "sdpa"}
    sys.argv = ["train.py", *(part for name, value in given.items() for part in (f"--{name}", str(value))), *flags]
    from llava.train.train import train as upstream_train

    upstream_train()


def load(kind: str, path: str) -> tuple:
    """Upstream's loader, on a CPU."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    options = {"attn_implementation": "sdpa", "torch_dtype": "bfloat16"} if kind == "next" else {"device": "cpu"}
    tokenizer, model, *rest = load_pretrained_model(
        path, None, get_model_name_from_path(path), device_map="auto", **options
    )
    return tokenizer, model.float(), *rest


def answer(kind: str, checkpoint: str) -> None:
    """What a trained checkpoint says about each image, by upstream's own loader and preparation."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images, tokenizer_image_token

    tokenizer, model, processor, _ = load(kind, f"./{checkpoint}")
    ids = tokenizer_image_token(f"<image>\n{TEXTS[0]}", tokenizer, IMAGE_TOKEN_INDEX, "pt")[None]
    for name in ("wide", "tall"):
        image = Image.open(f"images/{name}.png")
        pixels = list(process_images([image], processor, model.config))
        with torch.inference_mode():
            logits = model(input_ids=ids, images=pixels, image_sizes=[image.size]).logits[0, -1]
            out = model.generate(ids, images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=8)
        print(f"answer about {name}.png, image tensor {tuple(pixels[0].shape)}: {out[0].tolist()}")
        print(f"  next token's first logits: {[round(each, 4) for each in logits[:4].tolist()]}")


def chat(kind: str) -> None:
    """One question to upstream's own command-line chat, which asks for a GPU by name."""
    from llava.serve import cli

    torch.Tensor.cuda = lambda tensor, *_, **__: tensor

    cli.load_pretrained_model = lambda path, *_, **__: load(kind, path)  # its own is for GPUs
    sys.stdin = io.StringIO(f"{TEXTS[0]}\n\n")
    template = {"next": "qwen_1_5", "llava": "llava_v1"}[kind]
    options = {"model_base": None, "conv_mode": template, "temperature": 0.2, "max_new_tokens": 16, "device": "cpu"}
    flags = {"load_8bit": False, "load_4bit": False, "debug": False, "num_gpus": 1}
    cli.main(argparse.Namespace(model_path=f"./{CHECKPOINTS[kind]}", image_file="images/wide.png", **options, **flags))


def main() -> None:
    """make | train | answer | chat."""
    action, folder, *rest = sys.argv[1:]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    root = Path.cwd()
    sys.path.insert(0, str(root))
    kind = "next" if (root / "trl").is_dir() else "llava"
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    if action == "train":
        train(kind, rest)
    elif action == "answer":
        answer(kind, *rest or [CHECKPOINTS[kind]])
    else:
        {"make": make, "chat": chat}[action](kind)


if __name__ == "__main__":
    main()
