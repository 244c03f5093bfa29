"""Learning-rate schedules for trainings without a fixed end.

- :class:`InfiniteLR` (``infinite``): warm-up, cool-down, a constant phase of any length, annealing.

A recipe names one by ``model.lr_scheduler._target_``. It is a NeMo ``Serialization`` object as well, so that NeMo's
allow-list admits it, in NeMo's SALM too.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
