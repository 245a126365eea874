"""Packed attention against a softmax written out, segment by segment; every backend against every other."""

import logging
import sys

import pytest
import torch
from torch.testing import assert_close

from comp_patches.attention import BACKENDS, FLEX_BLOCK, Segments, _log_once, choose_backend, packed_attention
from tests.comp_patches import naive

LENGTHS = [(5,), (4, 4, 4), (4, 6, 4, 1, 6), (3, 0, 6)]


@pytest.fixture(autouse=True)
def nothing_chosen_yet():
    choose_backend.cache_clear()
    _log_once.cache_clear()


def random_states(tokens, heads=3, channels=8, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, channels, generator=generator, requires_grad=requires_grad) for _ in range(3)]


def expected_of(states, lengths):
    parts = zip(*(part.split(lengths) for part in states), strict=True)
    return torch.cat([naive.attention(*part) for part in parts])


@pytest.mark.parametrize("lengths", LENGTHS, ids=["one", "equal", "mixed", "empty"])
def test_segments_see_only_themselves(lengths):
    states = random_states(sum(lengths))
    packed = packed_attention(*states, Segments.of_lengths(lengths))
    expected = expected_of(states, lengths)
    assert_close(packed, expected, atol=1e-6, rtol=1e-5)
    gradients = torch.autograd.grad(packed.square().sum(), states, retain_graph=True)
    assert_close(gradients, torch.autograd.grad(expected.square().sum(), states), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS, ids=["one", "equal", "mixed", "empty"])
def test_flex_attention_equals_sdpa(lengths):
    states = random_states(sum(lengths), channels=16, requires_grad=False)  # on a CPU it has no backward pass
    flex, sdpa = (packed_attention(*states, Segments.of_lengths(lengths, backend=name)) for name in ("flex", "sdpa"))
    assert_close(flex, sdpa, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(5,), (100, 300, 1, 260, 7), (128, 128), (64, 200)])
def test_flex_attention_s_blocks_are_those_that_hold_a_pair_of_one_segment(lengths):
    mask = Segments.of_lengths(lengths, backend="flex").block_mask.to_dense()[0, 0]
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    blocks = torch.arange(len(segment)) // FLEX_BLOCK
    expected = torch.zeros_like(mask)
    for query, key in (segment[:, None] == segment).nonzero().tolist():
        expected[blocks[query], blocks[key]] = 1
    assert mask.equal(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["varlen", "flash_attention_2", "flex"])
@pytest.mark.parametrize("channels", [64, 72])
def test_gpu_backends_equal_sdpa_with_gradients(backend, channels):
    if backend == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is an optional package")
    cuda = torch.device("cuda")
    assert choose_backend(backend, cuda, torch.bfloat16, channels) == backend
    lengths = (256, 100, 256, 7)
    results = []
    for name in (backend, "sdpa"):
        states = [x.detach().cuda().bfloat16().requires_grad_() for x in random_states(sum(lengths), 4, channels)]
        attended = packed_attention(*states, Segments.of_lengths(lengths, cuda, name))
        results.append((attended, *torch.autograd.grad(attended.float().square().sum(), states)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).float().norm() < 2e-2 * theirs.float().norm()


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_compiled_attention_serves_new_segments_without_compiling_again(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(packed_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]
    trains = backend == "sdpa"
    for number, lengths in enumerate([(4, 6, 5), (8, 9), (2, 3, 4, 6)]):
        states = random_states(sum(lengths), channels=16, requires_grad=trains)
        attended = compiled(*states, Segments.of_lengths(lengths, backend=backend))
        expected = expected_of(states, lengths)
        assert_close(attended, expected, atol=1e-6, rtol=1e-5)
        if trains:
            gradients = torch.autograd.grad(attended.square().sum(), states, retain_graph=True)
            assert_close(gradients, torch.autograd.grad(expected.square().sum(), states), atol=1e-5, rtol=1e-5)
        if number == 1:
            settled = graphs["unique_graphs"]
    assert graphs["unique_graphs"] == settled


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "why"),
    [
        ("flash_attention_2", "cpu", torch.float32, "it needs an NVIDIA GPU, not cpu"),
        ("varlen", "cpu", torch.bfloat16, "it needs an NVIDIA GPU, not cpu"),
        ("flash_attention_2", "mps", torch.float16, "it needs an NVIDIA GPU, not mps"),
        ("flex", "mps", torch.float32, "it runs on GPUs and CPUs, not on mps"),
    ],
)
def test_a_backend_that_cannot_run_gives_way_with_one_line(caplog, asked, device, dtype, why):
    with caplog.at_level(logging.INFO, logger="comp_patches.attention"):
        for _ in range(3):
            assert choose_backend(asked, torch.device(device), dtype, 64) == "sdpa"
    assert [record.message for record in caplog.records] == [f"attn_implementation={asked}: {why}; using sdpa"]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "why"),
    [
        ((7, 5), torch.float16, 64, "Ampere"),
        ((9, 0), torch.float32, 64, "half precision"),
        ((9, 0), torch.bfloat16, 60, "multiples of 8 up to 256, not 60"),
        ((9, 0), torch.bfloat16, 64, "flash_attn cannot be imported"),
    ],
)
def test_a_gpu_s_flash_kernels_are_asked_for_what_they_can(monkeypatch, caplog, capability, dtype, head_dim, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with caplog.at_level(logging.WARNING, logger="comp_patches.attention"):
        chosen = choose_backend("flash_attention_2", torch.device("cuda"), dtype, head_dim)
    assert why in caplog.text
    assert chosen == ("varlen" if "imported" in why else "sdpa")


def test_flex_attention_on_a_cpu_serves_inference_only(caplog):
    cpu = torch.device("cpu")
    assert choose_backend("flex", cpu, torch.float32, 64, trains=False) == "flex"
    with caplog.at_level(logging.WARNING, logger="comp_patches.attention"):
        assert choose_backend("flex", cpu, torch.float32, 64, trains=True) == "sdpa"
    assert "on a CPU it has no backward pass" in caplog.text


def test_auto_takes_sdpa_on_a_cpu_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="comp_patches.attention"):
        for trains in (True, False, True):
            assert choose_backend("auto", torch.device("cpu"), torch.float32, 64, trains) == "sdpa"
    assert len(caplog.records) == 1


def test_segments_that_do_not_cover_the_tokens_are_refused():
    with pytest.raises(ValueError, match="cover 9 tokens, but there are 10"):
        packed_attention(*random_states(10), Segments.of_lengths((4, 5)))


def test_no_tokens_still_give_every_input_a_gradient():
    states = random_states(0)
    attended = packed_attention(*states, Segments.of_lengths(()))
    assert all(gradient is not None for gradient in torch.autograd.grad(attended.sum(), states))


def test_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match=r"'flashy' is unknown. Known: auto, sdpa"):
        choose_backend("flashy", torch.device("cpu"), torch.float32, 64)
    assert set(BACKENDS) == {"sdpa", "flash_attention_2", "varlen", "flex"}
