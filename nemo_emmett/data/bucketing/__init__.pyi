from .bins import optimal_bins as optimal_bins
from .bins import optimal_bins_2d as optimal_bins_2d
from .padding import bucket_of as bucket_of
from .padding import padding_of as padding_of

__all__ = ["bucket_of", "optimal_bins", "optimal_bins_2d", "padding_of"]
