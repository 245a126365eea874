"""SIGTERM, by which clusters announce that they take a machine back: a checkpoint after the step, then the end."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

EXIT_STATUS = 128 + signal.SIGTERM  # a shell's for a process that SIGTERM ended: schedulers requeue it


class StopOnSigterm(TrainerCallback):
    """Ends training after the optimizer step during which any process of the run got SIGTERM, with a checkpoint.

    The signals reach a run's processes at different times, so they agree after every step. (transformers has such a
    callback as well; its processes do not ask each other, and some would wait for ever for those that stopped.)

    Args:
        over_processes: sums numbers over the run's processes.

    Attributes:
        stopped: whether the run was ended so.
    """

    def __init__(self, over_processes: Callable[[list[int]], list[int]]) -> None:
        self.over_processes = over_processes
        self.stopped = False
        self._asked = False
        self._previous: Any = signal.SIG_DFL

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python takes signal handlers from there only
            self._previous = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if sum(self.over_processes([int(self._asked)])):
            logger.warning("SIGTERM: saving a checkpoint after step %d, then stopping.", state.global_step)
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the machine is not ours for long

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopped:  # which ends the epoch, and transformers has asked for the evaluation of one
            control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)

    def _ask(self, *_: Any) -> None:
        self._asked = True
