"""LLaVA's own helpers under LLaVA's names, called as lmms-eval and old scripts call them."""

import base64
import io
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from llava import mm_utils
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    divide_to_patches,
    expand2square,
    load_image_from_base64,
    process_images,
    resize_and_pad_image,
)
from llava.model.multimodal_encoder.builder import tower_factory
from tests.llava.data_parts import make_processor, make_tokenizer
from tests.llava.upstream import GOLDEN, photo

GRID = [[16 * w, 16 * h] for w in range(1, 4) for h in range(1, 4)]


def processor_of(family):
    config = tower_factory(f"x/{family}").tower_config(str(GOLDEN / family)) | {"image_size": 16, "patch_size": 8}
    return tower_factory(f"x/{family}").build_image_processor(f"x/{family}", config=config)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_process_images_is_upstreams_to_the_bit_in_each_mode(family):
    """The processor's own mode does not matter: LLaVA's scripts change the model's config."""
    processor = processor_of(family)
    with safe_open(GOLDEN / "pixels.safetensors", "pt") as file:
        for key in [key for key in list(file.keys()) if key.startswith(family)]:
            _, mode, size = key.split()
            config = SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=GRID)
            found = process_images([photo(*map(int, size.split("x")))], processor, config)
            assert torch.equal(found[0], file.get_tensor(key)), key


def test_images_of_one_shape_are_stacked_others_are_a_list():
    processor, config = processor_of("clip"), SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=GRID)
    same = process_images([photo(30, 16), photo(31, 16)], processor, config)
    assert same.shape == (2, 3, 3, 16, 16)
    mixed = process_images([photo(30, 16), photo(48, 48)], processor, config)
    assert [len(tiles) for tiles in mixed] == [3, 10]
    assert process_images([photo(8, 30)], processor, SimpleNamespace(image_aspect_ratio=None)).shape == (1, 3, 16, 16)


def test_what_is_left_out_says_what_to_use():
    with pytest.raises(ValueError, match="image_aspect_ratio 'highres' is not supported"):
        process_images([photo(8, 8)], processor_of("clip"), SimpleNamespace(image_aspect_ratio="highres"))
    with pytest.raises(ValueError, match="call image_processor"):
        process_images([photo(8, 8)], make_processor(), SimpleNamespace(image_aspect_ratio="pad"))


def test_a_canvas_has_the_image_in_its_middle_on_black():
    canvas = resize_and_pad_image(photo(20, 10), (64, 64))
    assert canvas.size == (64, 64)
    assert canvas.crop((0, 0, 64, 16)).getextrema() == ((0, 0),) * 3
    assert canvas.crop((0, 16, 64, 48)).getextrema() != ((0, 0),) * 3
    assert [tile.size for tile in divide_to_patches(canvas, 32)] == [(32, 32)] * 4
    assert divide_to_patches(canvas, 32)[1].tobytes() == canvas.crop((32, 0, 64, 32)).tobytes()


def test_a_square_stays_and_a_strip_is_filled_up():
    assert expand2square(photo(9, 9), (1, 2, 3)).size == (9, 9)
    square = expand2square(photo(9, 4), (1, 2, 3))
    assert square.size == (9, 9)
    assert square.getpixel((0, 0)) == (1, 2, 3)
    assert square.crop((0, 2, 9, 6)).tobytes() == photo(9, 4).tobytes()


def test_base64_images_are_bounded_and_checked(monkeypatch):
    file = io.BytesIO()
    photo(9, 4).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    assert load_image_from_base64(text).size == (9, 4)
    with pytest.raises(ValueError, match="its base64 text is broken"):
        load_image_from_base64("%%%")
    with pytest.raises(ValueError, match="cannot read image base64 image"):
        load_image_from_base64(base64.b64encode(b"no image"))
    monkeypatch.setattr(mm_utils, "MAX_BASE64_BYTES", 8)
    with pytest.raises(ValueError, match="above the limit of 8"):
        load_image_from_base64(text)


def test_keywords_of_several_tokens_end_each_row_of_a_batch():
    """LLaVA-NeXT takes one row, and fails at a keyword of several tokens."""
    tokenizer = make_tokenizer()
    prompt = torch.tensor([tokenizer("stop here").input_ids])
    rows = [tokenizer(text).input_ids for text in ("a cat ###", "a dog", "red")]
    new = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=0)
    batch = torch.cat([prompt.expand(3, -1), new], dim=1)
    stop = KeywordsStoppingCriteria(["###", "dog"], tokenizer, batch[:, : prompt.shape[1]])
    assert stop(batch, None).tolist() == [True, True, False]
    later = torch.cat([batch, torch.tensor([tokenizer(" ###").input_ids] * 3)], dim=1)
    assert stop(later, None).tolist() == [True, True, True]
    assert stop(torch.cat([later, later], dim=1), None).tolist() == [True] * 3  # it stays said


def test_one_criterion_serves_a_second_generation():
    tokenizer = make_tokenizer()
    ended, other = (torch.tensor([tokenizer(text).input_ids]) for text in ("a ###", "a long answer that goes on"))
    stop = KeywordsStoppingCriteria(["###"], tokenizer, torch.zeros(1, 2, dtype=torch.long))
    assert stop(ended, None).tolist() == [True]
    assert stop(other, None).tolist() == [False]
    assert stop(other.expand(2, -1), None).tolist() == [False, False]


def test_where_generate_hands_over_new_tokens_alone_all_of_them_count():
    """As a LLaVA model's does, however long the prompt was."""
    tokenizer = make_tokenizer()
    stop = KeywordsStoppingCriteria(["###"], tokenizer, torch.zeros(1, 2, dtype=torch.long))
    ids = tokenizer("a ###").input_ids
    said = [bool(stop(torch.tensor([ids[:count]]), None)) for count in range(1, len(ids) + 1)]
    assert said == [False] * (len(ids) - 1) + [True]


def test_a_keyword_in_the_prompt_ends_nothing():
    tokenizer = make_tokenizer()
    prompt = torch.tensor([tokenizer("### end ###").input_ids])
    stop = KeywordsStoppingCriteria(["###"], tokenizer, prompt)
    assert stop(torch.cat([prompt, torch.tensor([tokenizer("red").input_ids])], dim=1), None).tolist() == [False]
