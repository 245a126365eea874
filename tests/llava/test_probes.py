"""What both probes stand on: the stream of samples, the schedule, augmentations, maps of a frozen tower."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.eval import classification, segmentation
from llava.eval.probes.augment import BICUBIC, NEAREST, random_box, segmentation_crop
from llava.eval.probes.frozen import FrozenTower, prepare, to_maps
from llava.eval.probes.masked_images import IGNORED, Masks
from llava.eval.probes.stream import TrainingSteps, evaluation_batches
from llava.eval.probes.upernet import pyramid_layers, windows


def keys_of(**changes):
    options = {"batch_size": 6, "steps": 5, "seed": 3} | changes
    return [key for batch in TrainingSteps(10, **options) for key in batch]


def test_an_epoch_sees_every_sample_once_and_each_in_another_order():
    keys = keys_of()
    assert [epoch for epoch, _ in keys] == [0] * 10 + [1] * 10 + [2] * 10
    orders = [[index for epoch, index in keys if epoch == which] for which in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(("world", "micro_batch"), [(2, None), (3, 1), (1, 2)])
def test_a_step_sees_the_same_samples_however_it_is_shared(world, micro_batch):
    ranks = [TrainingSteps(10, batch_size=6, steps=5, seed=3, rank=r, world=world, micro_batch=micro_batch)
             for r in range(world)]  # fmt: skip
    whole = keys_of()
    for step in range(5):
        shared = []
        for rank in ranks:
            batches = list(rank)
            assert len(batches) == len(rank)
            for batch in batches[step * rank.accumulation : (step + 1) * rank.accumulation]:
                shared += batch
        assert sorted(shared) == sorted(whole[6 * step : 6 * step + 6])


def test_a_later_start_sees_the_rest():
    assert keys_of(start=2) == keys_of()[12:]


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="a batch of 6 cannot be shared by 4 process"):
        TrainingSteps(10, batch_size=6, steps=1, world=4)


def test_evaluation_sees_every_sample_once():
    keys = [key for rank in range(3) for batch in evaluation_batches(10, 2, rank, 3) for key in batch]
    assert sorted(index for _, index in keys) == list(range(10))


def test_the_paper_s_hyper_parameters():
    """Tab. 13 and 14, typed from the paper; the learning rates are not known."""
    small, large = classification.protocol(224, 1_281_167), classification.protocol(448, 1_281_167)
    assert (small.batch_size, large.batch_size, small.weight_decay, small.decay) == (1024, 256, 0.05, "cosine")
    assert small.steps == pytest.approx(10 * 1_281_167 / 1024, abs=1)
    assert large.steps == pytest.approx(10 * 1_281_167 / 256, abs=1)
    assert small.warmup_steps == pytest.approx(1_281_167 / 1024, abs=1)
    for size in (504, 672):
        plan = segmentation.protocol(size)
        assert (plan.steps, plan.warmup_steps, plan.batch_size) == (80_000, 1500, 16)
        assert (plan.weight_decay, plan.decay, plan.size) == (0.05, "poly", size)
    parsers = [module.make_parser() for module in (classification, segmentation)]
    sizes = [parser.get_default("size") for parser in parsers]
    assert sizes == [224, 504]
    assert classification.make_parser().get_default("epochs") == 10


@pytest.mark.parametrize(("decay", "half"), [("cosine", 0.5), ("poly", 0.5)])
def test_the_learning_rate_warms_up_and_ends_at_zero(decay, half):
    plan = replace(segmentation.protocol(504), steps=110, warmup_steps=10, learning_rate=1.0, decay=decay)
    assert [plan.learning_rate_at(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert plan.learning_rate_at(60) == pytest.approx(half)
    assert plan.learning_rate_at(109) < 0.011
    assert plan.learning_rate_at(110) == pytest.approx(0)
    quarter = {"cosine": 0.8536, "poly": 0.75}[decay]
    assert plan.learning_rate_at(35) == pytest.approx(quarter, abs=1e-4)


def test_boxes_stay_within_tab_13():
    rng = random.Random(0)
    for _ in range(300):
        box = random_box(640, 480, rng)
        width, height = box.right - box.left, box.bottom - box.top
        assert 0 <= box.left < box.right <= 640
        assert 0 <= box.top < box.bottom <= 480
        assert 0.079 <= width * height / (640 * 480) <= 1
        assert 0.74 <= width / height <= 1.35
    shares = [box.right - box.left for box in (random_box(640, 480, rng) for _ in range(50))]
    assert len(set(shares)) > 20


def test_an_extreme_image_still_has_a_box():
    box = random_box(1000, 10, random.Random(0))
    assert (box.top, box.bottom) == (0, 10)
    assert 0 < box.right - box.left <= 14


def test_mask_and_image_are_cut_and_flipped_together():
    image, mask = Image.new("RGB", (60, 40)), Image.new("L", (60, 40), 1)
    image.paste((255, 255, 255), (0, 0, 30, 40))
    mask.paste(2, (0, 0, 30, 40))
    flipped = 0
    for seed in range(30):
        cut, cut_mask = segmentation_crop(image, mask, 32, random.Random(seed))
        is_white = np.asarray(cut.convert("L")) > 100
        is_two = np.asarray(cut_mask) == 2
        assert cut.size == cut_mask.size == (32, 32)
        assert (is_white == is_two).mean() > 0.9
        flipped += is_two[:, -1].all() and not is_two.all()
    assert flipped > 3


def test_colours_are_distorted_and_classes_are_not():
    image, mask = Image.new("RGB", (40, 40), (120, 60, 200)), Image.new("L", (40, 40), 3)
    pairs = [segmentation_crop(image, mask, 16, random.Random(seed)) for seed in range(20)]
    assert len({cut.getpixel((8, 8)) for cut, _ in pairs}) > 10
    assert {value for _, cut in pairs for value in np.unique(np.asarray(cut))} == {3}


def test_boxes_resize_to_a_square():
    image = Image.new("RGB", (50, 30), "red")
    box = random_box(*image.size, random.Random(1))
    assert box.cut(image, 24, BICUBIC).size == box.cut(image, 24, NEAREST).size == (24, 24)


@pytest.fixture(scope="module")
def tower(siglip):
    return FrozenTower.load(f"comp-siglip:{siglip}", torch.device("cpu"), torch.float32)


def test_a_map_has_every_patch_in_its_place(tower):
    """The mean of each patch's pixels, laid out by `to_maps`, is the image made small."""
    assert tower.tower.merge_size == 2
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixels, grid = prepare(tower.processor, Image.fromarray(noise))
    means = pixels.unflatten(-1, (3, -1)).mean(-1)  # (P, 3)
    maps = to_maps(torch.cat([means, 2 * means]), [grid, grid], 2)
    expected = torch.from_numpy(noise / 255).float().reshape(6, 8, 8, 8, 3).mean((1, 3)).permute(2, 0, 1) * 2 - 1
    torch.testing.assert_close(maps, torch.stack([expected, 2 * expected]))


