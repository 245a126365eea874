"""Two ranks are one rank: the same losses and weights, however a batch is split."""

import pytest
import torch

from tests.llava import tiny
from tests.llava.ranks import launch, logged, save_mixed_data, train_alone, weights


def test_two_ranks_train_as_one(llm, siglip, tmp_path):
    """Data parallel without DeepSpeed. Samples without an image or missing meet a rank that holds no other."""
    data = save_mixed_data(tmp_path / "data")
    common = tiny.FULL_STAGE | {
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "use_alignment_loss": True,
        "word_prior": tiny.save_prior(tmp_path / "prior.safetensors"),
        "force_resize": "none",
        "max_bad_samples": 0.1,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    train_alone(tiny.stage_arguments(llm, siglip, data, one, **common, per_device_train_batch_size=2))
    told = launch(tiny.stage_arguments(llm, siglip, data, two, **common, per_device_train_batch_size=1))
    assert "1 of 12 samples were bad and skipped" in told
    for key in ("loss_decoding", "loss_alignment"):
        assert logged(two, key) == pytest.approx(logged(one, key), rel=1e-4), key
    expected = weights(one)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)
