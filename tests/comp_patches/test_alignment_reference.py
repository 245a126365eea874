"""The alignment loss and its gradient against plain exponents in the widest float there is.

Nothing is shared with the package: the cosines, the targets, the prediction and the gradient are written a second time.
Bounds are the project's: float64 1e-9, float32 1e-5 of the loss + 1e-6 and 1e-4 of the gradient's norm + 1e-7.
"""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from comp_patches.alignment_loss import alignment_loss
from tests.comp_patches import naive
from tests.comp_patches.test_alignment_loss import random_features

SIZES = [(1, 50), (2, 500), (3, 50), (7, 1000), (16, 50), (16, 5000)]  # samples, words
INPUTS = ["random", "aligned", "opposed", "duplicates", "words without mass", "one word has the mass", "long and short"]


def adversarial(kind, samples, words, dtype):
    visual, text, table, prior = random_features(samples, words=words, seed=samples + words)
    picked = table[torch.arange(samples) % words]
    if kind == "aligned":  # cosine 1: exp(1 / 0.005) = 7e86
        visual, text = 3 * picked, picked.clone()
    elif kind == "opposed":
        visual, text = picked.clone(), -2 * picked
    elif kind == "duplicates":
        visual, text = visual[:1].repeat(samples, 1), text[:1].repeat(samples, 1)
    elif kind == "words without mass":
        prior[::3] = 0.0
    elif kind == "one word has the mass":
        prior = torch.full_like(prior, 1e-12)
        prior[words // 2] = 1.0
    elif kind == "long and short":
        visual[::2] *= 1e4
        text[1::2] *= 1e-4
        table[::5] *= 1e-3
    return [tensor.to(dtype) for tensor in (visual, text, table, prior)]


def reference(visual, text, words, prior, mode):
    """Loss and gradient (B, H) with respect to the un-normalised visual features."""
    visual, text, words, prior = (
        tensor.double().numpy().astype(np.longdouble) for tensor in (visual, text, words, prior)
    )
    lengths = np.sqrt((visual**2).sum(1, keepdims=True))
    image = visual / lengths
    text = text / np.sqrt((text**2).sum(1, keepdims=True))
    words = words / np.sqrt((words**2).sum(1, keepdims=True))
    if mode == "sinkhorn":
        target = naive.sinkhorn_targets(text @ words.T, prior, 0.005, 3)
    else:
        target = naive.prior_softmax_targets(text @ words.T, prior, 0.005, 3, 0.05)
    mass = np.exp(image @ words.T / np.longdouble("0.005")) * (prior > 0)
    predicted = mass / mass.sum(axis=1, keepdims=True)
    used = prior > 0
    loss = -(target[:, used] * np.log(predicted[:, used])).sum(axis=1).mean()
    on_sphere = (predicted - target) @ words / (0.005 * len(visual))
    gradient = (on_sphere - (on_sphere * image).sum(1, keepdims=True) * image) / lengths
    return float(loss), torch.from_numpy(gradient.astype(np.float64))


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("samples", "words"), SIZES)
def test_loss_and_gradient_are_those_of_plain_exponents(mode, kind, samples, words):
    for dtype in (torch.float64, torch.float32):
        visual, *others = adversarial(kind, samples, words, dtype)
        expected, expected_gradient = reference(visual, *others, mode)
        loss = alignment_loss(visual.requires_grad_(), *others, mode=mode)
        loss.backward()
        gradient = visual.grad.double()
        if dtype == torch.float64:
            assert_close(loss.item(), expected, rtol=1e-9, atol=1e-9)
            assert (gradient - expected_gradient).norm() <= 1e-9 * expected_gradient.norm() + 1e-9
        else:
            assert abs(loss.item() - expected) <= 1e-5 * abs(expected) + 1e-6
            assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm() + 1e-7


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
def test_features_and_words_of_zeros_stay_finite(mode):
    visual, text, words, prior = random_features(dtype=torch.float32)
    visual[1], text[2], words[3:6] = 0, 0, 0
    prior[4] = 0
    loss = alignment_loss(visual.requires_grad_(), text, words, prior, mode=mode)
    loss.backward()
    assert loss.isfinite()
    assert visual.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
def test_the_gradient_passes_gradcheck(mode):
    visual, text, words, prior = random_features(samples=4, width=6, words=30, zero_words=3)
    assert torch.autograd.gradcheck(
        lambda image: alignment_loss(image, text, words, prior, mode=mode, temperature=0.1, epsilon=0.1),
        visual.requires_grad_(),
    )
