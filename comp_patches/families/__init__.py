"""The VFMs that a packed transformer can be, a small file each; a checkpoint's `model_type` chooses."""

from comp_patches.families import siglip
from comp_patches.families.base import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (siglip.FAMILY,)}


def family_of(model_type: str | None) -> Family:
    """The family that a Hugging Face `model_type` belongs to."""
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(model_type for family in FAMILIES.values() for model_type in family.model_types)
    raise ValueError(f"No vision tower is known for model_type {model_type!r}. Known: {known}.")
