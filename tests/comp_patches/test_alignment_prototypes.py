"""Learnable prototypes (Tab. 5(b)) in place of the word embeddings."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from comp_patches.alignment_loss import alignment_loss, targets
from comp_patches.alignment_module import AlignmentLoss
from tests.comp_patches.test_alignment_loss import random_features
from tests.comp_patches.test_alignment_module import SAMPLE, TEXT, TOKENS, WORDS

VALID = torch.tensor([True, True, True, False])


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
def test_they_get_the_gradient_of_the_prediction_and_not_of_the_targets(mode):
    """Against autograd through a normalised copy, the targets held fixed."""
    visual, text, words, prior = random_features(zero_words=10)
    found = words.clone().requires_grad_()
    alignment_loss(visual, text, found, prior, mode=mode, prototypes="learnable").backward()

    expected = words.clone().requires_grad_()
    target = targets(F.normalize(text, dim=-1), words, prior, mode=mode)[:, 10:]
    scores = F.normalize(visual, dim=-1) @ F.normalize(expected, dim=-1).T
    (-(target * torch.log_softmax(scores[:, 10:] / 0.005, dim=-1)).sum(-1).mean()).backward()
    assert expected.grad.norm() > 1
    assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)


def test_word_embeddings_get_none():
    visual, text, words, prior = (tensor.requires_grad_() for tensor in random_features())
    alignment_loss(visual, text, words, prior).backward()
    assert words.grad is None


def test_the_module_trains_its_own_and_looks_at_no_word():
    torch.manual_seed(3)
    module = AlignmentLoss(prototypes="learnable", vocab_size=40, hidden_size=8)
    tokens = TOKENS.clone().requires_grad_()
    values = module(tokens, SAMPLE, TEXT, VALID, torch.full_like(WORDS, torch.nan), 4)
    values["alignment"].backward()
    visual = torch.stack((TOKENS[[0, 1, 2, 5]].mean(0), TOKENS[[3, 4]].mean(0)))
    expected = alignment_loss(visual, TEXT[[0, 2]], module.prototypes, None)
    assert_close(values["alignment"], expected)
    assert module.prototypes.grad.norm() > 1
    assert tokens.grad[:6].any()

    before = values["alignment"].item()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    optimizer.step()
    assert module(TOKENS, SAMPLE, TEXT, VALID, WORDS, 4)["alignment"].item() < before


def test_without_a_sample_they_get_a_gradient_of_zeros():
    """So that every process of a run has one to average."""
    module = AlignmentLoss(prototypes="learnable", vocab_size=40, hidden_size=8)
    module(TOKENS, SAMPLE, TEXT, torch.zeros(4, dtype=torch.bool), WORDS, 4)["alignment"].backward()
    assert torch.equal(module.prototypes.grad, torch.zeros(40, 8))


def test_they_start_alike_on_every_process_and_by_the_seed():
    def start(seed, drawn_before):
        torch.manual_seed(seed)
        torch.randn(drawn_before)
        return AlignmentLoss(prototypes="learnable", vocab_size=40, hidden_size=8).prototypes

    assert torch.equal(start(1, 0), start(1, 5))
    assert not torch.equal(start(1, 0), start(2, 0))


@pytest.mark.parametrize("changes", [{"vocab_size": None}, {"hidden_size": None}, {"prior": "prior.safetensors"}])
def test_what_they_cannot_be_made_of_is_refused(changes):
    with pytest.raises(ValueError, match="need vocab_size and hidden_size, and take no prior"):
        AlignmentLoss(**{"prototypes": "learnable", "vocab_size": 40, "hidden_size": 8} | changes)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="Known: word_embeddings, learnable"):
        AlignmentLoss(prototypes="learnt")
    with pytest.raises(ValueError, match="--alignment_prototypes"):
        alignment_loss(*random_features(), prototypes="learnt")
