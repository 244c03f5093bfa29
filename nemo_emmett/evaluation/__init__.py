"""From a model and test sets to translations, scores, a table, JSON, and one self-contained HTML page.

- :func:`evaluate`, :func:`evaluate_recipe` (``run``): all of it, for a model and a recipe.
- :func:`translate` (``translation``): batches to translations, with the model's speed.
- :func:`score`, :func:`average` (``scoring``): metrics per direction, and their means; ``metrics``: which, ``comet``.
- :func:`compare` (``significance``): paired bootstrap against a baseline.
- ``distributed``: the processes that share an evaluation.
- :class:`Evaluation`, :func:`to_json`, :func:`from_json` (``results``): what is kept of a run.
- :func:`print_table` (``table``): the scores in the terminal.
- :func:`read_curves` (``curves``), :func:`write_report` (``report``): the page.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_emmett.evaluation.curves import Curve, read_curves
    from nemo_emmett.evaluation.report import write_report
    from nemo_emmett.evaluation.results import (
        Comparison,
        Evaluation,
        Score,
        Throughput,
        Translation,
        from_json,
        to_json,
    )
    from nemo_emmett.evaluation.run import evaluate, evaluate_recipe
    from nemo_emmett.evaluation.scoring import average, columns, score
    from nemo_emmett.evaluation.significance import compare
    from nemo_emmett.evaluation.table import print_table
    from nemo_emmett.evaluation.translation import translate

_MODULES = {
    "curves": ("Curve", "read_curves"),
    "report": ("write_report",),
    "results": ("Comparison", "Evaluation", "Score", "Throughput", "Translation", "from_json", "to_json"),
    "run": ("evaluate", "evaluate_recipe"),
    "scoring": ("average", "columns", "score"),
    "significance": ("compare",),
    "table": ("print_table",),
    "translation": ("translate",),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
