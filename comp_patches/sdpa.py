"""scaled_dot_product_attention over packed segments: a plain function, and one opaque operator of a compiled graph.

P = tokens of the batch, h = heads, d = channels of a head.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def sdpa_by_length(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(P, h, d) each, and the segments' lengths -> (P, h, d)."""
    packed = [states.split(lengths) for states in (query, key, value)]
    outputs = list(packed[0])
    for equal in _same_length(lengths):
        batches = [_batch([states[i] for i in equal]).transpose(1, 2) for states in packed]  # (n, h, length, d)
        attended = F.scaled_dot_product_attention(*batches).transpose(1, 2)
        for i, output in zip(equal, attended.unbind(), strict=True):
            outputs[i] = output
    return torch.cat(outputs)


def _batch(segments: list[Tensor]) -> Tensor:
    return segments[0][None] if len(segments) == 1 else torch.stack(segments)  # a lone segment needs no copy


@lru_cache(maxsize=64)  # the layers of a tower ask with the same segments
def _same_length(lengths: tuple[int, ...]) -> list[list[int]]:
    by_length: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_length.setdefault(length, []).append(i)
    return list(by_length.values())


def _sdpa_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]):
    # An operator's body runs below autograd; the guard brings it back.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        inputs = [states.detach().requires_grad_() for states in (query, key, value)]
        gradients = torch.autograd.grad(sdpa_by_length(*inputs, lengths), inputs, grad)
    return tuple(gradient.contiguous() for gradient in gradients)


def sdpa_operator(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
    """One opaque node of a compiled graph: the segments are data, so new grids compile nothing anew."""
    return sdpa_by_length(query, key, value, tuple(bounds.diff().tolist())).contiguous()


def _like_query(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _backward_operator(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the attention again: an opaque node keeps nothing but its inputs."""
    return _sdpa_gradients(grad, query, key, value, tuple(bounds.diff().tolist()))


def _like_inputs(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _keep_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad: Tensor):
    return (*_backward_operator(grad, *ctx.saved_tensors), None)


# Operators of one's own came with PyTorch 2.4. LLaVA pins 2.1, whose compiler traces through the plain function.
HAS_OPERATORS = hasattr(torch.library, "custom_op")
if HAS_OPERATORS:
    _backward_operator = torch.library.custom_op(
        "comp_patches::packed_sdpa_backward", _backward_operator, mutates_args=()
    )
    _backward_operator.register_fake(_like_inputs)
    sdpa_operator = torch.library.custom_op("comp_patches::packed_sdpa", sdpa_operator, mutates_args=())
    sdpa_operator.register_fake(_like_query)
    sdpa_operator.register_autograd(_gradient, setup_context=_keep_inputs)


def is_compiling() -> bool:
    """Whether a compiler that knows the operator is tracing."""
    return HAS_OPERATORS and torch.compiler.is_compiling()
