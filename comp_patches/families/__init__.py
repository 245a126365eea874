"""The VFMs that a packed transformer can be, a small file each; a checkpoint's config chooses."""

from typing import Any

from comp_patches.families.base import Family
from comp_patches.families.comp_release import COMP_SIGLIP
from comp_patches.families.siglip import SIGLIP

FAMILIES: tuple[Family, ...] = (COMP_SIGLIP, SIGLIP)


def family_of(hf_config: dict[str, Any]) -> Family:
    """The family that a Hugging Face config.json describes, by `architectures`, else by `model_type`."""
    architectures, model_type = hf_config.get("architectures") or (), hf_config.get("model_type")
    for family in FAMILIES:
        if set(family.architectures) & set(architectures):
            return family
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    raise ValueError(f"No vision tower is known for model_type {model_type!r} in config.json. Known: {known}.")
