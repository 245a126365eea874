"""For every test."""

import pytest
from PIL import ImageFile


@pytest.fixture(autouse=True)
def _pictures_cut_short_are_broken(monkeypatch):
    """As they are to a user: lmms-eval, which some tests import, has Pillow read them in the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
