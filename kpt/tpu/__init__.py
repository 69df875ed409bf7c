"""TPU kernels as their compiler schedules them: read and timed without a TPU."""

from kpt.tpu.bundles import ScheduleError
from kpt.tpu.chart import chart, plot
from kpt.tpu.schedule import GENERATIONS, Generation, Schedule, Stretch, generation, schedule

__all__ = ["GENERATIONS", "Generation", "Schedule", "ScheduleError", "Stretch", "chart", "generation", "plot", "schedule"]
