"""Write the golden files beside this script by running LLaVA-NeXT itself; README.md lists commit and versions.

    git -C LLaVA-NeXT checkout b42941c
    PYTHONPATH=LLaVA-NeXT python tests/data/upstream/make_golden.py

Nothing of LLaVA-NeXT is changed; only the arguments are small. All inputs come from formulas, so that a test makes the
same ones: `wave` for features and pixels, `SIZES` for images.
"""

from __future__ import annotations

import json
import random
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).parent
ONEVISION = [[384 * w, 384 * h] for w in range(1, 7) for h in range(1, 7)]
NEXT = [[672, 336], [336, 672], [672, 672], [1008, 336], [336, 1008]]
SYSTEM_TEXT = ["A cat sits on the mat.", "USER ASSISTANT: hello", "What is it?", "The square is red.", "user assistant"]


def sizes() -> list[tuple[int, int]]:
    """200 image sizes (width, height): all shapes from a strip to a poster."""
    draw = random.Random(0)
    return [(int(2 ** draw.uniform(3, 12)), int(2 ** draw.uniform(3, 12))) for _ in range(200)]


def wave(*shape: int, step: float = 0.37) -> torch.Tensor:
    """Numbers that a test can make again: cos(0, step, 2·step, ...), float32."""
    return torch.arange(int(np.prod(shape)), dtype=torch.float64).mul(step).cos().float().reshape(shape)


def photo(width: int, height: int) -> Image.Image:
    """A picture without any symmetry."""
    pixels = (wave(height, width, 3, step=0.0071).numpy() * 127 + 128).astype(np.uint8)
    return Image.fromarray(pixels)


def digest(features: torch.Tensor) -> list[float]:
    """Number of rows, and the sum of all values, each with a weight of its own."""
    return [len(features), float((features.double() * wave(*features.shape, step=1.3).double()).sum())]


def merge_files() -> None:
    """Grids of anyres and the merged features of 200 sizes in each mode."""
    from llava.mm_utils import get_anyres_image_grid_shape, select_best_resolution
    from llava.model.llava_arch import LlavaMetaForCausalLM

    found: dict = {"sizes": sizes(), "best": {}, "grid": {}, "merged": {}, "video": {}}
    for name, pinpoints, side in (("onevision", ONEVISION, 384), ("next", NEXT, 336)):
        found["best"][name] = [select_best_resolution(size, pinpoints) for size in sizes()]
        found["grid"][name] = [get_anyres_image_grid_shape(size, pinpoints, side) for size in sizes()]
    found["grid"]["range"] = [get_anyres_image_grid_shape(size, "(1x1),...,(6x6)", 384) for size in sizes()]
    found["grid"]["text"] = [get_anyres_image_grid_shape(size, str(NEXT), 336) for size in sizes()]

    class Spliced(LlavaMetaForCausalLM):
        """Only the part between the projector and the LLM, over features that the caller sets."""

        def __init__(self, per_side: int, image_size: int, **config):
            tower = types.SimpleNamespace(num_patches_per_side=per_side, image_size=image_size)
            backbone = types.SimpleNamespace(
                get_vision_tower=lambda: tower, embed_tokens=lambda ids: torch.zeros(len(ids), 2)
            )
            self.model = backbone
            self.model.image_newline = torch.tensor([3.0, -2.0])
            self.config = types.SimpleNamespace(**config)
            self.device = torch.device("cpu")
            self.training = False

        def get_model(self):
            return self.model

        def encode_images(self, images):
            return wave(len(images), self.get_vision_tower().num_patches_per_side ** 2, 2)

        def merged(self, tiles: int, size: tuple[int, int], modality: str) -> torch.Tensor:
            spliced = self.prepare_inputs_labels_for_multimodal(
                torch.tensor([[-200, 1]]), None, None, None, None, [torch.zeros(tiles, 3, 1, 1)], [modality], [size]
            )[4]
            return spliced[0, :-1]

    modes = [
        ("flat", "anyres", "onevision"),
        ("spatial", "anyres", "onevision"),
        ("spatial_unpad", "anyres", "next"),
        ("spatial_unpad", "anyres_max_9", "onevision"),
        ("spatial_unpad", "anyres_max_4", "onevision"),
        ("spatial_maxpool2x2", "anyres", "onevision"),
        ("spatial_unpad_nobase", "anyres_max_9", "onevision"),
        ("spatial_unpad", "pad", "onevision"),
        ("spatial", "pad", "onevision"),
    ]
    for merge, aspect, name in modes:
        pinpoints, side, per_side = (ONEVISION, 384, 27) if name == "onevision" else (NEXT, 336, 24)
        model = Spliced(
            per_side,
            side,
            mm_patch_merge_type=merge,
            image_aspect_ratio=aspect,
            image_grid_pinpoints=pinpoints,
            mm_spatial_pool_mode="bilinear",
        )
        rows = []
        for size in sizes():
            columns, lines = get_anyres_image_grid_shape(size, pinpoints, side)
            tiles = 1 + columns * lines if aspect.startswith("anyres") else 1
            rows.append(digest(model.merged(tiles, size, "image")))
        found["merged"][f"{merge} {aspect} {name}"] = rows
    for merge in ("flat", "spatial_unpad"):
        for mode in ("average", "max", "bilinear"):
            for newline in ("grid", "frame", "one_token", "no_token"):
                for per_side in (27, 24):
                    model = Spliced(
                        per_side, 384, mm_patch_merge_type=merge, mm_spatial_pool_mode=mode, mm_newline_position=newline
                    )
                    name = f"{merge} {mode} {newline} {per_side}"
                    found["video"][name] = digest(model.merged(5, (384, 384), "video"))
    (HERE / "merge.json").write_text(json.dumps(found) + "\n")


