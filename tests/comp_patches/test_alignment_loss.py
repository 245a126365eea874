"""The alignment loss against the release's numbers and against plain exponents in wider floats."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from comp_patches import cosine_scores
from comp_patches.alignment_loss import alignment_loss, cross_entropy, targets
from comp_patches.alignment_module import AlignmentLoss
from tests.comp_patches import naive

CASES = ["B5_soft", "B5_peaked", "B1_soft", "B3_minus1", "B5_overflow"]
FINITE = [case for case in CASES if case != "B5_overflow"]


def case_of(golden, name):
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in golden("align_loss").items() if key.startswith(prefix)}


def random_features(samples=6, width=16, words=200, seed=0, zero_words=0, dtype=torch.float64):
    """Features whose text and image agree somewhat, word embeddings of many norms, and a skewed prior."""
    generator = torch.Generator().manual_seed(seed)
    word_embeddings = torch.randn(words, width, generator=generator, dtype=torch.float64)
    word_embeddings *= 0.1 + 3 * torch.rand(words, 1, generator=generator, dtype=torch.float64)
    text = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    visual = text + torch.randn(samples, width, generator=generator, dtype=torch.float64)
    prior = torch.rand(words, generator=generator, dtype=torch.float64) ** 4 + 1e-6
    prior[:zero_words] = 0
    return visual.to(dtype), text.to(dtype), word_embeddings.to(dtype), (prior / prior.sum()).to(dtype)


def reference(visual, text, words, prior, mode, row_strength=1.0):
    share = prior.double().numpy()
    targets_of = {
        "sinkhorn": lambda scores: naive.sinkhorn_targets(scores, share, 0.005, 3, row_strength),
        "prior_softmax": lambda scores: naive.prior_softmax_targets(scores, share, 0.005, 3, 0.05),
    }[mode]
    arrays = (tensor.detach().double().numpy() for tensor in (visual, text, words))
    return naive.alignment(*arrays, share, targets_of)


@pytest.mark.parametrize("name", FINITE)
def test_prior_softmax_is_the_release_s_rule(golden, name):
    case = case_of(golden, name)
    words = case["in/lm_head_weight"].float()
    target = targets(case["mid/caption_features_bf16"], words, case["mid/vocab_dist"])
    assert_close(target, case["out/q_t"], atol=2e-5, rtol=0)
    loss = cross_entropy(F.normalize(case["mid/image_features"], dim=-1), target, words)
    assert_close(loss, case["out/loss"][0], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_prior_softmax_is_finite_where_the_release_overflows(golden, name):
    case = case_of(golden, name)
    words = case["in/lm_head_weight"].float()
    target = targets(case["mid/caption_features_bf16"], words, case["mid/vocab_dist"])
    assert_close(target, case["ref64/released_q_t"], atol=2e-5, rtol=0)
    loss = cross_entropy(F.normalize(case["mid/image_features"], dim=-1), target, words)
    assert_close(loss.double(), case["ref64/released_loss"][0], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("name", ["B5_soft", "B5_peaked", "B1_soft", "B5_overflow"])
def test_sinkhorn_is_equation_9(golden, name):
    case = case_of(golden, name)
    mask = case["in/attn_mask"].float()[..., None]
    text = (case["in/language_embed"] * mask).sum(1) / mask.sum(1)
    counts = case["in/word_counts"].clamp(min=1).float()
    lengths = (case["in/image_grid_thw"].prod(-1) // 4).tolist()
    visual = torch.stack([tokens.mean(0) for tokens in case["in/image_embeds"].split(lengths)])
    words, prior = case["in/lm_head_weight"].float(), counts / counts.sum()
    target = targets(F.normalize(text, dim=-1), words, prior, mode="sinkhorn")
    assert_close(target, case["ref64_method/q_t"], atol=2e-5, rtol=0)
    loss = alignment_loss(visual, text, words, prior, mode="sinkhorn")
    assert_close(loss.double(), case["ref64_method/loss"][0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
@pytest.mark.parametrize("samples", [1, 2, 16])
@pytest.mark.parametrize("zero_words", [0, 20])
def test_loss_matches_plain_exponents_in_wider_floats(mode, samples, zero_words):
    features = random_features(samples, zero_words=zero_words)
    expected = reference(*features, mode)
    assert_close(alignment_loss(*features, mode=mode).item(), expected, atol=1e-9, rtol=1e-9)
    in_float32 = alignment_loss(*(tensor.float() for tensor in features), mode=mode)
    assert abs(in_float32.item() - expected) <= 1e-5 * abs(expected) + 1e-6


@pytest.mark.parametrize("row_strength", [0.0, 0.3, 1.0])
def test_row_strength_is_unbalanced_transport(row_strength):
    features = random_features()
    found = alignment_loss(*features, mode="sinkhorn", row_strength=row_strength).item()
    assert_close(found, reference(*features, "sinkhorn", row_strength), atol=1e-9, rtol=1e-9)


def test_row_strength_0_is_a_plain_softmax():
    _, text, words, prior = random_features()
    text = F.normalize(text, dim=-1)
    plain = torch.softmax(text @ F.normalize(words, dim=-1).T / 0.005, dim=-1)
    assert_close(targets(text, words, prior, mode="sinkhorn", row_strength=0.0), plain)


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
def test_gradient_matches_finite_differences_and_reaches_the_image_alone(mode):
    visual, text, words, prior = (tensor.requires_grad_() for tensor in random_features())
    alignment_loss(visual, text, words, prior, mode=mode).backward()
    assert text.grad is None
    assert words.grad is None
    assert prior.grad is None

    direction = torch.randn(visual.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (alignment_loss(visual + s * 1e-6 * direction, text, words, prior, mode=mode) for s in (1, -1))
    assert_close((visual.grad * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
@pytest.mark.parametrize("case", ["aligned", "opposed", "duplicates", "zero word", "zero text"])
def test_adversarial_inputs_stay_finite(mode, case):
    visual, text, words, prior = random_features(dtype=torch.float32)
    if case == "aligned":
        visual = text = words[:6].clone()  # cosine exactly 1
    elif case == "opposed":
        visual, text = words[:6].clone(), -words[:6]
    elif case == "duplicates":
        text = text[:1].expand(6, -1)
    elif case == "zero word":
        words = words.index_fill(0, torch.tensor([3, 50]), 0.0)
    else:
        text = text.index_fill(0, torch.tensor([2]), 0.0)
    visual.requires_grad_()
    loss = alignment_loss(visual, text, words, prior, mode=mode)
    loss.backward()
    assert loss.isfinite()
    assert visual.grad.isfinite().all()


def test_targets_of_prior_softmax_change_with_the_text_even_for_one_sample():
    _, text, words, prior = random_features(samples=2)
    one, other = (targets(F.normalize(part[None], dim=-1), words, prior) for part in text)
    assert (one - other).abs().sum() > 1.0


def test_with_one_sample_sinkhorn_s_targets_are_the_prior_whatever_the_text():
    _, text, words, prior = random_features(samples=1)
    assert_close(targets(F.normalize(text, dim=-1), words, prior, mode="sinkhorn")[0], prior)


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
def test_words_of_prior_zero_get_no_mass_and_no_gradient(mode):
    visual, text, words, prior = random_features(zero_words=30)
    target = targets(F.normalize(text, dim=-1), words, prior, mode=mode)
    assert (target[:, :30] == 0).all()
    assert_close(target.sum(-1), torch.ones(6, dtype=torch.float64))
    without = alignment_loss(visual, text, words[30:], prior[30:], mode=mode)
    assert_close(alignment_loss(visual, text, words, prior, mode=mode), without)


@pytest.mark.parametrize("mode", ["prior_softmax", "sinkhorn"])
def test_no_prior_is_a_uniform_one(mode):
    visual, text, words, _ = random_features()
    uniform = torch.full((200,), 1 / 200, dtype=torch.float64)
    assert_close(
        alignment_loss(visual, text, words, None, mode=mode), alignment_loss(visual, text, words, uniform, mode=mode)
    )


def test_a_bf16_vocabulary_is_read_chunk_by_chunk_in_float32(monkeypatch):
    visual, text, words, prior = random_features(dtype=torch.float32)
    words = words.bfloat16()
    results = []
    for table, rows in [(words.float(), 8192), (words, 8192), (words, 7)]:
        monkeypatch.setattr(cosine_scores, "ROWS_AT_A_TIME", rows)
        image = visual.clone().requires_grad_()
        loss = alignment_loss(image, text, table, prior)
        loss.backward()
        results.append((loss.detach(), image.grad))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def test_bf16_features_give_a_float32_loss():
    visual, text, words, prior = random_features(dtype=torch.bfloat16)
    assert alignment_loss(visual, text, words, prior).dtype == torch.float32


def test_no_sample_gives_exactly_zero_connected_to_the_graph():
    visual = torch.zeros(0, 16, requires_grad=True)
    loss = alignment_loss(visual, torch.zeros(0, 16), torch.randn(20, 16), None, mode="sinkhorn")
    loss.backward()
    assert loss.item() == 0.0
    assert visual.grad.shape == (0, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sinkhron"}, "Known: prior_softmax, sinkhorn"),
        ({"row_strength": 1.5}, r"row_strength=1.5 must lie in"),
        ({"temperature": 0.0}, r"^temperature=0.0 must be a number above 0 \(--alignment_temperature\)"),
        ({"temperature": -0.005}, r"temperature=-0.005 .*--alignment_temperature"),
        ({"epsilon": 0.0}, r"epsilon=0.0 .*--alignment_epsilon"),
        ({"epsilon": float("nan")}, r"epsilon=nan .*--alignment_epsilon"),
        ({"prior_temperature": 0.0}, r"prior_temperature=0.0 .*--alignment_prior_temperature"),
        ({"iterations": -1}, r"iterations=-1 must be 0 or more"),
    ],
)
def test_unknown_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        alignment_loss(*random_features(), **options)
    with pytest.raises(ValueError, match=message):
        AlignmentLoss(**options)  # before the first step


def test_a_prior_of_another_vocabulary_is_refused_with_both_numbers():
    visual, text, words, prior = random_features()
    with pytest.raises(ValueError, match=r"shape \(150,\), but there are 200 word embeddings"):
        alignment_loss(visual, text, words, prior[:150])


def test_a_3x3_worked_by_hand():
    """Three orthogonal words, one sample; scores 1, 0, 0 at temperature 1: softmax (e, 1, 1) / (e + 2)."""
    words, text, visual = torch.eye(3, dtype=torch.float64), torch.eye(3)[:1].double(), torch.eye(3)[1:2].double()
    loss = alignment_loss(visual, text, words, None, temperature=1.0, epsilon=1.0)
    e = np.e
    expected = -(e * np.log(1 / (e + 2)) + np.log(e / (e + 2)) + np.log(1 / (e + 2))) / (e + 2)
    assert_close(loss.item(), expected)
