"""What the hooks call, on real towers, projectors and language models of tiny size, in upstream's shapes."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, Qwen2ForCausalLM, Trainer, TrainingArguments

from comp_patches.alignment_module import AlignmentLoss
from comp_patches.towers import load_image_processor, load_vision_transformer
from comp_patches.upstream import hooks
from comp_patches.upstream.hooks.alignment import Alignment, samples_of_images, text_features
from comp_patches.upstream.hooks.arguments import CompArguments, processor_options
from comp_patches.upstream.hooks.features import NativeImages
from comp_patches.upstream.hooks.processor import UpstreamImageProcessor, to_image, to_patches
from comp_patches.upstream.hooks.trainer import NamedLosses
from llava.train.arguments import DataArguments, ModelArguments
from tests.llava.tiny import save_llm, save_siglip

SIZES = ((96, 40), (40, 72), (33, 50))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return save_siglip(tmp_path_factory.mktemp("siglip") / "siglip")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp("llm") / "llm", tie=False)


def arguments(siglip, **changes):
    """As upstream's model arguments with the method's flags."""
    own = {
        "vision_tower": f"comp-siglip:{siglip}",
        "mm_projector_type": "downsample_mlp",
        "mm_patch_merge_type": "flat",
        "model_name_or_path": "llm",
    }
    given = own | changes
    flags = {name: given.pop(name) for name in list(given) if name in CompArguments.__dataclass_fields__}
    return SimpleNamespace(**vars(CompArguments(**flags)) | given)


class UpstreamModel(nn.Module):
    """As much of an upstream model as the hooks see."""

    def __init__(self, siglip, llm, **changes):
        super().__init__()
        self.llm = Qwen2ForCausalLM.from_pretrained(llm)
        self.config = self.llm.config
        given = arguments(siglip, **changes)
        self.vision_tower = hooks.build_tower(given)
        self.config.mm_hidden_size = self.vision_tower.hidden_size
        hooks.describe_tower(self.config, self.vision_tower, given)
        torch.manual_seed(3)
        self.mm_projector = hooks.build_projector(self.config)

    def get_model(self):
        return self

    def get_vision_tower(self):
        return self.vision_tower

    def get_output_embeddings(self):
        return self.llm.lm_head

    def forward(self, input_ids, attention_mask=None, use_cache=None, images=None, labels=None):
        if images is None:
            return self.llm.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        visual = torch.cat(hooks.encode_images(self, hooks.native_images(self, images)))
        outputs = self.llm(input_ids=input_ids.clamp(min=0), labels=labels)
        return {"loss": outputs.loss + 0.0 * visual.sum(), "logits": outputs.logits}


@pytest.fixture
def model(siglip, llm):
    return UpstreamModel(siglip, llm)


def photo(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("merge_size", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_images_go_to_upstream_and_come_back_as_the_core_s_patches(siglip, merge_size, size):
    native = load_image_processor(f"comp-siglip:{siglip}", merge_size=merge_size)
    image = photo(*size)
    pixels = UpstreamImageProcessor(native, 32).preprocess(image, return_tensors="pt")["pixel_values"]
    expected = native(image)
    patches, grid = to_patches(pixels, native.patch_size, merge_size)
    assert torch.equal(patches, expected["pixel_values"])
    assert grid == expected["image_grid_thw"][0].tolist()


def test_an_image_tensor_shows_the_picture(siglip):
    native = load_image_processor(f"comp-siglip:{siglip}")
    image = photo(64, 32)  # whole blocks: nothing is resized
    batch = native(image)
    shown = to_image(batch["pixel_values"], batch["image_grid_thw"][0], native.patch_size, native.merge_size)
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    torch.testing.assert_close(shown, (picture - 0.5) / 0.5)


def test_preprocess_gives_one_tensor_where_sizes_agree(siglip):
    processor = hooks.build_tower(arguments(siglip)).image_processor
    wide, tall = photo(96, 40), photo(40, 72)
    assert processor.preprocess(wide)["pixel_values"].shape == (1, 3, 32, 96)
    assert [tuple(each.shape) for each in processor([wide, tall])["pixel_values"]] == [(3, 32, 96), (3, 64, 32)]
    frames = np.stack([np.asarray(wide)] * 3)
    assert processor.preprocess(frames)["pixel_values"].shape == (3, 3, 32, 96)
    processor.tiles = True
    assert processor.preprocess([wide, tall])["pixel_values"].shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("changes", "side"), [({}, 2), ({"mm_projector_type": "mlp2x_gelu"}, 4), ({"force_resize": "64"}, 4)]
)
def test_a_tile_has_as_many_tokens_as_upstream_is_told(siglip, llm, changes, side):
    tower = hooks.build_tower(arguments(siglip, **changes))
    tower.image_processor.tiles = True
    tile = tower.image_processor.preprocess(photo(32, 32))["pixel_values"]
    patches, _ = to_patches(tile, tower.patch_size, tower.merge_size)
    assert tower.num_patches_per_side == side
    assert len(patches) == tower.num_patches * tower.merge_size**2


def test_native_images_become_the_tokens_of_the_core(model, siglip):
    images = [photo(*size, seed) for seed, size in enumerate(SIZES)]
    processor = model.vision_tower.image_processor
    native = hooks.native_images(model, list(processor(images)["pixel_values"]))
    assert type(native) is not list
    assert native.ndim == 4  # neither of upstream's two ways into its stacking of equal tiles
    tokens = hooks.encode_images(model, native)
    tower = load_vision_transformer(f"comp-siglip:{siglip}")
    for image, found in zip(images, tokens, strict=True):
        batch = load_image_processor(f"comp-siglip:{siglip}")(image)
        expected = model.mm_projector(tower(**batch))
        assert len(expected) == processor.native.num_visual_tokens(*image.size)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tiles_and_frames_keep_upstream_s_shapes(model):
    tiles = torch.randn(3, 3, 32, 32)
    stacked = hooks.encode_images(model, tiles)
    assert stacked.shape == (3, 4, 32)
    (video,) = hooks.encode_images(model, NativeImages([tiles]))
    torch.testing.assert_close(video, stacked.flatten(0, 1))
    (blank,) = hooks.encode_images(model, NativeImages([torch.zeros(1, 3, 36, 36)]))  # a size that has no grid
    assert blank.shape == (4, 32)


def test_native_images_leaves_tiles_and_other_towers_alone(model):
    images = [torch.zeros(3, 32, 32)]
    five = torch.zeros(2, 1, 3, 32, 32)
    assert len(hooks.native_images(model, five)) == 2
    model.vision_tower.image_processor.tiles = True
    assert hooks.native_images(model, images) is images
    assert hooks.native_images(model, five) is five
    model.vision_tower = nn.Identity()
    assert hooks.native_images(model, images) is images


def test_flags_have_this_project_s_names_and_defaults():
    own = ModelArguments.__dataclass_fields__ | DataArguments.__dataclass_fields__
    for name, flag in CompArguments.__dataclass_fields__.items():
        if name != "unfreeze_mm_vision_tower":  # LLaVA-NeXT's own, for a LLaVA without mm_tunable_parts
            assert own[name].default == flag.default, name


def test_flags_join_upstream_s_which_win():
    upstream = type("ModelArguments", (), {"__annotations__": {"use_rope": str}, "use_rope": "theirs"})
    joined = hooks.with_flags(dataclass(upstream))
    assert joined().use_rope == "theirs"
    assert joined(max_num_vistoken=7).max_num_vistoken == 7
    with pytest.raises(ValueError, match="--word_prior uniform"):
        joined(use_alignment_loss=True)
    with pytest.raises(ValueError, match="--force_resize 'big'"):
        joined(force_resize="big")
    sides = {value: processor_options(joined(force_resize=value)) for value in ("none", "pretrained", "64")}
    assert sides == {value: {"force_resize": side} for value, side in zip(sides, (None, "pretrained", 64), strict=True)}


def checkpoint_config(model, folder, **more):
    """The config of a checkpoint of `model` as upstream reads it from `folder`, whose config.json says `more`."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"} | more))
    names = ("mm_vision_tower", "mm_vision_config", "mm_image_processor")
    return SimpleNamespace(name_or_path=str(folder), **{name: getattr(model.config, name) for name in names})


