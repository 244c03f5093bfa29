"""The Lightning callbacks, under the names that recipes use.

- :class:`OOMptimizer` (``oomptimizer``): sets the batch size of every bucket.
- :class:`RandomState` (``random_state``): puts the states of the random generators into checkpoints.
- :class:`ResumableData` (``resumable_data``): lets checkpoints know the last batch trained on.
- :class:`SkipNonFiniteSteps` (``skip_non_finite_steps``): skips steps whose loss or gradients are not finite.
- :class:`StopOnSignal` (``stop_on_signal``): ends training on SIGTERM or SIGINT with a checkpoint and exit code 75.
- :class:`TrainingClock` (``training_clock``): logs how long the model has been trained, beside validation's scores.

All are NeMo ``Serialization`` objects as well, so that NeMo's allow-list admits them under ``trainer.callbacks``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
