"""Placeholders, their expansion, and reading images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import expand_placeholders, get_model_name_from_path, load_image, tokenizer_image_token
from tests.llava.data_parts import draw, make_tokenizer


def test_one_placeholder_per_image_between_the_pieces():
    tokenizer = make_tokenizer()
    a, b = tokenizer("A chart", add_special_tokens=False).input_ids, tokenizer("\nWhat?").input_ids
    assert tokenizer_image_token("A chart<image>\nWhat?", tokenizer) == [*a, IMAGE_TOKEN_INDEX, *b]
    assert tokenizer_image_token("<image><image>", tokenizer) == [IMAGE_TOKEN_INDEX] * 2
    assert tokenizer_image_token("", tokenizer) == []


def test_a_single_bos_stands_first():
    tokenizer = make_tokenizer(bos=True)
    ids = tokenizer_image_token("red<image>blue<image>", tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_pt_gives_a_row_of_int64_and_other_kinds_are_refused():
    ids = tokenizer_image_token("red<image>", make_tokenizer(), return_tensors="pt")
    assert ids.dtype == torch.int64
    assert ids.ndim == 1
    with pytest.raises(ValueError, match="return_tensors='np'"):
        tokenizer_image_token("red", make_tokenizer(), return_tensors="np")


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.integers(1, 5)), max_size=4))
def test_expansion_widens_each_placeholder_in_place(pieces):
    """Against a plain loop, for any text and any images."""
    ids, wide = [7], [7]
    for text, num_tokens in pieces:
        ids += [IMAGE_TOKEN_INDEX, *text]
        wide += [IMAGE_TOKEN_INDEX] * num_tokens + text
    labels = torch.arange(len(ids))
    new_ids, new_labels = expand_placeholders(torch.tensor(ids), labels, [tokens for _, tokens in pieces])
    assert new_ids.tolist() == wide
    assert (new_labels[new_ids == IMAGE_TOKEN_INDEX] == IGNORE_INDEX).all()
    kept = torch.tensor(ids) != IMAGE_TOKEN_INDEX
    assert new_labels[new_ids != IMAGE_TOKEN_INDEX].tolist() == labels[kept].tolist()


def test_expansion_without_labels():
    ids, labels = expand_placeholders(torch.tensor([1, IMAGE_TOKEN_INDEX]), None, torch.tensor([2]))
    assert ids.tolist() == [1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX]
    assert labels is None


def test_expansion_refuses_when_counts_differ_and_names_both():
    with pytest.raises(ValueError, match=r"holds 1 <image>.*there are 2 image\(s\)"):
        expand_placeholders(torch.tensor([1, IMAGE_TOKEN_INDEX]), None, [3, 3])


def test_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    for suffix in ("jpg", "png", "tif"):
        Image.new("RGB", (40, 20), "red").save(tmp_path / f"a.{suffix}", exif=exif)
        assert load_image(tmp_path / f"a.{suffix}").size == (20, 40)


def test_an_unreadable_image_says_which(tmp_path):
    draw(tmp_path, "whole.png", (64, 64))
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.png", "text.jpg"):
        with pytest.raises(ValueError, match=f"cannot read image .*{name}"):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"image file not found: .*gone\.png"):
        load_image(tmp_path / "gone.png")


def test_model_name_comes_from_the_path():
    assert get_model_name_from_path("runs/stage3/") == "stage3"
    assert get_model_name_from_path("runs/stage3/checkpoint-20") == "stage3_checkpoint-20"
