"""The contrastive loss of Tab. 5(b): InfoNCE by its formula, and the module that a host calls."""

import math

import pytest
import torch
from torch.testing import assert_close

from comp_patches.contrastive_loss import ContrastiveLoss, contrastive_loss
from tests.comp_patches.test_alignment_loss import random_features
from tests.comp_patches.test_alignment_module import SAMPLE, TEXT, TOKENS, WORDS


def by_the_formula(visual, text, temperature):
    """-1/2N of the sum over b of log(exp(s_bb / tau) / sum_j exp(s_bj / tau)) and of the same over columns."""

    def cosine(one, other):
        dot = sum(a * b for a, b in zip(one, other, strict=True))
        return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))

    visual, text = visual.tolist(), text.tolist()
    mass = [[math.exp(cosine(v, t) / temperature) for t in text] for v in visual]
    total = 0.0
    for b in range(len(visual)):
        total -= math.log(mass[b][b] / sum(mass[b]))
        total -= math.log(mass[b][b] / sum(row[b] for row in mass))
    return total / (2 * len(visual))


@pytest.mark.parametrize("samples", [2, 5, 16])
@pytest.mark.parametrize("temperature", [0.005, 0.07])
def test_it_is_symmetric_info_nce(samples, temperature):
    visual, text, *_ = random_features(samples)
    visual = visual + 2 * visual.flip(0)  # near another sample's text
    expected = by_the_formula(visual, text, temperature)
    assert expected > 0
    assert_close(contrastive_loss(visual, text, temperature=temperature).item(), expected, rtol=1e-9, atol=1e-9)
    in_float32 = contrastive_loss(visual.bfloat16(), text.bfloat16(), temperature=temperature)
    assert in_float32.dtype == torch.float32


def test_its_gradient_reaches_the_image_alone():
    visual, text = (tensor.requires_grad_() for tensor in random_features(samples=4, width=6)[:2])
    contrastive_loss(visual, text).backward()
    assert text.grad is None
    assert torch.autograd.gradcheck(lambda image: contrastive_loss(image, text, temperature=0.1), visual)


@pytest.mark.parametrize("samples", [0, 1])
def test_with_nothing_to_tell_apart_it_is_zero_and_connected(samples):
    visual = torch.randn(samples, 16, requires_grad=True)
    loss = contrastive_loss(visual, torch.randn(samples, 16))
    loss.backward()
    assert loss.item() == 0.0
    assert not visual.grad.any()


def test_features_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match=r"visual \(2, 4\) and text \(3, 4\)"):
        contrastive_loss(torch.zeros(2, 4), torch.zeros(3, 4))


def test_a_temperature_that_nothing_can_be_divided_by_is_refused():
    with pytest.raises(ValueError, match=r"temperature=0 .*--alignment_temperature"):
        ContrastiveLoss(temperature=0)


def test_the_module_pools_and_leaves_out_samples_without_image_or_text():
    tokens, text = TOKENS.clone().requires_grad_(), TEXT.clone()
    text[3] = torch.nan  # has no text: whatever stands there is not read
    values = ContrastiveLoss(temperature=0.1)(tokens, SAMPLE, text, torch.tensor([True, True, True, False]), WORDS, 4)
    visual = torch.stack((TOKENS[[0, 1, 2, 5]].mean(0), TOKENS[[3, 4]].mean(0)))
    assert_close(values["contrastive"], contrastive_loss(visual, TEXT[[0, 2]], temperature=0.1))
    assert values["contrastive_sample_share"].tolist() == [2, 4]
    values["contrastive"].backward()
    assert tokens.grad[:6].any(dim=-1).all()
    assert not tokens.grad[6:].any()
