"""The packed transformer: packed = one by one, block order everywhere, gradients to everything."""

import pytest
import torch
from torch.testing import assert_close

from comp_patches import vision_transformer
from comp_patches.packing import patch_coordinates
from comp_patches.vision_transformer import VisionTransformerConfig
from tests.comp_patches import naive
from tests.comp_patches.conftest import TINY

GRIDS = [(1, 4, 4), (1, 2, 10), (1, 6, 4), (1, 4, 4), (1, 8, 6)]


def split(features, grids):
    return features.split([t * h * w for t, h, w in grids])


def test_packed_images_match_one_by_one(tiny_tower, random_patches):
    tower, pixels = tiny_tower(), random_patches(GRIDS)
    together = split(tower(pixels, torch.tensor(GRIDS)), GRIDS)
    for part, grid, patches in zip(together, GRIDS, split(pixels, GRIDS), strict=True):
        assert_close(part, tower(patches, [grid]), atol=2e-5, rtol=1e-5)


def test_packed_gradients_match_the_sum_of_one_by_one(tiny_tower, random_patches):
    tower, pixels = tiny_tower(), random_patches(GRIDS)
    (tower(pixels, GRIDS) ** 2).sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}
    tower.zero_grad()
    for grid, patches in zip(GRIDS, split(pixels, GRIDS), strict=True):
        (tower(patches, [grid]) ** 2).sum().backward()
    for name, parameter in tower.named_parameters():
        assert (together[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-7, name


def test_the_order_of_images_does_not_matter(tiny_tower, random_patches):
    tower, pixels = tiny_tower(), random_patches(GRIDS)
    order = [3, 0, 4, 2, 1]
    forward = split(tower(pixels, GRIDS), GRIDS)
    parts = split(pixels, GRIDS)
    permuted_grids = [GRIDS[i] for i in order]
    permuted = split(tower(torch.cat([parts[i] for i in order]), permuted_grids), permuted_grids)
    for i, part in zip(order, permuted, strict=True):
        assert_close(part, forward[i], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "cols", "merge_size"), [(3, 3, 1), (1, 7, 1), (5, 2, 1), (6, 10, 2), (2, 8, 2), (14, 12, 2)]
)
@pytest.mark.parametrize("use_rope", [True, False])
def test_patches_embedding_and_angles_follow_one_order(tiny_tower, random_patches, rows, cols, merge_size, use_rope):
    tower = tiny_tower(merge_size=merge_size, use_rope=use_rope, num_hidden_layers=1)
    pixels = random_patches([(1, rows, cols)])
    with torch.no_grad():
        assert_close(tower(pixels, [(1, rows, cols)]), naive.tower(tower, pixels, rows, cols), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"rope_theta": 100.0}, {"rope_dtype": "bfloat16"}], ids=["theta", "dtype"])
def test_angles_are_the_config_s(tiny_tower, random_patches, options):
    rows, cols = 2, 280  # bf16 cannot tell all columns above 256
    tower, pixels = tiny_tower(num_hidden_layers=1, **options), random_patches([(1, rows, cols)])
    with torch.no_grad():
        features = tower(pixels, [(1, rows, cols)])
        assert_close(features, naive.tower(tower, pixels, rows, cols), atol=1e-4, rtol=1e-4)
        default = tiny_tower(num_hidden_layers=1)(pixels, [(1, rows, cols)])
    assert (features - default).abs().max() > 1e-2


def test_block_and_raster_order_are_the_same_image(tiny_tower, random_patches):
    rows, cols = 6, 10
    block, raster = tiny_tower(merge_size=2), tiny_tower(merge_size=1)
    pixels = random_patches([(1, rows, cols)])  # in raster order
    index = torch.tensor([y * cols + x for y, x in naive.block_order(rows, cols, 2)])
    assert_close(
        block(pixels[index], [(1, rows, cols)]), raster(pixels, [(1, rows, cols)])[index], atol=2e-5, rtol=1e-5
    )


