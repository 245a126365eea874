"""The VFMs that a packed transformer can be, a small file each; a checkpoint's config chooses."""

from typing import Any

from comp_patches.families.aimv2 import AIMV2, AIMV2_APPLE
from comp_patches.families.base import Family
from comp_patches.families.clip import CLIP
from comp_patches.families.comp_release import COMP_DINOV2, COMP_SIGLIP
from comp_patches.families.dinov2 import DINOV2, DINOV2_IN_MEMORY
from comp_patches.families.own import OWN
from comp_patches.families.siglip import SIGLIP
from comp_patches.families.siglip2 import SIGLIP2

FAMILIES: tuple[Family, ...] = (
    COMP_SIGLIP,
    COMP_DINOV2,
    SIGLIP,
    SIGLIP2,
    DINOV2,
    DINOV2_IN_MEMORY,
    AIMV2,
    AIMV2_APPLE,
    CLIP,
    OWN,
)


def families_of(hf_config: dict[str, Any]) -> tuple[Family, ...]:
    """The forms in which the files of the VFM that a Hugging Face config.json describes may come, at least one.

    `architectures` says which VFM it is, else `model_type`, else the `model_type` of the vision model inside.
    """
    architectures = set(hf_config.get("architectures") or ())
    model_type, vision = hf_config.get("model_type"), hf_config.get("vision_config") or {}
    for found in (
        [family for family in FAMILIES if architectures & set(family.architectures)],
        [family for family in FAMILIES if model_type in family.model_types],
        [family for family in FAMILIES if vision.get("model_type") in family.model_types],
    ):
        if found:
            return tuple(found)
    known = ", ".join(dict.fromkeys(model_type for family in FAMILIES for model_type in family.model_types))
    raise ValueError(f"No vision tower is known for model_type {model_type!r} in config.json. Known: {known}.")


def family_of(hf_config: dict[str, Any]) -> Family:
    """The VFM that a Hugging Face config.json describes."""
    return families_of(hf_config)[0]
