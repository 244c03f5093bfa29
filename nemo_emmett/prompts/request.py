"""The fields of an example that prompt formats need: a message, its languages, and the answer where it is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lhotse.cut import Cut, MixedCut
from nemo.collections.common.data.lhotse.text_adapters import (
    AudioTurn,
    NeMoMultimodalConversation,
    SourceTargetTextExample,
    TextTurn,
)

from nemo_emmett.errors import DataError
from nemo_emmett.prompts.markup import Markup, joined

EXAMPLE_TYPES = (SourceTargetTextExample, Cut, NeMoMultimodalConversation)
"""The examples that a :class:`Request` can be made of."""


class Request(NamedTuple):
    """A translation to prompt for, of text or of speech."""

    example_id: object  # for messages to the user
    message: str  # the text, or for speech the audio locator tag, as markup
    source_lang: str | None
    target_lang: str | None
    answer: str | None  # None where it is not known
    custom: Mapping  # the example's other fields
    transcript: str | None = None  # of speech that is translated, where it is known


def request_of(example: Cut | SourceTargetTextExample | NeMoMultimodalConversation) -> Request:
    """The request of an example.

    The answer of a pair is its target text; of a cut, whose custom fields are ``audio_locator_tag``, ``target_lang``
    and perhaps ``source_lang``, the text of its supervision; of a conversation, whose user turns are the message, the
    assistant's turn.

    Raises:
        DataError: if a cut has no audio locator.
    """
    if isinstance(example, SourceTargetTextExample):
        source, target, custom = example.source, example.target, example.custom or {}
        if example.question is not None:  # NeMo's name for the user's text in front of the source
            custom = {"context": example.question.text, **custom}
        example_id, source_lang = custom.get("id", source.text), source.language or custom.get("source_lang")
        return Request(example_id, source.text, source_lang, target.language, target.text, custom)
    if isinstance(example, Cut):
        # A mixed cut's first recording has the fields of the whole.
        example = example._first_non_padding_cut if isinstance(example, MixedCut) else example
        custom = example.custom or {}
        if not (locator := custom.get("audio_locator_tag")):
            raise DataError(
                f"example {example.id}: there is no token to mark the place of its audio; set audio_locator_tag in the "
                "dataset's config."
            )
        message, answer = Markup(locator), example.supervisions[0].text if example.supervisions else None
        source_lang, target_lang = custom.get("source_lang"), custom.get("target_lang")
        spoken = custom.get("source_text") if source_lang != target_lang else None
        transcript = spoken.strip() or None if isinstance(spoken, str) else None
        return Request(example.id, message, source_lang, target_lang, answer, custom, transcript)
    custom = example.custom or {}
    message = joined(message_of(turn) for turn in example.turns if turn.role != "assistant")
    answer = next((turn.value for turn in reversed(example.turns) if turn.role == "assistant"), None)
    return Request(example.id, message, custom.get("source_lang"), custom.get("target_lang"), answer, custom)


def target_language(request: Request) -> str:
    """The language to translate to.

    Raises:
        DataError: if the example has none.
    """
    if not request.target_lang:
        raise DataError(
            f"example {request.example_id}: its target language is not known; "
            "give its source a `target_lang`, or each of its records one."
        )
    return request.target_lang


def message_of(turn: TextTurn | AudioTurn) -> str:
    """The content of a conversation's turn: its text, or the audio locator tag, as markup."""
    return Markup(turn.audio_locator_tag) if isinstance(turn, AudioTurn) else turn.value
