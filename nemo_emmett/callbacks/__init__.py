"""Lightning callbacks, in the order in which they act on a training.

- :class:`OOMptimizer` (``oomptimizer``): sets the batch size of every bucket, and guards the memory.
- :class:`ResumableData` (``resumable_data``, with the epoch loop of ``resumable_loop``): stores the last batch trained
  on in checkpoints.
- :class:`RandomState` (``random_state``): stores the states of the random generators in checkpoints.
- :class:`SkipNonFiniteSteps` (``nonfinite``): skips steps whose loss or gradients are not finite.
- ``ValidateAtEpochEnd`` (``validation_schedule``): validates epochs that the trainer's schedule leaves without.
- :class:`TrainingClock` (``training_clock``): logs the seconds of training with each validation.
- ``RunProgress`` (``run_progress``): prints the progress of a training as lines, and measures its time.
- ``TrainedExamples`` (``trained_examples``): counts the examples by modality and direction, for the exported model.
- :class:`StopOnSignal` (``stop_on_signal``): ends training on SIGTERM or SIGINT with a checkpoint and exit code 75.

All are NeMo ``Serialization`` objects as well, so that NeMo's allow-list admits them under ``trainer.callbacks``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
