"""From records with image files to samples; what cannot be used is told apart, counted and never replaced."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.bad_samples import BadSample, BadSampleLedger, TooManyBadSamplesError
from llava.data.collator import PackedCollator
from llava.data.mixture import load_records
from tests.llava.data_parts import (
    draw,
    make_dataset,
    make_processor,
    make_record,
    make_tokenizer,
    supervised_text,
)


def visual_tokens(sample) -> int:
    return int((sample["input_ids"] == IMAGE_TOKEN_INDEX).sum())


def test_a_sample_has_as_many_places_as_its_image_has_tokens(tmp_path):
    draw(tmp_path, "sub/a.png", (24, 16))
    dataset = make_dataset([make_record("<image>\nWhat?", "A square.", image="sub/a.png")], tmp_path)
    sample = dataset[0]
    assert sample["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert sample["pixel_values"].shape == (24, 3 * 4 * 4)
    assert visual_tokens(sample) == 6
    assert supervised_text(sample) == "A square.<|im_end|>"
    assert "align_input_ids" not in sample


def test_several_images_keep_their_order(tmp_path):
    names = [draw(tmp_path, "a.png", (24, 16)), draw(tmp_path, "b.png", (8, 32))]
    sample = make_dataset([make_record("<image>\nand <image>", "Two.", image=names)], tmp_path)[0]
    assert sample["image_grid_thw"].tolist() == [[1, 4, 6], [1, 8, 2]]
    assert visual_tokens(sample) == 6 + 4


def test_a_fixed_resolution_comes_with_the_processor(tmp_path):
    draw(tmp_path, "a.png", (24, 16))
    record = make_record("<image>", "A square.", image="a.png")
    dataset = make_dataset([record], tmp_path, image_processor=make_processor(force_resize=32))
    assert dataset[0]["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert visual_tokens(dataset[0]) == 16


def test_an_image_on_its_side_has_the_grid_of_the_upright_one(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16), "red").save(tmp_path / "a.jpg", exif=exif)
    sample = make_dataset([make_record("<image>", "Red.", image="a.jpg")], tmp_path)[0]
    assert sample["image_grid_thw"].tolist() == [[1, 8, 4]]
    assert visual_tokens(sample) == 8


def test_text_only_samples_have_no_patches():
    sample = make_dataset([make_record("Hi", "Hello.")])[0]
    assert sample["pixel_values"].shape == (0, 48)
    assert sample["image_grid_thw"].shape == (0, 3)
    assert sample["image_grid_thw"].dtype == torch.int64
    assert supervised_text(sample) == "Hello.<|im_end|>"


@pytest.mark.parametrize("bos", [False, True])
def test_alignment_text_is_the_answers_alone_joined_by_a_space(tmp_path, bos):
    draw(tmp_path, "a.png")
    tokenizer = make_tokenizer(bos=bos)
    record = make_record("<image>\nWhat?", "A square.", "Colour?", "Red", image="a.png")
    sample = make_dataset([record], tmp_path, align_text=True, tokenizer=tokenizer)[0]
    assert sample["align_input_ids"].tolist() == tokenizer("A square. Red").input_ids


def test_images_and_alignment_text_are_cut_with_the_turns(tmp_path):
    names = [draw(tmp_path, "a.png", (24, 16)), draw(tmp_path, "b.png", (64, 64))]
    record = make_record("<image>\nOne?", "A.", "<image>\nTwo?", "B.", image=names)
    alone = make_dataset([make_record("<image>\nOne?", "A.", image=names[:1])], tmp_path, align_text=True)[0]
    cut = make_dataset([record], tmp_path, align_text=True, model_max_length=len(alone["input_ids"]) + 20)[0]
    for key in ("input_ids", "labels", "pixel_values", "image_grid_thw", "align_input_ids"):
        assert torch.equal(cut[key], alone[key]), key


def test_plain_takes_the_picture_and_the_caption(tmp_path):
    draw(tmp_path, "a.png", (24, 16))
    record = make_record("Describe it. <image>", "A square.", image="a.png")
    sample = make_dataset([record], tmp_path, conversation=conv_templates["plain"])[0]
    caption = make_tokenizer()("A square.\n").input_ids
    assert sample["input_ids"].tolist() == [IMAGE_TOKEN_INDEX] * 6 + caption
    assert supervised_text(sample) == "A square.\n"


@pytest.mark.parametrize(
    "name", ["../secret.png", "../images2/secret.png", "sub/../../secret.png", "/etc/passwd", ".", "sub/.."]
)
def test_a_path_out_of_the_folder_stops_at_the_start(tmp_path, name):
    draw(tmp_path, "secret.png")
    draw(tmp_path / "images", "sub/a.png")
    with pytest.raises(ValueError, match=r"record r: image path .* lies outside --image_folder") as caught:
        make_dataset([make_record("<image>", "A square.", image=name)], tmp_path / "images")
    assert "\n" not in str(caught.value)


def test_paths_that_stay_inside_are_fine(tmp_path):
    draw(tmp_path, "a..b/c.png")
    for name in ("a..b/c.png", "a..b/../a..b/./c.png", str(tmp_path / "a..b" / "c.png")):
        dataset = make_dataset([make_record("<image>", "A square.", image=name)], tmp_path)
        assert visual_tokens(dataset[0]) == 6


def test_a_source_can_bring_its_own_folder(tmp_path):
    draw(tmp_path / "own", "a.png")
    record = make_record("<image>", "A square.", image="a.png") | {"image_folder": str(tmp_path / "own")}
    assert visual_tokens(make_dataset([record])[0]) == 6


def test_a_folder_that_is_unset_or_missing_stops_at_the_start(tmp_path):
    record = make_record("<image>", "A square.", image="a.png")
    with pytest.raises(ValueError, match="record r has an image, but --image_folder is not set"):
        make_dataset([record])
    with pytest.raises(FileNotFoundError, match=r"--image_folder .*gone: no such folder"):
        make_dataset([record], tmp_path / "gone")
    with pytest.raises(ValueError, match="record r: `image` should be a path or a list of paths, found 3"):
        make_dataset([record | {"image": 3}], tmp_path)


def spoilt_records(folder):
    """Four good ones with one of each kind that is bad among them."""
    draw(folder, "a.png")
    whole = draw(folder, "whole.png", (64, 64))
    (folder / "cut.png").write_bytes((folder / whole).read_bytes()[:60])
    (folder / "text.png").write_text("no image")
    good = [make_record("<image>", f"{index}.", image="a.png", id=f"good{index}") for index in range(4)]
    bad = [
        make_record("<image>", "A.", image="gone.png", id="missing"),
        make_record("<image>", "A.", image="cut.png", id="cut"),
        make_record("<image>", "A.", image="text.png", id="text"),
        make_record("<image><image>", "A.", image="a.png", id="counts"),
        make_record("<image>", image="a.png", id="mute"),
    ]
    return [good[0], *bad[:2], good[1], *bad[2:], *good[2:]]


def test_bad_samples_say_why_and_are_not_replaced(tmp_path):
    dataset = make_dataset(spoilt_records(tmp_path), tmp_path)
    reasons = {sample.id: sample.reason for sample in dataset if isinstance(sample, BadSample)}
    assert "image file not found" in reasons["missing"]
    assert "gone.png" in reasons["missing"]
    assert "cannot read image" in reasons["cut"]
    assert "cannot read image" in reasons["text"]
    assert "2 <image>, but it has 1 image(s)" in reasons["counts"]
    assert "no answer" in reasons["mute"]
    assert len(reasons) == 5
    assert [sample["id"] for sample in dataset if isinstance(sample, dict)] == ["good0", "good1", "good2", "good3"]


@pytest.mark.parametrize(
    ("character", "said"), [("\\ud83d", "half a surrogate pair, '\\ud83d', at"), ("\\u0000", "a NUL at")]
)
def test_text_that_is_none_is_a_bad_sample(tmp_path, character, said):
    """In JSON both are well-formed escapes. The first is half of a smiley, and no tokenizer takes it."""
    records = [make_record("What?", "A square.", id="good"), make_record("What?", "A CUT square.", id="cut CUT")]
    (tmp_path / "a.json").write_text(json.dumps(records).replace("CUT", character))
    good, bad = make_dataset(load_records(tmp_path / "a.json"))
    assert good["id"] == "good"
    assert bad.kind == "bad text"
    assert f"turn 1 has {said} character 2" in bad.reason
    bad.id.encode()
    bad.reason.encode()


def test_an_image_that_the_processor_refuses_is_a_bad_sample(tmp_path):
    draw(tmp_path, "a.png", (40, 40))
    processor = make_processor(max_image_pixels=100)
    dataset = make_dataset([make_record("<image>", "A.", image="a.png")], tmp_path, image_processor=processor)
    assert "max_image_pixels" in dataset[0].reason


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_reach_the_ledger_through_workers(tmp_path, caplog, num_workers):
    dataset = make_dataset(spoilt_records(tmp_path), tmp_path)
    loader = DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=PackedCollator(patch_dim=48))
    ledger = BadSampleLedger(1.0, len(dataset))
    with caplog.at_level(logging.WARNING, logger="llava.data.bad_samples"):
        for batch in loader:
            ledger.update(batch.pop("bad_samples"), num_seen=batch.pop("num_samples"))
    assert (ledger.num_seen, ledger.num_bad) == (9, 5)
    assert "skipped bad sample missing: image file not found" in caplog.text
    assert len(caplog.records) == 5


def test_the_run_ends_where_the_share_is_above_the_rate():
    bad = BadSample("r7", "image file not found: x.png")
    ledger = BadSampleLedger(0.01, 100)
    ledger.update([bad], num_seen=1)  # 1 of 100 is allowed
    ledger.update([], num_seen=98)
    message = r"2 of the first 100 samples are bad, .*max_bad_samples=0\.01 .*r7: image file not found"
    with pytest.raises(TooManyBadSamplesError, match=message):
        ledger.update([bad], num_seen=1)


def test_a_large_run_is_ended_by_its_first_thousand_samples():
    ledger = BadSampleLedger(0.01, 10**6)
    bad = BadSample("r", "gone")
    for _ in range(10):
        ledger.update([bad], num_seen=1)
    with pytest.raises(TooManyBadSamplesError):
        ledger.update([bad], num_seen=1)
    seen_enough = BadSampleLedger(0.01, 10**6)
    seen_enough.update([], num_seen=5000)
    seen_enough.update([bad] * 50, num_seen=50)  # 1 % of 5 050


def test_the_share_is_of_all_processes_and_ends_all_of_them():
    """A process that has no bad sample itself ends with the others: left alone, it would wait for them."""
    ledger = BadSampleLedger(0.1, 20)
    ledger.update([BadSample("r", "gone")], num_seen=4, over_processes=lambda counts: [2 * count for count in counts])
    assert (ledger.num_bad, ledger.num_seen) == (2, 8)
    with pytest.raises(TooManyBadSamplesError, match="3 of the first 16 samples are bad"):
        ledger.update([], num_seen=4, over_processes=lambda counts: [1, 8])


def test_no_bad_sample_is_allowed_at_rate_zero():
    ledger = BadSampleLedger(0.0, 1000)
    ledger.update([], num_seen=500)
    with pytest.raises(TooManyBadSamplesError):
        ledger.update([BadSample("r", "gone")], num_seen=1)
    with pytest.raises(ValueError, match="max_bad_samples=3 is no share"):
        BadSampleLedger(3, 1000)


def test_modality_lengths_are_about_the_samples_tokens_and_llavas_sign(tmp_path):
    draw(tmp_path, "a.png")
    texts = ["The square is red. " * count for count in range(1, 60)]
    records = [
        make_record("<image>\nWhat is it?", "A square.", image="a.png"),
        make_record("<image> <image>", "Two.", image=["a.png", "a.png"]),
        *(make_record("Hi there", text) for text in texts),
        make_record("", ""),
    ]
    dataset = make_dataset(records, tmp_path, image_processor=make_processor(force_resize=32))
    lengths = dataset.modality_lengths
    assert (lengths > 0).tolist() == [True, True] + [False] * 60
    found = np.array([len(dataset[number]["input_ids"]) for number in range(61)])
    assert np.abs(lengths).sum() == pytest.approx(found.sum(), rel=0.02)
    assert (np.abs(np.abs(lengths[:-1]) - found) <= 0.05 * found + 8).all()
    short = make_dataset(records, tmp_path, image_processor=make_processor(force_resize=32), model_max_length=50)
    assert short.modality_lengths.tolist() == lengths.clip(-50, 50).tolist()  # the rest is cut


def test_lengths_count_text_that_has_no_spaces():
    chinese, english = "\u4e00\u53ea\u732b\u5728\u6811\u4e0a" * 20, "A cat in a tree. " * 20
    lengths = make_dataset([make_record("?", chinese), make_record("?", english)]).modality_lengths
    assert 0.5 < lengths[0] / lengths[1] < 2
