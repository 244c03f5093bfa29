from .bins_report import bins_of_dataset as bins_of_dataset
from .bins_report import print_bins as print_bins
from .blend_report import Recipe as Recipe
from .blend_report import print_blend as print_blend
from .commands import oomptimize as oomptimize
from .commands import plan as plan
from .index_report import print_index as print_index

__all__ = ["Recipe", "bins_of_dataset", "oomptimize", "plan", "print_bins", "print_blend", "print_index"]