def test_one_gradient_reaches_every_parameter(tiny_tower, random_patches):
    tower = tiny_tower()
    tower(random_patches(GRIDS), GRIDS).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradient_checkpointing_computes_layers_again_and_changes_no_gradient(tiny_tower, random_patches, compiled):
    plain, checkpointed = tiny_tower(), tiny_tower()
    checkpointed.gradient_checkpointing_enable()
    passes = {plain: 0, checkpointed: 0}

    def count(tower):
        passes[tower] += 1

    if compiled:
        torch._dynamo.reset()
        checkpointed.run_layers = torch.compile(checkpointed.run_layers, backend="aot_eager", dynamic=True)
    for tower in passes:
        if not compiled:
            tower.layers[1].register_forward_pre_hook(lambda *_, tower=tower: count(tower))
        tower.train()(random_patches(GRIDS), GRIDS).square().sum().backward()
    assert passes[checkpointed] == 2 * passes[plain]
    for (name, ours), theirs in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert (ours.grad - theirs[1].grad).norm() <= 1e-5 * ours.grad.norm() + 1e-7, name


@pytest.mark.parametrize("trains", [True, False])
def test_the_backend_is_chosen_for_the_dtype_that_autocast_gives(tiny_tower, monkeypatch, trains):
    asked = []

    def choose(*question):
        asked.append(question[2:])
        return "sdpa"

    monkeypatch.setattr(vision_transformer, "choose_backend", choose)
    states = torch.zeros(1, 48)  # what a norm before the layers leaves under a GPU's autocast; a CPU's rounds it
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trains):
        tiny_tower()._attention_backend(states)
    assert asked == [(torch.bfloat16, 12, trains)]


