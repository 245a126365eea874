"""The decoding loss is the cross-entropy of full logits, gradients included, but holds a chunk of them at most."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llava.constants import IGNORE_INDEX
from llava.model import decoding_loss as module
from llava.model.decoding_loss import ROWS_PER_CHUNK, decoding_loss
from tests.operations import Operations

WIDTH, VOCABULARY = 8, 50


def inputs(supervised, *, ignored=5, width=WIDTH, vocabulary=VOCABULARY, seed=0, dtype=torch.float64):
    """Hidden states (1, L, H), a head (V, H) and labels (1, L), of which `supervised` count."""
    generator = torch.Generator().manual_seed(seed)
    length = supervised + ignored + 1
    hidden = torch.randn(1, length, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.full((1, length), IGNORE_INDEX)
    places = 1 + torch.randperm(length - 1, generator=generator)[:supervised]
    labels[0, places] = torch.randint(0, vocabulary, (supervised,), generator=generator)
    return hidden, head, labels


def of_full_logits(hidden, head, labels, reduction="mean"):
    logits = F.linear(hidden, head)[0, :-1]
    return F.cross_entropy(logits.double(), labels[0, 1:], ignore_index=IGNORE_INDEX, reduction=reduction)


def apart(found, expected):
    """Distance in units of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.integers(0, 3),
    more=st.integers(-2, 2),
    ignored=st.integers(0, 40),
    upstream=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients_are_those_of_full_logits(chunks, more, ignored, upstream, seed):
    hidden, head, labels = inputs(max(1, chunks * ROWS_PER_CHUNK + more), ignored=ignored, seed=seed)
    loss, expected = decoding_loss(hidden, head, labels), of_full_logits(hidden, head, labels)
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(upstream * loss, (hidden, head))
    theirs = torch.autograd.grad(upstream * expected, (hidden, head))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_mean_is_over_the_global_batch_where_that_is_said():
    hidden, head, labels = inputs(30)
    total = of_full_logits(hidden, head, labels, reduction="sum")
    for count in (40, torch.tensor(40)):
        torch.testing.assert_close(decoding_loss(hidden, head, labels, count), total / 40)
    assert decoding_loss(hidden, head, labels, 0) == decoding_loss(hidden, head, labels, 1)


def test_a_row_without_supervised_tokens_gives_zero_and_zero_gradients():
    hidden, head, labels = inputs(0)
    loss = decoding_loss(hidden, head, labels)
    loss.backward()
    assert loss == 0
    for tensor in (hidden, head):
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen):
    hidden, head, labels = inputs(ROWS_PER_CHUNK + 3)
    trained = hidden if frozen == "head" else head
    (expected,) = torch.autograd.grad(of_full_logits(hidden, head, labels), trained)
    (head if frozen == "head" else hidden).requires_grad_(False)
    with Operations() as seen:
        (found,) = torch.autograd.grad(decoding_loss(hidden, head, labels), trained)
    torch.testing.assert_close(found, expected)
    assert len(seen.products) == 2 * 2  # logits and one gradient of each of two chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(dtype):
    hidden, head, labels = inputs(3 * ROWS_PER_CHUNK, vocabulary=200, dtype=dtype)
    with Operations() as seen:
        decoding_loss(hidden, head, labels).backward()
    assert seen.largest == ROWS_PER_CHUNK * 200
    assert len(seen.products) == 3 * 3


