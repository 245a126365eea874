"""Which part of the model a parameter belongs to, what trains, and with which learning rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

PARTS = ("mm_mlp_adapter", "mm_vision_tower", "mm_language_model")
OLD_PARTS = {  # of LLaVA-NeXT and of the CoMP authors' release
    "mm_vision_resampler": "there are no resamplers, leave it out",
    "mm_lm_head": "it is in mm_language_model, leave it out",
    "mm_aux_heads": "what a loss has of its own trains with it, leave it out",
}
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


def parse_parts(value: str, flag: str = "mm_tunable_parts", known: Sequence[str] = PARTS) -> list[str]:
    """A flag's comma list of parts; an unknown part is refused, and so is an empty list."""
    parts = [part.strip() for part in value.split(",") if part.strip()]
    unknown = [part for part in parts if part not in known]
    if unknown or not parts:
        hint = f" {unknown[0]}: {OLD_PARTS[unknown[0]]}." if unknown and unknown[0] in OLD_PARTS else ""
        raise ValueError(f"--{flag} {value!r}: unknown {unknown or 'empty'}. Known: {', '.join(known)}.{hint}")
    return parts


def is_lora(name: str) -> bool:
    """Whether a parameter is one half of a LoRA pair."""
    return "lora_A" in name.split(".") or "lora_B" in name.split(".")


def set_tunable_parts(
    model: nn.Module, parts: list[str], lora_parts: Sequence[str] = (), lora_bias: str = "none"
) -> None:
    """Let exactly these parts train; of those under LoRA the LoRA weights alone, and the biases that are asked for.

    Args:
        lora_bias: of the parts under LoRA: none, all, or those of the layers that have LoRA weights (lora_only).
    """
    for name, parameter in model.named_parameters():
        part, bias = part_of(name), name.endswith("bias")
        biases = {"none": False, "all": bias, "lora_only": bias and ".base_layer." in name}
        whole = part not in lora_parts
        parameter.requires_grad_(part in parts and (whole or is_lora(name) or biases[lora_bias]))
    for module in model.modules():
        for unused in module.off_path() if hasattr(module, "off_path") else ():  # of a plain tower: no gradient comes
            unused.requires_grad_(False)


def hold_in_float32(model: nn.Module) -> None:
    """Keep what trains in float32, for optimizers that have no copy of their own: at the recipes' learning rates a step
    is less than half of what bfloat16 can tell apart, and would be lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trainable_table(model: nn.Module, learning_rates: dict[str, float]) -> str:
    """What trains: of each module its parameters, how many of them train, and with which learning rate."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        module = ".".join(name.split(".")[: 2 if name.startswith("model.") else 1])
        size = getattr(parameter, "ds_numel", parameter.numel())  # a sharded parameter has no elements of its own
        counts[module, part_of(name)][0] += size
        counts[module, part_of(name)][1] += size * parameter.requires_grad
    lines = [f"{'module':<20} {'part':<18} {'parameters':>14} {'train':>14} {'learning rate':>14}"]
    for (module, part), (total, trainable) in counts.items():
        rate = f"{learning_rates[part]:g}" if trainable and part in learning_rates else "-"
        lines.append(f"{module:<20} {part:<18} {total:>14,} {trainable:>14,} {rate:>14}")
    return "\n".join(lines)


def parameter_groups(
    model: nn.Module, learning_rates: dict[str, float], weight_decay: float, decay_names: set[str]
) -> list[dict]:
    """Optimizer groups: per part one with weight decay and one without.

    Args:
        learning_rates: for each part that trains.
        decay_names: parameters under weight decay (matrices; not norms, not biases).

    A parameter that requires a gradient and belongs to a part without a learning rate is refused: it would silently
    stay as it is (in the authors' release Stage III leaves its adapter out like this). So is a part with a learning
    rate of which nothing trains.
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
    idle = learning_rates.keys() - {part for part, _ in groups}
    if idle:
        raise ValueError(
            f"{min(idle)} should train with learning rate {learning_rates[min(idle)]}, but nothing in it does."
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
