"""Whole towers on a GPU, in half precision, against the same tower on the CPU in float32."""

import pytest
import torch

from comp_patches.attention import choose_backend
from comp_patches.vision_transformer import PackedVisionTransformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

GRIDS = [(1, 4, 4), (1, 2, 10), (2, 6, 4), (1, 20, 30), (1, 8, 6)]
WIDTH = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}  # heads of 64, as flash kernels like
PREFIX = {"class_token": True, "num_register_tokens": 4}
CUDA = torch.device("cuda")


@pytest.fixture(params=["sdpa", "varlen", "flex", "flash_attention_2"])
def backend(request):
    if request.param == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is an optional package")
    assert choose_backend(request.param, CUDA, torch.bfloat16, 64) == request.param
    return request.param


def features_and_gradients(tower: PackedVisionTransformer, pixels: torch.Tensor) -> list[torch.Tensor]:
    """On the host in float32: what the tower gives for GRIDS, and every parameter's gradient."""
    features = tower(pixels.to(tower.patch_embedding.weight.device), GRIDS)
    features.float().square().mean().backward()
    return [tensor.detach().float().cpu() for tensor in (features, *(weight.grad for weight in tower.parameters()))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix", [{}, PREFIX], ids=["plain", "prefix"])
def test_every_backend_gives_the_cpu_s_features_and_gradients(tiny_tower, random_patches, backend, prefix, dtype):
    build = {"attn_implementation": backend} | WIDTH | prefix
    expected = features_and_gradients(tiny_tower(**WIDTH, **prefix), random_patches(GRIDS))
    found = features_and_gradients(tiny_tower(**build).to(CUDA, dtype), random_patches(GRIDS))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 5e-2 * theirs.norm()


def test_float32_is_as_exact_as_on_the_cpu(tiny_tower, random_patches, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    found = features_and_gradients(tiny_tower(**WIDTH, **PREFIX).to(CUDA), random_patches(GRIDS))
    expected = features_and_gradients(tiny_tower(**WIDTH, **PREFIX), random_patches(GRIDS))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_gradient_checkpointing_changes_no_gradient(tiny_tower, random_patches, backend):
    towers = [tiny_tower(attn_implementation=backend, **WIDTH, **PREFIX).to(CUDA, torch.bfloat16) for _ in range(2)]
    towers[1].train().gradient_checkpointing_enable()
    plain, checkpointed = (features_and_gradients(tower, random_patches(GRIDS)) for tower in towers)
    for ours, theirs in zip(checkpointed, plain, strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()  # flash kernels add up in any order


def test_compiled_layers_serve_new_grids_without_compiling_again(tiny_tower, random_patches, backend):
    tower = tiny_tower(attn_implementation=backend, **WIDTH).to(CUDA, torch.bfloat16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(tower, dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]
    for number, grids in enumerate([GRIDS, [(1, 6, 8), (1, 2, 2)], [(1, 10, 4)], GRIDS[2:]]):
        pixels = random_patches(grids).to(CUDA)
        found, expected = compiled(pixels, grids).float(), tower(pixels, grids).float()
        assert (found - expected).norm() <= 3e-2 * expected.norm()
        if number == 1:  # the second batch is what shows torch.compile that the number of segments varies
            settled = graphs["unique_graphs"]
    assert graphs["unique_graphs"] == settled


@pytest.mark.parametrize("prefix", [{}, PREFIX], ids=["plain", "prefix"])
def test_grids_on_the_host_cost_no_wait_for_the_gpu(tiny_tower, random_patches, backend, prefix):
    tower = tiny_tower(attn_implementation=backend, **WIDTH, **prefix).to(CUDA, torch.bfloat16)
    pixels = random_patches(GRIDS).to(CUDA)
    tower(pixels, GRIDS).float().sum().backward()  # the first call compiles and chooses kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        tower(pixels, GRIDS).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