@pytest.mark.parametrize("options", [{}, {"class_token": True, "num_register_tokens": 2}], ids=["plain", "prefix"])
def test_compiled_layers_serve_new_grids_without_compiling_again(tiny_tower, random_patches, options):
    tower = tiny_tower(**options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(tower, backend="aot_eager", dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]
    for number, grids in enumerate([GRIDS, [(1, 6, 8), (1, 2, 2)], [(1, 10, 4)], GRIDS[2:]]):
        pixels = random_patches(grids)
        assert_close(compiled(pixels, grids), tower(pixels, grids), atol=2e-5, rtol=1e-5)
        if number == 1:  # the second batch is what shows torch.compile that the number of segments varies
            settled = graphs["unique_graphs"]
    assert graphs["unique_graphs"] == settled
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_layers_are_one_graph_with_the_same_gradients(tiny_tower, random_patches):
    plain, compiled = tiny_tower(), tiny_tower()
    torch._dynamo.reset()
    compiled.run_layers = torch.compile(compiled.run_layers, backend="aot_eager", dynamic=True, fullgraph=True)
    for tower in (plain, compiled):
        tower(random_patches(GRIDS), GRIDS).square().sum().backward()
    for (name, ours), theirs in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-7, name


@pytest.mark.parametrize("tokens", [1, 30, 45])
@pytest.mark.parametrize("options", [{}, {"class_token": True, "num_register_tokens": 2}], ids=["plain", "prefix"])
def test_taking_the_batch_in_pieces_changes_nothing(tiny_tower, random_patches, monkeypatch, tokens, options):
    tower, pixels = tiny_tower(**options), random_patches(GRIDS)
    whole = tower(pixels, GRIDS)
    monkeypatch.setattr(vision_transformer, "CPU_TOKENS", tokens)
    assert_close(tower(pixels, GRIDS), whole, atol=2e-5, rtol=1e-5)


def test_a_tower_in_shards_takes_every_batch_in_one_piece(tiny_tower, random_patches, monkeypatch):
    monkeypatch.setattr(vision_transformer, "CPU_TOKENS", 20)
    tower, passes = tiny_tower(), []
    tower.layers[0].register_forward_hook(lambda *_: passes.append(1))
    tower(random_patches(GRIDS), GRIDS)
    assert len(passes) > 1
    passes.clear()
    tower.patch_embedding.weight.ds_id = 0  # DeepSpeed ZeRO-3's mark
    tower(random_patches(GRIDS), GRIDS)
    assert len(passes) == 1


def test_each_frame_of_a_video_is_an_image_of_its_own(tiny_tower, random_patches):
    tower, pixels = tiny_tower(), random_patches([(3, 4, 6)])
    assert_close(tower(pixels, [(3, 4, 6)]), tower(pixels, [(1, 4, 6)] * 3), atol=0, rtol=0)


def test_without_position_embedding_there_is_no_table(tiny_tower, random_patches):
    tower = tiny_tower(position_embedding_kind="none")
    assert not any("position_embedding" in name for name in tower.state_dict())
    assert tower(random_patches(GRIDS), GRIDS).isfinite().all()


def test_bf16_tower_keeps_its_angles_in_float32(tiny_tower, random_patches):
    tower = tiny_tower()
    at = patch_coordinates([(40, 60)], 2)
    exact, cast = tower.rotary_tables(at), tower.bfloat16().rotary_tables(at)
    assert cast[0].dtype == torch.float32
    assert_close(cast, exact, atol=0, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_stays_near_float32(tiny_tower, random_patches, dtype, tolerance):
    tower, pixels = tiny_tower(), random_patches(GRIDS)
    exact = tower(pixels, GRIDS)
    rounded = tower.to(dtype)(pixels, GRIDS)
    assert rounded.dtype == dtype
    assert (rounded.float() - exact).norm() < tolerance * exact.norm()


def test_no_image_gives_no_features(tiny_tower):
    assert tiny_tower()(torch.zeros(0, 588), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 48)


def test_grids_that_disagree_with_the_patches_are_refused_with_both_numbers(tiny_tower, random_patches):
    with pytest.raises(ValueError, match=r"describes 16 patches in 1 frame.s., but pixel_values holds 24"):
        tiny_tower()(random_patches([(1, 4, 6)]), [(1, 4, 4)])


def test_odd_grids_need_raster_order(tiny_tower, random_patches):
    with pytest.raises(ValueError, match="3x5 patches does not divide into blocks of 2x2"):
        tiny_tower()(random_patches([(1, 3, 5)]), [(1, 3, 5)])


def test_config_survives_json():
    config = VisionTransformerConfig(**TINY, position_interpolation="bicubic", rope_theta=100.0)
    assert VisionTransformerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("position_interpolation", "nearest", "Known: bilinear, bicubic"),
        ("position_embedding_order", "rastor", "Known: block, raster"),
        ("merge_size", 0, "merge_size=0 should be above 0"),
        ("merge_size", 2.5, "merge_size=2.5 should be a whole number"),
        ("feature_layer", [-2, -1], r"feature_layer=\[-2, -1\] should be a whole number or None"),
        ("num_register_tokens", -1, "num_register_tokens=-1 should be 0 or more"),
        ("image_mean", (0.5,), r"image_mean=\(0.5,\) should be 3 numbers"),
        ("position_grid", (4, 4, 1), r"position_grid=\(4, 4, 1\) should be 2 numbers"),
        ("use_rope", "False", "use_rope='False' should be True or False"),
        ("hidden_size", 50, "not a multiple of num_attention_heads=4"),
        ("hidden_size", 40, "multiple of 4, but hidden_size=40 over 4 heads is 10"),
    ],
)
def test_config_refuses_what_no_tower_can_be(field, value, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformerConfig(**TINY | {field: value})


def test_sincos_positions_need_a_width_for_them():
    odd = {"hidden_size": 42, "num_attention_heads": 1, "use_rope": False, "position_embedding_kind": "sincos"}
    with pytest.raises(ValueError, match="multiple of 4, not 42"):
        VisionTransformerConfig(**TINY | odd)


@pytest.mark.parametrize("kind", ["learned", "sincos"])
def test_raster_order_adds_the_embedding_s_rows_as_they_stand(tiny_tower, random_patches, kind):
    rows, cols = 4, 6
    pixels = random_patches([(1, rows, cols)])
    towers = [tiny_tower(position_embedding_kind=kind, position_embedding_order=order) for order in ("block", "raster")]
    in_blocks, in_raster = (t.embed(pixels, [(rows, cols)])[0] - t.patch_embedding(pixels) for t in towers)
    order = torch.tensor([y * cols + x for y, x in naive.block_order(rows, cols, 2)])
    assert_close(in_blocks, in_raster[order])
    assert not torch.equal(in_blocks, in_raster)


def test_a_config_without_its_sizes_says_which_are_missing():
    with pytest.raises(ValueError, match="lacks hidden_size, patch_size"):
        VisionTransformerConfig.from_dict({k: v for k, v in TINY.items() if k not in ("hidden_size", "patch_size")})


def test_unknown_config_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"'use_ropes' is no field .* Did you mean 'use_rope'"):
        VisionTransformerConfig.from_dict(VisionTransformerConfig(**TINY).to_dict() | {"use_ropes": True})
