"""The Lightning callbacks, under the names that recipes use.

- :class:`OOMptimizer` (``oomptimizer``): sets the batch size of every bucket.
- :class:`RandomState` (``random_state``): puts the states of the random generators into checkpoints.
- :class:`ResumableData` (``resumable_data``): lets checkpoints know the last batch trained on.
- :class:`SkipNonFiniteSteps` (``skip_non_finite_steps``): skips steps whose loss or gradients are not finite.
- :class:`StopOnSignal` (``stop_on_signal``): ends training on SIGTERM or SIGINT with a checkpoint and exit code 75.
- :class:`TrainingClock` (``training_clock``): logs how long the model has been trained, beside validation's scores.

All are NeMo ``Serialization`` objects as well, so that NeMo's allow-list admits them under ``trainer.callbacks``.
"""

from nemo_emmett.data.resumable import ResumableData
from nemo_emmett.modules.nonfinite import SkipNonFiniteSteps
from nemo_emmett.modules.random_state import RandomState
from nemo_emmett.modules.stop_on_signal import StopOnSignal
from nemo_emmett.modules.training_clock import TrainingClock
from nemo_emmett.oomptimizer import OOMptimizer

__all__ = ["OOMptimizer", "RandomState", "ResumableData", "SkipNonFiniteSteps", "StopOnSignal", "TrainingClock"]
