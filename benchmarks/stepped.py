"""A Trainer that takes its steps when it is told to, so that it can take turns with other ways to train.

A Trainer runs its loop from beginning to end; so it runs in a thread of its own, which waits for batches.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Queue
from typing import Any

from lightning.pytorch import LightningModule, Trainer

_SEEMINGLY_ENDLESS = 1 << 40


class _Batches:
    """What comes through a queue, until None; answers whenever the Trainer has nothing left to do.

    It has a length, or the Trainer would wait for the batch after next.
    """

    def __init__(self) -> None:
        self.queue: Queue[Sequence[Any] | None] = Queue()
        self.answers: Queue[BaseException | None] = Queue()

    def __len__(self) -> int:
        return _SEEMINGLY_ENDLESS

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.answers.put(None)
            batches = self.queue.get()
            if batches is None:
                return
            yield from batches


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's hints, and without warnings. Around all of a benchmark: both are the whole process's."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class SteppedTrainer:
    """`Trainer(...).fit(module)`, turn by turn, without logging, checkpoints or progress bar.

    Args:
        module: gets the batches that are handed over.
        options: of the Trainer.
    """

    def __init__(self, module: LightningModule, **options: Any) -> None:
        self._trainer = Trainer(max_epochs=1, barebones=True, use_distributed_sampler=False, **options)
        self._module = module
        self._batches = _Batches()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._answer()

    def turn(self, batches: Sequence[Any]) -> None:
        """Train on `batches`; returns when the Trainer asks for more, with what it queued on a device under way.

        Raises:
            BaseException: what the Trainer raised.
        """
        self._batches.queue.put(batches)
        self._answer()

    @property
    def trainer(self) -> Trainer:
        """Which stands still between turns."""
        return self._trainer

    def close(self) -> None:
        """End the training."""
        self._batches.queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._trainer.fit(self._module, self._batches)
        except BaseException as error:
            self._batches.answers.put(error)

    def _answer(self) -> None:
        answer = self._batches.answers.get()
        if answer is not None:
            raise answer
