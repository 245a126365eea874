"""The pictures of the method page: drawn by the method's own code, and true."""

import torch
from PIL import Image

from comp_patches.packing import patch_coordinates
from playground import pictures


def test_the_page_shows_every_picture_that_is_drawn(tmp_path):
    pictures.main(["--output", str(tmp_path)])
    page = (pictures.ROOT / "docs/method.md").read_text()
    for file in tmp_path.iterdir():
        assert f"](images/{file.name})" in page
        assert (pictures.ROOT / "docs/images" / file.name).is_file()
        with Image.open(file) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_rotary_scores_depend_on_the_distance_alone():
    cols = 7
    coordinates = patch_coordinates([(5, cols)], merge_size=1)
    one, other = (pictures.rotary_score(coordinates, 32, 2, column, cols) for column in (2, 3))
    assert torch.allclose(one[:, :-1], other[:, 1:], atol=1e-5)
    assert one[2, 2] == torch.as_tensor(1.0)
    assert (one <= 1).all()
