from .config import LANGUAGES, SPLITS, TYPES, PhrasebookConfig
from .items import Item, Phrase, split_phrases
from .prepare import prepare_phrasebook
from .speaking import SpokenSummary
from .verbalization import write_item

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
