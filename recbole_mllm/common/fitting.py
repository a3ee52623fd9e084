"""What a fit of RecBole's trainers spends on training alone, and what its validations have shown.

RecBole's ``fit`` validates and saves between its epochs (trainer.py:404-517); neither is training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Fit:
    """One call of a trainer's ``fit``, watched from outside, as RecBole has a ``fit`` of its own for several models.

    Args:
        trainer: RecBole's.
        recording: Opened around each validation; it yields what is to be returned of that.

    Attributes:
        seconds: What it took, without validating and saving.
        scores: Each validation's score, in order.
        recorded: What `recording` has yielded for the best validation, the last of equals, whose state RecBole saves
            (utils/utils.py:113-154); None where a resumed run has its best epoch from before.
    """

    def __init__(self, trainer: Any, recording: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self._trainer, self._recording = trainer, recording
        self._aside = 0.0
        self.seconds = 0.0
        self.scores: list[float] = []
        self.recorded: Any = None

    def run(self, *arguments: Any, **keywords: Any) -> Any:
        """Call ``fit`` and return what it returns: the best validation score and result."""
        watched = ("_valid_epoch", "_save_checkpoint")
        for name in watched:
            setattr(self._trainer, name, self._timed(getattr(self._trainer, name)))
        started = time.perf_counter()
        try:
            found = self._trainer.fit(*arguments, **keywords)
        finally:
            for name in watched:
                delattr(self._trainer, name)  # the class's own comes through again
        self.seconds = time.perf_counter() - started - self._aside
        if not self.scores or self._best() != found[0]:
            self.recorded = None
        return found

    def _best(self) -> float:
        return (max if self._trainer.valid_metric_bigger else min)(self.scores)

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                with self._recording() as recorded:
                    found = method(*arguments, **keywords)
            finally:
                self._aside += time.perf_counter() - started
            if found is not None:  # a validation's (score, result); saving returns nothing
                self.scores.append(float(found[0]))
                if self.scores[-1] == self._best():
                    self.recorded = recorded
            return found

        return timed

    @property
    def converged(self) -> bool | None:
        """Whether validation had stopped rising; None where nothing was trained or nothing validated."""
        trainer = self._trainer
        resumed = bool(getattr(trainer, "start_epoch", 0))
        if not trainer.epochs or not (self.scores or resumed):
            return None
        since = max(trainer.cur_step, validations_since_best(self.scores, trainer.valid_metric_bigger))
        return bool(since > trainer.stopping_step)  # where RecBole stops early (utils/utils.py:113-154)


def validations_since_best(scores: Sequence[float], bigger: bool) -> int:
    """Return how many validations followed the first of the best; an equal score is no rise."""
    return len(scores) - 1 - scores.index(max(scores) if bigger else min(scores)) if scores else 0
