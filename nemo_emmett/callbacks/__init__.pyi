from .nonfinite import SkipNonFiniteSteps as SkipNonFiniteSteps
from .oomptimizer import OOMptimizer as OOMptimizer
from .random_state import RandomState as RandomState
from .resumable_data import ResumableData as ResumableData
from .stop_on_signal import StopOnSignal as StopOnSignal
from .training_clock import TrainingClock as TrainingClock

__all__ = ["OOMptimizer", "RandomState", "ResumableData", "SkipNonFiniteSteps", "StopOnSignal", "TrainingClock"]
