"""How much may change, and the plan that says what does."""

from kpt.strategy.levels import LEVELS, Level, choose, level_named
from kpt.strategy.plan import FORMAT, Plan, Site

__all__ = ["FORMAT", "LEVELS", "Level", "Plan", "Site", "choose", "level_named"]
