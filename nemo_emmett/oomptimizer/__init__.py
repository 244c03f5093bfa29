"""Batch sizes that fit the memory, bucket by bucket.

- :class:`OOMptimizer`: the Lightning callback that gives every bucket the batch size of a profile.
- :class:`Profile`: bins and batch sizes, from a YAML file.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
