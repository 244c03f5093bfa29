from .curves import Curve as Curve
from .curves import read_curves as read_curves
from .report import write_report as write_report
from .results import (
    Comparison as Comparison,
)
from .results import (
    Evaluation as Evaluation,
)
from .results import (
    Score as Score,
)
from .results import (
    Throughput as Throughput,
)
from .results import (
    Translation as Translation,
)
from .results import (
    from_json as from_json,
)
from .results import (
    to_json as to_json,
)
from .run import evaluate as evaluate
from .run import evaluate_recipe as evaluate_recipe
from .scoring import average as average
from .scoring import columns as columns
from .scoring import score as score
from .significance import compare as compare
from .table import print_table as print_table
from .translation import translate as translate

__all__ = [
    "Comparison",
    "Curve",
    "Evaluation",
    "Score",
    "Throughput",
    "Translation",
    "average",
    "columns",
    "compare",
    "evaluate",
    "evaluate_recipe",
    "from_json",
    "print_table",
    "read_curves",
    "score",
    "to_json",
    "translate",
    "write_report",
]
