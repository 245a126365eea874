"""Checkpoint folders: config.json, and tensors in one file or several with an index.

safetensors are read and written; PyTorch's .bin, in which some hub repositories still come (CLIP's), is read only.
"""

import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG_NAME = "config.json"
PROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"


def resolve(name_or_path: str, *, weights: bool) -> Path:
    """The local path of a checkpoint; a hub id is downloaded (config only, unless `weights`)."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise ValueError(
            f"No checkpoint at {name_or_path!r}. Expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, "
            "a .safetensors file beside its config.json, or a hub id such as google/siglip-so400m-patch14-384."
        )
    return _download(name_or_path, weights=weights)


def _download(repo_id: str, *, weights: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{repo_id!r} is no local path, and the hub needs a package: pip install huggingface_hub"
        ) from error
    configs = [CONFIG_NAME, PROCESSOR_NAME]
    safetensors, pickles = ["model*.safetensors", INDEX_NAME], ["pytorch_model*.bin", PICKLE_INDEX_NAME]
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=configs + (safetensors if weights else [])))
        if weights and not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(repo_id, allow_patterns=configs + pickles))
        return folder
    except Exception as error:  # the hub's errors have many classes; the cause stays attached
        raise ValueError(
            f"Could not fetch {repo_id!r} from the hub ({type(error).__name__}). Is the name right, and is there a "
            "network? A local folder works too, as name:./folder."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a ValueError that says where it breaks."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: a checkpoint folder needs it.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, found a {type(content).__name__}.")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, or of the folder that a weights file lies in."""
    return read_json(_folder(path) / CONFIG_NAME)


def read_processor_config(path: Path) -> dict[str, Any]:
    """preprocessor_config.json, or nothing where a checkpoint has none."""
    file = _folder(path) / PROCESSOR_NAME
    return read_json(file) if file.exists() else {}


class TensorFiles(Mapping[str, Tensor]):
    """All tensors of a checkpoint by key, each read from disk when asked for."""

    def __init__(self, path: Path):
        self._file_of: dict[str, Path] = {}
        self._pickles: dict[Path, dict[str, Tensor]] = {}
        for file in _weight_files(path):
            if file.suffix == ".bin":
                self._pickles[file] = _read_pickle(file)
                keys = list(self._pickles[file])
            else:
                keys = _read(file, lambda tensors: list(tensors.keys()))
            self._file_of |= dict.fromkeys(keys, file)

    def __getitem__(self, key: str) -> Tensor:
        file = self._file_of[key]
        if file in self._pickles:
            return self._pickles[file][key]
        return _read(file, lambda tensors: tensors.get_tensor(key))

    def __iter__(self):
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def save_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], processor: dict[str, Any] | None = None
) -> None:
    """Write model.safetensors, preprocessor_config.json if there is one, and config.json, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_NAME, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    if processor:
        write_json(folder / PROCESSOR_NAME, processor)
    write_json(folder / CONFIG_NAME, config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON object, indented."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a killed run leaves the old file or the new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)  # mkstemp's file is private
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for single, index in ((WEIGHTS_NAME, INDEX_NAME), (PICKLE_NAME, PICKLE_INDEX_NAME)):
        if (path / single).exists():
            return [path / single]
        if (path / index).exists():
            return _shards(path, index)
    raise ValueError(f"{path} holds no {WEIGHTS_NAME} and no {INDEX_NAME}, nor the same as {PICKLE_NAME}.")


def _shards(folder: Path, index: str) -> list[Path]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{folder / index} has no weight_map, so it does not say which file holds which tensor.")
    files = sorted({folder / name for name in weight_map.values()})
    for file in files:
        if file.parent != folder or not file.exists():
            raise ValueError(f"{folder / index} names {file}, which is missing or outside the folder.")
    return files


def _read(file: Path, read: Callable[[Any], Any]) -> Any:
    try:
        with safe_open(file, framework="pt") as tensors:
            return read(tensors)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}. Was it cut short? Copy it again.") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """A .bin file: tensors and nothing else is unpickled, and they stay on disk until used where the format allows."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read as a file of tensors: {reason} Was it cut short?") from error
