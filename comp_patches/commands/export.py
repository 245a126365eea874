"""Take the vision tower out of a trained LLaVA checkpoint: `python -m comp_patches.export CHECKPOINT OUT`.

OUT is a folder that `--vision_tower comp-NAME:OUT`, `load_vision_transformer` and, after `import comp_patches.hf`,
`AutoModel` and `AutoImageProcessor` read.
"""

import argparse
from pathlib import Path
from typing import Any

from comp_patches.checkpoint import read_config, resolve
from comp_patches.image_processor import NativeImageProcessor
from comp_patches.towers import build_image_processor, load_vision_transformer, save_vision_transformer
from comp_patches.vision_config import VisionTransformerConfig
from comp_patches.vision_transformer import PackedVisionTransformer

LORA_CONFIG_FILE = "adapter_config.json"  # of a folder that holds LoRA weights alone
ADAPTER_FILE = "mm_projector.bin"  # LLaVA's mark of a folder that holds the adapter alone


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, export."""
    parser = argparse.ArgumentParser(prog="python -m comp_patches.export", description=__doc__.partition(":")[0])
    parser.add_argument("checkpoint", help="folder or hub id of a LLaVA checkpoint of this project, any stage's")
    parser.add_argument("out", help="new folder")
    options = parser.parse_args(arguments)
    from llava.utils import mistakes_in_one_line

    with mistakes_in_one_line():
        run(options.checkpoint, Path(options.out))


def run(checkpoint: str, out: Path) -> None:
    """Read the tower and its image processor, write them."""
    check_new(out)
    tower, processor = read_tower(checkpoint)
    save_vision_transformer(tower, out, processor)
    count = sum(parameter.numel() for parameter in tower.parameters())
    print(f"{out}: {tower.config.family} tower of {count:,} parameters from {checkpoint}")  # noqa: T201


def check_new(out: Path) -> None:
    """Refuse a folder in which something lies: a config.json of another model would be overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty. Give a new folder as OUT, or delete it.")


def read_tower(checkpoint: str) -> tuple[PackedVisionTransformer, NativeImageProcessor]:
    """The tower as the checkpoint left it, and the processor with the bounds of its training."""
    path = resolve(checkpoint, weights=True)
    raw = read_config(path)
    if "mm_vision_config" not in raw:
        raise ValueError(
            f"{path} is no LLaVA checkpoint of this project: its config.json (model_type {raw.get('model_type')!r}) "
            "has no mm_vision_config. Expected an output folder of llava.train."
        )
    config = VisionTransformerConfig.from_dict(raw["mm_vision_config"])
    options = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    tower = load_vision_transformer(_weights_of(path, raw), **options)
    return tower, build_image_processor(config, **raw.get("mm_image_processor") or {})


def _weights_of(path: Path, raw: dict[str, Any]) -> str:
    """Where the tower's weights are. Stage I trains and saves the adapter alone: its tower is the one it began with."""
    if (path / LORA_CONFIG_FILE).exists():
        raise ValueError(
            f"{path} holds LoRA weights, not a model. Merge them, then export MERGED: "
            f"python -m llava.merge_lora_weights --model-path {path} --save-model-path MERGED"
        )
    if not (path / ADAPTER_FILE).exists():
        return str(path)
    base = raw.get("mm_base_model")
    if base is None:
        raise ValueError(f"{path} holds an adapter alone, and its config.json has no mm_base_model to say over what.")
    base_is_llava = "mm_vision_config" in read_config(resolve(base, weights=False))
    return base if base_is_llava else raw["mm_vision_tower"]
