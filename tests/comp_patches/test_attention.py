"""Packed attention against a softmax written out, segment by segment; every backend against every other."""

import logging

import pytest
import torch
from torch.testing import assert_close

from comp_patches.attention import BACKENDS, Segments, choose_backend, packed_attention
from tests.comp_patches import naive

LENGTHS = [(5,), (4, 4, 4), (4, 6, 4, 1, 6), (3, 0, 6)]


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


@pytest.mark.parametrize("lengths", LENGTHS[:3], ids=["one", "equal", "mixed"])
def test_flex_attention_equals_sdpa(lengths):
    states = random_states(sum(lengths), channels=16, requires_grad=False)  # on a CPU it has no backward pass
    flex, sdpa = (packed_attention(*states, Segments.of_lengths(lengths), backend=name) for name in ("flex", "sdpa"))
    assert_close(flex, sdpa, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "flash_attention_2", "flex"])
@pytest.mark.parametrize("channels", [64, 72])
def test_gpu_backends_equal_sdpa_with_gradients(backend, channels):
    if not torch.cuda.is_available() or choose_backend(backend, "cuda", torch.bfloat16) != backend:
        pytest.skip(f"{backend} is not there")
    lengths = (256, 100, 256, 7)
    results = []
    for name in (backend, "sdpa"):
        states = [x.detach().cuda().bfloat16().requires_grad_() for x in random_states(sum(lengths), 4, channels)]
        attended = packed_attention(*states, Segments.of_lengths(lengths, "cuda"), backend=name)
        results.append((attended, *torch.autograd.grad(attended.float().square().sum(), states)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).float().norm() < 2e-2 * theirs.float().norm()


def test_compiled_attention_serves_new_segments_without_compiling_again():
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters["stats"]
    for number, lengths in enumerate([(4, 6, 5), (8, 9), (2, 3, 4, 6)]):
        states = random_states(sum(lengths))
        attended = compiled(*states, Segments.of_lengths(lengths))
        expected = expected_of(states, lengths)
        assert_close(attended, expected, atol=1e-6, rtol=1e-5)
        gradients = torch.autograd.grad(attended.square().sum(), states, retain_graph=True)
        assert_close(gradients, torch.autograd.grad(expected.square().sum(), states), atol=1e-5, rtol=1e-5)
        if number == 0:
            graphs = counter["unique_graphs"]
    assert counter["unique_graphs"] == graphs


def test_a_missing_backend_gives_way_with_one_line(caplog):
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="comp_patches.attention"):
        for _ in range(3):
            assert choose_backend("flash_attention_2", "cpu", torch.float32) == "sdpa"
    assert len(caplog.records) == 1
    assert "attn_implementation=flash_attention_2" in caplog.text
    assert "using sdpa" in caplog.text


def test_auto_takes_sdpa_on_a_cpu_and_says_so_once(caplog):
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="comp_patches.attention"):
        assert [choose_backend("auto", "cpu", torch.float32) for _ in range(2)] == ["sdpa", "sdpa"]
    assert len(caplog.records) == 1


def test_segments_that_do_not_cover_the_tokens_are_refused():
    with pytest.raises(ValueError, match="cover 9 tokens, but there are 10"):
        packed_attention(*random_states(10), Segments.of_lengths((4, 5)))


def test_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match=r"'flashy' is unknown. Known: auto, sdpa"):
        packed_attention(*random_states(4), Segments.of_lengths((4,)), backend="flashy")
    assert set(BACKENDS) == {"sdpa", "flash_attention_2", "varlen", "flex"}
