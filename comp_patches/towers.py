"""Tower names and how a packed vision transformer gets its weights.

A tower's full name is `name:weights`, for example `comp-siglip:google/siglip-so400m-patch14-384` or
`comp-siglip:./my/siglip`. Behaviour depends on the checkpoint's config, never on what its folder is called.
"""

import difflib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comp_patches.checkpoint import TensorFiles, read_config, read_processor_config, resolve, save_checkpoint
from comp_patches.families import family_of
from comp_patches.families.base import Family, Source
from comp_patches.image_processor import NativeImageProcessor
from comp_patches.vision_config import MODEL_TYPE, VisionTransformerConfig
from comp_patches.vision_transformer import PackedVisionTransformer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerName:
    """What a tower name stands for: the family its checkpoint must be of, and the weights a bare name means."""

    family: str
    default_weights: str


TOWERS: dict[str, TowerName] = {
    "comp-siglip": TowerName("siglip", "SliMM-X/CoMP-SigLIP-So400M"),
    "comp-siglip-base": TowerName("siglip", "google/siglip-base-patch16-384"),
}


def parse_tower_name(full_name: str) -> tuple[str, str]:
    """ "comp-siglip:./my/siglip" -> ("comp-siglip", "./my/siglip"); a bare name means its default weights."""
    name, _, weights = full_name.partition(":")
    if name not in TOWERS:
        nearest = difflib.get_close_matches(name, TOWERS, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"Vision tower {name!r} is unknown.{hint} Known: {', '.join(TOWERS)}, each also as NAME:WEIGHTS."
        )
    if not weights:
        weights = TOWERS[name].default_weights
        logger.info("%s means the weights %s", name, weights)
    return name, weights


def load_vision_config(
    name_or_path: str,
    *,
    merge_size: int | None = None,
    use_rope: bool | None = None,
    attn_implementation: str | None = None,
    **config_overrides: Any,
) -> VisionTransformerConfig:
    """The config of a tower; no weights are read. None leaves what the checkpoint says."""
    path, family_name = _locate(name_or_path, weights=False)
    return _configured(path, family_name, merge_size, use_rope, attn_implementation, config_overrides)


def load_image_processor(name_or_path: str, **options: Any) -> NativeImageProcessor:
    """The image processor that belongs to a tower; no weights are read. `options` are the processor's own."""
    config = load_vision_config(name_or_path, merge_size=options.pop("merge_size", None))
    return build_image_processor(config, **options)


def build_image_processor(config: VisionTransformerConfig, **options: Any) -> NativeImageProcessor:
    """The image processor for a config. `force_resize="pretrained"` means the VFM's own size."""
    if options.get("force_resize") == "pretrained":
        options["force_resize"] = config.image_size
    return NativeImageProcessor(
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        image_mean=config.image_mean,
        image_std=config.image_std,
        **options,
    )


def load_vision_transformer(
    name_or_path: str,
    *,
    merge_size: int = 2,
    use_rope: bool | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "auto",
    **config_overrides: Any,
) -> PackedVisionTransformer:
    """Build a tower and fill it from a checkpoint: an original VFM's, or one that `save_vision_transformer` wrote.

    Args:
        name_or_path: `name:weights`, a known name, a local folder, a .safetensors file, or a hub id.
        merge_size: side of a block; 1 is raster order and takes odd grids.
        use_rope: None means what the checkpoint says (an original VFM: True).
        dtype: of the parameters; None keeps the checkpoint's.
        attn_implementation: attention backend.
        config_overrides: other fields of `VisionTransformerConfig`.
    """
    path, family_name = _locate(name_or_path, weights=True)
    config = _configured(path, family_name, merge_size, use_rope, attn_implementation, config_overrides)
    state_dict = _read_state_dict(TensorFiles(path), config, read_config(path))
    dtype = dtype or state_dict["patch_embedding.weight"].dtype
    with torch.device("meta"):  # no random initialisation of what is about to be overwritten
        model = PackedVisionTransformer(config)
    _check_shapes(model, state_dict, path)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state_dict.items()}, assign=True)
    logger.info("%s: loaded %d tensors (%s) from %s", config.family, len(state_dict), dtype, path)
    return model


