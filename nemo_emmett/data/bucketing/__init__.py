"""Bins of least padding.

- ``bins``: :func:`optimal_bins` and :func:`optimal_bins_2d`, solved exactly.
- ``padding``: how much padding given bins leave.
- ``length_stats``: the lengths of a dataset's examples, measured.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
