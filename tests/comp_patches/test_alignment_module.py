"""The module a host calls: pooling by sample, the prior's file, named values."""

import pytest
import torch
from torch.testing import assert_close

from comp_patches.alignment_loss import alignment_loss, targets
from comp_patches.alignment_module import AlignmentLoss, pool_by_sample
from comp_patches.word_prior import prior_from_counts, save_counts

WORDS = torch.randn(40, 8, generator=torch.Generator().manual_seed(5))
TOKENS = torch.randn(9, 8, generator=torch.Generator().manual_seed(6))
SAMPLE = torch.tensor([0, 0, 0, 2, 2, 0, 3, 3, 3])  # sample 0 has two images, sample 1 none
TEXT = torch.randn(4, 8, generator=torch.Generator().manual_seed(7))


def test_a_sample_pools_over_all_tokens_of_all_its_images():
    pooled, counts = pool_by_sample(TOKENS, SAMPLE, 4)
    assert counts.tolist() == [4, 0, 2, 3]
    assert_close(pooled[0], TOKENS[[0, 1, 2, 5]].mean(0))
    assert_close(pooled[1], torch.zeros(8))


def test_thousands_of_bf16_tokens_pool_as_exactly_as_float32_can():
    """In bfloat16, whose integers end at 256, neither the sum nor the count would be any good."""
    tokens = (1 + torch.rand(3000, 8, generator=torch.Generator().manual_seed(8))).bfloat16()
    pooled, counts = pool_by_sample(tokens, torch.zeros(3000, dtype=torch.long), 2)
    assert counts.tolist() == [3000, 0]
    assert pooled.dtype == torch.float32
    assert_close(pooled[0].double(), tokens.double().mean(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
def test_samples_without_image_or_text_take_no_part(mode):
    tokens = TOKENS.clone().requires_grad_()
    text = TEXT.clone()
    text[3] = torch.nan  # has no text: whatever stands there is not read
    valid = torch.tensor([True, True, True, False])
    values = AlignmentLoss(mode=mode)(tokens, SAMPLE, text, valid, WORDS, 4)
    visual = torch.stack((TOKENS[[0, 1, 2, 5]].mean(0), TOKENS[[3, 4]].mean(0)))
    assert_close(values["alignment"], alignment_loss(visual, TEXT[[0, 2]], WORDS, None, mode=mode))
    assert values["alignment_sample_share"].tolist() == [2, 4]
    values["alignment"].backward()
    assert (tokens.grad[6:] == 0).all()
    assert (tokens.grad[:6] != 0).any(dim=-1).all()


@pytest.mark.parametrize("tokens", [0, 9])
def test_nothing_valid_gives_exactly_zero_connected_to_the_graph(tokens):
    visual_tokens = TOKENS[:tokens].clone().requires_grad_()
    values = AlignmentLoss(mode="sinkhorn")(
        visual_tokens, SAMPLE[:tokens], TEXT, torch.zeros(4, dtype=torch.bool), WORDS, 4
    )
    values["alignment"].backward()
    assert values["alignment"].item() == 0.0
    assert values["alignment_target_entropy"].tolist() == [0, 0]
    assert values["alignment_sample_share"].tolist() == [0, 4]
    assert (visual_tokens.grad == 0).all()


def test_only_the_loss_carries_gradients():
    values = AlignmentLoss()(TOKENS.clone().requires_grad_(), SAMPLE, TEXT, torch.ones(4, dtype=torch.bool), WORDS, 4)
    assert values["alignment"].requires_grad
    assert not values["alignment_target_entropy"].requires_grad
    assert not values["alignment_sample_share"].requires_grad


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
def test_the_entropy_is_a_total_over_the_samples_that_take_part(mode):
    some = [0, 2]
    target = targets(torch.nn.functional.normalize(TEXT[some], dim=-1), WORDS, None, mode=mode, epsilon=0.5).double()
    expected = -(target * target.log()).sum()
    valid = torch.tensor([True, True, True, False])
    values = AlignmentLoss(mode=mode, epsilon=0.5)(TOKENS, SAMPLE, TEXT, valid, WORDS, 4)
    total, count = values["alignment_target_entropy"].tolist()
    assert count == 2
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert total > 1


def test_the_prior_comes_from_its_file_and_survives_a_cast_of_the_model(tmp_path):
    counts = torch.arange(37)  # three rows of the vocabulary are padding
    save_counts(tmp_path / "prior.safetensors", counts, tokenizer="t", source="s", vocabulary="v", seed="42")
    module = AlignmentLoss(prior=str(tmp_path / "prior.safetensors")).bfloat16()
    values = module(TOKENS, SAMPLE, TEXT, torch.ones(4, dtype=torch.bool), WORDS, 4)
    prior = torch.cat((prior_from_counts(counts), torch.zeros(3)))
    pooled, counts = pool_by_sample(TOKENS, SAMPLE, 4)
    some = counts > 0
    assert_close(values["alignment"], alignment_loss(pooled[some], TEXT[some], WORDS, prior))
    assert not module.state_dict()


def test_a_prior_that_is_not_there_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"--word_prior .*none.safetensors .* python -m comp_patches.word_prior"):
        AlignmentLoss(prior=str(tmp_path / "none.safetensors"))


def test_word_scores_are_cosines_by_the_naive_formula():
    generator = torch.Generator().manual_seed(0)
    tokens, words = torch.randn(5, 8, generator=generator), torch.randn(11, 8, generator=generator)
    words[3] = 0  # a row that was never trained
    expected = torch.nn.functional.cosine_similarity(tokens[:, None], words[None], dim=-1)
    assert_close(AlignmentLoss().word_scores(tokens, words), expected)
    narrow = AlignmentLoss().word_scores(tokens.bfloat16(), words.bfloat16())
    assert narrow.dtype == torch.float32
    assert_close(narrow, expected, rtol=0, atol=0.02)
