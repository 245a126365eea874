"""What `test_output_folder.py` runs on two ranks: the second sees less of the output folder, as on a slow NFS."""

import shutil
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from llava.train.arguments import parse_arguments
from llava.train.train import shared_choice

*_, args = parse_arguments(sys.argv[1:])
rank, seen = args.process_index, Path(args.output_dir)
if rank == 1:
    args.output_dir = str(seen.with_name("view"))
    shutil.copytree(seen / "checkpoint-1", Path(args.output_dir) / "checkpoint-1")
assert shared_choice(args) == str(seen / "checkpoint-2")

if rank == 0:
    args.output_dir = f"{seen}-of-node-0"
    (Path(args.output_dir) / "checkpoint-3").mkdir(parents=True)
    (Path(args.output_dir) / "checkpoint-3" / "trainer_state.json").write_text("{}")
    kept = shared_choice(args)
    dist.barrier()
else:
    isdir, Path.is_dir = Path.is_dir, lambda path: False
    with pytest.raises(
        ValueError, match=r"checkpoint-3, from which the first process goes on, is not seen by process 1"
    ):
        shared_choice(args)
    Path.is_dir = isdir
    dist.barrier()

args.output_dir = f"{seen}-cut-short"  # what the first process refuses all do, in the same words
if rank == 0:
    (Path(args.output_dir) / "checkpoint-4").mkdir(parents=True)
    (Path(args.output_dir) / "checkpoint-4" / "trainer_state.json").write_text("{}")
    (Path(args.output_dir) / "checkpoint-4" / "optimizer.pt").write_text("half")
with pytest.raises(ValueError, match=r"checkpoint-4/optimizer\.pt was cut short"):
    shared_choice(args)
dist.destroy_process_group()
