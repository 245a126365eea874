"""The speed comparison of the alignment loss runs, and what it compares is the same loss."""

from functools import partial

import pytest
from torch.testing import assert_close

from comp_patches.alignment_loss import alignment_loss
from tests.comp_patches.test_alignment_loss import random_features
from tests.scripts.launching import BENCH, printed_by_bench


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import alignment_loss

    return alignment_loss


@pytest.mark.parametrize(("mode", "targets"), [("prior_softmax", "released_targets"), ("sinkhorn", "sinkhorn_targets")])
def test_the_literal_transcription_is_the_same_loss(bench, mode, targets):
    results = []
    for loss in (partial(bench.literal_loss, targets_of=getattr(bench, targets)), partial(alignment_loss, mode=mode)):
        visual, *others = random_features()
        value = loss(visual.requires_grad_(), *others)
        value.backward()
        results.append((value.detach(), visual.grad))
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_it_prints_ratios_and_memory_beside_their_bars():
    sizes = ["--samples", "4", "--words", "3000", "--width", "32", "--rounds", "1"]
    printed = printed_by_bench("alignment_loss.py", *sizes)
    for words in ("floor", "ours, prior_softmax", "ours, sinkhorn", "literal, as released", "1.5", "3.0"):
        assert words in printed
