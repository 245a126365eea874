"""Which part of the model a parameter belongs to, what trains, and with which learning rate."""

from __future__ import annotations

import logging
from collections import defaultdict

from torch import nn

logger = logging.getLogger(__name__)

PARTS = ("mm_mlp_adapter", "mm_vision_tower", "mm_language_model")
AUXILIARY = "auxiliary_losses"  # weights of a loss, no part of the model: trained with it and never saved with it


def part_of(name: str) -> str:
    """The part of a parameter by its LLaVA name: `model.mm_projector.0.weight` -> `mm_mlp_adapter`."""
    modules = name.split(".")
    if AUXILIARY in modules:
        return AUXILIARY
    if "mm_projector" in modules:
        return "mm_mlp_adapter"
    if "vision_tower" in modules:
        return "mm_vision_tower"
    return "mm_language_model"


def parse_tunable_parts(value: str) -> list[str]:
    """`--mm_tunable_parts` as a list; an unknown part is refused."""
    parts = [part.strip() for part in value.split(",") if part.strip()]
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"--mm_tunable_parts {value!r}: unknown {unknown or 'empty'}. Known: {', '.join(PARTS)}.")
    return parts


def set_tunable_parts(model: nn.Module, parts: list[str]) -> None:
    """Let exactly these parts train, and log how many parameters of each part do."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in parts)
        size = getattr(parameter, "ds_numel", parameter.numel())  # a sharded parameter has no elements of its own
        counts[part][0] += size
        counts[part][1] += size * parameter.requires_grad
    for part, (total, trainable) in counts.items():
        logger.info("%-18s %14s parameters, %14s train", part, f"{total:,}", f"{trainable:,}")


def parameter_groups(
    model: nn.Module, learning_rates: dict[str, float], weight_decay: float, decay_names: set[str]
) -> list[dict]:
    """Optimizer groups: per part one with weight decay and one without.

    Args:
        learning_rates: for each part that trains.
        decay_names: parameters under weight decay (matrices; not norms, not biases).

    A parameter that requires a gradient and belongs to a part without a learning rate is refused: it would silently
    stay as it is (in the authors' release Stage III leaves its adapter out like this).
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    orphans = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if part_of(name) in learning_rates:
            groups[part_of(name), name in decay_names].append(parameter)
        else:
            orphans.append(name)
    if orphans:
        raise ValueError(
            f"{len(orphans)} parameter(s) should train but are in no optimizer group, the first {orphans[0]} "
            f"(part {part_of(orphans[0])}; parts with a learning rate: {', '.join(learning_rates)})."
        )
    return [
        {
            "params": parameters,
            "lr": learning_rates[part],
            "weight_decay": weight_decay if decays else 0.0,
            "name": part + ("" if decays else "_no_decay"),
        }
        for (part, decays), parameters in groups.items()
    ]
