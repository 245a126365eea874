"""Make one checkpoint of LoRA weights and the model below: `python -m llava.merge_lora_weights --model-path LORA ...`.

Flags and name are LLaVA's. The merging is done in float32; the weights are saved in the type that they were trained in.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch

from llava.model.builder import load_pretrained_model
from llava.model.loading import load_config, local_folder
from llava.model.lora import LORA_CONFIG_FILE, is_lora_folder
from llava.utils import check_new_folder, mistakes_in_one_line


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m llava.merge_lora_weights", description=__doc__.partition(":")[0])
    parser.add_argument("--model-path", required=True, help="folder that a training with --lora_enable left")
    parser.add_argument("--model-base", help="the model below; default: the one that the folder names")
    parser.add_argument("--save-model-path", required=True, help="new folder")
    options = parser.parse_args(argv)
    with mistakes_in_one_line():
        merge(options.model_path, options.model_base, Path(options.save_model_path))


def merge(model_path: str, model_base: str | None, out: Path) -> None:
    """Load, merge, and write a full checkpoint, which appears whole or not at all."""
    model_path = local_folder(model_path)
    if not is_lora_folder(model_path):
        raise ValueError(f"--model-path {model_path} holds no {LORA_CONFIG_FILE}, so there is nothing to merge.")
    check_new_folder(out, f"--save-model-path {out}")
    dtype = load_config(model_path).dtype or torch.float32
    tokenizer, model, _, _ = load_pretrained_model(model_path, model_base, device="cpu", torch_dtype="float32")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        model.to(dtype).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)  # mkdtemp's folder is private
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{out}: a full checkpoint of {sum(p.numel() for p in model.parameters()):,} parameters")  # noqa: T201


if __name__ == "__main__":
    main()
