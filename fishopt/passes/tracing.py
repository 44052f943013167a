"""Where a network's parameters meet its data: each call of a torch function that takes both, seen as it happens.

A parameter may come to such a call as it is, or as something computed from parameters alone (a normalised weight, a
slice, a sum with a low-rank matrix). Which module it belongs to, and how often that is called, makes no difference: a
subclass, a functional call and a weight used twice are seen alike.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten, tree_unflatten

DATA = "_fishopt_data"
"""An attribute of tensors that depend on the inputs."""

MADE = "_fishopt_made"
"""An attribute of tensors that are computed from parameters alone."""


Signature = tuple[Any, tuple[tuple[int, tuple[str, ...]], ...]]
"""A call, and which parameters are in which of its arguments."""


@dataclass
class Contact:
    """One call in which parameters meet data.

    Attributes:
        function: What was called.
        leaves: Its arguments, flattened; tensors of data detached.
        operands: Leaf's number -> the parameter, or what was made of parameters.
        outputs: Numbers of the outputs that have a gradient, in the flattened result.
        shapes: Their shapes.
        edges: Where they stand in the graph.
    """

    function: Callable[..., Any]
    leaves: list[Any]
    operands: dict[int, Tensor]
    outputs: list[int]
    shapes: list[torch.Size]
    edges: list[GradientEdge]
    spec: Any

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with these leaves."""
        args, kwargs = tree_unflatten(list(leaves), self.spec)
        return args, kwargs

    def signature(self, name_of: Mapping[int, str]) -> Signature:
        """By what it is known again in another forward; ``name_of`` maps a parameter's identity to its name."""
        return self.function, tuple((i, made_of(operand, name_of)) for i, operand in self.operands.items())