def test_a_full_checkpoint_brings_its_tower_and_remembers_its_options(siglip, llm, tmp_path):
    trained = UpstreamModel(siglip, llm, max_num_vistoken=5, use_rope=False)
    config = checkpoint_config(trained, tmp_path / "full", mm_vision_tower="comp-siglip")
    tower = hooks.build_tower(config)
    assert tower.is_loaded
    assert config.image_aspect_ratio == "square"  # one of this project has no such key
    assert tower.image_processor.native.max_num_vistoken == 5
    assert not tower.config.use_rope
    random = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    tower.load_model()
    assert all(torch.equal(tensor, random[name]) for name, tensor in tower.state_dict().items())
    config.image_aspect_ratio = "pad"
    assert hooks.build_tower(config).image_processor.tiles


def test_over_a_bare_llm_the_tower_gets_its_starting_weights_under_what_trained(model, tmp_path):
    config = checkpoint_config(model, tmp_path / "bare")
    starting = model.vision_tower.state_dict()
    tower = hooks.build_tower(config)
    assert not tower.is_loaded
    name = "vision_tower.layers.0.mlp.fc1.weight"
    trained = torch.full_like(starting[name], 7.0)
    nn.ModuleDict({"tower": tower}).load_state_dict({f"tower.{name}": trained}, strict=False)  # beside a LoRA
    assert tower.is_loaded
    tower.load_model()
    for key, tensor in tower.state_dict().items():
        assert torch.equal(tensor, trained if key == name else starting[key])


