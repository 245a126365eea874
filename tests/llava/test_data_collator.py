"""A micro-batch is its samples end to end, with nothing lost and nothing added."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from llava.constants import IGNORE_INDEX
from llava.data.bad_samples import BadSample
from llava.data.collator import PackedCollator
from tests.llava.data_parts import draw, make_dataset, make_record

PATCH_DIM = 48
BAD = BadSample("r", "gone")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """One image, no image, two images."""
    folder = tmp_path_factory.mktemp("images")
    names = [draw(folder, "a.png", (24, 16)), draw(folder, "b.png", (8, 32))]
    records = [
        make_record("<image>\nWhat?", "A square.", image=names[0]),
        make_record("Hi", "Hello, you."),
        make_record("<image><image>", "Two.", "Sure?", "Yes.", image=names),
    ]
    dataset = make_dataset(records, folder, align_text=True)
    return [dataset[index] for index in range(3)]


@settings(max_examples=40, deadline=None)
@given(slots=st.lists(st.sampled_from([0, 1, 2, None]), min_size=1, max_size=6))
def test_samples_are_found_again_in_the_row(samples, slots):
    """For every mixture with bad samples between: cut at cu_seqlens, the batch gives the samples back."""
    assume(any(slot is not None for slot in slots))
    chosen = [samples[slot] for slot in slots if slot is not None]
    batch = PackedCollator(PATCH_DIM)([BAD if slot is None else samples[slot] for slot in slots])
    assert batch["num_samples"] == len(slots)
    assert batch["bad_samples"] == [BAD] * slots.count(None)
    for prefix in ("", "align_"):
        borders = batch[f"{prefix}cu_seqlens"]
        assert len(borders) == len(chosen) + 1
        for sample, start, end in zip(chosen, borders[:-1], borders[1:], strict=True):
            assert torch.equal(batch[f"{prefix}input_ids"][0, start:end], sample[f"{prefix}input_ids"])
            assert torch.equal(batch[f"{prefix}position_ids"][0, start:end], torch.arange(end - start))
        assert batch[f"{prefix}input_ids"].shape == (1, borders[-1])
    for sample, start, end in zip(chosen, batch["cu_seqlens"], batch["cu_seqlens"][1:], strict=False):
        assert torch.equal(batch["labels"][0, start:end], sample["labels"])
        assert batch["labels"][0, start] == IGNORE_INDEX
    assert torch.equal(batch["pixel_values"], torch.cat([sample["pixel_values"] for sample in chosen]))
    assert len(batch["pixel_values"]) == sum(math.prod(grid) for grid in batch["image_grid_thw"])
    whose = [number for number, sample in enumerate(chosen) for _ in sample["image_grid_thw"]]
    assert batch["image_sample"] == whose


def test_layout_by_hand():
    def sample(name, ids, num_images):
        return {
            "id": name,
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor([IGNORE_INDEX, *ids[1:]]),
            "pixel_values": torch.ones(4 * num_images, PATCH_DIM),
            "image_grid_thw": torch.tensor([[1, 2, 2]] * num_images).reshape(-1, 3),
        }

    batch = PackedCollator(PATCH_DIM)([sample("a", [5, 6, 7], 2), BAD, sample("b", [8, 9], 1)])
    assert batch["ids"] == ["a", "b"]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seqlens"] == [0, 3, 5]
    assert batch["image_grid_thw"] == [[1, 2, 2]] * 3
    assert batch["image_sample"] == [0, 0, 1]
    assert "align_input_ids" not in batch


def test_without_an_image_the_keys_are_there_and_empty(samples):
    batch = PackedCollator(PATCH_DIM)([samples[1]])
    assert batch["pixel_values"].shape == (0, PATCH_DIM)
    assert batch["image_grid_thw"] == batch["image_sample"] == []


def test_an_all_bad_micro_batch_is_one_token_that_teaches_nothing(samples):
    """Same keys, types and ranks of tensors as any other batch, so that the model runs as it always does."""
    batch, usual = PackedCollator(PATCH_DIM)([BAD, BAD]), PackedCollator(PATCH_DIM)(samples)
    assert (batch["num_samples"], batch["bad_samples"]) == (2, [BAD, BAD])
    assert batch.keys() == usual.keys()
    assert batch["labels"].tolist() == [[IGNORE_INDEX]]
    assert batch["cu_seqlens"] == batch["align_cu_seqlens"] == [0, 1]
    for key, value in usual.items():
        if isinstance(value, torch.Tensor):
            assert (batch[key].dtype, batch[key].ndim) == (value.dtype, value.ndim), key


def test_a_data_worker_makes_the_same_batches(samples):
    """With images, without any, and with nothing but bad samples."""
    batches = [samples, samples[1:2], [BAD]]
    collate = PackedCollator(PATCH_DIM)
    loader = DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=1)
    for batch, slots in zip(loader, batches, strict=True):
        expected = collate(slots)
        torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=0)
        assert batch["image_grid_thw"] == expected["image_grid_thw"]