def save_vision_transformer(model: PackedVisionTransformer, folder: str | Path) -> None:
    """Write config.json and model.safetensors under the names of this module."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_checkpoint(Path(folder), model.config.to_dict(), tensors)


def _locate(name_or_path: str, *, weights: bool) -> tuple[Path, str | None]:
    """The checkpoint's local path and, if a tower name was given, the family it must be of."""
    name, separator, _ = name_or_path.partition(":")
    is_tower_name = name in TOWERS or (separator and not Path(name_or_path).exists())
    if not is_tower_name and not Path(name_or_path).exists() and "/" not in name_or_path:
        is_tower_name = True  # neither a path nor a hub id: a misspelt name, which the error below explains
    if not is_tower_name:
        return resolve(name_or_path, weights=weights), None
    name, weights_name = parse_tower_name(name_or_path)
    return resolve(weights_name, weights=weights), TOWERS[name].family


def _configured(
    path: Path,
    family_name: str | None,
    merge_size: int | None,
    use_rope: bool | None,
    attn_implementation: str | None,
    overrides: dict[str, Any],
) -> VisionTransformerConfig:
    """The checkpoint's config under the caller's options."""
    raw = read_config(path)
    if raw.get("model_type") == MODEL_TYPE:
        config = VisionTransformerConfig.from_dict(raw)
    else:
        config = family_of(raw).config_from_hf(raw).with_overrides(_normalisation(path))
    if family_name is not None and config.family != family_name:
        raise ValueError(
            f"The tower name asks for a {family_name!r} checkpoint, but {path} has model_type "
            f"{raw.get('model_type')!r} ({config.family}). Choose the tower name that fits the weights."
        )
    options = {"merge_size": merge_size, "use_rope": use_rope, "attn_implementation": attn_implementation}
    return config.with_overrides(options | overrides)


def _normalisation(path: Path) -> dict[str, Any]:
    """The checkpoint's own mean and std, where it ships a preprocessor_config.json; else the family's stay."""
    processor = read_processor_config(path)
    return {name: processor.get(name) for name in ("image_mean", "image_std")}


def _read_state_dict(
    files: TensorFiles, config: VisionTransformerConfig, raw_config: dict[str, Any]
) -> dict[str, Tensor]:
    """All parameters of the tower under our names. Any that is missing is an error."""
    if raw_config["model_type"] == MODEL_TYPE:
        family, prefix = None, ""
        with torch.device("meta"):
            names = {name: Source((name,)) for name in PackedVisionTransformer(config).state_dict()}
    else:
        family = family_of(raw_config)
        prefix = _prefix(files, family)
        names = {
            ours: replace(source, keys=tuple(prefix + key for key in source.keys))
            for ours, source in family.sources(config).items()
        }
    wanted = [key for source in names.values() for key in source.keys]
    missing = [key for key in wanted if key not in files]
    unexpected = _unexpected(files, set(wanted), family, prefix)
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} of {len(wanted)} tensors, first {', '.join(missing[:3])}. "
            f"It has {len(unexpected)} that the tower does not know"
            + (f", first {', '.join(unexpected[:3])}." if unexpected else ".")
        )
    if unexpected:
        logger.warning(
            "%d tensors of the checkpoint are not used, first %s", len(unexpected), ", ".join(unexpected[:3])
        )
    return {ours: source.read([files[key] for key in source.keys]) for ours, source in names.items()}


def _prefix(files: TensorFiles, family: Family) -> str:
    """Files of transformers 4 and of whole dual encoders say `vision_model.`; transformers 5 writes no prefix."""
    for prefix in family.prefixes:
        if prefix + family.anchor in files:
            return prefix
    tried = " or ".join(repr(prefix + family.anchor) for prefix in family.prefixes)
    found = ", ".join(list(files)[:3])
    raise ValueError(f"The checkpoint has no {tried}, so it is no {family.name} vision model. Its keys begin: {found}.")


def _unexpected(files: TensorFiles, wanted: set[str], family: Family | None, prefix: str) -> list[str]:
    """Vision tensors that nobody asked for; other modules of a whole model (under another prefix) are none of ours."""
    ignored = tuple(prefix + name for name in family.ignored) if family else ()
    known = wanted.union(key for key in files if key.startswith(ignored))
    return [key for key in files if key.startswith(prefix) and key not in known]


def _check_shapes(model: PackedVisionTransformer, state_dict: dict[str, Tensor], path: Path) -> None:
    for name, parameter in model.state_dict().items():
        if state_dict[name].shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(state_dict[name].shape)} in {path}, but its config says "
                f"{tuple(parameter.shape)}. Do config.json and the weights belong together?"
            )
