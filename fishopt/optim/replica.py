"""A copy of the network with other parameters for a moment: its output, and how that changes along directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward
from torch import Tensor, nn
from torch.func import functional_call

from fishopt.batch import apart, in_full_precision
from fishopt.passes import Arguments, Shadow
from fishopt.passes.tracing import Substituting, under

Direction = Mapping[str, Tensor]
"""Parameter's name -> how it changes."""


class Replica:
    """Runs a network on what it was trained on, without leaving a trace on it.

    On a shadow, which is in eval mode but for batch normalisation: a loss that was trained by the batch's statistics is
    looked at by these. No dropout: two looks at one loss must not differ by chance.

    Args:
        model: The user's network.
        readout: What picks the natural parameters from the model's output.
    """

    def __init__(self, model: nn.Module, readout: Any) -> None:
        self._model, self._readout = model, readout
        self._shadow: Shadow | None = None
        self._modes: list[bool] = []
        self._lacks_forward_mode = False

    @apart()
    def outputs(self, inputs: Arguments) -> Tensor:
        """The output at the parameters as they are, detached; of the network as `products` found it."""
        shadow = self._shadow or self._current()
        shadow.sync()
        return _run(shadow, in_full_precision(inputs), {}).detach()

    @apart()
    def products(self, inputs: Arguments, directions: Sequence[Direction]) -> tuple[Tensor, list[Tensor]]:
        """The output, and the product of its Jacobian with each direction, all of the output's shape.

        Raises:
            RuntimeError: As the network raises it.
        """
        inputs, shadow = in_full_precision(inputs), self._current()
        shadow.sync()
        if not self._lacks_forward_mode:
            try:
                return _forward_products(shadow, inputs, directions)
            except RuntimeError as error:
                # An operation without a forward-mode rule, or a network with a forward mode of its own.
                if not isinstance(error, NotImplementedError) and "forward mode" not in str(error):
                    raise
                self._lacks_forward_mode = True
        return _backward_products(shadow, inputs, directions)

    def _current(self) -> Shadow:
        modes = [module.training for module in self._model.modules() if _normalises_batches(module)]
        if self._shadow is None or not self._shadow.is_current() or modes != self._modes:
            self._shadow, self._modes = Shadow(self._model, self._readout), modes
            own = (module for module in self._shadow.module.modules() if _normalises_batches(module))
            for module, is_training in zip(own, modes, strict=True):
                if is_training:
                    # Its own running statistics play no part then, and are not to be averaged further.
                    module._buffers.update(running_mean=None, running_var=None)
            self._shadow.require(())
        return self._shadow

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shadow": None}


def _forward_products(
    shadow: Shadow, inputs: Arguments, directions: Sequence[Direction]
) -> tuple[Tensor, list[Tensor]]:
    found = []
    for direction in directions:
        with forward.dual_level():
            duals = {name: forward.make_dual(shadow.parameters[name].detach(), d) for name, d in direction.items()}
            value, product = forward.unpack_dual(_run(shadow, inputs, duals))
        outputs = value.detach()
        found.append(torch.zeros_like(outputs) if product is None else product.detach())
    return outputs, found


@torch.enable_grad()
def _backward_products(
    shadow: Shadow, inputs: Arguments, directions: Sequence[Direction]
) -> tuple[Tensor, list[Tensor]]:
    """``J d`` is the derivative of ``<J^T u, d>`` with respect to ``u``, whatever u is."""
    wanted = {name: shadow.parameters[name].detach().requires_grad_() for name in directions[0]}
    outputs = _run(shadow, inputs, wanted)
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(
        outputs, list(wanted.values()), u, create_graph=True, allow_unused=True, materialize_grads=True
    )
    found = []
    for direction in directions:
        inner = torch.stack([(a * direction[name]).sum() for name, a in zip(wanted, pulled, strict=True)]).sum()
        (product,) = torch.autograd.grad(inner, u, retain_graph=True, allow_unused=True, materialize_grads=True)
        found.append(product)
    return outputs.detach(), found


def _run(shadow: Shadow, inputs: Arguments, replaced: Direction) -> Tensor:
    def forwards(*args: Any, **kwargs: Any) -> Any:
        # Under all of its names, if it has several, as torch would find out at each call.
        held = {alias: replaced[name] for alias, name in _aliases(shadow).items() if name in replaced}
        return functional_call(shadow.module, held, args, kwargs, tie_weights=False)

    function = forwards if replaced else shadow.module
    # With gradients on: a network may differentiate its own output, as physics-informed ones do.
    with torch.enable_grad():
        outputs: Tensor = under(Substituting(), lambda: shadow.read(inputs.call(function)))
    return outputs


def _aliases(shadow: Shadow) -> dict[str, str]:
    """All names that a parameter has -> the one that it goes by."""
    if "aliases" not in shadow.notes:
        listed = shadow.module.named_parameters(remove_duplicate=False)
        shadow.notes["aliases"] = {alias: shadow.name_of[id(p)] for alias, p in listed}
    found: dict[str, str] = shadow.notes["aliases"]
    return found


def _normalises_batches(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
