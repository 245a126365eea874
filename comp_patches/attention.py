"""Packed (variable-length) attention: tokens see their own segment and nothing else. One function, several backends.

P = tokens of the batch, h = heads, d = channels of a head, S = segments; segment i is
[cu_seqlens[i], cu_seqlens[i + 1]).
"""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segments:
    """Where the segments of a packed batch lie.

    Attributes:
        bounds: cu_seqlens (S + 1) int32 on the host.
        cu_seqlens: the same on the tokens' device.
        max_seqlen: length of the longest segment.
    """

    bounds: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """Segments of these lengths, end to end. The copy to a GPU does not wait for it."""
        bounds = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
        return cls(bounds, bounds.to(device, non_blocking=True), max(lengths, default=0))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.bounds.diff().tolist())

    @cached_property
    def block_mask(self):
        """flex_attention's mask of same-segment pairs, made once for all layers."""
        from torch.nn.attention.flex_attention import create_block_mask

        tokens = int(self.bounds[-1])
        segment = torch.arange(len(self.lengths), device=self.cu_seqlens.device).repeat_interleave(
            self.cu_seqlens.diff(), output_size=tokens
        )
        return create_block_mask(
            lambda batch, head, q, k: segment[q] == segment[k], None, None, tokens, tokens, device=segment.device
        )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, backend: str = "auto") -> Tensor:
    """softmax(q kT / sqrt(d)) v within each segment (CoMP Eq. 2).

    Args:
        query, key, value: (P, h, d).
        segments: they cover the P tokens.
        backend: a key of BACKENDS, or "auto". One that is missing here gives way to the best that is not.

    Returns:
        (P, h, d).
    """
    if not torch.compiler.is_compiling() and segments.bounds[-1] != len(query):
        raise ValueError(f"The segments cover {int(segments.bounds[-1])} tokens, but there are {len(query)}.")
    return BACKENDS[_constant_choice(backend, query.device.type, query.dtype)](query, key, value, segments)


@lru_cache
def choose_backend(asked: str, device: str, dtype: torch.dtype) -> str:
    """The backend to use; the choice, and why it is not the one asked for, is logged once.

    Args:
        asked: "auto" or a key of BACKENDS.
        device: "cpu", "cuda", "mps", ...
        dtype: of queries, keys and values; the flash kernels take half precision only.
    """
    if asked != "auto" and asked not in BACKENDS:
        raise ValueError(f"attn_implementation={asked!r} is unknown. Known: auto, {', '.join(BACKENDS)}.")
    candidates = ("flash_attention_2", "varlen", "sdpa") if asked == "auto" else (asked, "varlen", "sdpa")
    obstacles = {name: _obstacle(name, device, dtype) for name in candidates}
    chosen = next(name for name in candidates if not obstacles[name])
    if asked not in ("auto", chosen):
        logger.warning("attn_implementation=%s: %s; using %s", asked, obstacles[asked], chosen)
    else:
        logger.info("packed attention on %s in %s: %s", device, dtype, chosen)
    return chosen


@torch.compiler.assume_constant_result
def _constant_choice(asked: str, device: str, dtype: torch.dtype) -> str:
    """`choose_backend` for a compiled tower, which must not look into it."""
    return choose_backend(asked, device, dtype)


def _obstacle(backend: str, device: str, dtype: torch.dtype) -> str:
    """Why a backend cannot run here, or nothing."""
    if backend in ("flash_attention_2", "varlen"):
        module = "flash_attn" if backend == "flash_attention_2" else "torch.nn.attention.varlen"
        if importlib.util.find_spec(module) is None:
            return f"no module {module} here" + (" (pip install flash-attn)" if module == "flash_attn" else "")
        if device != "cuda":
            return f"it needs an NVIDIA GPU, not {device}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it takes half precision, not {dtype}"
    if backend == "flex" and importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        return "this torch has no flex_attention"
    return ""


def _sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """scaled_dot_product_attention, one call for all segments of a length: the only loop over images in the tower."""
    if torch.compiler.is_compiling():
        return _sdpa_op(query, key, value, segments.bounds)
    return _sdpa_by_length(query, key, value, segments.lengths)


def _sdpa_by_length(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    packed = [states.split(lengths) for states in (query, key, value)]
    outputs = list(packed[0])
    for equal in _same_length(lengths):
        batches = [_batch([states[i] for i in equal]).transpose(1, 2) for states in packed]  # (n, h, length, d)
        attended = F.scaled_dot_product_attention(*batches).transpose(1, 2)
        for i, output in zip(equal, attended.unbind(), strict=True):
            outputs[i] = output
    return torch.cat(outputs) if outputs else torch.zeros_like(query)


def _batch(segments: list[Tensor]) -> Tensor:
    return segments[0][None] if len(segments) == 1 else torch.stack(segments)  # a lone segment needs no copy


@lru_cache(maxsize=64)  # the layers of a tower ask with the same segments
def _same_length(lengths: tuple[int, ...]) -> list[list[int]]:
    by_length: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_length.setdefault(length, []).append(i)
    return list(by_length.values())


def _flash_attention_2(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    bounds, longest = segments.cu_seqlens, segments.max_seqlen
    return flash_attn_varlen_func(query, key, value, bounds, bounds, longest, longest)


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """PyTorch's own variable-length flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = segments.cu_seqlens, segments.max_seqlen
    return varlen_attn(query, key, value, bounds, bounds, longest, longest)


def _flex(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    states = [x.transpose(0, 1)[None] for x in (query, key, value)]  # (1, h, P, d)
    return _flex_attention(query.device.type)(*states, block_mask=segments.block_mask)[0].transpose(0, 1)


@lru_cache
def _flex_attention(device: str) -> Callable[..., Tensor]:
    """On a GPU flex_attention is a kernel only once it is compiled; elsewhere it runs as it is."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Segments], Tensor]] = {
    "sdpa": _sdpa,
    "flash_attention_2": _flash_attention_2,
    "varlen": _varlen,
    "flex": _flex,
}


def _sdpa_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]):
    inputs = [states.detach().requires_grad_() for states in (query, key, value)]
    gradients = torch.autograd.grad(_sdpa_by_length(*inputs, lengths), inputs, grad)
    return tuple(gradient.contiguous() for gradient in gradients)


if hasattr(torch.library, "custom_op"):  # torch 2.4; before that a compiled tower breaks its graph here

    @torch.library.custom_op("comp_patches::packed_sdpa", mutates_args=())
    def _sdpa_op(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        """One opaque node of a compiled graph: the segments are data, so new grids compile nothing anew."""
        return _sdpa_by_length(query, key, value, tuple(bounds.diff().tolist())).contiguous()

    @_sdpa_op.register_fake
    def _(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        return torch.empty_like(query, memory_format=torch.contiguous_format)

    @torch.library.custom_op("comp_patches::packed_sdpa_backward", mutates_args=())
    def _sdpa_backward_op(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the attention again: an opaque node keeps nothing but its inputs."""
        # An operator's body runs below autograd, which is a state of its thread; another thread has autograd.
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(_sdpa_gradients, grad, query, key, value, tuple(bounds.diff().tolist())).result()

    @_sdpa_backward_op.register_fake
    def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor):
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))

    def _keep_inputs(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def _sdpa_gradient(ctx, grad: Tensor):
        return (*_sdpa_backward_op(grad, *ctx.saved_tensors), None)

    _sdpa_op.register_autograd(_sdpa_gradient, setup_context=_keep_inputs)
else:
    _sdpa_op = torch.compiler.disable(lambda *states: _sdpa_by_length(*states[:3], tuple(states[3].diff().tolist())))
