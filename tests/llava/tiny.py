"""Tiny real parts in the real formats: an LLM, a SigLIP tower and a data set, each as it would lie on disk."""

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

COLOURS = ("red", "green", "blue", "yellow")
QUESTION = "Which colour is the square?"


def save_llm(folder: Path, *, seed: int = 0, tie: bool = True) -> Path:
    """A Qwen2 of width 32 with a byte-level BPE tokenizer that knows ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([QUESTION, *(f"The square is {colour}." for colour in COLOURS)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=328,  # padded, as Qwen's is
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    model = Qwen2ForCausalLM(config)
    if not tie:
        torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    model.save_pretrained(folder)
    return folder


def save_siglip(folder: Path, *, seed: int = 1) -> Path:
    """A SigLIP vision model of width 24, patch 8, pre-trained grid 4×4; every parameter random and non-zero."""
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = SiglipVisionModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def save_data(folder: Path, *, count: int = 16) -> Path:
    """A LLaVA JSON `data.json` about coloured squares on images of several sizes, which lie in `images/`."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index in range(count):
        colour = COLOURS[index % len(COLOURS)]
        size = ((64, 48), (32, 64), (80, 32), (48, 48))[index % 4]
        image = Image.new("RGB", size, "white")
        ImageDraw.Draw(image).rectangle((8, 8, 24, 24), fill=colour)
        image.save(folder / "images" / f"{index}.png")
        records.append(record(f"sample-{index}", f"{index}.png", f"The square is {colour}."))
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def record(identity: str, image: str | None, answer: str) -> dict:
    """One LLaVA record with one exchange."""
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
    if image is None:
        turns[0]["value"] = QUESTION
        return {"id": identity, "conversations": turns}
    return {"id": identity, "image": image, "conversations": turns}


def save_prior(file: Path, *, tokenizer_size: int = 320) -> Path:
    """Word counts over the tiny tokenizer's ids, as `python -m comp_patches.word_prior` writes them."""
    counts = torch.randint(0, 50, (tokenizer_size,), generator=torch.Generator().manual_seed(2))
    save_file({"counts": counts}, file)
    return file


def stage_arguments(llm: Path, siglip: Path, data: Path, output: Path, **changes: object) -> list[str]:
    """Flags of a Stage-I run of a few steps on the CPU; `changes` replace or (None) remove some."""
    flags: dict[str, object] = {
        "model_name_or_path": llm,
        "version": "plain",
        "vision_tower": f"comp-siglip:{siglip}",
        "mm_tunable_parts": "mm_mlp_adapter",
        "use_rope": False,
        "data_path": data / "data.json",
        "image_folder": data / "images",
        "force_resize": "pretrained",
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    } | changes
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]


FULL_STAGE = {"mm_tunable_parts": "mm_mlp_adapter,mm_vision_tower,mm_language_model", "use_rope": True}
