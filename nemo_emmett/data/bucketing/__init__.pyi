from .bins import optimal_bins as optimal_bins
from .bins import optimal_bins_2d as optimal_bins_2d

__all__ = ["optimal_bins", "optimal_bins_2d"]
