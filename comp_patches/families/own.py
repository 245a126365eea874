"""The tower's own form, one set of names for all VFMs: what `save_vision_transformer` writes, and LLaVA checkpoints."""

from comp_patches.families.base import Family, Source, parameter_names, pattern_of
from comp_patches.vision_config import MODEL_TYPE, VisionTransformerConfig


def names(config: VisionTransformerConfig) -> dict[str, Source]:
    """Every name is its own."""
    patterns = {pattern_of(parameter)[0] for parameter in parameter_names(config)}
    return {pattern: Source((pattern,)) for pattern in patterns}


OWN = Family(
    name=MODEL_TYPE,
    model_types=(MODEL_TYPE,),
    config_from_hf=VisionTransformerConfig.from_dict,
    anchor="patch_embedding.weight",
    names=names,
)
