"""The grouped order: every sample once, steps of one modality, batches of even length, repeatable."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.sampler import ModalityLengthSampler

LENGTHS = st.lists(st.integers(-500, 500).filter(bool), max_size=120)


def order(lengths, *, batch_size=2, batches_per_step=3, seed=0, epoch=0):
    sampler = ModalityLengthSampler(lengths, batch_size=batch_size, batches_per_step=batches_per_step, seed=seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    return list(sampler)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_every_sample_comes_once_and_whole_steps_have_one_modality(lengths, batch_size, batches_per_step, epoch):
    indices = order(lengths, batch_size=batch_size, batches_per_step=batches_per_step, epoch=epoch)
    assert sorted(indices) == list(range(len(lengths)))
    step_size = batch_size * batches_per_step
    num_whole = sum(sum((length > 0) is has_image for length in lengths) // step_size for has_image in (True, False))
    with_image = [lengths[index] > 0 for index in indices]
    for step in range(num_whole):
        assert len(set(with_image[step * step_size : (step + 1) * step_size])) == 1
    rest = with_image[num_whole * step_size :]
    assert rest == sorted(rest, reverse=True)  # left over, those with images first


@pytest.mark.parametrize("seed", range(8))
def test_long_samples_are_spread_over_the_batches_of_a_step(seed):
    indices = order([100, 1, 1, 100, 1, 1, 100, 1, 1], batch_size=3, batches_per_step=3, seed=seed)
    for start in (0, 3, 6):
        assert sum(index % 3 == 0 for index in indices[start : start + 3]) == 1


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = [(-1) ** index * (index + 1) for index in range(60)]
    assert order(lengths, seed=1) == order(lengths, seed=1)
    assert order(lengths, seed=1) != order(lengths, seed=2)
    assert order(lengths, epoch=0) != order(lengths, epoch=1)
    sampler = ModalityLengthSampler(lengths, batch_size=2, batches_per_step=3)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_single_modality_is_enough(sign):
    assert sorted(order([sign * length for length in range(1, 20)])) == list(range(19))


def test_a_length_of_zero_tells_no_modality():
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        order([3, 0])
