"""Parts that several tests share. Each is made once a session and never written to."""

from pathlib import Path

import pytest
import torch

from tests.llava import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llm(tmp_path_factory) -> Path:
    return tiny.save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def siglip(tmp_path_factory) -> Path:
    return tiny.save_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return tiny.save_data(tmp_path_factory.mktemp("data") / "squares")
