"""What an optimizer chooses estimators for, and what it tells of that."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fishopt.groups import Groups
from fishopt.optim.resuming import Resumable
from fishopt.optim.units import units
from fishopt.report import Report, Row


class Reporting(Resumable):
    """An optimizer that can be asked which estimators it uses."""

    _layerwise: bool

    def _units(self) -> tuple[Groups, dict[str, str]]:
        self._follow_model()
        return units(self.param_groups, self._name_of, layerwise=self._layerwise)

    def report(self) -> Report:
        """Which estimator each group uses and why, and what the curvature has cost: print it, or see `Report`."""
        groups, wanted = self._units()
        parameters = dict(self._model.named_parameters())
        return Report(
            optimizer=type(self).__name__,
            criterion=self._curvature.criterion,
            rows=[
                self._row(unit, {name: parameters[name] for name in names}, wanted[unit])
                for unit, names in groups.items()
            ],
            steps=self._steps,
            failures=self._curvature.failures.total,
            skipped=self._skipped.total,
            curvature_seconds=self._curvature.seconds,
            curvature_share=self._curvature.seconds / self._seconds if self._seconds else 0.0,
            history=list(self._curvature.history),
        )

    def _row(self, unit: str, held: Mapping[str, Tensor], wanted: str) -> Row:
        return Row.of(
            unit,
            wanted,
            self._curvature.choices.get(unit),
            parameters=sum(p.numel() for p in held.values()),
            refreshes=max(self.state[p].get("refreshes", 0) if p in self.state else 0 for p in held.values()),
            ways={name: way for name in held if (way := self._curvature.way_of(name)) is not None},
        )
