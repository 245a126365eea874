"""The 2x2 downsampling MLP against the release's merger, and block by block."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from comp_patches.adapter import DownsampleMLP
from tests.comp_patches.conftest import randomise


def test_adapter_is_the_release_s_merger(golden):
    weights, outputs = golden("siglip_d12.weights"), golden("siglip_d12.io")
    adapter = DownsampleMLP(48, 32)
    renamed = {
        key.removeprefix("merger.").replace("ln_q", "norm").removeprefix("mlp."): tensor.float()
        for key, tensor in weights.items()
        if key.startswith("merger.")
    }
    adapter.load_state_dict(renamed)
    for rope in (0, 1):
        ours = adapter(outputs[f"out/rope{rope}_merger0"])
        assert_close(ours, outputs[f"out/rope{rope}_merger1"], atol=5e-5, rtol=0)


def test_a_token_is_its_block_of_four_patches_alone():
    adapter = randomise(DownsampleMLP(6, 5))
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    for i, token in enumerate(adapter(features)):
        normed = [
            F.layer_norm(patch, (6,), adapter.norm.weight, adapter.norm.bias, 1e-6) for patch in features[4 * i :][:4]
        ]
        hidden = F.gelu(F.linear(torch.cat(normed), adapter[0].weight, adapter[0].bias))
        assert_close(token, F.linear(hidden, adapter[2].weight, adapter[2].bias))


def test_state_dict_has_llava_s_names():
    names = {name.split(".")[0] for name in DownsampleMLP(6, 5).state_dict()}
    assert names == {"norm", "0", "2"}
    assert DownsampleMLP(6, 5).merge == 4


def test_patches_that_form_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="10 patches do not divide into blocks of 4"):
        DownsampleMLP(6, 5)(torch.zeros(10, 6))
