"""An optimizer that averages its iterates, and what the parameters hold when: what is trained, or the average."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from fishopt.batch import apart
from fishopt.optim.atomic import Transaction
from fishopt.optim.averages import follow
from fishopt.optim.averaging import UNSTRETCHED
from fishopt.optim.base import FisherOptimizer
from fishopt.optim.buckets import Members
from fishopt.optim.checkpoint import ASKED, AVERAGE, TRAINED
from fishopt.optim.estimate import Estimate

State = dict[str, Any]


class ScheduleFree(FisherOptimizer):
    """An optimizer whose groups may have the option ``"schedule_free"``.

    Their parameters hold y in training. While the model is evaluated, which a hook on it sees, they hold the average x,
    and y is kept in the state beside it: evaluation leaves training as it is, bit for bit. Weights that the model has
    loaded since the last step are both.
    """

    _kept: tuple[str, ...] = ("_wrapped", "_switch", "_switch_handles", "_awaits_weights", "_loaded", "_versions")

    _wrapped: nn.Module
    _switch: Switch | None
    _switch_handles: list[RemovableHandle]
    _awaits_weights: bool
    _loaded: set[Tensor]
    _versions: dict[Tensor, int]

    def eval(self) -> None:
        """Puts the averages into the parameters of groups with ``schedule_free``.

        Needed only where the model is evaluated or saved other than after a call in eval mode and without gradients,
        with which this happens by itself. `train`, `step` and a call in training mode end it.
        """
        if self._holds == TRAINED:
            self._put_averages_in(ASKED)
        self._holds = ASKED

    def train(self) -> None:
        """Puts back what is trained; a training forward and `step` do this by themselves."""
        if self._holds != TRAINED:
            self._put_trained_back()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `FisherOptimizer.add_param_group`."""
        super().add_param_group(param_group)
        if hasattr(self, "_wrapped"):
            self._watch()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Resumable.load_state_dict`; the model's parameters have to be of the same moment."""
        super().load_state_dict(state_dict)
        self._awaits_weights, self._loaded = True, set()
        self._watch()

    def follow_call(self) -> None:
        """Before each call of the model: puts in what it is called for.

        Calls in eval mode without gradients evaluate, those in training mode with gradients train. What is neither is
        training, as with layers that are frozen in eval mode, unless `eval` was called: then it goes on evaluating, as
        where BatchNorm's statistics are taken anew.
        """
        trains, grad = self._model.training, torch.is_grad_enabled()
        self._awaits_weights = False
        if self._holds == TRAINED:
            if not trains and not grad:
                self._refuse_traced()
                self._put_averages_in(AVERAGE)
        elif (trains and grad) or (self._holds == AVERAGE and (trains or grad)):
            self._refuse_traced()
            self.train()

    def before_load(self) -> None:
        """Before the model loads weights: tells what it loads by what changes."""
        self._versions = {p: p._version for p in self._parameters}

    def after_load(self) -> None:
        """Until the next step these weights are evaluated as they are: what was trained before is not beside them.

        But those that belong to the optimizer's state that was loaded just before are of the kind that it says.
        """
        if self._holds == TRAINED and not self._awaits_weights:
            self._loaded |= {p for p, version in self._versions.items() if p._version != version}
        self._versions, self._awaits_weights = {}, False

    def _refuse_traced(self) -> None:
        """Raises where a switch would become a part of what is exported.

        Raises:
            RuntimeError: If the model is being traced or exported.
        """
        is_fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        if (is_fake or torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()) and any(
            True for _ in self._moved()
        ):
            raise RuntimeError(
                "the model is traced or exported while its parameters hold what is trained, not the average; call "
                "optimizer.eval() first (or optimizer.train(), for what is trained)"
            )

    def _to_trained(self) -> None:
        self.train()

    def _prepared(
        self, estimate: Estimate | None, members: Members, closure: Any, loss: Any, transaction: Transaction
    ) -> Estimate | None:
        for i, group in enumerate(self.param_groups):
            trained = next((state for p in group["params"] if (state := self.state.get(p)) and state.get("step")), None)
            if trained is not None and group["schedule_free"] != ("averaged" in trained):
                # Its momentum would be taken for an average's offset, or the other way round.
                raise ValueError(
                    f"param_groups[{i}]['schedule_free']={group['schedule_free']!r} was changed after its first step; "
                    "build another optimizer for that, with the model as it is"
                )
            if trained is None:
                self._watch()
        self._loaded = set()
        return super()._prepared(estimate, members, closure, loss, transaction)

    def _make_room(self) -> None:
        super()._make_room()
        for group in self.param_groups:
            for p in group["params"] if group["schedule_free"] else ():
                if p in self.state:
                    self.state[p].update(lr_max=0.0, averaged=0.0, stretch=1.0, beta=group["betas"][0])

    def _hook_on(self, model: nn.Module, loss: nn.Module | None) -> None:
        super()._hook_on(model, loss)
        self._wrapped, self._switch, self._switch_handles = model, None, []
        self._awaits_weights, self._loaded, self._versions = False, set(), {}
        self._watch()

    def _watch(self) -> None:
        """Puts the switch on the model, once there is need of one."""
        if self._switch is not None or not any(group["schedule_free"] for group in self.param_groups):
            return
        for hook in [*self._wrapped._forward_pre_hooks.values(), *self._model._forward_pre_hooks.values()]:
            switch = getattr(hook, "__self__", hook)
            older = switch.optimizer if isinstance(switch, Switch) else None
            if older is not None and not self._parameters.isdisjoint(older._parameters):
                older._leave()
        self._switch = Switch(self)
        self._switch_handles.append(self._wrapped.register_forward_pre_hook(self._switch))
        if self._model is not self._wrapped:  # it may be called without its wrapper
            self._switch_handles.append(self._model.register_forward_pre_hook(self._switch.within))
        self._switch_handles.append(self._model.register_load_state_dict_pre_hook(self._switch.loads))
        self._switch_handles.append(self._model.register_load_state_dict_post_hook(self._switch.loaded))
        self._let_go_with_self()

    def _leave(self) -> None:
        """Takes the switch off: a newer optimizer has the parameters."""
        for handle in self._switch_handles:
            handle.remove()
        self._switch, self._switch_handles = None, []

    @property
    def _parameters(self) -> set[Tensor]:
        return {p for group in self.param_groups for p in group["params"]}

    def _let_go_with_self(self) -> None:
        for handle in self._switch_handles:
            weakref.finalize(self, handle.remove)

    # --- what the parameters hold ---

    def _moved(self) -> Iterator[tuple[Tensor, State, float]]:
        """The parameters whose average is another, their state, and what y is off it by, in units of ``"exp_avg"``."""
        for group in self.param_groups:
            for p in group["params"] if group["schedule_free"] else ():
                if p in self.state and self.state[p].get("step") and p not in self._loaded:
                    follow(p, self.state[p])
                    state = self.state[p]
                    yield p, state, (state.get("beta", group["betas"][0]) - 1) / state.get("stretch", UNSTRETCHED)

    def _put_averages_in(self, holds: str) -> None:
        with Transaction() as transaction, apart(), torch.no_grad():
            moved = [(p, state, p.clone(), off) for p, state, off in self._moved()]
            transaction.commit()
            for p, state, y, off in moved:
                state["y"] = y
                p.sub_(state["exp_avg"], alpha=off)  # needs no memory, which there may not be
            self._holds = holds

    def _put_trained_back(self) -> None:
        with Transaction() as transaction, apart(), torch.no_grad():
            moved = [(p, state, _trained(p, state, off)) for p, state, off in self._moved()]
            transaction.commit()
            for p, state, y in moved:
                state.pop("y", None)
                p.copy_(y)
            self._holds = TRAINED

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_wrapped" in state:  # not so from torch's `load_state_dict`
            if self._switch is not None:
                self._switch.bind(self)
            self._let_go_with_self()


def _trained(p: Tensor, state: State, off: float) -> Tensor:
    """What was trained before the average was put in, to the bit; in entries that were changed since, moved along."""
    moved = torch.add(p, state["exp_avg"], alpha=off)
    if "y" not in state:  # a checkpoint that was put together from parts
        return moved
    y = state["y"].to(p)
    average = torch.sub(y, state["exp_avg"], alpha=off).to(p.dtype)
    return torch.where((p == y) | (p == average), y, moved.to(p))


class Switch:
    """A forward pre-hook that tells an optimizer of each call; copied or pickled along with the model it tells nobody.

    Args:
        optimizer: Whom it tells.
    """

    def __init__(self, optimizer: ScheduleFree | None = None) -> None:
        self._optimizer: weakref.ref[ScheduleFree] | None = None
        if optimizer is not None:
            self.bind(optimizer)

    def bind(self, optimizer: ScheduleFree) -> None:
        """Has it tell this one."""
        self._optimizer = weakref.ref(optimizer)

    @property
    def optimizer(self) -> ScheduleFree | None:
        """Whom it tells, if there still is one."""
        return self._optimizer() if self._optimizer is not None else None

    @_disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Tells of a call."""
        if (optimizer := self.optimizer) is not None:
            optimizer.follow_call()

    def within(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The same from inside a wrapper: when that is compiled, it has told already."""
        if not torch.compiler.is_compiling():
            self(module, args)

    def loads(self, *_: Any) -> None:
        """Tells that the model is about to load weights."""
        if (optimizer := self.optimizer) is not None:
            optimizer.before_load()

    def loaded(self, *_: Any) -> None:
        """Tells that it has."""
        if (optimizer := self.optimizer) is not None:
            optimizer.after_load()

    def __reduce__(self) -> tuple[type[Switch], tuple[()]]:
        return Switch, ()
