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


def request_of(example: Cut | SourceTargetTextExample | NeMoMultimodalConversation) -> Request:
    """The request of an example.

    The answer of a pair is its target text; of a cut, whose custom fields are ``audio_locator_tag``, ``target_lang``
    and perhaps ``source_lang``, the text of its supervision; of a conversation, whose user turns are the message, the
    assistant's turn.

    Raises:
        DataError: if a cut has no audio locator.
    """
    if isinstance(example, SourceTargetTextExample):
        return _request_of_text(example)
    if isinstance(example, Cut):
        return _request_of_speech(example)
    return _request_of_conversation(example)


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


def _request_of_text(pair: SourceTargetTextExample) -> Request:
    source, target, custom = pair.source, pair.target, pair.custom or {}
    if pair.question is not None:  # NeMo's name for the user's text in front of the source
        custom = {"context": pair.question.text, **custom}
    return Request(
        custom.get("id", source.text),
        source.text,
        source.language or custom.get("source_lang"),
        target.language,
        target.text,
        custom,
    )


def _request_of_speech(cut: Cut) -> Request:
    if isinstance(cut, MixedCut):  # its first recording carries the fields of the whole
        cut = cut._first_non_padding_cut
    custom = cut.custom or {}
    locator = custom.get("audio_locator_tag")
    if not locator:
        raise DataError(
            f"example {cut.id}: there is no token to mark the place of its audio; set audio_locator_tag in the "
            "dataset's config."
        )
    answer = cut.supervisions[0].text if cut.supervisions else None
    return Request(cut.id, Markup(locator), custom.get("source_lang"), custom.get("target_lang"), answer, custom)


def _request_of_conversation(conversation: NeMoMultimodalConversation) -> Request:
    message, answer = [], None
    for turn in conversation.turns:
        if turn.role == "assistant":
            answer = turn.value
        else:
            message.append(message_of(turn))
    custom = conversation.custom or {}
    return Request(
        conversation.id, joined(message), custom.get("source_lang"), custom.get("target_lang"), answer, custom
    )
