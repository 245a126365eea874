"""The products of the losses: on pieces of the vocabulary only, and in float32 where the rest may run in TF32."""

import pytest
import torch
from torch.testing import assert_close

from comp_patches import cosine_scores
from comp_patches.alignment_loss import alignment_loss
from comp_patches.contrastive_loss import contrastive_loss
from tests.comp_patches.test_alignment_loss import random_features
from tests.operations import Operations

# By the setting's name in this PyTorch: what allows TF32, what does not.
ALLOWED, REFUSED = {"fp32_precision": ("tf32", "ieee"), "allow_tf32": (True, False)}[cosine_scores.TF32_SETTING]

LOSSES = {
    "prior_softmax": alignment_loss,
    "sinkhorn": lambda *features: alignment_loss(*features, mode="sinkhorn"),
    "learnable": lambda *features: alignment_loss(*features, prototypes="learnable"),
    "contrastive": lambda visual, text, *_: contrastive_loss(visual, text),
}


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
@pytest.mark.parametrize("words_dtype", [torch.float32, torch.bfloat16])
def test_the_word_embeddings_are_never_copied(mode, words_dtype, monkeypatch):
    monkeypatch.setattr(cosine_scores, "ROWS_AT_A_TIME", 32)
    visual, text, words, prior = random_features(dtype=torch.float32)
    words = words.to(words_dtype)
    with Operations(words) as seen:
        alignment_loss(visual.requires_grad_(), text, words, prior, mode=mode).backward()
    assert seen.products
    assert 0 < seen.largest <= 2 * len(visual) * len(words) < words.numel(), "both score matrices, at the most"


@pytest.fixture
def tf32():
    """As transformers' --tf32 True sets it."""
    name = cosine_scores.TF32_SETTING
    places = [place for place in (torch.backends, torch.backends.cuda.matmul) if hasattr(place, name)]
    before = [getattr(place, name) for place in places]
    setattr(places[0], name, ALLOWED)
    yield
    for place, setting in zip(places, before, strict=True):
        setattr(place, name, setting)


@pytest.mark.parametrize("name", LOSSES)
def test_no_product_runs_in_tf32(tf32, name):
    visual, text, words, prior = random_features(dtype=torch.float32)
    words.requires_grad_(name == "learnable")
    with Operations() as seen:
        LOSSES[name](visual.requires_grad_(), text, words, prior).backward()
    assert len(seen.products) >= 2
    assert set(seen.products) == {REFUSED}
    assert getattr(torch.backends.cuda.matmul, cosine_scores.TF32_SETTING) == ALLOWED, "as it was"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", LOSSES)
def test_with_tf32_allowed_it_is_as_exact_as_in_float32(tf32, name):
    results = []
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "cuda")):
        visual, *others = (tensor.to(device, dtype) for tensor in random_features(width=512, words=5000))
        visual = (visual + 2 * visual.flip(0)).requires_grad_()  # near another sample's text
        loss = LOSSES[name](visual, *others)
        loss.backward()
        results.append((loss.detach().double().cpu(), visual.grad.double().cpu()))
    (expected, gradient), (found, found_gradient) = results
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found_gradient - gradient).norm() <= 1e-4 * gradient.norm()
