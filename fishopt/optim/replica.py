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
        """The output at the parameters as they are, detached."""
        return _run(self._current(), in_full_precision(inputs), {}).detach()

    @apart()
    def products(self, inputs: Arguments, directions: Sequence[Direction]) -> tuple[Tensor, list[Tensor]]:
        """The output, and the product of its Jacobian with each direction, all of the output's shape."""
        inputs, shadow = in_full_precision(inputs), self._current()
        if not self._lacks_forward_mode:
            try:
                return _forward_products(shadow, inputs, directions)
            except NotImplementedError:  # an operation without a forward-mode rule
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
        self._shadow.sync()
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
    held = {name: replaced.get(name, p) for name, p in shadow.parameters.items()}

    def forwards(*args: Any, **kwargs: Any) -> Any:
        return functional_call(shadow.module, held, args, kwargs)

    # With gradients on: a network may differentiate its own output, as physics-informed ones do.
    with torch.enable_grad():
        outputs: Tensor = under(Substituting(), lambda: shadow.read(inputs.call(forwards)))
    return outputs


def _normalises_batches(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