def made_of(operand: Tensor, name_of: Mapping[int, str]) -> tuple[str, ...]:
    """The parameters that something was computed from."""
    if id(operand) in name_of:
        return (name_of[id(operand)],)
    found, seen, stack = [], set(), [operand.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [name_of[id(node.variable)]] if hasattr(node, "variable") else []
            stack.extend(child for child, _ in node.next_functions)
    return tuple(found)


class Widening(TorchFunctionMode):
    """All is in full precision, whatever autocast a user, or the network itself, has switched on.

    And what it does without gradients has none in forward mode either.

    Attributes:
        level: Of the transforms of torch.func around the network, None if there are none.
    """

    level: int | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # The network's own doing, which our forward mode does not heed; one of the network's own has another level.
        if not torch.is_grad_enabled() and self.level == torch._C._functorch.maybe_current_level():
            with _set_fwd_grad_enabled(False):
                return self._widened(func, args, kwargs or {})
        return self._widened(func, args, kwargs or {})

    def _widened(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return self.called(func, args, kwargs)
        return self.called(func, args, kwargs)

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function's value."""
        return func(*args, **kwargs)


class Substituting(Widening):
    """Calls that hide what they do, or have no second derivative, are replaced by the same in plain operations."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (plain := SUBSTITUTES.get(func)) is not None:
            with self:
                return plain(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def under(mode: Widening, function: Callable[[], Any]) -> Any:
    """The function's value while the mode watches; Ctrl-C just when ``with`` is through would leave it on for good."""
    depth = torch._C._len_torch_function_stack()
    mode.level = torch._C._functorch.maybe_current_level()
    try:
        with mode:
            return function()
    finally:
        leave_modes(depth)


def leave_modes(depth: int) -> None:
    """Takes torch function modes off their stack until so many are left."""
    while torch._C._len_torch_function_stack() > depth:
        torch._C._pop_torch_function_stack()


class Tracer(Substituting):
    """Watches a forward, see `under`.

    Attributes:
        contacts: What was seen, in order.
        made: The shapes of what was computed from parameters alone, in order.

    Args:
        parameters: Those to look for, by name; they require gradients.
        spreading: Which of `made` have a row for each input, and are contacts therefore: a class token that was
            expanded, or something that met data in a way that hides it, such as by NumPy.
        copies: Keep copies of what could be changed in place later.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], spreading: frozenset[int] = frozenset(), *, copies: bool = False
    ) -> None:
        super().__init__()
        self.contacts: list[Contact] = []
        self.made: list[torch.Size] = []
        self._own = {id(p) for p in parameters.values()}
        self._spreading = spreading
        self._copies = copies
        self._watched: list[tuple[Tensor, int]] = []

    def watch(self, tensors: Sequence[Tensor]) -> None:
        """Takes these for data."""
        for x in tensors:
            _mark(x, DATA)

    def was_changed(self) -> bool:
        """Whether something that was to be kept has been changed in place since."""
        return any(x._version != version for x, version in self._watched)

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._are_functorch_transforms_active():  # a network's own vmap or grad, whose tensors are its alone
            return func(*args, **kwargs)
        kind = self._scan(args) | (self._scan(kwargs.values()) if kwargs else 0)
        if kind == _BOTH and torch.is_grad_enabled():
            return self._meet(func, args, kwargs)
        result = func(*args, **kwargs)
        if kind & _DATA:
            _mark(args[0] if func is Tensor.__setitem__ else result, DATA)
        elif kind and torch.is_grad_enabled():
            return self._make(func, args, kwargs, result)
        return result

    def _scan(self, values: Any) -> int:
        found = 0
        for x in values:
            if isinstance(x, Tensor):
                if DATA in x.__dict__:
                    found |= _DATA
                elif x.requires_grad:
                    # What comes from where nothing is seen may well depend on the inputs.
                    found |= _MADE if id(x) in self._own or MADE in x.__dict__ else _DATA
            elif isinstance(x, tuple | list):
                found |= self._scan(x)
        return found

    def _make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Something was computed from parameters: to be looked for as well, or here they spread over inputs."""
        mark = MADE
        if isinstance(result, Tensor):
            if id(result) in self._own:
                return result
            self.made.append(result.shape)
            if len(self.made) - 1 in self._spreading:
                result, mark = self._record(func, args, kwargs, result), DATA
        _mark(result, mark)
        return result

    def _meet(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func not in _INPLACE:
            result = self._record(func, args, kwargs, func(*args, **kwargs))
            _mark(result, DATA)
            return result
        target, before = args[0], args[0].detach().clone()
        result = func(*args, **kwargs)
        if not target._is_view():  # a view's past changes with what it is a view of, and cannot be followed
            _mark(before, DATA)
            self._record(_INPLACE[func], (before, *args[1:]), kwargs, result)
        return result

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        operands, kept = {}, []
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and self._scan((x,)) == _MADE:
                operands[i] = x
                kept.append(x)
            else:
                kept.append(self._kept(x))
        results, out_spec = tree_flatten(result)
        with_gradient = [i for i, x in enumerate(results) if isinstance(x, Tensor) and x.requires_grad]
        if len(with_gradient) > 1:  # one may be computed from another, as an LSTM cell's: apart from here on
            results = [x.view_as(x) if i in with_gradient else x for i, x in enumerate(results)]
        if with_gradient:
            shapes = [results[i].shape for i in with_gradient]
            edges = [get_gradient_edge(results[i]) for i in with_gradient]
            self.contacts.append(Contact(func, kept, operands, with_gradient, shapes, edges, spec))
        for i in with_gradient:
            results[i] = self._passed_on(results[i])
        return tree_unflatten(results, out_spec)

    def _kept(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if self._copies and DATA in x.__dict__:
            return x.detach().clone()
        self._watched.append((x, x._version))
        return x.detach()

    def _passed_on(self, x: Tensor) -> Tensor:
        # A change in place of a view, as a linear layer's output on sequences is, gives it another past.
        if x._is_view():
            if self._copies:
                return x.clone()
            self._watched.append((x, x._version))
        return x


_DATA, _MADE, _BOTH = 1, 2, 3


def _mark(result: Any, mark: str) -> None:
    if isinstance(result, Tensor):
        setattr(result, mark, True)
    elif isinstance(result, tuple | list):
        for x in result:
            _mark(x, mark)
    elif isinstance(result, dict):
        _mark(list(result.values()), mark)


_INPLACE = {
    Tensor.add_: torch.add,
    Tensor.__iadd__: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.__isub__: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.__imul__: torch.mul,
}


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The fused kernels have neither second derivatives nor rules for vmap."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_zeros(()).where(attn_mask, float("-inf"))
    return torch._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _opened(function: Any) -> Any:
    """A function of torch.nn.functional that, when it is watched, shows what it calls instead of itself."""
    inside = {**function.__globals__, "has_torch_function": lambda _: False}
    other = types.FunctionType(function.__code__, inside, function.__name__, function.__defaults__)
    other.__kwdefaults__ = function.__kwdefaults__
    return other


SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    functional.scaled_dot_product_attention: _attention,
    functional.multi_head_attention_forward: _opened(functional.multi_head_attention_forward),
}


# --- checkpoints ---
# They hide what they run, refuse torch.autograd.grad (the reentrant ones) or expect to meet the same calls again (the
# others). When a network is watched they just run it; there is no hook for that, and networks import by name.


def _unless_watched(original: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*args: Any, **kwargs: Any) -> Any:
        watched = any(isinstance(mode, Widening) for mode in _get_current_function_mode_stack())
        return (plain if watched else original)(*args, **kwargs)

    return chosen


def _nothing_around(*_: Any, **__: Any) -> Iterator[None]:
    yield


_reentrant: Any = torch.utils.checkpoint.CheckpointFunction
_reentrant.apply = staticmethod(_unless_watched(_reentrant.apply, lambda function, _, *args: function(*args)))
torch.utils.checkpoint._checkpoint_without_reentrant_generator = _unless_watched(
    torch.utils.checkpoint._checkpoint_without_reentrant_generator, _nothing_around
)
