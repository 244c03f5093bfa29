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

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