def test_flags_change_the_switches_of_a_checkpoint_s_tower(model, siglip):
    before = model.vision_tower.state_dict()
    hooks.describe_tower(model.config, model.vision_tower, arguments(siglip, use_rope=False, min_num_vistoken=9))
    assert model.config.mm_vision_config["use_rope"] is False
    assert model.config.mm_image_processor == {"min_num_vistoken": 9}
    assert model.config.mm_base_model == "llm"
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.vision_tower.state_dict().items())
    with pytest.raises(ValueError, match="mlp2x_gelu: the checkpoint's tower was trained for"):
        hooks.describe_tower(model.config, model.vision_tower, arguments(siglip, mm_projector_type="mlp2x_gelu"))


def test_the_name_and_the_weights_may_be_two_flags(siglip):
    tower = hooks.build_tower(arguments(siglip, vision_tower="comp-siglip", vision_tower_pretrained=str(siglip)))
    assert tower.vision_tower_name == f"comp-siglip:{siglip}"
    assert hooks.names_comp_tower(SimpleNamespace(vision_tower="comp-siglip"))
    assert not hooks.names_comp_tower(SimpleNamespace(mm_vision_tower="google/siglip-so400m-patch14-384"))
    assert not hooks.names_comp_tower(SimpleNamespace(vision_tower=None))


