"""`load_pretrained_model` as LLaVA's callers call it: their arguments, their return value, and what a folder holds."""

import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.model.loading import load_config
from tests.llava import tiny
from tests.llava.ranks import train_alone


@pytest.fixture(scope="module")
def full(llm, siglip, data, tmp_path_factory):
    """A trained LLaVA checkpoint."""
    folder = tmp_path_factory.mktemp("full") / "out"
    train_alone(tiny.stage_arguments(llm, siglip, data, folder, **tiny.FULL_STAGE, max_steps=1))
    return folder


@pytest.fixture
def adapter(llm, siglip, data, tmp_path):
    """A Stage-I folder as LLaVA writes it: without a tokenizer."""
    train_alone(tiny.stage_arguments(llm, siglip, data, tmp_path / "adapter", max_steps=1))
    for file in (tmp_path / "adapter").glob("*token*"):
        file.unlink()
    return tmp_path / "adapter"


def test_the_signature_is_llavas():
    parameters = inspect.signature(load_pretrained_model).parameters
    assert list(parameters)[:10] == [
        "model_path", "model_base", "model_name", "load_8bit", "load_4bit", "device_map", "torch_dtype",
        "attn_implementation", "customized_config", "overwrite_config",
    ]  # fmt: skip
    assert {"device", "multimodal", "use_flash_attn"} <= set(parameters)


def test_llava_next_calls_and_lmms_evals_give_the_four_values(full):
    """By position, as llava.eval does; by keyword, as lmms-eval does. Any model_name."""
    by_place = load_pretrained_model(str(full), None, "llava_qwen", False, False, "cpu", "float32", "sdpa")
    by_name = load_pretrained_model(
        str(full), None, "any name", device_map="cpu", multimodal=True, attn_implementation="sdpa",
        overwrite_config={"mm_spatial_pool_stride": 3, "mm_spatial_pool_mode": "average"},
    )  # fmt: skip
    for tokenizer, model, image_processor, context_len in (by_place, by_name):
        assert tokenizer("red").input_ids
        assert not model.training
        assert image_processor.patch_size == 8
        assert context_len == 512
    assert by_name[1].config.mm_spatial_pool_stride == 3
    ids = torch.arange(5)[None]
    assert torch.equal(by_place[1](ids).logits, by_name[1](ids).logits)


@pytest.mark.parametrize("multimodal", [True, False])
def test_a_bare_llm_is_loaded_whatever_multimodal_says(llm, multimodal):
    _, model, image_processor, _ = load_pretrained_model(str(llm), None, "qwen", device="cpu", multimodal=multimodal)
    assert image_processor is None
    assert model.get_vision_tower() is None


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp16", torch.float16), ("float16", torch.float16), ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16),
     ("float32", torch.float32), ("torch.float32", torch.float32), ("auto", torch.float32),
     (torch.bfloat16, torch.bfloat16), (None, torch.float32)],
)  # fmt: skip
def test_dtypes_by_name(full, name, dtype):
    model = load_pretrained_model(str(full), torch_dtype=name, device_map="cpu")[1]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}  # the tower too


def test_an_unknown_dtype_is_an_error_and_no_debugger(full):
    with pytest.raises(ValueError, match=r"torch_dtype='float8' is unknown. Known: auto, float32, fp32, float16"):
        load_pretrained_model(str(full), torch_dtype="float8")


def test_devices_of_every_form(full):
    for where in ("cpu", torch.device("cpu"), {"": "cpu"}):
        assert load_pretrained_model(str(full), device_map=where)[1].device.type == "cpu"
    assert load_pretrained_model(str(full), device_map="cuda:7", device="cpu")[1].device.type == "cpu"


def test_a_map_over_several_devices_gives_the_same_answer(full):
    whole = load_pretrained_model(str(full), device="cpu")[1]
    spread = {"model.vision_tower": "cpu", "model.mm_projector": "cpu", "model.embed_tokens": "cpu", "lm_head": "cpu"}
    spread |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    split = load_pretrained_model(str(full), device_map=spread)[1]
    assert split.hf_device_map["model.layers.1"] == "disk"
    ids = torch.arange(5)[None]
    assert torch.equal(split(ids).logits, whole(ids).logits)


@pytest.mark.parametrize(("option", "text"), [("load_8bit", "load_8bit=True"), ("load_4bit", "load_4bit=True")])
def test_without_bitsandbytes_one_line_says_so(full, monkeypatch, option, text):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=rf"^{text} needs bitsandbytes: pip install bitsandbytes"):
        load_pretrained_model(str(full), **{option: True})


def test_both_widths_at_once_are_refused(full):
    with pytest.raises(ValueError, match="load_8bit and load_4bit are both True"):
        load_pretrained_model(str(full), load_8bit=True, load_4bit=True)


