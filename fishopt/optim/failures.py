"""What becomes of a refresh that fails: training goes on with the last good estimate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self, TypeVar

import torch

from fishopt.batch import NonFiniteError
from fishopt.optim.subbatch import SubBatch

T = TypeVar("T")

MAX_FAILURES = 10
"""Refreshes in a row that may fail before training is stopped."""


class Attempt:
    """The parts of one refresh, in order: after the first error no more is tried.

    Attributes:
        error: That error.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __call__(self, do: Callable[[], T]) -> T | None:
        """What ``do`` returns; None if it or an earlier part failed."""
        if self.error is not None:
            return None
        try:
            return do()
        except Exception as error:  # noqa: BLE001 - the model is the user's, and may raise anything
            self.error = error
            return None

    def with_less(self, do: Callable[[SubBatch], T], some: SubBatch | None) -> T | None:
        """What ``do`` returns for some inputs, or where there is not the memory for half of them, down to one."""
        if some is None:
            return None
        found = self(partial(do, some))
        while self.error is not None and some.may_shrink and self.forgive_lack_of_memory():
            some = some.first(-(-len(some) // 2))
            found = self(partial(do, some))
        return found

    def forgive_lack_of_memory(self) -> bool:
        """Whether there was not the memory for the last part; it may be tried again, with less, then."""
        lacked = self.error is not None and is_lack_of_memory(self.error)
        if lacked:
            self.forget()
        return lacked

    def agree(self, first: Callable[[str | None], str | None]) -> None:
        """Takes over what stops training on another process, so that it stops on all of them.

        Args:
            first: Tells what the first process said that said something.
        """
        goes_on = self.error is None or _may_pass(self.error)
        told = first(None if goes_on else str(self.error))
        if goes_on and told is not None:
            self.error = RuntimeError(f"{told} (on another process)")

    def forget(self) -> None:
        """Lets go of the error, and of the frames that it keeps with all that the model was computing in them."""
        error: BaseException | None = self.error
        while error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
        self.error = None


NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""In the messages of plain RuntimeErrors, from allocators of CPUs and from libraries on devices."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # A failure of the model may come wrapped in what says where.
    of_torch = isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
    return of_torch or (error.__cause__ is not None and is_lack_of_memory(error.__cause__))


class Failures(NamedTuple):
    """How refreshes have gone so far.

    Attributes:
        total: Those that failed.
        in_a_row: Those that failed since the last good one.
        has_succeeded: Whether there was a good one.
    """

    total: int = 0
    in_a_row: int = 0
    has_succeeded: bool = False

    def after(self, error: Exception | None, *, failed: int, of: int = 1) -> Self:
        """The same after one more.

        Args:
            error: What happened on this process.
            failed: Processes that have no estimate; the others' is used, if there are any.
            of: All processes.

        Raises:
            Exception: ``error``, if nothing has ever succeeded and it is not a matter of numbers or memory: then
                something does not fit, which training should not hide.
            RuntimeError: If too many in a row have failed.
        """
        if not failed:
            return self._replace(in_a_row=0, has_succeeded=True)
        everywhere = failed == of
        if everywhere and error is not None and not self.has_succeeded and not _may_pass(error):
            raise error
        what = "came out NaN or infinite (inputs, output or estimate)" if error is None else f"failed: {error}"
        if isinstance(error, NonFiniteError):
            what = f"came out NaN or infinite: {error}"
        if not everywhere:
            what = (
                f"failed on {failed} of {of} processes" if error is None else f"{what} (on {failed} of {of} processes)"
            )
        if self.total == 0:
            kept = self._meanwhile() if everywhere else "The other processes' estimate is used"
            warnings.warn(
                f"a curvature refresh {what}. {kept}; further failures are counted in report() without a warning.",
                RuntimeWarning,
                stacklevel=2,
            )
        if not everywhere:
            return self._replace(total=self.total + 1, in_a_row=0, has_succeeded=True)
        after = self._replace(total=self.total + 1, in_a_row=self.in_a_row + 1)
        if after.in_a_row >= MAX_FAILURES:
            raise RuntimeError(
                f"{after.in_a_row} curvature refreshes in a row have failed; the last one {what}. Lower lr or look for "
                "bad inputs"
            ) from error
        return after

    def _meanwhile(self) -> str:
        if self.has_succeeded:
            return "The last good estimate stays in use"
        return f"There is none yet: parameters stay as they are until one of the next {MAX_FAILURES - 1} succeeds"


def _may_pass(error: Exception) -> bool:
    return isinstance(error, NonFiniteError) or is_lack_of_memory(error)