def test_maps_of_different_grids_are_refused():
    with pytest.raises(ValueError, match="need one grid"):
        to_maps(torch.zeros(20, 4), [(1, 4, 4), (1, 2, 2)], 2)


@pytest.mark.parametrize(("patch", "size", "pixels"), [(14, 504, 504), (16, 504, 512), (14, 672, 672), (16, 672, 672)])
def test_the_rule_for_sizes_that_are_no_whole_blocks(patch, size, pixels, siglip):
    from comp_patches.image_processor import NativeImageProcessor

    processor = NativeImageProcessor(patch_size=patch, min_num_vistoken=1, max_num_vistoken=1 << 20)
    _, grid = prepare(processor, Image.new("RGB", (size, size)))
    assert grid == (1, pixels // patch, pixels // patch)


def test_the_last_layer_s_features_are_the_tower_s_own(tower):
    pixels, grid = prepare(tower.processor, Image.effect_noise((32, 48), 90).convert("RGB"))
    first, last = tower.maps(pixels, [grid], [1, 2])
    torch.testing.assert_close(last, to_maps(tower.patches(pixels, [grid])[0], [grid], 2), rtol=0, atol=0)
    assert not torch.allclose(first, last)


def test_the_pyramid_s_layers():
    assert pyramid_layers(24) == [6, 12, 18, 24]
    assert pyramid_layers(27) == [7, 14, 20, 27]
    assert pyramid_layers(2) == [1, 1, 1, 2]


@pytest.mark.parametrize(("width", "height"), [(504, 504), (504, 700), (1300, 504)])
def test_windows_cover_the_image(width, height):
    seen = np.zeros((height, width), dtype=int)
    for left, top in windows(width, height, 504, 336):
        assert left + 504 <= width
        assert top + 504 <= height
        seen[top : top + 504, left : left + 504] += 1
    assert seen.min() >= 1


def test_nothing_and_255_in_a_mask_count_nowhere():
    target = Masks([], num_classes=3).target(Image.fromarray(np.array([[0, 1], [3, 255]], dtype=np.uint8)))
    assert target.tolist() == [[IGNORED, 0], [2, IGNORED]]
    with pytest.raises(ValueError, match="holds class 4, but there are 3"):
        Masks([], num_classes=3).target(Image.new("L", (2, 2), 4))
