"""The built-in corpus: numbers, dates, clock times and prices, written out and spoken in four languages.

- ``config``: :class:`PhrasebookConfig`.
- ``items``: an item is a (type, value), such as ``number:42``; the possible ones, and their division into splits.
- ``verbalization``: items in words of every language.
- ``espeak``: the voices and the library that speaks. ``speaker``: a process that speaks.
- ``speaking``: texts, recordings and manifests of any spoken corpus. ``prepare``: those of the phrasebook.

Example:
    >>> from pathlib import Path
    >>> from nemo_emmett.corpora.phrasebook import PhrasebookConfig, prepare_phrasebook
    >>> config = PhrasebookConfig(types=("number",), max_number=999, train_items=600)
    >>> summary = prepare_phrasebook(Path("data/phrasebook"), config)  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
