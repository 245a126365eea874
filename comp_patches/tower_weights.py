"""From a checkpoint's tensors to a tower's: whose names the file uses, which tensors are read, a report of it."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from comp_patches.families.base import Family
from comp_patches.vision_config import VisionTransformerConfig

logger = logging.getLogger(__name__)


def read_tower_weights(
    files: Mapping[str, Tensor], config: VisionTransformerConfig, families: Sequence[Family], path: Path
) -> dict[str, Tensor]:
    """All parameters of the tower under our names. Any that is missing is an error.

    Args:
        files: the checkpoint's tensors by key; what belongs to other modules is left alone.
        config: of the tower to fill.
        families: whose names the file may use.
        path: of the checkpoint, for messages.
    """
    family, prefix = _names_of(files, families, path)
    sources = {
        ours: replace(source, keys=tuple(prefix + key for key in source.keys))
        for ours, source in family.sources(config).items()
    }
    wanted = {key for source in sources.values() for key in source.keys}
    report = _compare(files, wanted, {prefix + key for key in _all_keys(family, config)}, family.ignored, prefix)
    level = logging.WARNING if report.missing or report.unexpected else logging.INFO
    logger.log(level, "%s tower from %s, keys under %r\n%s", config.family, path, prefix, report.table(len(prefix)))
    if report.missing:
        only_positions = {ours for ours, source in sources.items() if set(source.keys) & set(report.missing)} == {
            "position_embedding.weight"
        }
        hint = (
            " Has this tower no learned positions? Then say which it has: position_embedding_kind=sincos, or none."
            if only_positions
            else ""
        )
        raise ValueError(_missing_message(report, path) + hint)
    return {ours: source.read([files[key] for key in source.keys]) for ours, source in sources.items()}


@dataclass(frozen=True)
class Report:
    """Keys of a checkpoint, sorted by what became of them: all but the last are reasons to look twice."""

    missing: list[str]
    unexpected: list[str]
    loaded: list[str]
    unused: list[str]  # the VFM has them, this tower does not need them: a pooling head, layers above the feature's

    def table(self, prefix_length: int) -> str:
        """A line for each module of the checkpoint, then the first unexpected keys by name."""
        columns = {"loaded": self.loaded, "missing": self.missing, "unexpected": self.unexpected, "unused": self.unused}
        counts = {name: Counter(_module(key[prefix_length:]) for key in keys) for name, keys in columns.items()}
        modules = sorted(set().union(*counts.values()))
        width = max(map(len, ("module", *modules)))
        lines = ["  ".join((f"{'module':<{width}}", *columns))]
        for module in modules:
            cells = (f"{counts[name][module] or '-':>{len(name)}}" for name in columns)
            lines.append("  ".join((f"{module:<{width}}", *cells)))
        if self.unexpected:
            lines.append(f"unexpected: {_first(self.unexpected)}")
        return "\n".join(lines)


def _names_of(files: Mapping[str, Tensor], families: Sequence[Family], path: Path) -> tuple[Family, str]:
    """The family whose names the file uses, and what stands before them in it.

    Files of transformers 4 and of dual encoders say `vision_model.`, LLaVA checkpoints `model.vision_tower...`.
    """
    for family in families:
        prefixes = [key.removesuffix(family.anchor) for key in files if f".{key}".endswith(f".{family.anchor}")]
        if len(prefixes) > 1:
            found = _first([repr(prefix) for prefix in prefixes])
            raise ValueError(f"{path} holds {len(prefixes)} vision models, under {found}. Expected one.")
        if prefixes:
            return family, prefixes[0]
    anchors = " or ".join(repr(family.anchor) for family in families)
    raise ValueError(
        f"{path} has no {anchors} under any prefix, so it holds no {families[0].name} vision model. "
        f"Its keys begin: {_first(list(files))}."
    )


def _all_keys(family: Family, config: VisionTransformerConfig) -> set[str]:
    """Keys (without prefix) that the VFM has in full, whatever part of it this tower takes."""
    whole = replace(config, feature_layer=None, position_embedding_kind="learned")
    return {key for source in family.sources(whole).values() for key in source.keys}


def _compare(files: Iterable[str], wanted: set[str], known: set[str], ignored: tuple[str, ...], prefix: str) -> Report:
    """Other modules of a whole model, under another prefix, are none of ours."""
    found = [key for key in files if key.startswith(prefix)]
    rest = [key for key in found if key not in wanted]
    unused = [key for key in rest if key in known or key.removeprefix(prefix).startswith(ignored)]
    return Report(
        missing=sorted(wanted.difference(found)),
        loaded=[key for key in found if key in wanted],
        unused=unused,
        unexpected=[key for key in rest if key not in unused],
    )


def _missing_message(report: Report, path: Path) -> str:
    return (
        f"{path} lacks {len(report.missing)} of {len(report.missing) + len(report.loaded)} tensors, first "
        f"{_first(report.missing)}. It has {len(report.unexpected)} that the tower does not know"
        + (f", first {_first(report.unexpected)}." if report.unexpected else ".")
    )


def _module(key: str) -> str:
    """ "encoder.layers.3.mlp.fc1.bias" -> "encoder.layers"; "post_layernorm.weight" -> "post_layernorm"."""
    numbered = re.match(r"(.*?)\.\d+\.", key)
    return numbered[1] if numbered else key.partition(".")[0]


def _first(keys: Sequence[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
