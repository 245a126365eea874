"""A training step without data, weights or arithmetic: on the meta device, to see how much memory it would hold.

The model's own code runs, forward and backward, gradient checkpointing and losses included. Counted is what is alive at
once beside weights and gradients; kernels' own scratch memory is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class MicroBatch:
    """The sizes of one.

    Attributes:
        grids: frames, rows and columns of patches of each image.
        lengths: tokens of each sample, visual ones included.
        visual: visual tokens of all together.
        supervised: tokens of all together that have a label.
    """

    grids: Sequence[Sequence[int]]
    lengths: Sequence[int]
    visual: int
    supervised: int

    @property
    def borders(self) -> list[int]:
        return list(accumulate(self.lengths, initial=0))

    def described(self) -> dict[str, Any]:
        """The sizes as `ModelFlops.of_batch` reads them of a real one."""
        return {"image_grid_thw": self.grids, "cu_seqlens": self.borders}


def step_peak(model: Any, batch: MicroBatch, *, patch_dim: int, align_text: bool) -> int:
    """Bytes that one micro-batch holds at its peak, forward and backward, beside weights and gradients.

    Args:
        model: on the meta device, training; its gradients are taken away as they come.
        align_text: the batch brings the answers' text too.
    """
    length, patches = batch.borders[-1], sum(rows * cols * frames for frames, rows, cols in batch.grids)
    handles = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    live = LiveBytes(model, [batch.visual, batch.supervised])
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        stack.enter_context(_fused_attention())
        stack.enter_context(live)
        inputs = {name: _row(length) for name in ("input_ids", "position_ids", "labels")}
        inputs["pixel_values"] = torch.empty(patches, patch_dim, device="meta")
        if align_text:
            share = max(batch.supervised // len(batch.lengths), 1)
            inputs |= {f"align_{name}": _row(share * len(batch.lengths)) for name in ("input_ids", "position_ids")}
            inputs["align_cu_seqlens"] = [share * number for number in range(len(batch.lengths) + 1)]
        images = len(batch.grids)
        model(
            **inputs,
            cu_seqlens=batch.borders,
            image_grid_thw=batch.grids,
            image_sample=[number * len(batch.lengths) // images for number in range(images)],
            num_items_in_batch=batch.supervised,
        ).loss.backward()
    return live.peak


def _row(length: int) -> Tensor:
    return torch.empty(1, length, dtype=torch.long, device="meta")


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class LiveBytes(TorchDispatchMode):
    """Follows which storages are alive that were not the model's before.

    Args:
        found: how many elements each `nonzero` finds, in the order of the calls: the meta device has no elements.

    Attributes:
        peak: the most bytes at once.
    """

    def __init__(self, model: torch.nn.Module, found: list[int]) -> None:
        super().__init__()
        self._found = iter(found)
        self.peak = self._now = 0
        self._results: dict[tuple, Any] = {}
        tensors = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten.nonzero.default and args[0].device.type == "meta":
            result = torch.empty(next(self._found), args[0].dim(), dtype=torch.long, device="meta")
        else:
            result = self._call(function, args, kwargs or {})
        for leaf in _leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                self._note(leaf.untyped_storage())
        return result

    def _call(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """The operator, or, where its like was called before (all layers are alike), new tensors as it then gave."""
        key = (function, *kwargs, *map(_signature, _leaves((args, *kwargs.values()))))
        if key in self._results:
            made = [
                torch.empty_strided(size, stride, dtype=dtype, device="meta")
                for size, stride, dtype, _ in self._results[key]
            ]
            return made[0] if len(function._schema.returns) == 1 else tuple(made)
        result = function(*args, **kwargs)
        outputs = list(_leaves(result))
        makes_new = not any(each.alias_info for each in (*function._schema.arguments, *function._schema.returns))
        if (
            makes_new
            and isinstance(result, (Tensor, tuple))
            and all(isinstance(each, Tensor) and each.device.type == "meta" for each in outputs)
        ):
            self._results[key] = [_signature(each) for each in outputs]
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self._now -= size


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return type(value), value


def _leaves(value: Any) -> Iterator[Any]:
    """What operators take and give lies in lists and tuples at most."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention on the meta device as fused kernels do it; by itself it would make a matrix of scores there."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(
            "scaled_dot_product_attention",
            lambda query, key, value, *_, **__: _FusedAttention.apply(query, key, value),
            "AutogradMeta",
        )
        yield


class _FusedAttention(torch.autograd.Function):
    """What fused kernels keep for the backward pass: inputs, output, and a number a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
