from .commands import oomptimize as oomptimize
from .commands import plan as plan

__all__ = ["oomptimize", "plan"]
