"""How programs are timed against each other."""

from kpt.tuning.rounds import SECONDS, SIGMAS, gain, ratio, rounds

__all__ = ["SECONDS", "SIGMAS", "gain", "ratio", "rounds"]
