"""The picture of words nearest to visual tokens: the right words at the right places, readable, or one clear line."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from comp_patches.commands.alignment_picture import Lettering, cell_size, draw, missing_letters
from comp_patches.commands.show_alignment import main
from comp_patches.image_processor import NativeImageProcessor
from llava.eval.models import load_checkpoint
from llava.inspection import as_seen, vocabulary
from llava.mm_utils import load_image
from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, run_stage
from tests.llava import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny trained model whose output embeddings are not its input ones."""
    root = tmp_path_factory.mktemp("aligned")
    llm, siglip = tiny.save_llm(root / "llm", tie=False), tiny.save_siglip(root / "siglip")
    data = tiny.save_data(root / "data")
    changes = tiny.FULL_STAGE | {"max_steps": 1, "force_resize": "none"}
    run_stage(*build_stage(*parse_arguments(tiny.stage_arguments(llm, siglip, data, root / "full", **changes))))
    return root / "full"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """96 x 48 pixels of coloured noise: 3 rows and 6 columns of visual tokens of 16 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 3), dtype=np.uint8)
    file = tmp_path_factory.mktemp("image") / "noise.png"
    Image.fromarray(pixels).resize((96, 48), Image.Resampling.NEAREST).save(file)
    return file


@pytest.fixture(scope="module")
def cosines(checkpoint, image):
    """Word -> its cosines (3, 6) with the image's tokens, the nearest spelling's, by plain float64 arithmetic."""
    loaded = load_checkpoint(str(checkpoint), device="cpu")
    with torch.no_grad():
        tokens = loaded.model.get_model().encode_images(**loaded.image_processor([load_image(image)]))
    ids, texts = vocabulary(loaded.tokenizer)
    words = loaded.model.lm_head.weight.detach()[ids].double().numpy()
    tokens = tokens.double().numpy()
    scores = tokens @ words.T / np.linalg.norm(tokens, axis=1)[:, None] / np.linalg.norm(words, axis=1)
    by_word = {}
    for text, column in zip(texts, scores.T.reshape(-1, 3, 6), strict=True):
        by_word[text] = np.maximum(by_word.get(text, -1), column)
    assert len(by_word) < len(texts), "a word with two spellings should be among them"
    return by_word


@pytest.fixture
def drawn(monkeypatch):
    """Brush -> all that it wrote, (place, text, font); it is really drawn. Words come first, then the heat map."""
    written = {}
    text_of_pillow = ImageDraw.ImageDraw.text

    def record(self, xy, text, fill=None, font=None, **options):
        written.setdefault(self, []).append((xy, text, font))
        return text_of_pillow(self, xy, text, fill, font, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return written


def texts_in_cells(drawn, panel, rows, columns, top=1):
    """Rows of columns of the texts, from top to bottom, that a panel shows in its cells."""
    cell = cell_size(rows, columns, top)
    found = [[[] for _ in range(columns)] for _ in range(rows)]
    for (x, y), text, _ in sorted(list(drawn.values())[panel], key=lambda entry: entry[0][1]):
        found[int(y // cell)][int(x // cell)].append(text)
    return found


def test_the_words_drawn_are_the_nearest_ones(checkpoint, image, cosines, drawn, tmp_path, capsys):
    main([str(checkpoint), str(image), str(tmp_path / "out.png"), "--device", "cpu"])
    names, values = list(cosines), np.stack(list(cosines.values()))
    expected = [[[names[best]] for best in line] for line in values.argmax(axis=0)]
    assert texts_in_cells(drawn, 0, 3, 6) == expected
    assert len({cell[0] for line in expected for cell in line}) > 3, "should differ from place to place"
    assert "3 rows x 6 columns" in capsys.readouterr().out
    with Image.open(tmp_path / "out.png") as picture:
        picture.load()
        assert picture.width > 6 * cell_size(3, 6, 1)


def test_several_words_come_nearest_first_and_none_twice(checkpoint, image, cosines, drawn, tmp_path):
    main([str(checkpoint), str(image), str(tmp_path / "out.png"), "--top", "4", "--device", "cpu"])
    names, values = list(cosines), np.stack(list(cosines.values()))
    order = (-values).argsort(axis=0)[:4]
    expected = [[[names[place] for place in order[:, row, column]] for column in range(6)] for row in range(3)]
    assert texts_in_cells(drawn, 0, 3, 6, top=4) == expected


def test_the_heat_map_shows_the_cosine_with_the_word(checkpoint, image, cosines, drawn, tmp_path, capsys):
    main([str(checkpoint), str(image), str(tmp_path / "out.png"), "--word", "red", "--device", "cpu"])
    red = cosines["red"]
    figures = texts_in_cells(drawn, 1, 3, 6)
    np.testing.assert_allclose([[float(cell[0]) for cell in line] for line in figures], red, atol=0.0051)
    row, column = np.unravel_index(red.argmax(), red.shape)
    assert f"highest in row {row + 1}, column {column + 1}" in capsys.readouterr().out
    # Lightest where the cosine is the highest, darkest where it is the lowest: at a corner of the cell, off its figure.
    cell = cell_size(3, 6, 1)
    with Image.open(tmp_path / "out.png") as picture:
        panel = np.asarray(picture.convert("L"))[-24 - 3 * cell : -24, -24 - 6 * cell : -24]
    corners = panel[5::cell, 5::cell].astype(int)
    assert corners.shape == (3, 6)
    assert np.corrcoef(corners.ravel(), red.ravel())[0, 1] > 0.8


@pytest.mark.parametrize("force_resize", [None, 64])
def test_the_image_is_drawn_as_the_model_saw_it(image, force_resize):
    processor = NativeImageProcessor(patch_size=8, image_mean=(0.4, 0.5, 0.6), force_resize=force_resize)
    picture = load_image(image).crop((0, 0, 90, 42))
    expected = picture
    if force_resize:
        expected = expected.resize((64, 64), Image.Resampling.BICUBIC)
    else:
        expected = expected.resize((96, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(as_seen(picture, processor)), np.asarray(expected))


def test_fewer_visual_tokens_on_request(checkpoint, image, drawn, tmp_path):
    main([str(checkpoint), str(image), str(tmp_path / "out.png"), "--max-num-vistoken", "8", "--device", "cpu"])
    texts = [text for entries in drawn.values() for _, text, _ in entries]
    assert "2 x 4 = 8 visual tokens" in texts


def test_the_command_as_it_is_typed(checkpoint, image, tmp_path):
    arguments = [str(checkpoint), str(image), str(tmp_path / "new/out.png"), "--word", "square", "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "comp_patches.show_alignment", *arguments], check=True, capture_output=True)
    with Image.open(tmp_path / "new/out.png") as picture:
        assert picture.format == "PNG"
        picture.load()


@pytest.fixture
def mistakes(checkpoint, image, tmp_path):
    """Name -> (arguments after changes, what the line must say)."""
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    good = {"model": checkpoint, "image": image, "out": tmp_path / "out.png"}
    llm = tiny.save_llm(tmp_path / "llm")
    cases = {
        "unknown word": ({}, ["--word", "yelow"], ["'yelow'", "no single token", "Near it are: yellow"]),
        "outlandish word": ({}, ["--word", "\u4e2d\u4e2d"], ["no single token", "Nothing is near it"]),
        "no image": ({"image": tmp_path / "none.png"}, [], ["none.png", "not found"]),
        "not an image": ({"image": tmp_path / "text.png"}, [], ["text.png"]),
        "no picture's name": ({"out": tmp_path / "out.gif"}, [], ["out.gif", ".png"]),
        "a folder": ({"out": tmp_path / "folder.png"}, [], ["folder.png", ".png"]),
        "no checkpoint": ({"model": tmp_path / "none"}, [], ["none"]),
        "a bare LLM": ({"model": llm}, [], ["no vision tower"]),
        "a folder of stages": ({"model": checkpoint.parent}, [], ["holds some", str(checkpoint)]),
        "no font": ({}, ["--font", str(tmp_path / "text.png")], ["--font", "text.png"]),
        "below a file": ({"out": tmp_path / "text.png" / "out.png"}, [], ["text.png/out.png", "which is a file"]),
        "no kind of device": ({}, ["--device", "gpu"], ["--device gpu", "cpu"]),
        "no such device": ({}, ["--device", "cuda:77"], ["--device cuda:77"]),
        "too few tokens": ({}, ["--max-num-vistoken", "1"], ["max_num_vistoken=1"]),
    }
    return {
        name: ([*map(str, (good | change).values()), *flags], words) for name, (change, flags, words) in cases.items()
    }


MISTAKES = (
    "unknown word", "outlandish word", "no image", "not an image", "no picture's name", "a folder", "no checkpoint",
    "a bare LLM", "a folder of stages", "no font", "below a file", "no kind of device", "no such device",
    "too few tokens",
)  # fmt: skip
WITH_THE_MODEL = ("a bare LLM", "a folder of stages", "no checkpoint", "too few tokens")


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_the_old_picture_stays(mistakes, tmp_path, name, monkeypatch):
    arguments, words = mistakes[name]
    if name not in WITH_THE_MODEL:  # loading one would be an error of another kind
        monkeypatch.delattr("llava.eval.models.load_pretrained_model")
    (tmp_path / "out.png").write_bytes(b"old")
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cpu", *arguments])
    assert isinstance(stopped.value.code, str), "sys.exit(text) prints the text on stderr and exits with 1"
    assert "\n" not in stopped.value.code
    for word in words:
        assert word in stopped.value.code
    assert (tmp_path / "out.png").read_bytes() == b"old"


def test_every_mistake_is_tried(mistakes):
    assert tuple(mistakes) == MISTAKES


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(checkpoint, image, tmp_path, monkeypatch):
    def full_disk(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    (tmp_path / "out.png").write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(SystemExit, match="No space left"):
        main([str(checkpoint), str(image), str(tmp_path / "out.png"), "--device", "cpu"])
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(("rows", "columns", "top"), [(37, 37, 1), (37, 37, 3), (2, 60, 1), (1, 1, 5), (9, 1, 2)])
def test_words_of_any_grid_can_be_read_in_their_cells(drawn, rows, columns, top):
    """Letters of 10 pixels at least; a usual word is not cut, the longest is; nothing leaves its cell."""
    words = ["the", "triangle", "Photograph", "Donaudampfschifffahrt", "diagram"]
    grid = [
        [[(words[(row + column + place) % 5], 0.5) for place in range(top)] for column in range(columns)]
        for row in range(rows)
    ]
    draw(Image.new("RGB", (28 * columns, 28 * rows)), grid, Lettering(), title="t", word="the", cosines=None)
    cell = cell_size(rows, columns, top)
    shown = next(iter(drawn.values()))
    assert len(shown) == rows * columns * top
    for (x, y), text, font in shown:
        left, above, right, below = font.getbbox(text, anchor="mm")
        assert font.size >= 10
        assert x // cell == (x + left) // cell == (x + right) // cell
        assert y // cell == (y + above) // cell == (y + below) // cell
        assert text in words or (text.endswith("...") and words[3].startswith(text[:-3]))


def test_letters_that_the_font_lacks_are_counted(checkpoint, image, tmp_path, capsys, monkeypatch):
    lettering = Lettering()
    assert missing_letters([[[("red", 0.1), ("\u4e2d", 0.1)], [("\u4e2d", 0.1), ("\U0010fffe", 0.1)]]], lettering) == 2
    assert lettering.has("A z_9")
    main([str(checkpoint), str(image), str(tmp_path / "out.png"), "--device", "cpu"])
    assert "--font" not in capsys.readouterr().out
