"""What the hooks in an upstream checkout call. Copied there with the method's core; needs what upstream needs anyway.

N = entries of upstream's `images`, k = frames or tiles of one, P = patches, T = visual tokens, D = tower width,
H = LLM width, S = samples.
"""

from comp_patches.upstream.hooks.arguments import with_flags
from comp_patches.upstream.hooks.features import encode_images, native_images
from comp_patches.upstream.hooks.tower import (
    build_projector,
    build_tower,
    describe_tower,
    fit_config,
    has_comp_tower,
    merges_patches,
    names_comp_tower,
)
from comp_patches.upstream.hooks.trainer import with_named_losses
from comp_patches.upstream.hooks.training import add_answers, aspect_ratio, collate_answers, prepare_training

__all__ = [
    "add_answers",
    "aspect_ratio",
    "build_projector",
    "build_tower",
    "collate_answers",
    "describe_tower",
    "encode_images",
    "fit_config",
    "has_comp_tower",
    "merges_patches",
    "names_comp_tower",
    "native_images",
    "prepare_training",
    "with_flags",
    "with_named_losses",
]
