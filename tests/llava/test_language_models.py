"""Every LLM family: packed rows compute what transformers' own class computes, and a checkpoint keeps its answers."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.model.language_model import OF_BARE_LLMS
from llava.model.loading import load_config, load_weights
from tests.llava import tiny
from tests.llava.ranks import train_alone

SMALL = {
    "vocab_size": 328,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OWN = {
    "mixtral": {"num_local_experts": 3, "sliding_window": None},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": EXPERTS,
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
}


@pytest.fixture(scope="module", params=sorted(OF_BARE_LLMS))
def bare(request, tmp_path_factory):
    """A checkpoint of the family as transformers writes it, with the tiny tokenizer."""
    folder = tiny.save_llm(tmp_path_factory.mktemp(request.param) / "bare")
    family = request.param
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | OWN.get(family, {})))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def keys_of(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return set(tensors.keys())


def test_a_packed_row_is_its_samples_one_by_one(bare):
    """Samples longer and shorter than the window where the family has one."""
    reference = AutoModelForCausalLM.from_pretrained(bare).eval()
    model = load_weights(str(bare), load_config(str(bare))).eval()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 320, (length,), generator=generator) for length in (19, 1, 5)]
    hidden = model._run_packed(
        [0, 19, 20, 25],
        input_ids=torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
    )
    packed = model.lm_head(hidden)[0].split([len(row) for row in rows])
    for row, logits in zip(rows, packed, strict=True):
        torch.testing.assert_close(logits, reference(row[None]).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bare", ["qwen2", "mistral"], indirect=True)
def test_a_longer_context_by_yarn_is_kept(bare):
    """LLaVA's Qwen and Mistral set rope_scaling to None as they are built."""
    config = json.loads((bare / "config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    (bare / "config.json").write_text(json.dumps(config | {"rope_parameters": yarn}))
    try:
        reference = AutoModelForCausalLM.from_pretrained(bare).eval()
        model = load_pretrained_model(str(bare), device="cpu")[1]
    finally:
        (bare / "config.json").write_text(json.dumps(config))
    assert model.config.rope_parameters["factor"] == 4.0
    ids = torch.arange(30)[None]
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-6)
    plain = load_pretrained_model(str(bare), device="cpu")[1]
    assert (plain(ids).logits - model(ids).logits).abs().max() > 2e-5


def test_a_model_trains_and_a_copy_of_its_checkpoint_answers_alike(bare, siglip, data, tmp_path):
    out = tmp_path / "out"
    family = json.loads((bare / "config.json").read_text())["model_type"]
    flags = tiny.FULL_STAGE | {"force_resize": "none", "max_steps": 2}
    train_alone(tiny.stage_arguments(bare, siglip, data, out, **flags))
    model_type = json.loads((out / "config.json").read_text())["model_type"]
    assert model_type == OF_BARE_LLMS[family].config_class.model_type
    assert keys_of(bare) <= keys_of(out)  # the experts of a mixture one by one, as everywhere
    copy = out.rename(tmp_path / "k3j9")
    _, model, _, _ = load_pretrained_model(str(copy), device="cpu")
    assert type(model) is OF_BARE_LLMS[family]
    pixels, grids = torch.randn(8 + 16, 3 * 8 * 8), torch.tensor([[1, 2, 4], [1, 4, 4]])
    prompts = [torch.tensor([5, IMAGE_TOKEN_INDEX, 9, 11]), torch.tensor([IMAGE_TOKEN_INDEX, 7])]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(prompts, pixel_values=pixels, image_grid_thw=grids, **options)
    alone = [
        model.generate([prompt], pixel_values=part, image_grid_thw=grid[None], **options)[0]
        for prompt, part, grid in zip(prompts, pixels.split([8, 16]), grids, strict=True)
    ]
    assert torch.equal(together, torch.stack(alone))
