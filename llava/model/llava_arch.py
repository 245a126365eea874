"""Where images enter the text. Two mixins turn any transformers decoder into a LLaVA model.

P = patches, N = images, T = visual tokens, S = samples of a micro-batch, D = tower width, H = LLM width, L = text row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import expand_placeholders
from llava.model.attention import packed_attention_kwargs
from llava.model.decoding_loss import decoding_loss
from llava.model.multimodal_encoder.builder import build_patch_merge, build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.multimodal_rope import MultimodalRotary, multimodal_positions, next_positions, rotating_by
from llava.model.patch_merge import PatchMerge, Visual, unpad_image
from llava.model.tile_inputs import tile_inputs

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "LlavaOutput", "expand_placeholders", "unpad_image"]

Grids = Tensor | Sequence[Sequence[int]]  # (N, 3) frames, rows and columns of patches; on the host it costs no wait
Layout = Tensor | Sequence[Sequence[int]]  # (N, 3) for a plain tower: width, height, whether a video (`patch_merge`)


@dataclass
class LlavaOutput(CausalLMOutputWithPast):
    """`losses` holds every named value of the step: `decoding`, then each auxiliary loss and what it reports."""

    losses: dict[str, Tensor] | None = None


class LlavaMetaModel:
    """Mixed into an LLM's backbone: gives it `vision_tower` and `mm_projector`.

    With a plain tower, also the rule by which tiles become tokens, and maybe `image_newline` (H,).
    """

    patch_merge: PatchMerge | None = None

    def __init__(self, config: Any):
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(config)
            self.mm_projector = build_vision_projector(
                config.mm_projector_type, config.mm_hidden_size, config.hidden_size, self.vision_tower.merge_size
            )
            self._set_patch_merge()
        if getattr(config, "mm_mrope_section", None):
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            self.rotary_emb = MultimodalRotary(self.rotary_emb, config.mm_mrope_section, head_dim)

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any):
        """The LLM's own; `position_ids` may be (3, B, L), see `llava.model.multimodal_rope`."""
        if position_ids is None or position_ids.ndim == 2:
            return super().forward(*args, position_ids=position_ids, **kwargs)
        with rotating_by(position_ids):
            return super().forward(*args, **kwargs)

    def get_vision_tower(self) -> nn.Module | None:
        return getattr(self, "vision_tower", None)

    def attach_vision_modules(self, tower: nn.Module, projector: nn.Module, **config: Any) -> None:
        """Give a bare LLM a tower and a projector; `config` are the `mm_*` keys by which a checkpoint rebuilds them."""
        self.vision_tower = tower
        self.mm_projector = projector
        for key, value in config.items():
            setattr(self.config, key, value)
        self._set_patch_merge()

    def _set_patch_merge(self) -> None:
        self.patch_merge = build_patch_merge(self.config)
        if self.patch_merge is not None and self.patch_merge.has_newline and not hasattr(self, "image_newline"):
            width = self.config.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width, dtype=self.dtype) / math.sqrt(width))

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Grids, image_layout: Layout | None = None) -> Tensor:
        """(P, 3·p·p), (N, 3) -> the visual tokens (T, H) of all images, one after another."""
        weight = next(self.vision_tower.parameters())
        tokens = self.mm_projector(self.vision_tower(pixel_values.to(weight.dtype), image_grid_thw))
        return tokens if self.patch_merge is None else self._merged(tokens, image_grid_thw, image_layout)

    def _merged(self, tokens: Tensor, image_grid_thw: Grids, image_layout: Layout | None) -> Tensor:
        """A plain tower's tokens, tile after tile, as its images' visual tokens."""
        visuals, tiles = _visuals(image_grid_thw, image_layout)
        rows = tokens.view(-1, self.patch_merge.tokens_per_tile, tokens.shape[-1]).split(tiles)
        newline = getattr(self, "image_newline", None)
        return torch.cat([self.patch_merge(*pair, newline) for pair in zip(rows, visuals, strict=True)])

    def tokens_per_image(self, image_grid_thw: Grids, image_layout: Layout | None = None) -> list[int]:
        """(N, 3) patches per axis -> the N images' visual tokens, on the host."""
        if self.patch_merge is not None:
            visuals, tiles = _visuals(image_grid_thw, image_layout)
            return [self.patch_merge.num_tokens(*pair) for pair in zip(tiles, visuals, strict=True)]
        return [math.prod(grid) // self.mm_projector.merge for grid in _numbers(image_grid_thw)]

    def row_positions(self, input_ids: Tensor, image_grid_thw: Grids, cu_seqlens: Sequence[int]) -> Tensor | None:
        """M-RoPE's (3, 1, L) for a packed row (1, L) with images; None where the LLM counts tokens, as most do."""
        if not getattr(self.config, "mm_mrope_section", None) or len(image_grid_thw) == 0:
            return None
        grids = image_grid_thw.tolist() if isinstance(image_grid_thw, Tensor) else image_grid_thw
        side = math.isqrt(self.mm_projector.merge)
        merged = [(frames, rows // side, columns // side) for frames, rows, columns in grids]
        return multimodal_positions(input_ids[0] == IMAGE_TOKEN_INDEX, merged, cu_seqlens)


class LlavaMetaForCausalLM:
    """Mixed into an LLM with a head: packed training with named losses, and generation with images.

    A subclass says which backbone it has; whoever trains it adds the losses it wants.
    """

    backbone_class: type[nn.Module]

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)  # past the LLM's own __init__, which would build a second backbone
        self.model = self.backbone_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.auxiliary_losses = nn.ModuleDict()
        self.auxiliary_weights: dict[str, float] = {}
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ):
        """The LLM's own; with `cu_seqlens` a packed one, see `packed_forward`."""
        if cu_seqlens is None:
            return super().forward(input_ids=input_ids, **kwargs)
        return self.packed_forward(input_ids, cu_seqlens=cu_seqlens, num_items_in_batch=num_items_in_batch, **kwargs)

    def get_model(self) -> LlavaMetaModel:
        return self.model

    def get_vision_tower(self) -> nn.Module | None:
        return self.get_model().get_vision_tower()

    def add_auxiliary_loss(self, name: str, loss: nn.Module, weight: float) -> None:
        """Let `loss` take part in training with `weight`. Weights of its own are none of the model's: not saved."""
        self.auxiliary_losses[name] = loss
        self._keys_to_ignore_on_save |= {f"auxiliary_losses.{name}.{key}" for key in loss.state_dict()}
        self.auxiliary_weights[name] = weight

    def packed_forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Sequence[int],
        pixel_values: Tensor,
        image_grid_thw: Grids,
        image_sample: Sequence[int],
        image_layout: Layout | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **align_stream: Any,
    ) -> LlavaOutput:
        """One micro-batch of samples laid end to end, as `llava.data.collator` makes it.

        Args:
            input_ids: (1, L), IMAGE_TOKEN_INDEX at every visual token.
            position_ids: (1, L), restarting at each sample; under M-RoPE those of images are worked out here.
            cu_seqlens: S + 1 numbers, where samples begin and end.
            pixel_values: (P, 3·p·p); image_grid_thw: (N, 3); image_sample: N numbers, the sample an image belongs to.
            image_layout: (N, 3), of a plain tower's images.
            labels: (1, L) or None; without labels the logits of the whole row are returned instead of losses.
            align_stream: the packed answers' text, `align_*`; read only when an auxiliary loss is on.
        """
        inputs_embeds, visual_tokens = self.embed_multimodal(input_ids, pixel_values, image_grid_thw, image_layout)
        with_images = self.get_model().row_positions(input_ids, image_grid_thw, cu_seqlens)
        position_ids = position_ids if with_images is None else with_images
        hidden_states = self._run_packed(cu_seqlens, inputs_embeds=inputs_embeds, position_ids=position_ids)
        if labels is None:
            return LlavaOutput(logits=self.lm_head(hidden_states))
        losses = {"decoding": decoding_loss(hidden_states, self.lm_head.weight, labels, num_items_in_batch)}
        loss = losses["decoding"]
        if self.auxiliary_losses and self.training:
            tokens = self.get_model().tokens_per_image(image_grid_thw, image_layout)
            visual_sample = repeated(image_sample, tokens, visual_tokens.device)
            text_features, text_valid = self.text_features(len(cu_seqlens) - 1, **align_stream)
            for name, module in self.auxiliary_losses.items():
                losses |= module(
                    visual_tokens,
                    visual_sample,
                    text_features,
                    text_valid,
                    self.get_output_embeddings().weight,
                    num_samples=len(cu_seqlens) - 1,
                )
                loss = loss + self.auxiliary_weights[name] * losses[name]
        return LlavaOutput(loss=loss, losses=losses)

    def embed_multimodal(
        self, input_ids: Tensor, pixel_values: Tensor, image_grid_thw: Grids, image_layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """Word embeddings with the visual tokens in their places: (1, L, H), and the visual tokens (T, H) alone."""
        is_visual = input_ids[0] == IMAGE_TOKEN_INDEX
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_visual[None], 0))
        if len(pixel_values) == 0:
            return self._without_images(inputs_embeds, pixel_values)
        visual_tokens = self.get_model().encode_images(pixel_values, image_grid_thw, image_layout)
        places = is_visual.nonzero().squeeze(1)
        if len(places) != len(visual_tokens):
            raise ValueError(
                f"The text has {len(places)} places for visual tokens, but the {len(image_grid_thw)} image(s) give "
                f"{len(visual_tokens)}. Were the placeholders expanded with another processor than the images?"
            )
        return inputs_embeds.index_copy(1, places, visual_tokens[None].to(inputs_embeds)), visual_tokens

    def _without_images(self, inputs_embeds: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """In training every rank runs the tower, else collectives of sharded or data-parallel runs never meet."""
        if not self.training:
            return inputs_embeds, inputs_embeds.new_zeros(0, inputs_embeds.shape[-1])
        tower = self.get_vision_tower()
        side = getattr(tower, "per_side", tower.merge_size)  # a plain tower takes whole tiles
        pixels = pixel_values.new_zeros(side * side, pixel_values.shape[1])
        dummy = self.get_model().encode_images(pixels, [[1, side, side]], [[side, side, 0]])
        return inputs_embeds + 0.0 * dummy.sum().to(inputs_embeds.dtype), dummy[:0]

    def _run_packed(self, cu_seqlens: Sequence[int], *, position_ids: Tensor, **inputs: Tensor) -> Tensor:
        """The backbone over one packed row; returns (1, L, H) after the final norm."""
        attention = packed_attention_kwargs(self.config._attn_implementation, cu_seqlens, position_ids.device)
        return self.model(use_cache=False, position_ids=position_ids, **inputs, **attention).last_hidden_state

    @torch.no_grad()
    def text_features(
        self,
        num_samples: int,
        *,
        align_input_ids: Tensor,
        align_position_ids: Tensor,
        align_cu_seqlens: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """F_t (paper, Sec. 2.3): per sample the mean last hidden state over its answers' text, read alone.

        Returns (S, H) fp32, un-normalised, and (S,) bool: False where a sample has no text.
        """
        device = align_input_ids.device
        lengths = [end - start for start, end in pairwise(align_cu_seqlens)]
        features = torch.zeros(num_samples, self.config.hidden_size, device=device)
        if not any(lengths):  # every rank runs the LLM, else sharded weights never meet: here over nobody's token
            align_input_ids = align_position_ids = align_input_ids.new_zeros(1, 1)
            align_cu_seqlens = [0, 1]
        with evaluating(self.model):
            hidden = self._run_packed(align_cu_seqlens, input_ids=align_input_ids, position_ids=align_position_ids)[0]
        hidden = hidden[: sum(lengths)]
        features.index_add_(0, repeated(range(num_samples), lengths, device), hidden.float())
        counts = torch.tensor(lengths).to(device, non_blocking=True)
        return features / counts.clamp(min=1)[:, None], counts > 0

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | list[Tensor] | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_layout: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        modalities: Sequence[str] | str = ("image",),
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue prompts, with images or without; returns the new tokens only.

        Args:
            inputs: prompt ids (1, L), (B, L) with `attention_mask`, or a list of (L_i,); one IMAGE_TOKEN_INDEX per
                image or video.
            pixel_values: (P, 3·p·p) of all images in order of appearance; image_grid_thw: (N, 3).
            image_layout: (N, 3), of a plain tower's images.
            images, image_sizes, modalities: LLaVA's way to say the three lines above, see `tile_inputs`.
            kwargs: transformers' generate arguments.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if inputs is None:
            return super().generate(attention_mask=attention_mask, **kwargs)
        if images is not None:
            pixel_values, image_grid_thw, image_layout = tile_inputs(
                self.get_vision_tower(), images, image_sizes, modalities
            )
        rows = unpadded(inputs, attention_mask)
        if pixel_values is None:
            if any((row == IMAGE_TOKEN_INDEX).any() for row in rows):
                raise ValueError("The prompt holds <image>, but no images (pixel_values) were given.")
            pixel_values, image_grid_thw = torch.zeros(0, 0), []
        tokens = self.get_model().tokens_per_image(image_grid_thw, image_layout) if len(image_grid_thw) else []
        expanded = []
        for row in rows:
            count = int((row == IMAGE_TOKEN_INDEX).sum())
            expanded.append(expand_placeholders(row, None, tokens[:count])[0])
            tokens = tokens[count:]
        if tokens:
            raise ValueError(f"{len(tokens)} image(s) more than <image> placeholders in the prompt(s).")
        lengths, packed_ids = [len(row) for row in expanded], torch.cat(expanded)[None]
        packed, _ = self.embed_multimodal(packed_ids, pixel_values, image_grid_thw, image_layout)
        inputs_embeds, attention_mask = pad_left(packed[0].split(lengths))
        positions = self.get_model().row_positions(packed_ids, image_grid_thw, [0, *accumulate(lengths)])
        if positions is not None:
            positions, _ = pad_left(positions[:, 0].T.split(lengths))
            kwargs["position_ids"] = positions.permute(2, 0, 1)
        return super().generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any):
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        positions = updated.get("position_ids")
        if positions is not None and positions.ndim == 3:
            updated["position_ids"] = torch.cat((positions[..., :-1], next_positions(positions[..., :-1])), dim=-1)
        return updated


def _numbers(rows: Tensor | Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    return rows.tolist() if isinstance(rows, Tensor) else rows


def _visuals(image_grid_thw: Grids, image_layout: Layout | None) -> tuple[list[Visual], list[int]]:
    """What merging needs to know of each image, and its number of tiles."""
    if image_layout is None:
        raise ValueError("A plain tower's images come with image_layout, which its image processor gives.")
    visuals = [Visual(width, height, bool(video)) for width, height, video in _numbers(image_layout)]
    return visuals, [grid[0] for grid in _numbers(image_grid_thw)]


def unpadded(inputs: Tensor | Sequence[Tensor], attention_mask: Tensor | None) -> list[Tensor]:
    """The prompts of a batch, each (L_i,), without what fills it up."""
    rows = [row.reshape(-1) for row in inputs]
    if attention_mask is None:
        return rows
    return [row[mask.bool()] for row, mask in zip(rows, attention_mask, strict=True)]


def repeated(numbers: Sequence[int], times: Sequence[int], device: torch.device) -> Tensor:
    """Each number as many times as said, (Σ times,) int64; made on the host, so that the device need not wait."""
    indices = torch.tensor(numbers, dtype=torch.long).repeat_interleave(torch.tensor(times, dtype=torch.long))
    return indices.to(device, non_blocking=True)


def pad_left(rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Rows (L_i, H) -> a batch (B, L, H) whose rows end together, and its mask (B, L)."""
    length = max(len(row) for row in rows)
    batch = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    mask = torch.zeros(len(rows), length, dtype=torch.long, device=batch.device)
    for i, row in enumerate(rows):
        batch[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return batch, mask


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout and gradient checkpointing off inside, every submodule's mode as it was afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode
