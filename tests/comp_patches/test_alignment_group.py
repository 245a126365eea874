"""Each loss over several processes equals the loss of all their samples in one."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from comp_patches.alignment_loss import alignment_loss
from comp_patches.contrastive_loss import contrastive_loss
from tests.comp_patches.test_alignment_loss import random_features

PATIENCE = 240  # seconds; processes that disagree about a collective would wait for each other for ever
SPLITS = {2: ([4, 2], [6, 0], [0, 0]), 4: ([3, 1, 0, 2], [0, 0, 5, 1], [1, 1, 1, 1])}  # samples of each process
LOSSES = {
    "prior_softmax": alignment_loss,
    "sinkhorn": lambda *features, **group: alignment_loss(*features, mode="sinkhorn", **group),
    "learnable prototypes": lambda *features, **group: alignment_loss(*features, prototypes="learnable", **group),
    "contrastive": lambda visual, text, *_, **group: contrastive_loss(visual, text, temperature=0.1, **group),
}


def value_and_gradients(name, visual, text, words, prior, **group):
    """The loss, its gradient with respect to visual features (B, H), and to prototypes (V, H)."""
    visual, words = visual.clone().requires_grad_(), words.clone().requires_grad_()
    loss = LOSSES[name](visual, text, words, prior, **group)
    loss.backward()
    of_words = torch.zeros_like(words) if words.grad is None else words.grad
    return loss.item(), visual.grad.tolist(), of_words.tolist()


def one_rank(rank: int, world_size: int, store: str, queue) -> None:
    """Every loss with every split on one of several processes: puts (rank, {(name, number of split): ...})."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    results = {}
    for name in LOSSES:
        for number, splits in enumerate(SPLITS[world_size]):
            visual, text, words, prior = random_features(sum(splits))
            own = (visual.split(splits)[rank], text.split(splits)[rank])
            results[name, number] = value_and_gradients(name, *own, words, prior, group=dist.group.WORLD)
    queue.put((rank, results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(SPLITS))
def processes(request, tmp_path_factory):
    """By rank: what `one_rank` put."""
    world_size = request.param
    queue = mp.get_context("spawn").Queue()
    store = str(tmp_path_factory.mktemp("gloo") / "store")
    workers = mp.spawn(one_rank, args=(world_size, store, queue), nprocs=world_size, join=False, daemon=True)
    results = dict(queue.get(timeout=PATIENCE) for _ in range(world_size))
    while not workers.join(timeout=PATIENCE):
        pass
    return [results[rank] for rank in range(world_size)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("number", range(3))
def test_the_loss_does_not_depend_on_how_samples_are_split_over_processes(processes, name, number):
    """Each process returns the whole's loss, and their *averaged* gradients are the whole's."""
    world_size = len(processes)
    splits = SPLITS[world_size][number]
    whole, of_visual, of_words = value_and_gradients(name, *random_features(sum(splits)))
    assert (whole == 0) == (sum(splits) == 0)
    close = {"rtol": 1e-9, "atol": 1e-9}
    averaged = torch.zeros(200, 16, dtype=torch.float64)
    for rank, own_of_visual in enumerate(torch.tensor(of_visual, dtype=torch.float64).reshape(-1, 16).split(splits)):
        loss, grad, grad_words = processes[rank][name, number]
        assert_close(loss, whole, **close)
        assert_close(torch.tensor(grad, dtype=torch.float64).reshape(-1, 16) / world_size, own_of_visual, **close)
        averaged += torch.tensor(grad_words, dtype=torch.float64) / world_size
    assert_close(averaged, torch.tensor(of_words, dtype=torch.float64), **close)
