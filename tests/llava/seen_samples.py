"""Both ranks of a test: what each trains on, in a run that SIGTERM stops and that then goes on.

The last argument is the step in which it stops, the others are those of a stage. Leaves `seen-RANK.json`, the ids of
each step's samples.
"""

import json
import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

from llava.train.arguments import parse_arguments
from llava.train.train import build_stage, run_stage


class Watch(TrainerCallback):
    def __init__(self, trainer, stop_in):
        self.trainer, self.stop_in, self.seen = trainer, stop_in, []

    def on_step_begin(self, args, state, control, **_):
        self.seen.append(self.trainer._ids)
        if state.global_step + 1 == self.stop_in and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    seen = []
    for stop_in in (int(sys.argv[-1]), None):
        trainer, checkpoint = build_stage(*parse_arguments(sys.argv[1:-1]))
        assert (checkpoint is None) == (stop_in is not None)
        watch = Watch(trainer, stop_in)
        trainer.add_callback(watch)
        run_stage(trainer, checkpoint)
        assert trainer.preemption.stopped == (stop_in is not None)
        seen += watch.seen
    Path(trainer.args.output_dir, f"seen-{trainer.args.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