def test_rope_s_base_is_found_where_newer_transformers_write_it():
    config = SimpleNamespace(rope_theta=1e4, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    hooks.fit_config(config)
    assert config.rope_theta == 1e6
    plain = SimpleNamespace(rope_theta=1e4)
    hooks.fit_config(plain)
    assert plain.rope_theta == 1e4


def test_mistakes_in_a_training_s_flags_are_named(model, siglip):
    data = SimpleNamespace(image_aspect_ratio="square")
    with pytest.raises(ValueError, match="spatial_unpad lays tiles out"):
        hooks.prepare_training(model, arguments(siglip, mm_patch_merge_type="spatial_unpad"), data)
    model.vision_tower = nn.Identity()
    with pytest.raises(ValueError, match="--use_alignment_loss needs a tower"):
        hooks.prepare_training(model, arguments(siglip, use_alignment_loss=True, word_prior="uniform"), data)
    with pytest.raises(ValueError, match="merges 2x2 patches of a comp-"):
        hooks.build_projector(SimpleNamespace(mm_vision_tower="openai/clip"))


def test_several_images_stay_native_or_are_padded():
    processors = {tiles: SimpleNamespace(image_processor=SimpleNamespace(tiles=tiles)) for tiles in (True, False)}
    assert hooks.aspect_ratio(processors[False], "pad") is None
    assert hooks.aspect_ratio(processors[True], "pad") == "pad"
    assert hooks.aspect_ratio(SimpleNamespace(image_processor=object()), "pad") == "pad"


def test_images_belong_to_samples_in_turn():
    ids = torch.tensor([[-200, 5, -200, 5], [5, 5, 5, 5], [5, -200, 5, 5]])
    assert samples_of_images(ids) == [0, 0, None, 2]


def test_text_features_are_means_over_each_text_alone(model):
    answers = [torch.tensor([5, 6, 7]), torch.tensor([], dtype=torch.long), torch.tensor([8, 9, 10, 11, 12])]
    model.train()
    features, valid = text_features(model, answers)
    assert valid.tolist() == [True, False, True]
    assert model.llm.training
    for row in (0, 2):
        alone = model.llm.model(input_ids=answers[row][None]).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(features[row], alone, atol=1e-5, rtol=1e-4)


def test_the_loss_is_the_core_s_over_the_samples_own_tokens(model):
    loss = AlignmentLoss()
    model.vision_tower.alignment = Alignment(loss, 0.5)
    model.train()
    ids = torch.tensor([[-200, 5, -200], [5, 5, 5], [5, -200, 5]])
    answers = [torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8, 9, 3])]
    blank = torch.randn(1, 3, 32, 32)  # the second sample's, which has no image
    images = [torch.randn(3, 32, 64), torch.randn(2, 3, 32, 32), blank, torch.randn(3, 48, 32)]
    tokens = hooks.encode_images(model, NativeImages(images))
    found = model.vision_tower.alignment(model, ids, images, answers)
    text, valid = text_features(model, answers)
    sample = torch.tensor([0] * (len(tokens[0]) + len(tokens[1])) + [2] * len(tokens[3]))
    visual = torch.cat([tokens[0], tokens[1], tokens[3]])
    expected = loss(visual, sample, text, valid, model.llm.lm_head.weight, num_samples=3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


def test_answers_enter_a_sample_and_a_batch_only_for_the_loss(llm):
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "red"},
        {"role": "assistant", "content": "blue"},
    ]
    dataset = SimpleNamespace(
        data_args=SimpleNamespace(),
        list_data_dict=[{"conversations": turns}, {"conversations": [turns[0], {"from": "gpt", "value": " "}]}],
        tokenizer=AutoTokenizer.from_pretrained(llm),
    )
    sample, batch = {}, {}
    hooks.add_answers(dataset, 0, sample)
    hooks.collate_answers([sample], batch)
    assert sample == batch == {}
    dataset.data_args.align_answers = True
    hooks.add_answers(dataset, 0, sample)
    empty = {}
    hooks.add_answers(dataset, 1, empty)
    hooks.collate_answers([sample, empty], batch)
    found = [dataset.tokenizer.decode(ids) for ids in batch["align_input_ids"]]
    assert found == ["red blue", ""]


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("aligns", [True, False])
def test_a_trainer_adds_the_loss_and_names_both(model, tmp_path, aligns):
    def collate(samples):
        ids = torch.tensor([[-200, 5, 6, 7]] * len(samples))
        batch = {"input_ids": ids, "labels": ids.clamp(min=0), "images": [torch.ones(3, 32, 32)] * len(samples)}
        if aligns:
            batch["align_input_ids"] = [torch.tensor([5, 6 + number]) for number in samples]
        return batch

    if aligns:
        model.vision_tower.alignment = Alignment(AlignmentLoss(), 0.25)
    model.vision_tower.requires_grad_(True)
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    trainer = hooks.with_named_losses(Trainer)(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            remove_unused_columns=False,
            **options,
        ),
        train_dataset=Samples(),
        data_collator=collate,
    )
    assert isinstance(trainer, NamedLosses)
    before = model.vision_tower.vision_tower.layers[0].mlp.fc1.weight.clone()
    trainer.train()
    logs = trainer.state.log_history[0]
    assert ("loss_alignment" in logs) is aligns
    moved = not torch.equal(before, model.vision_tower.vision_tower.layers[0].mlp.fc1.weight)
    assert moved is aligns  # here the loss alone reaches the tower
    if aligns:
        expected = logs["loss_decoding"] + 0.25 * logs["loss_alignment"]
        assert logs["loss"] == pytest.approx(expected, rel=1e-3)
        assert logs["alignment_sample_share"] == 1
