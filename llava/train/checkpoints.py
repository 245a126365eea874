"""Checkpoint folders: what an adapter-only stage writes, and which folder a run may continue from."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.model.loading import ADAPTER_FILE
from llava.train.parts import part_of

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"  # the Trainer writes it last, so a checkpoint that has it whole is complete


def save_adapter(state_dict: dict[str, Tensor], config: Any, folder: str) -> None:
    """LLaVA's Stage-I layout: `config.json`, and the adapter's tensors in `mm_projector.bin`, written atomically."""
    os.makedirs(folder, exist_ok=True)
    config.save_pretrained(folder)
    adapter = {
        name: tensor.detach().cpu().clone() for name, tensor in state_dict.items() if part_of(name) == "mm_mlp_adapter"
    }
    temporary = Path(folder) / f".{ADAPTER_FILE}.tmp"
    torch.save(adapter, temporary)
    os.replace(temporary, Path(folder) / ADAPTER_FILE)


def last_complete_checkpoint(output_dir: str, *, remove: bool) -> str | None:
    """The newest `checkpoint-N` whose saving was not interrupted.

    Args:
        remove: delete interrupted ones, with a line each (one process of a run does).

    Raises:
        ValueError: a file of that checkpoint was cut short afterwards.
    """
    folders = sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True)
    for folder in folders:
        if _is_complete(folder):
            _check_readable(folder)
            return str(folder)
        if remove:
            logger.warning("%s: its saving was interrupted; removed.", folder)
            shutil.rmtree(folder)
    return None


def check_output_dir(output_dir: str) -> None:
    """Refuse, before any work is done, a folder that cannot be made."""
    for path in [Path(output_dir), *Path(output_dir).parents]:
        if path.exists():
            if not path.is_dir():
                raise NotADirectoryError(f"--output_dir {output_dir}: {path} is a file, not a folder.")
            if not os.access(path, os.W_OK):
                raise PermissionError(f"--output_dir {output_dir}: {path} is not writable.")
            return


def _step(folder: Path) -> int:
    suffix = folder.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1


def _check_readable(folder: Path) -> None:
    """Weights and optimizer must be whole: both formats keep their table of contents where a cut shows."""
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pt")):
        try:
            if file.suffix == ".safetensors":
                safe_open(file, framework="pt")
            elif not zipfile.is_zipfile(file):
                raise ValueError("not a whole torch file")
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{file} was cut short ({error}). Delete {folder} to continue from an earlier one."
            ) from error


def _is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / TRAINER_STATE).read_text())
    except (OSError, ValueError):
        return False
    return True
