"""The loss over several processes equals the loss of all their samples in one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from comp_patches.alignment_loss import alignment_loss
from tests.comp_patches.test_alignment_loss import random_features


def one_rank(rank: int, splits: list[int], mode: str, store: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(splits))
    visual, text, words, prior = random_features(sum(splits))
    visual, text = visual.split(splits)[rank].clone().requires_grad_(), text.split(splits)[rank]
    loss = alignment_loss(visual, text, words, prior, mode=mode, group=dist.group.WORLD)
    loss.backward()
    queue.put((rank, loss.item(), visual.grad.tolist()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["sinkhorn", "prior_softmax"])
@pytest.mark.parametrize("splits", [[4, 2], [6, 0]])
def test_the_loss_does_not_depend_on_how_samples_are_split_over_processes(mode, splits, tmp_path):
    visual, text, words, prior = random_features(6)
    visual.requires_grad_()
    whole = alignment_loss(visual, text, words, prior, mode=mode)
    whole.backward()

    context = mp.get_context("spawn")
    queue = context.Queue()
    arguments = (splits, mode, str(tmp_path / "store"), queue)
    workers = mp.spawn(one_rank, args=arguments, nprocs=len(splits), join=False)
    results = sorted(queue.get(timeout=120) for _ in splits)
    while not workers.join():
        pass

    for rank, loss, grad in results:
        assert_close(loss, whole.item(), rtol=1e-9, atol=1e-9)
        averaged = torch.tensor(grad, dtype=torch.float64).reshape(-1, 16) / len(splits)
        assert_close(averaged, visual.grad.split(splits)[rank], rtol=1e-9, atol=1e-9)
