"""Upstream's trainer with the method's loss beside its own, and each named in the log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from comp_patches.upstream.hooks.tower import has_comp_tower
from comp_patches.upstream.hooks.training import ANSWERS


class NamedLosses:
    """Mixed into a `transformers.Trainer`. Without an alignment loss it changes nothing."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Any:
        """L = L_dec + weight * L_align, both over this micro-batch."""
        own = self.accelerator.unwrap_model(model)
        alignment = own.get_vision_tower().alignment if has_comp_tower(own) else None
        answers = inputs.pop(ANSWERS, None)
        if alignment is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **options)
        input_ids = inputs["input_ids"]
        loss, outputs = super().compute_loss(model, inputs, True, **options)
        values = alignment(own, input_ids, inputs["images"], answers)
        self._note(values | {"decoding": loss})
        loss = loss + alignment.weight * values["alignment"]
        return (loss, outputs) if return_outputs else loss

    def _note(self, values: dict[str, Tensor]) -> None:
        """Add up the named values of a micro-batch: a pair is a total and what to divide it by."""
        sums = self.__dict__.setdefault("_named_sums", {})
        for name, value in values.items():
            value = value.detach().float()
            pair = value if value.ndim else torch.stack((value, torch.ones_like(value)))
            sums[name] = sums.get(name, 0.0) + pair

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Adds the means since the last log under this project's names."""
        sums = self.__dict__.pop("_named_sums", {})
        if "loss" in logs and sums:
            names = sorted(sums)
            totals = self.accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="sum")
            for name, (total, count) in zip(names, totals.tolist(), strict=True):
                if count:  # no sample took part: there is nothing to say of them
                    logs[f"loss_{name}" if name in ("decoding", "alignment") else name] = total / count
        super().log(logs, *arguments, **options)


def with_named_losses(trainer: type) -> type:
    """Upstream's trainer class with `NamedLosses` mixed in."""
    return type(trainer.__name__, (NamedLosses, trainer), {"__module__": trainer.__module__})