def pixel_files() -> None:
    """What `process_images` gives for some images, in each mode, for processors of a small tower."""
    from llava.model.multimodal_encoder.siglip_encoder import SigLipImageProcessor

    from llava.mm_utils import process_images

    tensors = {}
    grid = [[16 * w, 16 * h] for w in range(1, 4) for h in range(1, 4)]
    for name, processor in (
        ("clip", small_clip_processor(16)),
        ("siglip", SigLipImageProcessor(size=(16, 16), crop_size={"height": 16, "width": 16})),
    ):
        for mode in ("square", "pad", "anyres", "anyres_max_2"):
            config = types.SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=grid)
            for size in ((32, 32), (75, 40), (23, 90)):
                pixels = process_images([photo(*size)], processor, config)
                tensors[f"{name} {mode} {size[0]}x{size[1]}"] = pixels[0].contiguous()
    save_file(tensors, HERE / "pixels.safetensors")


def small_clip_processor(side: int) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def checkpoints() -> None:
    """A tiny llava-v1.5 and a tiny llava-onevision as LLaVA-NeXT saves them, and their logits."""
    from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionConfig, SigLipVisionModel

    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM

    common = {
        "vocab_size": 328,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }
    torch.manual_seed(0)
    clip_config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    tower = HERE / "clip"
    noisy(CLIPVisionModel(clip_config)).save_pretrained(tower)
    small_clip_processor(32).save_pretrained(tower)
    config = LlavaConfig(
        **common, mm_vision_tower=str(tower), mm_hidden_size=16, mm_patch_merge_type="flat", image_aspect_ratio="pad"
    )
    model = noisy(LlavaLlamaForCausalLM(config))
    write_checkpoint(
        "v15", model, [wave(2, 3, 32, 32)[:1], wave(1, 3, 32, 32, step=0.11)], [(32, 20), (10, 30)], ["image"] * 2
    )
    for file in tower.glob("*.safetensors"):
        file.unlink()  # the checkpoint has them

    siglip = SigLipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=384, patch_size=14
    )
    tower = HERE / "siglip"
    noisy(SigLipVisionModel(siglip)).save_pretrained(tower)
    config = LlavaQwenConfig(
        **common,
        mm_vision_tower="tiny-siglip",
        mm_hidden_size=16,
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=ONEVISION,
        mm_spatial_pool_mode="bilinear",
        mm_newline_position="grid",
        delay_load=True,
    )
    model = LlavaQwenForCausalLM(config)
    vision_tower = model.get_vision_tower()
    vision_tower.vision_tower_name = str(tower)
    vision_tower.load_model()
    noisy(model)
    images = [wave(3, 3, 384, 384), wave(2, 3, 384, 384, step=0.11)]
    write_checkpoint("onevision", model, images, [(700, 300), (384, 384)], ["image", "video"])
    for file in tower.glob("*.safetensors"):
        file.unlink()


