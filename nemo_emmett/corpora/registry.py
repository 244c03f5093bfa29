"""The public corpora that can be prepared, by name; a reader is imported when it is needed."""

from __future__ import annotations

from importlib import import_module

from nemo_emmett.config import nearest
from nemo_emmett.corpora.corpus import Corpus
from nemo_emmett.errors import ConfigError

TEXT = {
    "flores": "FLORES-200 and FLORES+: sentences to validate and test on, 200 languages.",
    "multi30k": "Multi30k: captions of photos in English, German, French and Czech.",
    "opus": "OPUS: parallel text of all kinds, in Moses form or as TMX.",
    "tatoeba": "Tatoeba: sentences and translations by volunteers, 400 languages.",
}
SPEECH = {
    "covost2": "CoVoST 2: Common Voice with translations.",
    "europarl_st": "Europarl-ST: speeches of the European Parliament with translations.",
    "fleurs": "FLEURS: sentences of FLORES read aloud, 102 languages.",
    "mtedx": "Multilingual TEDx: talks in eight languages with translations.",
    "must_c": "MuST-C: English TED talks with translations.",
}
"""Module of the reader (the command's name with underscores) -> description for ``nemo-emmett prepare --help``, which
imports no reader."""

CORPORA = {**TEXT, **SPEECH}


def find_corpus(name: str) -> Corpus:
    """The corpus of that name, written with dashes or underscores.

    Raises:
        ConfigError: if there is none, with the nearest name.
    """
    module = name.replace("-", "_")
    if module not in CORPORA:
        commands = [corpus.replace("_", "-") for corpus in CORPORA]
        suggestion = nearest(module.replace("_", "-"), commands)
        hint = f"did you mean '{suggestion}'?" if suggestion else f"there are {', '.join(commands)}."
        raise ConfigError(f"'{name}' is no corpus that can be prepared; {hint}")
    return import_module(f"nemo_emmett.corpora.readers.{module}").CORPUS
