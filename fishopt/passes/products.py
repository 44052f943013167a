"""Products with a network's Jacobian from either side, for whole vectors: no value per input, no diagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import embedding

from fishopt.passes.arguments import Arguments
from fishopt.passes.base import Diagonal
from fishopt.passes.shadow import Shadow
from fishopt.passes.tracing import Substituting, under

Direction = Mapping[str, Tensor]
"""Parameter's name -> how it changes."""

_LACKS = "lacks forward mode"


class Heeding(Substituting):
    """Forward mode's rule for embeddings does not heed ``padding_idx``, whose rows the backward one leaves out."""

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().called(func, args, kwargs)
        padding = kwargs.get("padding_idx", args[2] if len(args) > 2 else None) if func is embedding else None
        if padding is None:
            return found
        indices, weight = args[:2]
        return torch.where((indices == padding % len(weight))[..., None], found.detach(), found)


def run(shadow: Shadow, inputs: Arguments, replaced: Direction) -> Tensor:
    """The network's output with other values for some of its parameters."""

    def forwards(*args: Any, **kwargs: Any) -> Any:
        # Under all of its names, if it has several, as torch would find out at each call.
        held = {alias: replaced[name] for alias, name in _aliases(shadow).items() if name in replaced}
        return functional_call(shadow.module, held, args, kwargs, tie_weights=False)

    function = forwards if replaced else shadow.module
    # With gradients on: a network may differentiate its own output, as physics-informed ones do.
    with torch.enable_grad():
        outputs: Tensor = under(Heeding(), lambda: shadow.read(inputs.call(function)))
    return outputs


def pushed(shadow: Shadow, inputs: Arguments, directions: Sequence[Direction]) -> tuple[Tensor, list[Tensor]]:
    """The output, and the product ``J d`` of its Jacobian with each direction, all of the output's shape.

    Raises:
        RuntimeError: As the network raises it.
    """
    shadow.require(())
    if _LACKS not in shadow.notes:
        try:
            return _forward_products(shadow, inputs, directions)
        except RuntimeError as error:
            # An operation without a forward-mode rule, or a network with a forward mode of its own.
            if not isinstance(error, NotImplementedError) and "forward mode" not in str(error):
                raise
            shadow.notes[_LACKS] = True
    return _backward_products(shadow, inputs, directions)


def pulled(shadow: Shadow, inputs: Arguments, names: Sequence[str], cotangent: Tensor) -> Diagonal:
    """The product ``J^T u`` for a cotangent of the output's number of entries: parameter -> tensor of its shape."""
    wanted = _leaves(shadow, names)
    outputs = run(shadow, inputs, wanted)
    found = torch.autograd.grad(
        outputs, list(wanted.values()), cotangent.reshape(outputs.shape), allow_unused=True, materialize_grads=True
    )
    return dict(zip(wanted, found, strict=True))


def _leaves(shadow: Shadow, names: Sequence[str]) -> dict[str, Tensor]:
    shadow.require(())
    return {name: shadow.parameters[name].detach().requires_grad_() for name in names}


def _forward_products(
    shadow: Shadow, inputs: Arguments, directions: Sequence[Direction]
) -> tuple[Tensor, list[Tensor]]:
    found = []
    for direction in directions:
        with forward.dual_level():
            duals = {name: forward.make_dual(shadow.parameters[name].detach(), d) for name, d in direction.items()}
            value, product = forward.unpack_dual(run(shadow, inputs, duals))
        outputs = value.detach()
        found.append(torch.zeros_like(outputs) if product is None else product.detach())
    return outputs, found


@torch.enable_grad()
def _backward_products(
    shadow: Shadow, inputs: Arguments, directions: Sequence[Direction]
) -> tuple[Tensor, list[Tensor]]:
    """``J d`` is the derivative of ``<J^T u, d>`` with respect to ``u``, whatever u is."""
    wanted = _leaves(shadow, list(directions[0]))
    outputs = run(shadow, inputs, wanted)
    u = torch.zeros_like(outputs, requires_grad=True)
    back = torch.autograd.grad(
        outputs, list(wanted.values()), u, create_graph=True, allow_unused=True, materialize_grads=True
    )
    found = []
    for direction in directions:
        inner = torch.stack([(a * direction[name]).sum() for name, a in zip(wanted, back, strict=True)]).sum()
        (product,) = torch.autograd.grad(inner, u, retain_graph=True, allow_unused=True, materialize_grads=True)
        found.append(product)
    return outputs.detach(), found


def _aliases(shadow: Shadow) -> dict[str, str]:
    """All names that a parameter has -> the one that it goes by."""
    if "aliases" not in shadow.notes:
        listed = shadow.module.named_parameters(remove_duplicate=False)
        shadow.notes["aliases"] = {alias: shadow.name_of[id(p)] for alias, p in listed}
    found: dict[str, str] = shadow.notes["aliases"]
    return found