def noisy(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def write_checkpoint(name: str, model, images: list[torch.Tensor], image_sizes: list, modalities: list) -> None:
    """The folder, spliced embeddings and logits of two prompts together, and what greedy generation says to each."""
    model = model.eval()
    model.config.torch_dtype = "float32"
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    input_ids = torch.tensor([[5, 9, -200, 17, 33, 2], [7, -200, 21, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    labels = input_ids.clone()
    labels[:, :3] = -100
    _, _, attention_mask, _, embeddings, spliced_labels = model.prepare_inputs_labels_for_multimodal(
        input_ids, None, mask, None, labels, images, modalities, image_sizes
    )
    output = model(
        input_ids=input_ids, attention_mask=mask, images=images, image_sizes=image_sizes, modalities=modalities
    )
    lengths = attention_mask.sum(1)
    tensors = {"lengths": lengths, "labels": spliced_labels}
    for row, length in enumerate(lengths.tolist()):
        tensors[f"embeddings.{row}"] = embeddings[row, :length][:: max(1, length // 40)].contiguous()
        tensors[f"logits.{row}"] = output.logits[row, :length][-6:].contiguous()
        ids = input_ids[row, : int(mask[row].sum())][None]
        tensors[f"generated.{row}"] = model.generate(
            ids,
            images=[images[row]],
            image_sizes=[image_sizes[row]],
            modalities=[modalities[row]],
            do_sample=False,
            max_new_tokens=8,
            min_new_tokens=8,
        )[0]
    tensors = {key: value.clone() for key, value in tensors.items()}
    save_file(tensors, HERE / f"{name}.io.safetensors")


CONVERSATIONS = [
    ["<image>\nWhat is it?", "The square is red."],
    ["What is it?", "A cat sits on the mat.", "Sure?", "Yes.\nIt is."],
    ["Look. <image> What is it?", " a cat ", "First: <image>, second: <image>?", "Two."],
    ["<image>\nHi\n", "Hello\n\nthere", "x", "y"],
]


def label_files() -> None:
    """Prompts, ids and labels of each template as `preprocess` gives them, with small tokenizers of the right kinds."""
    from llava import conversation as conversation_lib
    from llava.train import train

    tokenizers = {"bpe": byte_level(), "llama3": llama3(), "spm": sentence_piece(), "gemma": gemma()}
    kinds = {
        "plain": "spm",
        "v1": "spm",
        "llava_v1": "spm",
        "llava_llama_2": "spm",
        "mistral_instruct": "spm",
        "qwen_1_5": "bpe",
        "qwen_2": "bpe",
        "gemma_instruct": "gemma",
        "llava_llama_3": "llama3",
        "chatml_direct": "bpe",
        "mpt": "bpe",
    }
    found: dict = {"conversations": CONVERSATIONS, "labels": {}, "prompts": {}}
    for name, template in conversation_lib.conv_templates.items():
        if template.sep_style is conversation_lib.SeparatorStyle.LLAMA_3:
            template.tokenizer = tokenizers["llama3"]
        if template.messages or "v0" in name or "plain" in name:  # the last cannot be rendered there
            continue
        texts = []
        for turns in CONVERSATIONS:
            for messages in (turns, [*turns[:-1], None]):
                template.messages = [[template.roles[i % 2], text] for i, text in enumerate(messages)]
                texts.append(template.get_prompt())
        template.messages = []
        found["prompts"][name] = texts
    for name, kind in kinds.items():
        conversation_lib.default_conversation = conversation_lib.conv_templates[name]
        rows = []
        for turns in CONVERSATIONS:
            if name == "plain" and (len(turns) != 2):
                rows.append(None)
                continue
            source = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
            has_image = any("<image>" in text for text in turns)
            arguments = types.SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
            encoded = train.preprocess(
                train.preprocess_multimodal([source], arguments), tokenizers[kind], has_image=has_image
            )
            rows.append([encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist()])
        found["labels"][name] = {"tokenizer": kind, "rows": rows}
    (HERE / "labels.json").write_text(json.dumps(found) + "\n")


def byte_level(specials=("<|im_start|>", "<|im_end|>"), **options) -> PreTrainedTokenizerFast:
    """As Qwen2's: the bytes come first, so that a newline is 198."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        SYSTEM_TEXT * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    options = {"eos_token": specials[-1], "pad_token": "<|endoftext|>", "model_max_length": 4096} | options
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(specials), **options)
    fast.save_pretrained(HERE / "tokenizer_bpe") if len(specials) == 2 else None
    return fast


def llama3() -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    specials = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast = byte_level(tuple(specials), bos_token=specials[0])
    fast._tokenizer.post_processor = TemplateProcessing(
        single=f"{specials[0]} $A", special_tokens=[(specials[0], fast.bos_token_id)]
    )
    fast.chat_template = (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    fast.save_pretrained(HERE / "tokenizer_llama3")
    return fast


def sentence_piece() -> LlamaTokenizer:
    """LLaMA's slow tokenizer, which LLaVA-NeXT uses; the fast one beside it is what a test reads."""
    folder = HERE / "tokenizer_spm"
    folder.mkdir(exist_ok=True)
    train_sentence_piece(folder, ["--pad_id=-1"])
    slow = LlamaTokenizer(
        str(folder / "tokenizer.model"), legacy=False, model_max_length=4096, pad_token="<unk>", padding_side="right"
    )
    save_fast(slow, folder)
    return slow


def gemma():
    from transformers import GemmaTokenizer

    folder = HERE / "tokenizer_gemma"
    folder.mkdir(exist_ok=True)
    ids = "--pad_id=0 --pad_piece=<pad> --eos_id=1 --eos_piece=<eos> --bos_id=2 --bos_piece=<bos> --unk_id=3"
    turns = "--user_defined_symbols=<start_of_turn>,<end_of_turn>"
    train_sentence_piece(folder, [ids, turns, "--add_dummy_prefix=false"])
    slow = GemmaTokenizer(str(folder / "tokenizer.model"), model_max_length=4096)
    save_fast(slow, folder)
    return slow


def save_fast(slow, folder: Path) -> None:
    """The same as one file that any later transformers reads without sentencepiece."""
    from transformers import GemmaTokenizerFast, LlamaTokenizerFast

    family = GemmaTokenizerFast if type(slow).__name__.startswith("Gemma") else LlamaTokenizerFast
    slow.save_pretrained(folder)
    fast = family.from_pretrained(folder)
    if family is LlamaTokenizerFast:  # legacy=False, which this release's conversion does not know yet
        fast._tokenizer.normalizer = normalizers.Sequence([])
        fast._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    fast.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()


def train_sentence_piece(folder: Path, options: list[str]) -> None:
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(SYSTEM_TEXT * 20))
    sentencepiece.SentencePieceTrainer.train(
        " ".join(
            [
                f"--input={corpus} --model_prefix={folder / 'tokenizer'} --vocab_size=320 --model_type=bpe",
                "--normalization_rule_name=identity --byte_fallback=true --hard_vocab_limit=false",
                "--minloglevel=2 --remove_extra_whitespaces=false",
                *options,
            ]
        )
    )
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()


if __name__ == "__main__":
    merge_files()
    pixel_files()
    checkpoints()
    label_files()
