"""What the alignment loss may not do: keep (B, V) matrices for the backward pass, write on its inputs, lose digits."""

import pytest
import torch
from torch.testing import assert_close

from comp_patches import alignment_cross_entropy, alignment_targets, cosine_scores
from comp_patches.alignment_loss import alignment_loss
from comp_patches.contrastive_loss import contrastive_loss
from tests.comp_patches.test_alignment_loss import random_features

MODES = ["prior_softmax", "sinkhorn"]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_as_wide_as_the_vocabulary_waits_for_the_backward_pass(mode):
    visual, *others = random_features()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
        alignment_loss(visual.requires_grad_(), *others, mode=mode)
    assert torch.Size([6, 16]) in kept
    assert not [shape for shape in kept if 200 in shape]


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_left_as_they_are(mode):
    inputs = random_features(zero_words=5)
    copies = [tensor.clone() for tensor in inputs]
    alignment_loss(inputs[0].requires_grad_(), *inputs[1:], mode=mode).backward()
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("mode", MODES)
def test_the_size_of_the_pieces_changes_nothing(mode, monkeypatch):
    results = []
    for samples, words in ((8, 8192), (4, 7), (100, 100)):
        monkeypatch.setattr(cosine_scores, "ROWS_AT_A_TIME", words)
        for module in (alignment_targets, alignment_cross_entropy):
            monkeypatch.setattr(module, "SAMPLES_AT_A_TIME", samples)
        monkeypatch.setattr(alignment_targets, "WORDS_AT_A_TIME", words)
        visual, *others = random_features(samples=11, zero_words=5)
        loss = alignment_loss(visual.requires_grad_(), *others, mode=mode)
        loss.backward()
        results.append((loss.detach(), visual.grad))
    for result in results[1:]:
        assert_close(result, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*MODES, "contrastive"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_image_without_a_direction_gets_no_gradient(name, dtype):
    visual, *others = random_features(dtype=dtype)
    visual[1] = 0
    visual.requires_grad_()
    loss = contrastive_loss(visual, others[0]) if name == "contrastive" else alignment_loss(visual, *others, mode=name)
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(visual.grad[1], torch.zeros_like(visual.grad[1]))
    assert visual.grad.isfinite().all()
    assert visual.grad.any()


@pytest.mark.parametrize("name", [*MODES, "contrastive"])
def test_under_autocast_the_loss_is_computed_in_float32(name):
    visual, *others = random_features(dtype=torch.float32)
    visual = visual + 2 * visual.flip(0)  # near another sample's text

    def loss(image):
        return (
            contrastive_loss(image, others[0]) if name == "contrastive" else alignment_loss(image, *others, mode=name)
        )

    plain = visual.clone().requires_grad_()
    expected = loss(plain)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(visual.requires_grad_())
    found.backward()
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_close(visual.grad, plain.grad, rtol=1e-4, atol=1e-5)
