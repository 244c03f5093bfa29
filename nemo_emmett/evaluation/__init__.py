"""From a model and test sets to translations, scores, a table, JSON, and one self-contained HTML page.

The modules in the order of the data's flow:

- ``recipe``: the recipe's keys as :class:`EvaluationConfig`. ``run``: :func:`evaluate` and :func:`evaluate_recipe`.
- ``distributed``: the processes that share an evaluation. ``translation``: batches to translations, with the speed.
- ``metrics``, ``comet``: the metrics. ``scoring``: scores per direction, and their averages.
- ``results``: :class:`Evaluation`, as it is saved. ``significance``: paired bootstrap against a baseline.
- ``table``: the table of scores, printed in the terminal and shown on the page.
- ``report``: the page, with ``curves`` of the training, ``breakdown`` (BLEU by length), ``charts`` of both, and
  ``examples`` with their ``recordings``: random ones, and those of ``changes`` (the worst, the most changed).
  ``words`` splits sentences for ``breakdown`` and ``examples``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
