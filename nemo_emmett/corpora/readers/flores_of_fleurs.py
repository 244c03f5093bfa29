"""Which sentence of FLORES a sentence of FLEURS is.

FLEURS had the sentences of FLORES dev and devtest read aloud, but divided and numbered them anew: the ids of its test
recordings in English lie between 1,660 and 2,009, those of one article apart from each other. Ids are no places in
FLORES, and those who brought the two together did it by text (Schmidt et al., Fleurs-SLU, arXiv:2501.06117,
``scripts/align-flores-and-fleurs.py``). So the id of a sentence is looked up once, by its English text, of which all
others are translations, or where FLEURS' English is not at hand or differs, by the text of another language; all
languages are then joined by the id.

What a speaker was given can differ from what FLORES has, in Cebuano in one sentence of sixteen (the same work): a
recording whose own text is not that of the sentence it was joined with gets no translation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path

from nemo_emmett.corpora.normalisation import normalise
from nemo_emmett.corpora.readers.flores import SPLITS, flores_sentences
from nemo_emmett.errors import DataError

_MOST_UNKNOWN = 0.1
"""Share of the sentences that may not be in FLORES; Cebuano, the worst that Fleurs-SLU found, has 6 %."""

_LEAST_SHARED_WORDS = 0.5
"""Of two texts of one sentence. Corrections leave most words; different sentences share little but articles."""


def translations_in_flores(
    texts: Mapping[str, Mapping[int, str]], flores: Path, spoken: str, targets: Sequence[str], what: str
) -> dict[int, dict[str, str]]:
    """The translations that FLORES has of FLEURS' sentences.

    Args:
        texts: of each language of FLEURS at hand, the text of each id; English helps, ``spoken`` must be there.
        flores: folder or archive of FLORES-200 or FLORES+.
        spoken: the language whose recordings are translated.
        targets: the languages to translate to.
        what: names the recordings in messages.

    Returns:
        For each id in ``spoken`` that is in FLORES, its text in each target language.

    Raises:
        DataError: if more than a tenth of the sentences are not those of FLORES.
    """
    sentences = _read_flores(flores, dict.fromkeys([*texts, spoken, *targets]))
    places = places_in_flores(texts, sentences)
    found = {
        number: {target: sentences[target].get(places[number], "") for target in targets}
        for number, text in texts[spoken].items()
        if number in places and _same_sentence(text, sentences[spoken].get(places[number], ""))
    }
    unknown = [number for number in texts[spoken] if number not in found]
    if len(unknown) > _MOST_UNKNOWN * len(texts[spoken]):
        raise DataError(
            f"{what} in '{spoken}': {len(unknown)} of {len(texts[spoken])} sentences are not those of '{flores}' (id "
            f"{unknown[0]} is the first); give FLORES-200 or FLORES+ as published, and have FLEURS' en_us beside."
        )
    return found


def places_in_flores(
    texts: Mapping[str, Mapping[int, str]], sentences: Mapping[str, Mapping[str, str]]
) -> dict[int, str]:
    """FLORES' id of each id of FLEURS, found by the text in English or else in the first language that has it.

    Texts are the same if their words are. One that FLORES has twice tells nothing.
    """
    places: dict[int, str] = {}
    for language in sorted(texts, key=lambda language: language != "en"):
        of_text = _unique_texts(sentences[language])
        for number, text in texts[language].items():
            place = of_text.get(normalise(text))
            if place is not None:
                places.setdefault(number, place)
    return places


def _unique_texts(sentences: Mapping[str, str]) -> dict[str, str]:
    normalised = {place: normalise(text) for place, text in sentences.items()}
    times = Counter(normalised.values())
    return {text: place for place, text in normalised.items() if times[text] == 1}


def _same_sentence(one: str, other: str) -> bool:
    words, others = normalise(one).split(), normalise(other).split()
    return words == others or SequenceMatcher(None, words, others, autojunk=False).ratio() >= _LEAST_SHARED_WORDS


def _read_flores(flores: Path, languages: Iterable[str]) -> dict[str, dict[str, str]]:
    """The sentences of dev and devtest together, by language and FLORES' id."""
    sentences: dict[str, dict[str, str]] = {language: {} for language in languages}
    for split in SPLITS:
        for language, texts in flores_sentences(flores, split, tuple(sentences)).items():
            sentences[language].update(texts)
    return sentences
