"""The loss over several processes equals the loss of all their samples in one."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from comp_patches.alignment_loss import alignment_loss
from tests.comp_patches.test_alignment_loss import random_features

CASES = list(product(("sinkhorn", "prior_softmax"), ([4, 2], [6, 0])))  # the second rank may have no sample


def one_rank(rank: int, store: str, queue) -> None:
    """All cases on one of two processes: puts (rank, [(loss, gradient), ...])."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = []
    for mode, splits in CASES:
        visual, text, words, prior = random_features(sum(splits))
        visual, text = visual.split(splits)[rank].clone().requires_grad_(), text.split(splits)[rank]
        loss = alignment_loss(visual, text, words, prior, mode=mode, group=dist.group.WORLD)
        loss.backward()
        results.append((loss.item(), visual.grad.tolist()))
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Per rank, per case: loss and gradient."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = mp.spawn(one_rank, args=(str(tmp_path_factory.mktemp("gloo") / "store"), queue), nprocs=2, join=False)
    results = dict(queue.get(timeout=300) for _ in range(2))
    while not workers.join():
        pass
    return results


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{mode}-{splits}" for mode, splits in CASES])
def test_the_loss_does_not_depend_on_how_samples_are_split_over_processes(on_two_ranks, case):
    mode, splits = CASES[case]
    visual, text, words, prior = random_features(sum(splits))
    visual.requires_grad_()
    whole = alignment_loss(visual, text, words, prior, mode=mode)
    whole.backward()
    for rank in range(2):
        loss, grad = on_two_ranks[rank][case]
        assert_close(loss, whole.item(), rtol=1e-9, atol=1e-9)
        averaged = torch.tensor(grad, dtype=torch.float64).reshape(-1, 16) / 2
        assert_close(averaged, visual.grad.split(splits)[rank], rtol=1e-9, atol=1e-9)
