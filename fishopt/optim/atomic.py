"""A step happens as a whole or not at all, whatever interrupts it."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` makes enums, which costs a tenth of a small step
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from fishopt.passes.tracing import leave_modes


class Transaction:
    """Undoes what is half done if an exception ends it; once it commits, Ctrl-C waits until it is through.

    Between computing and committing it is either: there is no moment at which an interrupt would find a part committed.
    Interrupts come to the main thread alone, so in others there is nothing to hold back.
    """

    def __init__(self) -> None:
        self._undos: list[Callable[[], None]] = []
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._held: tuple[int, FrameType | None] | None = None
        self._modes = torch.is_grad_enabled(), torch._C._len_torch_function_stack()

    def __enter__(self) -> Self:
        return self

    def on_failure(self, undo: Callable[[], None]) -> None:
        """Has ``undo`` called if there is an exception before `commit`; the last one given is called first."""
        self._undos.append(undo)

    def commit(self) -> None:
        """From here on nothing is undone, and interrupts wait for the end."""
        self._hold_interrupts()
        self._undos.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._undos:
                self._hold_interrupts()
            while self._undos:
                self._undos.pop()()
        finally:
            self._restore_modes()
            if self._handler is not None:
                _signal.signal(_signal.SIGINT, self._handler)
                if self._held is not None:
                    self._handler(*self._held)

    def _restore_modes(self) -> None:
        """An interrupt can come between a context manager's work and the moment from which it is sure to be undone."""
        grad_mode, depth = self._modes
        torch.set_grad_enabled(grad_mode)
        leave_modes(depth)

    def _hold_interrupts(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        handler = _signal.getsignal(_signal.SIGINT)
        if callable(handler):  # not ignored, nor left to the system, which ends the process
            self._handler = handler
            _signal.signal(_signal.SIGINT, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._held = number, frame