def test_flash_attention_where_it_cannot_run_is_an_error(full):
    with pytest.raises(ValueError, match="flash_attention_2 needs an NVIDIA GPU"):
        load_pretrained_model(str(full), device="cpu", use_flash_attn=True)


def test_a_config_of_ones_own(llm):
    config = AutoConfig.from_pretrained(llm)
    config.max_position_embeddings = 77
    assert load_pretrained_model(str(llm), device="cpu", customized_config=config)[3] == 77


def test_a_stage_one_folder_takes_llm_tower_and_tokenizer_from_below(adapter, llm):
    tokenizer, model, image_processor, _ = load_pretrained_model(str(adapter), str(llm), "llava_qwen", device="cpu")
    assert tokenizer("red").input_ids == AutoTokenizer.from_pretrained(llm)("red").input_ids
    assert torch.equal(
        model.get_model().mm_projector.state_dict()["0.weight"],
        torch.load(adapter / "mm_projector.bin", weights_only=True)["model.mm_projector.0.weight"],
    )
    assert image_processor is not None


def test_a_checkpoint_without_a_tower_takes_the_towers_own_weights(full, siglip, tmp_path, caplog):
    """LLaVA's checkpoints that never trained the tower."""
    tensors = load_file(full / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if ".vision_tower." not in key}
    for file in full.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_text(file.read_text())
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level("INFO"):
        _, model, _, _ = load_pretrained_model(str(tmp_path), device="cpu")
    assert f"its weights come from comp-siglip:{siglip}" in caplog.text
    positions = load_file(siglip / "model.safetensors")["embeddings.position_embedding.weight"]
    assert torch.equal(model.get_vision_tower().vision_tower.position_embedding.weight, positions)
    name = next(name for name in kept if "mm_projector" in name)
    save_file(
        {key: kept[key] for key in kept if key != name}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=rf"lacks 1 weight\(s\) of the model, the first {name}"):
        load_pretrained_model(str(tmp_path), device="cpu")


def test_image_tokens_of_older_checkpoints_are_added(full, tmp_path):
    """`mm_use_im_patch_token` and `mm_use_im_start_end`; the vocabulary grows only as far as it must."""
    for file in full.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((full / "config.json").read_text())
    changes = {"mm_use_im_patch_token": True, "mm_use_im_start_end": True}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    tokenizer, model, _, _ = load_pretrained_model(str(tmp_path), device="cpu")
    plain = AutoTokenizer.from_pretrained(full)
    assert tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == [
        len(plain) + number for number in range(3)
    ]
    assert model.get_input_embeddings().num_embeddings == max(328, len(plain) + 3)


def test_llavas_first_name_for_its_config_is_understood(tmp_path):
    """llava-v1.5's first config.json said model_type `llava`, which now is transformers' own."""
    config = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_config(str(tmp_path))
    assert (type(found).__name__, found.model_type, found.hidden_size) == ("LlavaConfig", "llava_llama", 48)


def test_names_of_folders_decide_nothing_and_a_copy_answers_bit_by_bit(full, siglip, tmp_path):
    """LLaVA takes a class by `llama`, `yi` or `qwen` anywhere in the path, and any local tower for CLIP."""
    copies = [shutil.copytree(full, tmp_path / "yi" / name) for name in ("llama-mistral-lora", "kq3xz9")]
    pixels, grids = torch.randn(16, 3 * 8 * 8, generator=torch.Generator().manual_seed(3)), torch.tensor([[1, 4, 4]])
    prompt = [torch.tensor([5, IMAGE_TOKEN_INDEX, 9, 11])]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answers = []
    for folder in (full, *copies):
        _, model, processor, _ = load_pretrained_model(str(folder), None, folder.name, device="cpu")
        assert type(model).__name__ == "LlavaQwenForCausalLM"
        assert processor.patch_size == 8
        answers.append(model.generate(prompt, pixel_values=pixels, image_grid_thw=grids, pad_token_id=0, **options))
    for answer in answers[1:]:
        assert torch.equal(answer.sequences, answers[0].sequences)
        assert torch.equal(torch.stack(answer.logits), torch.stack(answers[0].logits))


class Bomb:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_that_runs_code_is_not_run(adapter, llm, tmp_path):
    torch.save({"model.mm_projector.0.weight": Bomb(tmp_path / "it_ran")}, adapter / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"mm_projector\.bin cannot be read"):
        load_pretrained_model(str(adapter), str(llm), device="cpu")
    assert not (tmp_path / "it_ran").exists()


