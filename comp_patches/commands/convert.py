"""To and from the authors' CoMP-SigLIP, CoMP-DINOv2 and CoMP-MM folders: `python -m comp_patches.convert SOURCE OUT`.

What SOURCE is, its config.json says; OUT is the other format. CoMP-MM comes to ours only. A tower's way there and back
gives the same tensors, bit by bit, under the same keys, and the same config files: what this project has no use for
(the adapter `merger.*`, the class token's row of DINOv2's position table, the authors' own config files) lies in
OUT/release and comes back from there.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comp_patches.checkpoint import (
    PROCESSOR_NAME,
    TensorFiles,
    read_config,
    read_processor_config,
    resolve,
    save_checkpoint,
    write_json,
)
from comp_patches.commands import convert_lmm
from comp_patches.commands.export import check_new
from comp_patches.families import family_of
from comp_patches.families.comp_release import AS_RELEASED
from comp_patches.families.comp_release_writer import (
    RELEASED,
    release_config,
    release_tensors,
    same_tower,
    unused_tensors,
)
from comp_patches.image_processor import NativeImageProcessor
from comp_patches.towers import (
    load_image_processor,
    load_vision_transformer,
    save_vision_transformer,
)
from comp_patches.vision_config import MODEL_TYPE

KEPT = "release"  # folder inside OUT
_ARCHITECTURES = {name for family in RELEASED.values() for name in family.architectures}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, convert."""
    parser = argparse.ArgumentParser(prog="python -m comp_patches.convert", description=__doc__.partition(":")[0])
    parser.add_argument("source", help="folder or hub id: the authors' CoMP-SigLIP, -DINOv2 or -MM, or a tower of ours")
    parser.add_argument("out", help="new folder, in the other of the two formats")
    parser.add_argument(
        "--vision-model", help="CoMP-MM only: folder or hub id of the vision model that its config.json names"
    )
    options = parser.parse_args(arguments)
    from llava.utils import mistakes_in_one_line

    with mistakes_in_one_line():
        run(options.source, Path(options.out), options.vision_model)


def run(source: str, out: Path, vision_model: str | None = None) -> None:
    """Convert in the direction that config.json asks for."""
    check_new(out)
    path = resolve(source, weights=True)
    raw = read_config(path)
    if raw.get("model_type") == MODEL_TYPE:
        to_release(path, out)
    elif set(raw.get("architectures") or ()) & _ARCHITECTURES:
        from_release(path, out)
    elif convert_lmm.ARCHITECTURE in (raw.get("architectures") or ()):
        convert_lmm.from_release(source, path, out, vision_model)
    else:
        raise ValueError(
            f"{path} is in neither format: its config.json has model_type {raw.get('model_type')!r} and architectures "
            f"{raw.get('architectures')}. Expected model_type {MODEL_TYPE!r} (python -m comp_patches.export makes it "
            f"of a LLaVA checkpoint) or one of the architectures "
            f"{', '.join(sorted(_ARCHITECTURES | {convert_lmm.ARCHITECTURE}))}."
        )


def from_release(path: Path, out: Path) -> None:
    """The authors' folder -> ours, with what it holds beyond the tower in OUT/release."""
    tower = load_vision_transformer(str(path))
    files = TensorFiles(path)
    unused = unused_tensors(files, tower.config)
    again = release_tensors(tower.state_dict(), tower.config, unused)
    changed = [key for key in files if key not in again or not _same(again[key], files[key])]
    if changed or len(again) != len(files):
        raise ValueError(f"{path} would not come back as it is: {', '.join(changed[:3])} would differ.")
    save_checkpoint(out / KEPT, read_config(path), unused, read_processor_config(path))
    save_vision_transformer(tower, out, load_image_processor(str(path)))
    print(f"{out}: {tower.config.family} tower; {len(unused)} tensors that it does not use in {out / KEPT}")  # noqa: T201


def to_release(path: Path, out: Path) -> None:
    """Our folder -> the authors'."""
    tower, kept = load_vision_transformer(str(path)), path / KEPT
    config = release_config(tower.config)
    unused: dict[str, Tensor] = {}
    if kept.exists():
        unused = dict(TensorFiles(kept))
        theirs = read_config(kept)
        if same_tower(family_of(theirs).config_from_hf(theirs), tower.config):
            config = theirs  # to the letter
    save_checkpoint(out, config, release_tensors(tower.state_dict(), tower.config, unused))
    processor = load_image_processor(str(path))
    if (kept / PROCESSOR_NAME).exists() and load_image_processor(str(kept)).to_dict() == processor.to_dict():
        shutil.copyfile(kept / PROCESSOR_NAME, out / PROCESSOR_NAME)
    else:
        write_json(out / PROCESSOR_NAME, _qwen2_vl_processor(processor))
    print(f"{out}: {', '.join(config['architectures'])}")  # noqa: T201
    other = [name for name, value in AS_RELEASED.items() if getattr(tower.config, name) != value]
    if other:
        said = ", ".join(f"{name}={getattr(tower.config, name)}" for name in other)
        print(f"note: the tower has {said}; the authors' code takes no notice of that, this project's does")  # noqa: T201


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _qwen2_vl_processor(processor: NativeImageProcessor) -> dict[str, Any]:
    """The preprocessor_config.json that the authors' code reads: Qwen2-VL's, an image being one frame."""
    block = (processor.patch_size * processor.merge_size) ** 2
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "min_pixels": processor.min_num_vistoken * block,
        "max_pixels": processor.max_num_vistoken * block,
        "patch_size": processor.patch_size,
        "merge_size": processor.merge_size,
        "temporal_patch_size": 1,
    }
