"""Training steps that scripts/bench/train_step.py compares: ours, its matrix products alone, and padded ones.

A model of random weights, its tower, adapter and LLM all trained; images of random pixels, and of text random words:
time does not depend on them. Each maker takes (setting, micro_batches) and returns a function that runs them all once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from encoders import PATCH, Setting, ViT, attend, naflex_layout, naflex_model, our_tower, product
from encoders import floor as tower_floor
from timing import Run
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from comp_patches.adapter import DownsampleMLP
from comp_patches.llava_plugin import CompVisionTower
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.collator import PackedCollator
from llava.model.attention import PACKED_SDPA
from llava.model.decoding_loss import decoding_loss
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM

Grids = Sequence[tuple[int, int]]  # rows and columns of patches, an image and a sample each
MERGE = 2  # side of a visual token in patches


@dataclass(frozen=True)
class LLM:
    """One size of Qwen2. The default is Qwen2.5-0.5B's width and vocabulary."""

    width: int = 896
    heads: int = 14
    kv_heads: int = 2
    mlp: int = 4864
    words: int = 151936
    layers: int = 4

    def config(self) -> LlavaQwenConfig:
        return LlavaQwenConfig(
            vocab_size=self.words,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=True,
        )


@dataclass(frozen=True)
class Model:
    """Sizes of the whole, and of a sample's text in tokens. The default tower is SigLIP-Base's width."""

    vit: ViT = field(default_factory=lambda: ViT(width=768, heads=12, layers=4, mlp=3072))
    llm: LLM = field(default_factory=LLM)
    prompt: int = 32
    answer: int = 96
    device: str = "cpu"

    def tower_setting(self, grids: Grids) -> Setting:
        return Setting(self.vit, tuple(grids), torch.float32, self.device, backward=True)

    def build(self) -> LlavaQwenForCausalLM:
        model = LlavaQwenForCausalLM._from_config(self.llm.config(), attn_implementation=PACKED_SDPA)
        projector = DownsampleMLP(self.vit.width, self.llm.width, MERGE)
        model.get_model().attach_vision_modules(CompVisionTower(our_tower(self.tower_setting(()))), projector)
        return model.to(self.device).train()

    def micro_batch(self, grids: Grids) -> dict:
        """A sample for each image: a prompt, its visual tokens, an answer."""
        batch = PackedCollator(3 * PATCH**2)([self._sample(*grid) for grid in grids])
        for key in ("ids", "num_samples", "bad_samples"):  # for the trainer
            del batch[key]
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _sample(self, rows: int, cols: int) -> dict:
        text = torch.randint(self.llm.words, (self.prompt + self.answer,))
        input_ids = torch.cat((torch.full((rows * cols // MERGE**2,), IMAGE_TOKEN_INDEX), text))
        labels = input_ids.clone()
        labels[: -self.answer] = IGNORE_INDEX
        return {
            "id": f"{rows}x{cols}",
            "input_ids": input_ids,
            "labels": labels,
            "pixel_values": torch.randn(rows * cols, 3 * PATCH**2),
            "image_grid_thw": torch.tensor([[1, rows, cols]]),
        }


def packed(setting: Model, micro_batches: Sequence[Grids], update: bool = False) -> Run:
    """Ours: forward and backward, and if asked for AdamW's update."""
    model, batches = setting.build(), [setting.micro_batch(grids) for grids in micro_batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if update else None

    def run() -> None:
        model.zero_grad()
        for batch in batches:
            model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()

    return run


def updated(setting: Model, micro_batches: Sequence[Grids]) -> Run:
    """Ours with AdamW's update."""
    return packed(setting, micro_batches, update=True)


def floor(setting: Model, micro_batches: Sequence[Grids]) -> Run:
    """Forward's and backward's matrix products as bare torch.mm, one attention per image and sample: nothing else."""
    parts = [_micro_batch_floor(setting, grids) for grids in micro_batches]

    def run() -> None:
        for part in parts:
            part()

    return run


def _micro_batch_floor(setting: Model, grids: Grids) -> Run:
    tower, llm = tower_floor(setting.tower_setting(grids)), setting.llm
    lengths = [rows * cols // MERGE**2 + setting.prompt + setting.answer for rows, cols in grids]
    tokens, visual = sum(lengths), sum(rows * cols for rows, cols in grids) // MERGE**2
    merged, head_dim = MERGE**2 * setting.vit.width, llm.width // llm.heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device)

    def weights(*widths: tuple[int, int]) -> list[Tensor]:
        return [random(outputs, inputs) for inputs, outputs in widths]

    blocks, answers = random(visual, merged), random(setting.answer * len(grids), llm.width)
    states, gated = random(tokens, llm.width), random(tokens, llm.mlp)
    adapter, head = weights((merged, merged), (merged, llm.width)), random(llm.words, llm.width)
    up = [(llm.width, width) for width in (llm.width, llm.kv_heads * head_dim, llm.kv_heads * head_dim)]
    layers = [
        weights(*up, (llm.width, llm.width), (llm.width, llm.mlp), (llm.width, llm.mlp), (llm.mlp, llm.width))
        for _ in range(llm.layers)
    ]

    def run() -> None:
        tower()
        for weight in adapter:
            product(blocks, weight.T, backward=True)
        for *qkv, output, gate, up, down in layers:
            heads = [product(states, weight.T, backward=True).unflatten(1, (-1, head_dim)) for weight in qkv]
            for segment in zip(*(part.split(lengths) for part in heads), strict=True):
                attend([part.transpose(0, 1)[None] for part in segment], True, is_causal=True, enable_gqa=True)
            for inputs, weight in ((states, output), (states, gate), (states, up), (gated, down)):
                product(inputs, weight.T, backward=True)
        product(answers, head.T, backward=True)

    return run


def padded_text(setting: Model, micro_batches: Sequence[Grids]) -> Run:
    """The same with the samples padded to the longest of their micro-batch, under a mask. The tower is packed."""
    return _padded(setting, setting.build(), micro_batches)


def padded(setting: Model, micro_batches: Sequence[Grids]) -> Run:
    """The same with samples and images padded: a tower of this size as transformers has it, SigLIP 2 NaFlex."""
    model = setting.build()
    model.get_model().vision_tower = PaddedTower(naflex_model(setting.tower_setting(())))
    return _padded(setting, model, micro_batches)


class PaddedTower(nn.Module):
    """A padding tower under our towers' interface."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, image_grid_thw: Sequence[Sequence[int]]) -> Tensor:
        grids = [(rows, cols) for _, rows, cols in image_grid_thw]
        layout = naflex_layout(grids, str(pixel_values.device))
        images = pad_sequence(pixel_values.split([rows * cols for rows, cols in grids]), batch_first=True)
        return self.model(pixel_values=images, **layout).last_hidden_state[layout["pixel_attention_mask"].bool()]


def _padded(setting: Model, model: LlavaQwenForCausalLM, micro_batches: Sequence[Grids]) -> Run:
    batches = [setting.micro_batch(grids) for grids in micro_batches]

    def run() -> None:
        model.zero_grad()
        for batch in batches:
            padded_loss(model, batch).backward()

    return run


def padded_loss(model: LlavaQwenForCausalLM, batch: dict) -> Tensor:
    """The decoding loss of a packed batch whose samples the LLM reads as rows of one length."""
    lengths = [end - start for start, end in pairwise(batch["cu_seqlens"])]
    packed, _ = model.embed_multimodal(batch["input_ids"], batch["pixel_values"], batch["image_grid_thw"])
    rows = pad_sequence(packed[0].split(lengths), batch_first=True)
    labels = pad_sequence(batch["labels"][0].split(lengths), batch_first=True, padding_value=IGNORE_INDEX)
    mask = torch.arange(rows.shape[1], device=rows.device) < torch.tensor(lengths, device=rows.device)[:, None]
    hidden = model.get_model()(inputs_embeds=rows, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return decoding_loss(hidden.flatten(0, 1)[None], model.lm_head.weight, labels.flatten()[None])
