"""Corpora prepared for training: files as NeMo manifests, line-aligned text and shards.

- ``phrasebook``: numbers, dates, clock times and prices in four languages, written and spoken by this package.
- ``registry``: public corpora by name; ``readers`` has a module for each, which knows its publisher's files.
- ``preparing``: what a reader finds becomes files. ``audio_files``: the recordings among them.
- ``tokenizers``: tokenizers for models that are trained from nothing.

Example:
    >>> from nemo_emmett.corpora import find_corpus, prepare_corpus
    >>> prepare_corpus(find_corpus("multi30k"), "multi30k-dataset", "data/multi30k")  # doctest: +SKIP
"""

from nemo_emmett.corpora.corpus import Corpus, Part, Recording, Selection, Sentence
from nemo_emmett.corpora.preparing import CorpusSummary, PartSummary, prepare_corpus
from nemo_emmett.corpora.registry import CORPORA, find_corpus

__all__ = [
    "CORPORA",
    "Corpus",
    "CorpusSummary",
    "Part",
    "PartSummary",
    "Recording",
    "Selection",
    "Sentence",
    "find_corpus",
    "prepare_corpus",
]
