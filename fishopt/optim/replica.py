"""A copy of the network with other parameters for a moment: its output, and how that changes along directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fishopt.batch import apart, in_full_precision
from fishopt.passes import Arguments, Direction, Shadow, pushed
from fishopt.passes.products import run


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

    @apart()
    def outputs(self, inputs: Arguments) -> Tensor:
        """The output at the parameters as they are, detached; of the network as `products` found it."""
        shadow = self._shadow or self._current()
        shadow.sync()
        return run(shadow, in_full_precision(inputs), {}).detach()

    @apart()
    def products(self, inputs: Arguments, directions: Sequence[Direction]) -> tuple[Tensor, list[Tensor]]:
        """The output, and the product of its Jacobian with each direction, all of the output's shape.

        Raises:
            RuntimeError: As the network raises it.
        """
        shadow = self._current()
        shadow.sync()
        return pushed(shadow, in_full_precision(inputs), directions)

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


def _normalises_batches(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
