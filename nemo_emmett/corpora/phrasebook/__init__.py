"""The built-in corpus: numbers, dates, clock times and prices, written out and spoken in four languages.

An **item** is a (type, value), such as ``number:42``. It is written in words in every language (``writing``), falls
into one of the splits train, dev and test (``items``), and is spoken by eSpeak NG (``voices``, ``espeak``).

Example:
    >>> from pathlib import Path
    >>> from nemo_emmett.corpora.phrasebook import PhrasebookConfig, prepare_phrasebook
    >>> config = PhrasebookConfig(types=("number",), max_number=999, train_items=600)
    >>> summary = prepare_phrasebook(Path("data/phrasebook"), config)  # doctest: +SKIP
"""

from nemo_emmett.corpora.phrasebook.config import LANGUAGES, SPLITS, TYPES, PhrasebookConfig
from nemo_emmett.corpora.phrasebook.items import Item, Phrase, split_phrases
from nemo_emmett.corpora.phrasebook.prepare import prepare_phrasebook
from nemo_emmett.corpora.phrasebook.speaking import SpokenSummary
from nemo_emmett.corpora.phrasebook.writing import write_item

__all__ = [
    "LANGUAGES",
    "SPLITS",
    "TYPES",
    "Item",
    "Phrase",
    "PhrasebookConfig",
    "SpokenSummary",
    "prepare_phrasebook",
    "split_phrases",
    "write_item",
]
