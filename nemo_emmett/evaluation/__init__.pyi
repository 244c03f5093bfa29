from .curves import Curve, read_curves
from .report import write_report
from .results import Comparison, Evaluation, Score, Throughput, Translation, from_json, to_json
from .run import evaluate, evaluate_recipe
from .scoring import average, columns, score
from .significance import compare
from .table import print_table
from .translation import translate

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
