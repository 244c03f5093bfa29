"""Which languages a request may name: those that the model was trained on.

A direction that was trained for text alone, or for speech alone, is allowed for both: that one carries over to the
other is what the joint training is for. A model whose export does not say what it was trained on is not restricted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nemo_emmett.errors import ConfigError
from nemo_emmett.models.exported import only_source, trained_directions
from nemo_emmett.prompts.answers import is_two_step
from nemo_emmett.prompts.languages import check_language, language_name
from nemo_emmett.serving.request_errors import RequestError, shown

DEFAULT_TARGET = "en"
"""OpenAI's API translates to English."""


class Direction(NamedTuple):
    """What the model is asked for."""

    source: str | None  # None: no language is named to the model
    target: str
    wants_transcript: bool = False  # the result is the transcript that comes with the translation


class Directions:
    """The directions of a model.

    Args:
        config: of the exported model.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._trained = trained_directions(config)
        self.gives_transcripts = is_two_step(config.get("prompt_format"))

    def translation(
        self,
        modality: str,
        source: str | None,
        target: str | None,
        source_key: str = "language",
        target_key: str = "to_language",
    ) -> Direction:
        """The direction that a request names.

        Args:
            modality: of the input, ``audio`` or ``text``.
            source: the language code of the input; None or empty: the only one that the target was trained from, or
                none.
            target: the language code of the translation; None or empty: English.
            source_key, target_key: the request's fields, for messages.

        Raises:
            RequestError: if a language is unknown, or the model was not trained on it.
        """
        named, target = bool(target), self._known(target or DEFAULT_TARGET, target_key)
        source = self._known(source, source_key) if source else None
        default = "" if named else " (the default)"
        if self._trained:
            targets = {of_pair for _, of_pair in self._trained}
            if target not in targets:
                raise _refused(
                    f"{target_key}: the model does not translate to {_named([target])}{default}, but to "
                    f"{_named(targets)}; name one of these.",
                    target_key,
                )
            source = source or only_source(self._config, target)
            sources = {of_pair for of_pair, _ in self._trained}
            if source is not None and source not in sources and None not in sources:
                raise _refused(
                    f"{source_key}: the model does not translate from {_named([source])}, but from "
                    f"{_named(filter(None, sources))}; name one of these, or leave it out.",
                    source_key,
                )
            if source == target and (source, target) not in trained_directions(self._config, modality):
                raise _refused(
                    f"{target_key}: {_named([target])}{default} is the language of the input; name another.",
                    target_key,
                )
        return Direction(source, target)

    def transcription(self, language: str | None) -> Direction:
        """The direction of which the result is a transcript.

        Args:
            language: code of the language that is spoken; None or empty: the only one that the model transcribes.

        Raises:
            RequestError: if the language is unknown, is missing, or is none that the model transcribes.
        """
        transcribed = {source for source, target in self._trained if source == target}
        on_the_way: dict[
            str, str
        ] = {}  # languages that are transcribed before they are translated, to the first target
        if self.gives_transcripts:
            pairs = trained_directions(self._config, "audio")
            on_the_way = {source: target for source, target in sorted(pairs, key=str, reverse=True) if source}
        possible = transcribed | set(on_the_way)
        if not language:
            if len(possible) != 1:
                raise _refused("language: is missing; name the language that is spoken, such as en.", "language")
            (language,) = possible
        language = self._known(language, "language")
        if self._trained and language not in possible:
            which = f"transcribes {_named(possible)}" if possible else "was not trained to transcribe"
            raise _refused(f"language: the model does not transcribe {_named([language])}; it {which}.", "language")
        if self._trained and language not in transcribed:
            return Direction(language, on_the_way[language], wants_transcript=True)
        return Direction(language, language)

    def _known(self, code: str, key: str) -> str:
        """The one form of a code. Of a region that was not trained, as browsers name it (en-US), the language."""
        try:
            found = check_language(shown(code), key)
        except ConfigError as error:
            raise _refused(str(error), key) from error
        base, _, rest = found.partition("-")
        codes = {of_pair for pair in self._trained for of_pair in pair}
        return base if found not in codes and base in codes and re.fullmatch(r"[A-Z]{2}|\d{3}", rest) else found

    def listing(self) -> dict[str, Any]:
        """What a client can choose from."""
        pairs = sorted(self._trained, key=str)
        codes = sorted({code for pair in pairs for code in pair if code})
        return {
            "directions": [{"source": source, "target": target} for source, target in pairs],
            "languages": {code: language_name(code) for code in codes},
            "gives_transcripts": self.gives_transcripts,
        }


def _refused(sentence: str, key: str) -> RequestError:
    return RequestError(sentence, param=key, code="unsupported_language")


def _named(codes: Iterable[str]) -> str:
    return ", ".join(f"{code} ({language_name(code)})" for code in sorted(codes))
