from .corpus import Corpus, Part, Recording, Selection, Sentence
from .preparing import CorpusSummary, PartSummary, prepare_corpus
from .registry import CORPORA, find_corpus

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
