"""What an optimizer saves, and takes over from what was saved."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from fishopt.optim import checkpoint
from fishopt.optim.atomic import Transaction
from fishopt.optim.buckets import Sorting
from fishopt.optim.checks import plain
from fishopt.optim.copies import Copyable
from fishopt.optim.curvature import Curvature
from fishopt.optim.estimate import Moment
from fishopt.optim.gradients import Skipped
from fishopt.optim.portable import from_copy, with_copy
from fishopt.optim.units import known_as


class Resumable(Copyable):
    """An optimizer with the attributes that are saved; a resumed run continues bit for bit."""

    _model: nn.Module
    _name_of: dict[Tensor, str]
    _curvature: Curvature
    _steps: int
    _is_fresh: bool
    _holds: str
    _skipped: Skipped
    _moment: Moment
    _seconds: float
    _started: float | None
    _sorting: Sorting | None

    @abstractmethod
    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises ValueError for options out of range."""

    @abstractmethod
    def _wants_gradient(self) -> bool:
        """Whether the loss's gradient at the model's output is needed."""

    def _follow_model(self) -> None:
        """Parameters go by the names that they have now, and what they are is recorded for."""
        self._name_of = known_as(self._model, self._name_of)
        self._recorder.parameters = [p for group in self.param_groups for p in group["params"]]
        self._recorder.wants_gradient = self._wants_gradient()

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, with the curvature's own state: a resumed run continues bit for bit."""
        self._follow_model()
        state = super().state_dict()
        state["param_groups"] = [plain(group) for group in state["param_groups"]]
        state["fishopt"] = {
            "version": checkpoint.VERSION,
            **checkpoint.identity(self, self._name_of),
            "steps": self._steps,
            "is_fresh": self._is_fresh,
            "holds": self._holds,
            "skipped": list(self._skipped),
            "moment": list(self._moment),
            "seconds": self._seconds,
            "curvature": self._curvature.state_dict(),
        }
        return with_copy(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, of this fishopt or an older one; all of it or nothing.

        Raises:
            ValueError: If it is another kind of optimizer's, another model's, or a newer fishopt's, or is damaged.
            TypeError: If it is no dict.
        """
        self._follow_model()
        before = dict(vars(self))
        with checkpoint.refuse_damaged(state_dict), Transaction() as transaction:
            state_dict = from_copy(state_dict)
            own = checkpoint.read(state_dict, checkpoint.identity(self, self._name_of))
            checkpoint.check_values(own)
            transaction.on_failure(self._curvature.restorer())
            transaction.on_failure(lambda: vars(self).update(before))
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "fishopt"})
            checkpoint.restore_precision(state_dict, self.param_groups, self.state)
            checkpoint.check_states(self.state, self._name_of)
            for group, old in zip(self.param_groups, before["param_groups"], strict=True):
                for name in self.defaults.keys() & old.keys():
                    group.setdefault(name, checkpoint.BEFORE.get(name, old[name]))
                self._check_options(group)
            self._steps, self._sorting = own["steps"], None
            self._is_fresh, self._holds, self._skipped = own["is_fresh"], own["holds"], Skipped(*own["skipped"])
            self._moment = Moment(*own["moment"])
            self._seconds, self._started = own["seconds"], None
            self._curvature.load_state_dict(own["curvature"])
            self._follow_model()
            transaction.commit()
