"""What is watched during training, and what is made of it."""

from fishopt.diagnostics.measures import Measurement, condition_number
from fishopt.diagnostics.monitor import TrainingMonitor
from fishopt.diagnostics.schedule import BatchSizeSchedule

__all__ = ["BatchSizeSchedule", "Measurement", "TrainingMonitor", "condition_number"]
