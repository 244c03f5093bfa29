"""Batch sizes, and the bins that go with them, before a training.

- :func:`oomptimize`: find a recipe's batch sizes on the device at hand.
- :func:`plan`: find them anywhere for a memory budget, and, if asked, the bins with the shortest epoch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
