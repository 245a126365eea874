"""For any mix on any number of ranks: every sample once, ranks evenly loaded, and after a stop exactly the rest."""

import math

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from llava.data.sampler import WINDOW, BalancedBatchSampler

LONGEST = 500


@st.composite
def mixes(draw):
    """Lengths of up to 200 samples: of text alone (negative), with an image, with a video, or of one kind only."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = rng.choice(draw(st.sampled_from([(-1, 1, 2), (-1,), (1,), (-1, 2)])), draw(st.integers(0, 200)))
    longest = {-1: -LONGEST, 1: LONGEST // 5, 2: LONGEST}
    return [int(np.sign(kind)) * int(rng.integers(1, abs(longest[kind]) + 1)) for kind in kinds.tolist()]


MIXES = mixes() | st.lists(st.integers(-LONGEST, LONGEST).filter(bool), max_size=8)
LAYOUTS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 5),
        "num_ranks": st.integers(1, 8),
        "turns": st.integers(1, 4),
        "by_modality": st.booleans(),
        "max_pack": st.none() | st.integers(1, 2 * LONGEST),
        "seed": st.integers(0, 3),
    }
)


def sampler(lengths, *, epoch=0, **layout):
    made = BalancedBatchSampler(lengths, **{"batch_size": 1} | layout)
    made.set_epoch(epoch)
    return made


def by_turns(lengths, **layout):
    """Per turn, the samples of each rank."""
    ranks = [list(sampler(lengths, rank=rank, **layout)) for rank in range(layout.get("num_ranks", 1))]
    return list(zip(*ranks, strict=True))


def by_steps(lengths, **layout):
    """Per step, its turns."""
    turns = by_turns(lengths, **layout)
    size = layout.get("turns", 1)
    return [turns[start : start + size] for start in range(0, len(turns), size)]


def tokens_of(lengths, samples):
    return sum(abs(lengths[sample]) for sample in samples)


@settings(deadline=None)
@given(MIXES, LAYOUTS, st.integers(0, 3))
def test_every_sample_comes_once_and_all_ranks_have_as_many_micro_batches(lengths, layout, epoch):
    turns = by_turns(lengths, epoch=epoch, **layout)  # `strict` there: as many on each rank
    assert sorted(sample for turn in turns for batch in turn for sample in batch) == list(range(len(lengths)))
    assert len(turns) == len(sampler(lengths, **layout))
    if layout["max_pack"] is None:
        assert len(turns) == math.ceil(len(lengths) / (layout["batch_size"] * layout["num_ranks"]))
        for turn in turns:
            sizes = [len(batch) for batch in turn]
            assert sum(sizes) <= layout["batch_size"] * layout["num_ranks"]
            assert min(sizes) >= min(sum(sizes) // layout["num_ranks"], 1)  # none is empty where there is one for each


@settings(deadline=None)
@given(MIXES, LAYOUTS)
def test_ranks_differ_by_one_sample_at_most(lengths, layout):
    """In tokens, by the longest of those that they deal with: in every turn, and over a step. Of packs, by one pack."""
    tokens = np.abs(np.array(lengths, dtype=int))
    longest_pack = max(sampler(lengths, **layout).tokens, default=0)
    for step in by_steps(lengths, **layout):
        loads = np.array([[tokens[batch].sum() for batch in turn] for turn in step])
        longest = [max(tokens[sample] for batch in turn for sample in batch) for turn in step]
        if layout["max_pack"] is not None:
            longest = [longest_pack] * len(step)
        assert (np.ptp(loads, axis=1) <= longest).all()
        assert np.ptp(loads.sum(axis=0)) <= max(longest)


@settings(deadline=None)
@given(MIXES, LAYOUTS, st.integers(0, 3), st.data())
def test_a_run_that_goes_on_takes_exactly_what_is_left(lengths, layout, epoch, data):
    """As transformers goes on, in a new process: it skips micro-batches, then says the epoch."""
    rank = data.draw(st.integers(0, layout["num_ranks"] - 1))
    whole = list(sampler(lengths, epoch=epoch, rank=rank, **layout))
    done = data.draw(st.integers(0, len(whole)))
    fresh = BalancedBatchSampler(lengths, rank=rank, **layout)
    loader = DataLoader(range(len(lengths)), batch_sampler=fresh, collate_fn=list)
    loader = skip_first_batches(prepare_data_loader(loader, num_processes=1, process_index=0), done)
    loader.set_epoch(epoch)
    loader.batch_sampler.batch_sampler.set_epoch(epoch)  # as `Trainer._run_epoch` does
    assert list(loader) == whole[done:]


@settings(deadline=None)
@given(MIXES, st.integers(0, 3), st.booleans(), st.none() | st.integers(1, LONGEST))
def test_a_step_is_the_same_samples_on_any_hardware(lengths, epoch, by_modality, max_pack):
    common = {"epoch": epoch, "by_modality": by_modality, "max_pack": max_pack}
    layouts = ((12, 1, 1), (1, 4, 3), (3, 2, 2), (2, 6, 1), (1, 1, 12))
    steps = [
        [
            {sample for turn in step for batch in turn for sample in batch}
            for step in by_steps(lengths, batch_size=batch_size, num_ranks=num_ranks, turns=turns, **common)
        ]
        for batch_size, num_ranks, turns in layouts
    ]
    assert all(other == steps[0] for other in steps)


@given(MIXES, st.integers(1, 3), st.integers(1, 3), st.none() | st.integers(1, LONGEST))
@settings(deadline=None)
def test_whole_steps_by_modality_have_one_and_the_rest_comes_last_images_first(lengths, batch_size, ranks, max_pack):
    layout = {"batch_size": batch_size, "num_ranks": ranks, "turns": 2, "by_modality": True, "max_pack": max_pack}
    steps = [[sample for turn in step for batch in turn for sample in batch] for step in by_steps(lengths, **layout)]
    with_image = [[lengths[sample] > 0 for sample in step] for step in steps]
    mixed = [number for number, step in enumerate(with_image) if len(set(step)) > 1]
    assert len(mixed) <= 1
    for number in mixed:
        assert not any(image for step in with_image[number + 1 :] for image in step)
        assert number >= len(with_image) - 2


def test_a_long_sample_has_a_micro_batch_to_itself_and_the_short_ones_share_the_others():
    (turn,) = by_turns([90, *[10] * 8], batch_size=3, num_ranks=3)
    assert sorted(map(len, turn)) == [1, 4, 4]


def test_by_modality_and_length_ranks_are_handed_samples_of_like_lengths():
    """With one sample each, those next to each other in the step; with two, no turn has all the long ones."""
    lengths = np.random.default_rng(0).permutation(np.arange(1, 49)).tolist()
    for step in by_steps(lengths, batch_size=1, num_ranks=4, turns=6, by_modality=True):
        found = sorted(sorted(lengths[sample] for batch in turn for sample in batch) for turn in step)
        in_a_row = [length for turn in found for length in turn]
        assert in_a_row == sorted(in_a_row)
    (step,) = by_steps(lengths[:16], batch_size=2, num_ranks=2, turns=4, by_modality=True)
    loads = [sum(tokens_of(lengths, batch) for batch in turn) for turn in step]
    assert max(loads) - min(loads) <= max(lengths[:16]) * 2  # a sample for each rank


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = [(-1) ** index * (index + 1) for index in range(60)]
    layout = {"batch_size": 2, "num_ranks": 3, "turns": 2}
    assert by_turns(lengths, seed=1, **layout) == by_turns(lengths, seed=1, **layout)
    assert by_turns(lengths, seed=1, **layout) != by_turns(lengths, seed=2, **layout)
    assert by_turns(lengths, epoch=0, **layout) != by_turns(lengths, epoch=1, **layout)
    twice = sampler(lengths, **layout)
    assert list(twice) == list(twice)


@settings(deadline=None)
@given(MIXES, st.integers(1, 2 * LONGEST), st.integers(0, 3), st.booleans())
def test_packs_hold_what_fits_and_are_the_same_in_every_epoch(lengths, most, seed, by_modality):
    def packs(epoch):
        made = sampler(lengths, epoch=epoch, max_pack=most, seed=seed, by_modality=by_modality)
        return {tuple(sorted(pack)) for pack in made}

    assert len(lengths) <= WINDOW
    for pack in packs(0):
        assert tokens_of(lengths, pack) <= most or len(pack) == 1
    for image in (True, False) if by_modality else (None,):
        of_kind = [pack for pack in packs(0) if image is None or (lengths[pack[0]] > 0) is image]
        assert sum(2 * tokens_of(lengths, pack) <= most for pack in of_kind) <= 1  # two such were one
    assert packs(0) == packs(3)


def test_in_many_samples_packs_are_nearly_full():
    lengths = np.random.default_rng(0).integers(20, 1500, size=5 * WINDOW)
    packed = sampler(lengths, max_pack=4096)
    assert packed.tokens.mean() > 0.98 * 4096
    assert f"{5 * WINDOW} samples in {len(packed)} packs" in packed.packing()


@pytest.mark.parametrize(("num_samples", "sizes"), [(1, {0: 3, 1: 1}), (5, {1: 3, 2: 1}), (9, {1: 7, 2: 1})])
def test_a_short_last_step_by_hand(num_samples, sizes):
    turns = by_turns([10] * num_samples, batch_size=2, num_ranks=4, turns=2)
    found = [len(batch) for turn in turns for batch in turn]
    assert {size: found.count(size) for size in set(found)} == sizes


def test_dropping_the_last_leaves_whole_micro_batches_only():
    layout = {"batch_size": 2, "num_ranks": 3, "turns": 2, "drop_last": True}
    turns = by_turns([10] * 35, **layout)
    assert len(turns) == len(sampler([10] * 35, **layout)) == 5
    assert all(len(batch) == 2 for turn in turns for batch in turn)  # of equal lengths
    assert len({sample for turn in turns for batch in turn for sample in batch}) == 30


def test_a_length_of_zero_tells_no_modality():
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        sampler([3, 0])


def test_ranks_tell_other_data_by_the_fingerprint():
    def fingerprint(lengths, rank=0, epoch=0):
        return sampler(lengths, rank=rank, num_ranks=2, epoch=epoch, by_modality=True).fingerprint()

    lengths = [30, -20, 10, 10]
    assert len({fingerprint(lengths, rank, epoch) for rank in (0, 1) for epoch in (0, 1)}) == 1
    others = [[30, 20, 10, 10], [-20, 30, 10, 10], [30, -20, 10], [30, -20, 10, 11]]
    assert len({fingerprint(other) for other in [lengths, *others]}) == 5
