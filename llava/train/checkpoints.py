"""Checkpoint folders: what an adapter-only stage writes, whether a save is whole, where a run may continue from."""

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
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava.model.loading import ADAPTER_FILE
from llava.model.lora import OTHERS_FILE
from llava.model.sharding import full_shape
from llava.train.lora import has_lora, saved_tensors
from llava.train.parts import AUXILIARY, part_of
from llava.train.run_card import FILE as RUN_CARD
from llava.utils import write_atomically

logger = logging.getLogger(__name__)

AUXILIARY_FILE = "auxiliary_losses.safetensors"
TRAINER_STATE = "trainer_state.json"  # the Trainer writes it last, so a checkpoint that has it whole is complete


def save_adapter(projector: nn.Module, config: Any, folder: str) -> None:
    """LLaVA's Stage-I layout: `config.json`, and the adapter's tensors in `mm_projector.bin`, written atomically."""
    os.makedirs(folder, exist_ok=True)
    config.save_pretrained(folder)
    weights = {
        f"model.mm_projector.{name}": tensor.detach().cpu().clone() for name, tensor in projector.state_dict().items()
    }
    write_atomically(Path(folder) / ADAPTER_FILE, lambda file: torch.save(weights, file))


def save_auxiliary_losses(losses: nn.Module, folder: str) -> None:
    """What losses have learnt (`--alignment_prototypes learnable`), for a run that continues from this checkpoint."""
    weights = losses.state_dict()
    if weights:
        write_atomically(Path(folder) / AUXILIARY_FILE, lambda file: save_file(weights, file))


def load_auxiliary_losses(losses: nn.Module, folder: str) -> None:
    """Fill them again."""
    if losses.state_dict():
        losses.load_state_dict(load_file(Path(folder) / AUXILIARY_FILE))


def check_saved_weights(folder: str, model: nn.Module, *, adapter_only: bool) -> None:
    """Look into the files that were just written: each of the model's weights must be there with its full shape."""
    if has_lora(model):
        expected = {name: full_shape(parameter) for name, parameter in saved_tensors(model).items()}
        found = _model_shapes(folder) | _torch_shapes(folder, OTHERS_FILE)
    else:
        expected = {
            name: full_shape(parameter)
            for name, parameter in model.named_parameters()
            if part_of(name) == "mm_mlp_adapter" or not (adapter_only or part_of(name) == AUXILIARY)
        }
        expected = _as_in_files(model, expected)
        found = _torch_shapes(folder, ADAPTER_FILE) if adapter_only else _model_shapes(folder)
    wrong = [name for name, shape in expected.items() if found.get(name) != shape]
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} of {len(expected)} weights were not saved whole, the first {wrong[0]}: "
            f"{found.get(wrong[0], 'missing')} in the file, {expected[wrong[0]]} in the model. Continue from an "
            "earlier checkpoint, or without sharding (--deepspeed scripts/zero2.json)."
        )


def last_complete_checkpoint(output_dir: str, *, remove: bool) -> str | None:
    """The newest `checkpoint-N` that is whole.

    Args:
        remove: delete those whose saving was interrupted, with a line each (one process of a run does). Only where a
            run of ours began: another program's checkpoints may look like that and are left alone.

    Raises:
        ValueError: A file of the only complete one was cut short afterwards.
    """
    named = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    found = [path for path in named if path.is_dir() and step_of(path) >= 0]
    remove = remove and (Path(output_dir) / RUN_CARD).exists()
    unreadable = None
    for folder in sorted(found, key=step_of, reverse=True):
        if _is_complete(folder):
            try:
                _check_readable(folder)
            except ValueError as error:
                logger.warning("%s", error)
                unreadable = unreadable or error
                continue
            return str(folder)
        if remove:
            logger.warning("%s: its saving was interrupted; removed.", folder)
            shutil.rmtree(folder)
    if unreadable:
        raise unreadable
    return None


def step_of(folder: str | Path) -> int:
    """After how many steps the checkpoint `checkpoint-N` was saved; -1 for a folder of another name."""
    suffix = Path(folder).name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1


def check_sharding(checkpoint: str, *, deepspeed: bool, world_size: int) -> None:
    """Refuse other optimizer shards than DeepSpeed wrote, before it finds out with the model loaded."""
    shards = len(list(Path(checkpoint).glob("global_step*/*_optim_states.pt")))
    here = world_size if deepspeed else 0
    if shards != here:
        before, now = (f"{n} process(es) with DeepSpeed" if n else "a run without DeepSpeed" for n in (shards, here))
        raise ValueError(
            f"{checkpoint} is of {before}, this start is {now}: the optimizer's state does not fit. Continue with as "
            "many, or begin a new run from its weights (--model_name_or_path, another --output_dir)."
        )


def _as_in_files(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A model's names and shapes -> those of its files, which hold a mixture's experts one by one."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, tensors).items()}


def _torch_shapes(folder: str, file: str) -> dict[str, tuple[int, ...]]:
    weights = torch.load(Path(folder) / file, map_location="cpu", weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _model_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:  # reads the headers alone
            names = tensors.keys()
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    return shapes


def _check_readable(folder: Path) -> None:
    """Weights and optimizer must be whole: both formats keep their table of contents where a cut shows."""
    for file in folder.rglob("*"):  # DeepSpeed's lie one folder deeper
        if file.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            continue
        try:
            if file.suffix == ".safetensors":
                safe_open(file, framework="pt")
            elif not zipfile.is_zipfile(file):
                raise ValueError("not a whole torch file")
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{file} was cut short ({error}). Without an earlier checkpoint, delete {folder} to start anew."
            ) from error


def _is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / TRAINER_STATE).read_text())
    except (OSError, ValueError):
        return False
    return True
