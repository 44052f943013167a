"""Copies and pickles of an optimizer: they belong to the copied model."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fishopt.optim.recorder import LossHook, Recorder


class Shared:
    """The loss module in use: a copy of an optimizer listens to the same one, or to its copy if there is one by then.

    Args:
        module: The loss.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return Shared(memo.get(id(self.module), self.module))


class Copyable(torch.optim.Optimizer):
    """An optimizer with a hook on its model that can be copied and pickled.

    The copy goes on as the original would, bit for bit. Copy or pickle the two together, as in
    ``copy.deepcopy((model, optimizer))``: an optimizer copied alone brings along a copy of its model that nothing else
    refers to. Hooks that the user put on the optimizer stay with the original, as with torch.optim.

    A subclass names its own attributes, besides torch's three: in ``_kept`` those that go along, in ``_renewed`` those
    that are None in the copy, which makes them anew.
    """

    _kept: tuple[str, ...] = ("_recorder", "_handle", "_loss")
    _renewed: tuple[str, ...] = ()

    _recorder: Recorder
    _handle: RemovableHandle
    _loss: Shared | None

    def _hook_on(self, model: nn.Module, loss: nn.Module | None) -> None:
        """Puts the recorder on the model and the loss, for as long as the optimizer is there."""
        self._handle = model.register_forward_hook(self._recorder, with_kwargs=True)
        weakref.finalize(self, self._handle.remove)
        self._loss = None if loss is None else Shared(loss)
        self._listen()

    def _listen(self) -> None:
        if self._loss is not None:
            hook = LossHook(self._recorder)  # which a copy of the loss leaves behind
            weakref.finalize(self, self._loss.module.register_forward_hook(hook, with_kwargs=True).remove)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: vars(self)[name] for name in self._named("_kept")} | dict.fromkeys(self._named("_renewed"))
        # A recorder is copied inert, so what it holds goes along.
        return {**super().__getstate__(), **own, "recording": vars(self._recorder)}

    def _named(self, which: str) -> list[str]:
        return [name for kind in type(self).__mro__ for name in vars(kind).get(which, ())]

    def __setstate__(self, state: dict[str, Any]) -> None:
        recording = state.pop("recording", None)
        super().__setstate__(state)
        if recording is None:  # torch's `load_state_dict`, with groups and their state alone
            return
        vars(self._recorder).update(recording)
        weakref.finalize(self, self._handle.remove)
        self._listen()

    def __copy__(self) -> NoReturn:
        raise TypeError(f"two {type(self).__name__} cannot share state and model; use copy.deepcopy")