def test_without_gradients_only_the_logits_are_computed():
    hidden, head, labels = inputs(3 * ROWS_PER_CHUNK)
    expected = decoding_loss(hidden, head, labels)
    with torch.no_grad(), Operations() as seen:
        loss = decoding_loss(hidden, head, labels)
    assert loss == expected.detach()
    assert not loss.requires_grad
    assert len(seen.products) == 3


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_as_exact_as_full_logits(hidden_dtype, head_dtype):
    """Both within 1 % of fp64, and ours no further than 1.2 times as far."""
    hidden, head, labels = inputs(2 * ROWS_PER_CHUNK)
    exact = of_full_logits(hidden, head, labels)
    wanted = torch.autograd.grad(exact, (hidden, head))
    leaves = [x.detach().to(dtype).requires_grad_() for x, dtype in ((hidden, hidden_dtype), (head, head_dtype))]
    with torch.autocast("cpu", torch.bfloat16):
        loss, full = decoding_loss(*leaves, labels), of_full_logits(*leaves, labels)
    assert loss.dtype == torch.float32
    assert apart(loss, exact) < 0.01
    ours, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(full, leaves)
    for leaf, our, their, right in zip(leaves, ours, theirs, wanted, strict=True):
        assert our.dtype == leaf.dtype
        assert apart(our, right) < min(0.01, 1.2 * apart(their, right))


def test_without_autocast_two_dtypes_are_refused_as_a_linear_layer_refuses_them():
    hidden, head, labels = inputs(3)
    with pytest.raises(RuntimeError, match="dtype"):
        decoding_loss(hidden, head.float(), labels)


def test_the_gradient_of_a_bf16_head_does_not_lose_the_small_beside_the_large(monkeypatch):
    """200 chunks that all pull one word the same way: a bf16 sum would leave out most of the last ones."""
    monkeypatch.setattr(module, "ROWS_PER_CHUNK", 4)
    hidden, head, labels = inputs(800, ignored=0, vocabulary=400, dtype=torch.bfloat16)
    hidden = hidden.detach().abs().requires_grad_()
    labels[:, 1:] = 7
    (found,) = torch.autograd.grad(decoding_loss(hidden, head, labels), head)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    (expected,) = torch.autograd.grad(of_full_logits(*doubles, labels), doubles[1])
    assert found.dtype == torch.bfloat16
    assert apart(found[7], expected[7]) < 2**-8


def test_a_bf16_word_that_is_nearly_certain_keeps_its_small_gradient():
    """p rounded to bf16 is 1 here, so that p - 1 must not be taken of the rounded p."""
    hidden = torch.tensor([[[8.0, 0.0], [0.0, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    head, labels = torch.eye(2, dtype=torch.bfloat16), torch.tensor([[IGNORE_INDEX, 0]])
    (found,) = torch.autograd.grad(decoding_loss(hidden, head, labels), hidden)
    expected = torch.sigmoid(torch.tensor(-8.0))
    torch.testing.assert_close(found[0, 0].float(), torch.stack((-expected, expected)), rtol=1e-2, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_a_checkpoint_it_is_the_same(use_reentrant):
    hidden, head, labels = inputs(ROWS_PER_CHUNK + 1)
    expected = torch.autograd.grad(decoding_loss(hidden, head, labels), (hidden, head))
    checkpoint(decoding_loss, hidden, head, labels, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close((hidden.grad, head.grad), expected)


def test_a_second_backward_and_a_second_derivative_are_refused():
    hidden, head, labels = inputs(3)
    loss = decoding_loss(hidden, head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(decoding_loss(hidden, head, labels), hidden, create_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_liger_kernels_loss_is_that_of_full_logits(dtype, frozen):
    pytest.importorskip("liger_kernel")
    assert module._fused_kernel("cuda") is not None
    hidden, head, labels = (tensor.cuda() for tensor in inputs(700, width=64, vocabulary=3000))
    exact = of_full_logits(hidden, head, labels)
    wanted = torch.autograd.grad(exact, (hidden, head))
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, head)]
    leaves[1].requires_grad_(not frozen)
    loss = decoding_loss(*leaves, labels)
    (0.5 * loss).backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    assert apart(loss, exact) < tolerance
    for leaf, right in zip(leaves[: 2 - frozen], wanted, strict=False):
        assert apart(leaf.grad, 0.5 * right) < tolerance
    assert not frozen or leaves[1].grad is None