@pytest.fixture
def llava_lora(full, llm, tmp_path):
    """A LoRA folder as LLaVA and the peft of its day write it: pickles, suffixes, no tokenizer, names one level up."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_pretrained_model(str(full), device="cpu")[1], LoraConfig(r=2, target_modules=["q_proj"])
    )
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "mm_projector" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "llava-lora"
    model.save_pretrained(folder, safe_serialization=True)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    others = {name: value.detach() for name, value in model.named_parameters() if "mm_projector" in name}
    torch.save(others, folder / "non_lora_trainables.bin")
    model.config.save_pretrained(folder)
    merged = model.merge_and_unload()
    return folder, merged


@pytest.mark.parametrize("prefix", ["base_model.model.", "model.", ""])
@torch.no_grad()
def test_a_lora_folder_of_llavas_is_merged(llava_lora, full, prefix):
    folder, merged = llava_lora
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    renamed = {prefix + name.removeprefix("base_model.model."): tensor for name, tensor in others.items()}
    torch.save(renamed, folder / "non_lora_trainables.bin")
    tokenizer, model, _, _ = load_pretrained_model(str(folder), str(full), "llava-qwen-lora", device="cpu")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
    weight = model.get_model().mm_projector.state_dict()["0.weight"]
    assert torch.equal(weight, others["base_model.model.model.mm_projector.0.weight"])
    assert tokenizer("red").input_ids


def test_a_stage_one_folder_of_llavas_own_goes_over_a_bare_llm(tmp_path, llm):
    """Its config names a SigLIP and describes none; the adapter is LLaVA's, and so are the rules for images."""
    siglip = tiny.save_siglip(tmp_path / "siglip")
    keys = {
        "model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"], "mm_vision_tower": str(siglip),
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 24, "mm_vision_select_layer": -2,
        "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
    }  # fmt: skip
    folder = tmp_path / "llava-qwen-pretrain"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((llm / "config.json").read_text()) | keys))
    torch.manual_seed(6)
    adapter = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    adapter = {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in adapter.items()}
    torch.save(adapter, folder / "mm_projector.bin")
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), str(llm), "llava_qwen", device="cpu")
    assert torch.equal(model.get_model().mm_projector[0].weight, adapter["model.mm_projector.0.weight"])
    inputs = processor([Image.new("RGB", (60, 30), "red")])
    assert inputs["image_grid_thw"].tolist() == [[3, 4, 4]]  # the whole and two tiles
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate([torch.tensor([5, IMAGE_TOKEN_INDEX, 9])], **inputs, **options).shape == (1, 3)
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    again = load_pretrained_model(str(tmp_path / "whole"), device="cpu")[1]
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that lays a folder into a hub's cache; the hub itself is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def add(folder, name):
        home = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, home / "snapshots" / ("0" * 40))
        (home / "refs").mkdir()
        (home / "refs/main").write_text("0" * 40)
        return {"cache_dir": tmp_path / "cache", "revision": "main"}

    return add


def test_a_hub_id_of_an_adapter_is_known_by_its_files(adapter, llm, hub):
    where = hub(adapter, "someone/adapter")
    model = load_pretrained_model("someone/adapter", str(llm), device="cpu", **where)[1]
    here = load_pretrained_model(str(adapter), str(llm), device="cpu", low_cpu_mem_usage=True)[1]
    assert torch.equal(model.get_model().mm_projector[-1].weight, here.get_model().mm_projector[-1].weight)


def test_a_hub_id_of_lora_weights_is_known_by_its_files(llm, siglip, data, tmp_path, hub):
    changes = tiny.FULL_STAGE | {"lora_enable": True, "lora_r": 4, "max_steps": 1, "learning_rate": 1e-2}
    train_alone(tiny.stage_arguments(llm, siglip, data, tmp_path / "lora", **changes))
    where = hub(tmp_path / "lora", "someone/lora")
    models = [
        load_pretrained_model(path, device="cpu", **where)[1] for path in ("someone/lora", str(tmp_path / "lora"))
    ]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_whole_model_may_have_the_adapters_own_file_too(full, adapter, tmp_path):
    """liuhaotian/llava-v1.5-7b does."""
    folder = shutil.copytree(full, tmp_path / "both")
    shutil.copy(adapter / "mm_projector.bin", folder)
    model = load_pretrained_model(str(folder), device="cpu")[1]
    expected = load_file(full / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items() if name in expected)
    assert expected


def test_an_unknown_argument_is_refused_by_name(llm):
    with pytest.raises(TypeError, match="use_safetensor"):
        load_pretrained_model(str(llm), use_safetensor=True)


def test_a_hub_id_that_cannot_be_had_is_named(hub):
    with pytest.raises(FileNotFoundError, match=r"^someone/nothing is no folder here"):
        load_pretrained_model("someone/nothing", device="cpu")
