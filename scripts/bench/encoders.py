"""The encoders that scripts/bench/tower.py compares: ours, transformers' own, and the floor under all of them.

Each maker takes (vit, grids, dtype, device, backward) and returns a function that runs the whole batch once. Weights
and pixels are random: time does not depend on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timing import Run
from torch import Tensor
from torch.nn import functional as F

from comp_patches.vision_transformer import PackedVisionTransformer, VisionTransformerConfig, pieces_of

PATCH = 14
ANYRES_SIDE = 384  # a crop: 27 x 27 patches
ANYRES_TILES = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # LLaVA-NeXT's grids of crops


@dataclass(frozen=True)
class ViT:
    """One size of vision transformer."""

    width: int
    heads: int
    layers: int
    mlp: int

    @property
    def config_fields(self) -> dict[str, int]:
        """Under the names that our config and transformers' SigLIP configs share."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "patch_size": PATCH,
        }


@dataclass(frozen=True)
class Setting:
    """What all encoders of a comparison share. `grids` are rows and columns of patches, an image each."""

    vit: ViT
    grids: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    device: str
    backward: bool

    @property
    def lengths(self) -> list[int]:
        return [rows * cols for rows, cols in self.grids]

    def pixels(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def runner(self, model: torch.nn.Module, outputs: Callable[[], Sequence[Tensor]]) -> Run:
        """Forward, or forward and backward of the outputs' squares."""

        def run() -> None:
            model.zero_grad()
            with torch.set_grad_enabled(self.backward):
                for output in outputs():
                    if self.backward:
                        output.square().mean().backward()

        return run


def our_tower(setting: Setting) -> PackedVisionTransformer:
    config = VisionTransformerConfig(
        family="siglip", image_size=384, position_grid=(27, 27), **setting.vit.config_fields
    )
    return PackedVisionTransformer(config).to(setting.device, setting.dtype)


def packed(setting: Setting, compiled: bool = False) -> Run:
    """Ours: all images in one call."""
    tower = our_tower(setting)
    if compiled:
        tower.run_layers = torch.compile(tower.run_layers, dynamic=True, fullgraph=True)
    pixels = setting.pixels(sum(setting.lengths), 3 * PATCH**2)
    grids = [(1, *grid) for grid in setting.grids]
    return setting.runner(tower, lambda: [tower(pixels, grids)])


def packed_compiled(setting: Setting) -> Run:
    """Ours through torch.compile."""
    return packed(setting, compiled=True)


def one_by_one(setting: Setting) -> Run:
    """Ours: a call per image."""
    tower = our_tower(setting)
    pixels = [setting.pixels(length, 3 * PATCH**2) for length in setting.lengths]
    calls = list(zip(pixels, setting.grids, strict=True))
    return setting.runner(tower, lambda: (tower(patches, [(1, *grid)]) for patches, grid in calls))


def naflex(setting: Setting) -> Run:
    """transformers' SigLIP 2 NaFlex: padded to the longest image, with a mask."""
    model = naflex_model(setting)
    pixels = setting.pixels(len(setting.grids), max(setting.lengths), 3 * PATCH**2)
    inputs = naflex_layout(setting.grids, setting.device)
    return setting.runner(model, lambda: [model(pixel_values=pixels, **inputs).last_hidden_state])


def naflex_model(setting: Setting) -> torch.nn.Module:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(num_patches=27 * 27, vision_use_head=False, **setting.vit.config_fields)
    return Siglip2VisionModel(config).to(setting.device, setting.dtype)


def naflex_layout(grids: Sequence[tuple[int, int]], device: str) -> dict[str, Tensor]:
    """What NaFlex wants to know of padded images beside their pixels."""
    lengths = torch.tensor([rows * cols for rows, cols in grids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    shapes = torch.tensor(grids, device=device)
    return {"pixel_attention_mask": mask.long().to(device), "spatial_shapes": shapes}


def qwen2_vl(setting: Setting) -> Run:
    """transformers' Qwen2-VL encoder: packed, full attention, without its merger."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    vit = setting.vit
    config = Qwen2VLVisionConfig(
        depth=vit.layers,
        embed_dim=vit.width,
        hidden_size=vit.width,
        num_heads=vit.heads,
        patch_size=PATCH,
        temporal_patch_size=1,
    )
    vars(config)["mlp_ratio"] = (vit.mlp + 0.5) / vit.width  # the class takes whole ratios only; So400M's is 3.74
    return _qwen(Qwen2VisionTransformerPretrainedModel, config, setting)


def qwen2_5_vl(setting: Setting) -> Run:
    """transformers' Qwen2.5-VL encoder: packed, a SwiGLU of as many weights, windows in all but four layers."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    vit = setting.vit
    full = {round((i + 1) * vit.layers / 4) - 1 for i in range(4)}
    config = Qwen2_5_VLVisionConfig(
        depth=vit.layers,
        hidden_size=vit.width,
        out_hidden_size=vit.width,
        intermediate_size=vit.mlp * 2 // 3,
        num_heads=vit.heads,
        patch_size=PATCH,
        temporal_patch_size=1,
        fullatt_block_indexes=sorted(full),
    )
    return _qwen(Qwen2_5_VisionTransformerPretrainedModel, config, setting)


def _qwen(model_class: type, config, setting: Setting) -> Run:
    config._attn_implementation = "sdpa"
    model = model_class(config).to(setting.device, setting.dtype)
    model.merger = torch.nn.Identity()
    pixels = setting.pixels(sum(setting.lengths), 3 * PATCH**2)
    grids = torch.tensor([(1, *grid) for grid in setting.grids], device=setting.device)
    return setting.runner(model, lambda: [model(pixels, grid_thw=grids).last_hidden_state])


def anyres(setting: Setting) -> Run:
    """LLaVA-NeXT's way: every image as crops of 384 px and a thumbnail, all through transformers' SigLIP."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(image_size=ANYRES_SIDE, vision_use_head=False, **setting.vit.config_fields)
    model = SiglipVisionModel(config).to(setting.device, setting.dtype)
    crops = sum(anyres_crops(rows * PATCH, cols * PATCH) for rows, cols in setting.grids)
    pixels = setting.pixels(crops, 3, ANYRES_SIDE, ANYRES_SIDE)
    return setting.runner(model, lambda: [model(pixel_values=pixels).last_hidden_state])


def anyres_crops(height: int, width: int) -> int:
    """Crops of the tiling that keeps most of the image's pixels and then wastes least, and the thumbnail."""

    def merit(tiles: tuple[int, int]) -> tuple[float, float]:
        rows, cols = tiles[0] * ANYRES_SIDE, tiles[1] * ANYRES_SIDE
        scale = min(rows / height, cols / width)
        kept = min(int(height * scale) * int(width * scale), height * width)
        return kept, kept - rows * cols

    rows, cols = max(ANYRES_TILES[1:], key=merit)
    return rows * cols + 1


def floor(setting: Setting, pieces: Sequence[Sequence[int]] | None = None) -> Run:
    """The same matrix products as bare torch.mm, and one scaled_dot_product_attention per image: nothing else.

    Args:
        setting: what is compared.
        pieces: lengths of the images that go through all layers together; None = the whole batch.
    """
    vit = setting.vit
    width, heads = vit.width, vit.heads
    shapes = ((width, 3 * width), (width, width), (width, vit.mlp), (vit.mlp, width))
    embed = setting.pixels(3 * PATCH**2, width)
    layers = [[setting.pixels(*shape) for shape in shapes] for _ in range(vit.layers)]
    inputs = []
    for lengths in pieces or [setting.lengths]:
        tokens = sum(lengths)
        inputs.append((lengths, setting.pixels(tokens, 3 * PATCH**2), setting.pixels(tokens, width)))

    def run() -> None:
        for lengths, patches, states in inputs:
            torch.mm(patches, embed)
            if setting.backward:
                torch.mm(patches.t(), states)
            for qkv, proj, fc1, fc2 in layers:
                heads_of = product(states, qkv, setting.backward).view(len(states), 3, heads, width // heads).unbind(1)
                for segment in zip(*(part.split(lengths) for part in heads_of), strict=True):
                    attend([part.transpose(0, 1)[None] for part in segment], setting.backward)
                product(states, proj, setting.backward)
                product(product(states, fc1, setting.backward), fc2, setting.backward)

    return run


def floor_in_pieces(setting: Setting) -> Run:
    """The floor in the pieces that our tower takes on a CPU, whose activations stay in the caches."""
    return floor(setting, [[rows * cols for rows, cols in piece] for piece in pieces_of(setting.grids)])


def product(left: Tensor, right: Tensor, backward: bool) -> Tensor:
    """left @ right, and of backward the two products of the same sizes."""
    result = torch.mm(left, right)
    if backward:
        torch.mm(result, right.t())
        torch.mm(left.t(), result)
    return result


def attend(states: list[Tensor], backward: bool, **options: bool) -> None:
    """Bare attention of queries, keys and values (1, heads, T, d)."""
    states = [part.detach().requires_grad_(backward) for part in states]
    attended = F.scaled_dot_product_attention(*states, **options)
    if backward:
        torch.autograd.grad(attended, states, attended.detach())


ENCODERS: dict[str, Callable[[Setting], Run]] = {
    "floor": floor,
    "floor, in pieces": floor_in_pieces,
    "ours": packed,
    "ours, one by one": one_by_one,
    "ours, compiled": packed_compiled,
    "SigLIP 2 NaFlex, padded": naflex,
    "Qwen2-VL ViT, full attention": qwen2_vl,
    "Qwen2.5-VL ViT, windows": qwen2_5_vl,
    "AnyRes SigLIP": anyres,
}
