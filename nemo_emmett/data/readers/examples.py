"""Examples of what a source's reader yields: a source and a target text (or a recording and a text), and languages.

Speech records follow one of two conventions:

- ``text`` is the transcript and ``translations`` maps languages to translations: one example per target language;
- ``text`` is the target text itself, in ``target_lang`` (NeMo's Canary convention).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from lhotse import SupervisionSegment
from lhotse.cut import Cut, MixedCut
from lhotse.utils import fastcopy
from nemo.collections.common.data.lhotse.text_adapters import (
    AudioTurn,
    Formattable,
    NeMoMultimodalConversation,
    NeMoSFTExample,
    SourceTargetTextExample,
    TextExample,
    TextTurn,
)

from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.io.files import is_unicode
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.prompts.instruction import translation_instruction
from nemo_emmett.prompts.language_codes import normalized
from nemo_emmett.prompts.languages import is_known_language
from nemo_emmett.prompts.markup import Prompt
from nemo_emmett.prompts.transcripts import set_transcript

_PACKED_ROW = "packed_row"


class ExampleKind(str, Enum):
    """The kind of examples that a dataset takes."""

    TRANSLATION = "translation"  # ours: cuts and text pairs with their languages
    CONVERSATION = "conversation"  # NeMo's SALMDataset
    AS_READ = "as_read"  # any other dataset: what NeMo's readers yield


def lengths_in_tokens(sources: Iterable[Source], kind: ExampleKind) -> str | None:
    """Why examples have no length in seconds, in words; None if all sources have some.

    Args:
        sources: of a group.
        kind: what the dataset takes.
    """
    for source in sources:
        if source.is_text:
            return f"{source.name} is text"
        if source.is_conversation:
            return f"{source.name} is read as conversations (type: {source.type}), whose length is in tokens"
        if kind is ExampleKind.CONVERSATION:
            return f"{source.name} is read as conversations (NeMo's SALM takes no others), whose length is in tokens"
    return None


@dataclass(frozen=True)
class SourceDefaults:
    """The values that a source's config has for records without their own."""

    name: str  # for the report, where a record does not name its manifest
    source_lang: str | None = None
    target_lang: str | Sequence[str] | None = None
    audio_locator_tag: str | None = None
    token_equivalent_duration: float | None = None  # seconds of speech that count as one token
    context: str | None = None  # instruction of a conversation
    system_prompt: str | None = None  # of a conversation
    transcripts: bool = False  # are prompted as text, next to the speech
    is_transcription: bool = False  # the answers are what is spoken


class Examples:
    """The examples of a source, made from what its reader yields; records that make none are skipped.

    Args:
        records: what the reader yields: cuts, text pairs, conversations.
        kind: what the dataset takes.
        defaults: the source's own languages and tags.
        skipped_records: receives the records that cannot be used.
        forbidden: what no text may hold (:func:`~nemo_emmett.prompts.families.forbidden_text`).
    """

    def __init__(
        self,
        records: Iterable,
        kind: ExampleKind,
        defaults: SourceDefaults,
        skipped_records: SkippedRecords,
        forbidden: re.Pattern | None = None,
    ) -> None:
        self.records = records
        self.kind = kind
        self.defaults = defaults
        self.skipped_records = skipped_records
        self.forbidden = forbidden

    def __iter__(self) -> Iterator:
        for example in self._examples():
            if self.forbidden is not None and any(map(self.forbidden.search, _texts_of(example))):
                self._note(example, "text holds a control token")
            else:
                yield example

    def _examples(self) -> Iterator[Cut | Formattable]:
        for record in self.records:
            if isinstance(record, Cut):
                yield from self._of_speech(record)
            elif isinstance(record, SourceTargetTextExample):
                yield from self._of_text(record)
            else:
                try:
                    _check_turns(record)
                except InvalidRecord as cause:
                    self._note(record, str(cause))
                else:
                    yield self._with_languages(record)

    def _of_speech(self, cut: Cut) -> Iterator[Cut | NeMoMultimodalConversation]:
        custom = _custom_of(cut)
        is_transcription = self.defaults.is_transcription
        try:
            if is_transcription:
                translations = [_spoken(cut, custom, self.defaults)]
            else:
                translations = list(_translations(cut, custom, self.defaults, self._has_instruction(custom)))
        except InvalidRecord as cause:
            self._note(cut, str(cause))
            return
        source_lang = _spoken_language(cut, custom, self.defaults)
        for target_lang, text in translations:
            try:
                _check_example(text, target_lang, source_lang)
                example = _speech_example(cut, text, source_lang, target_lang, self.defaults.audio_locator_tag)
                if is_transcription:
                    _drop_instruction(example)  # that of the translation
                if len(translations) > 1 or is_transcription:
                    example.id = f"{cut.id}-{target_lang}"
                if self.defaults.transcripts:
                    self._mark_transcript(example)
                example = self._finished(example)
            except InvalidRecord as cause:
                self._note(cut, str(cause))
                continue
            yield example

    def _mark_transcript(self, example: Cut) -> None:
        """Have the transcript of a speech example prompted; an empty one if it has none that can be."""
        transcript = _custom_of(example).get("source_text")
        if not isinstance(transcript, str) or not is_unicode(transcript):
            transcript = ""
        if self.forbidden is not None and self.forbidden.search(transcript):
            transcript = ""
        set_transcript(example, transcript.strip())

    def _of_text(self, pair: SourceTargetTextExample) -> Iterator[SourceTargetTextExample | NeMoMultimodalConversation]:
        custom = pair.custom or {}
        source_lang = normalized(custom.get("source_lang") or pair.source.language or self.defaults.source_lang)
        target_lang = normalized(custom.get("target_lang") or pair.target.language or self.defaults.target_lang)
        try:
            if not pair.source.text:
                raise InvalidRecord("empty text")
            if target_lang is None and not self._has_instruction(custom):
                raise InvalidRecord("no target language")
            _check_example(pair.target.text, target_lang, source_lang)
        except InvalidRecord as cause:
            self._note(pair, str(cause))
            return
        pair.source.language, pair.target.language = source_lang, target_lang
        pair.custom = {**custom, "source_lang": source_lang, "target_lang": target_lang}
        yield self._finished(pair)

    def _with_languages(self, example: Formattable) -> Formattable:
        if isinstance(example, TextExample):
            example.text = Prompt([example.text])  # a locator in it is text
        if isinstance(example, NeMoSFTExample):
            turns = [{**turn, "value": Prompt([turn["value"]])} for turn in example.data["conversations"]]
            example.data = {**example.data, "conversations": turns}
        defaults = {"source_lang": self.defaults.source_lang, "target_lang": self.defaults.target_lang}
        known = {key: value for key, value in defaults.items() if isinstance(value, str)}
        custom = {**known, **(getattr(example, "custom", None) or {})}
        example.custom = custom | {key: normalized(custom[key]) for key in defaults if key in custom}
        return example

    def _has_instruction(self, custom: Mapping) -> bool:
        """Whether an instruction in words replaces the target language, as conversations allow."""
        return self.kind is ExampleKind.CONVERSATION and bool(custom.get("context") or self.defaults.context)

    def _finished(self, example: Cut | SourceTargetTextExample) -> Cut | Formattable:
        return as_conversation(example, self.defaults) if self.kind is ExampleKind.CONVERSATION else example

    def _note(self, example: Cut | Formattable, cause: str) -> None:
        note_example(self.skipped_records, example, cause, self.defaults.name)


def origin_of(example: Cut | Formattable) -> tuple[str | None, str]:
    """The manifest (None where unknown) and the place in it that an example comes from."""
    custom = _custom_of(example)
    place = custom.get("manifest_place") or getattr(example, "id", None) or custom.get("id")
    if place is None and isinstance(example, SourceTargetTextExample):
        place = example.source.text
    return custom.get("manifest_origin"), str(place or "an example without id")


def note_example(
    skipped_records: SkippedRecords, example: Cut | Formattable, cause: str, source: str = "examples"
) -> None:
    """Note that an example had to be skipped, under its own source or, where it has none, this one."""
    origin, place = origin_of(example)
    skipped_records.add(origin or source, place, cause)


def mark_origin(example: Cut | Formattable, source: str, place: str) -> None:
    """Write the source and the place in it that an example comes from into its custom fields."""
    if isinstance(example, MixedCut):  # its first recording carries the fields of the whole
        example = example._first_non_padding_cut
    example.custom = {**(getattr(example, "custom", None) or {}), "manifest_origin": source, "manifest_place": place}


def mark_row(example: Cut | Formattable, row: int, size: int) -> None:
    """Note in which row of its batch an example is packed, and the most positions of a row."""
    if isinstance(example, MixedCut):
        example = example._first_non_padding_cut
    example.custom = {**(getattr(example, "custom", None) or {}), _PACKED_ROW: (row, size)}


def packed_row(example: Cut | Formattable) -> tuple[int, int] | None:
    """What :func:`mark_row` has noted; None: the example is not packed."""
    return _custom_of(example).get(_PACKED_ROW)


def _texts_of(example: Cut | Formattable) -> Iterator[str]:
    """All texts of a record that the model is given."""
    custom = _custom_of(example)
    yield from (custom[field] for field in ("context", "system_prompt") if isinstance(custom.get(field), str))
    if isinstance(example, Cut):
        yield from (supervision.text for supervision in example.supervisions if supervision.text)
    elif isinstance(example, SourceTargetTextExample):
        yield from (part.text for part in (example.question, example.source, example.target) if part is not None)
    elif isinstance(example, NeMoMultimodalConversation):
        yield from (turn.value for turn in example.turns if isinstance(turn, TextTurn))
    elif isinstance(example, TextExample):
        yield example.text
    elif isinstance(example, NeMoSFTExample):
        yield from (turn["value"] for turn in example.data["conversations"])


def _custom_of(example: Cut | Formattable) -> dict:
    if isinstance(example, MixedCut):
        example = example._first_non_padding_cut
    return getattr(example, "custom", None) or {}


def _transcript(cut: Cut) -> str:
    """The text of all its supervisions, as NeMo's Canary prompt joins them."""
    texts = [s.text for s in cut.supervisions if s.text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRecord("text is not a string")
    return " ".join(texts).strip()


def _spoken_language(cut: Cut, custom: Mapping, defaults: SourceDefaults) -> str | None:
    spoken = custom.get("lang")
    if spoken is None and "translations" in custom:
        spoken = next((s.language for s in cut.supervisions if s.language), None)
    return normalized(custom.get("source_lang") or defaults.source_lang or spoken)


def _spoken(cut: Cut, custom: Mapping, defaults: SourceDefaults) -> tuple[str, str]:
    """The spoken language and what is spoken."""
    language = _spoken_language(cut, custom, defaults)
    if language is None:
        raise InvalidRecord("no source language")
    text, target = custom.get("source_text"), custom.get("target_lang") or defaults.target_lang
    if text is None and ("translations" in custom or (isinstance(target, str) and normalized(target) == language)):
        text = _transcript(cut)
    if text is None or text == "":
        raise InvalidRecord("no transcript")
    return language, text.strip() if isinstance(text, str) else text


def _drop_instruction(example: Cut) -> None:
    holder = example._first_non_padding_cut if isinstance(example, MixedCut) else example
    holder.custom = {key: value for key, value in holder.custom.items() if key != "context"}


def _translations(
    cut: Cut, custom: Mapping, defaults: SourceDefaults, has_instruction: bool
) -> Iterator[tuple[str | None, str]]:
    """The target languages of a cut and the text in each."""
    wanted = custom.get("target_lang") or defaults.target_lang
    for language in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
        if language is not None and not (isinstance(language, str) and is_known_language(language)):
            raise InvalidRecord(f"unknown language '{language}'")
    texts = custom.get("translations")
    if texts is None:
        if wanted is not None and not isinstance(wanted, str):
            raise InvalidRecord("several target languages, but no translations")
        if wanted is None and not has_instruction:
            raise InvalidRecord("no target language")
        yield normalized(wanted), _transcript(cut)
        return
    if not isinstance(texts, Mapping):
        raise InvalidRecord("translations is not a mapping")
    texts = _by_language(texts)
    spoken = _spoken_language(cut, custom, defaults)
    targets = [wanted] if isinstance(wanted, str) else list(wanted or texts)
    for target in map(normalized, targets):
        text = texts.get(target)
        if text is None and target == spoken:
            text = _transcript(cut)
        yield target, text


def _by_language(translations: Mapping[str, str]) -> dict[str, str]:
    """The translations by the one form of their languages' codes."""
    found: dict[str, str] = {}
    for code, text in translations.items():
        if found.setdefault(normalized(code), text) != text:
            raise InvalidRecord(f"two translations to '{normalized(code)}'")
    return found


def _check_example(text: str | None, target_lang: str | None, source_lang: str | None) -> None:
    for language in (source_lang, target_lang):
        if language is not None and not is_known_language(str(language)):
            raise InvalidRecord(f"unknown language '{language}'")
    if text is None:
        raise InvalidRecord(f"no translation to '{target_lang}'")
    if not isinstance(text, str):
        raise InvalidRecord("text is not a string")
    if not text.strip():
        raise InvalidRecord("empty text")
    if not is_unicode(text):
        raise InvalidRecord("text is not Unicode")


def _check_turns(example: Formattable) -> None:
    """Refuse a conversation that NeMo has made of a record whose text is none."""
    for turn in example.turns if isinstance(example, NeMoMultimodalConversation) else ():
        if isinstance(turn, TextTurn) and not isinstance(turn.value, str):
            raise InvalidRecord("text is not a string")
        if isinstance(turn, TextTurn) and not is_unicode(turn.value):
            raise InvalidRecord("text is not Unicode")


def _speech_example(
    cut: Cut, text: str, source_lang: str | None, target_lang: str | None, audio_locator_tag: str | None
) -> Cut:
    """A copy of the cut whose one supervision is the target text and whose custom fields name the languages."""
    if isinstance(cut, MixedCut):  # its first recording carries the fields of the whole
        first = cut._first_non_padding_cut
        tracks = [
            fastcopy(track, cut=_speech_example(track.cut, text, source_lang, target_lang, audio_locator_tag))
            if track.cut is first
            else track
            for track in cut.tracks
        ]
        return fastcopy(cut, tracks=tracks)
    spoken = cut.supervisions[0] if cut.supervisions else SupervisionSegment(cut.id, cut.recording_id, 0, cut.duration)
    custom = {**(cut.custom or {}), "source_lang": source_lang, "target_lang": target_lang}
    if "translations" in custom or source_lang == target_lang:  # then the record's text is what is spoken
        custom.setdefault("source_text", _transcript(cut) or None)
    if audio_locator_tag is not None:
        custom["audio_locator_tag"] = audio_locator_tag
    return fastcopy(cut, supervisions=[fastcopy(spoken, text=text, language=target_lang)], custom=custom)


def as_conversation(example: Cut | SourceTargetTextExample, defaults: SourceDefaults) -> NeMoMultimodalConversation:
    """The same example as the user's turns (instruction, then speech or text) and the assistant's turn (the answer)."""
    custom = _custom_of(example)
    if isinstance(example, Cut):
        answer = example.supervisions[0].text
        question = AudioTurn(cut=example, role="user", audio_locator_tag=defaults.audio_locator_tag, text=answer)
    else:
        answer = example.target.text
        question = TextTurn(value=example.source.text, role="user")
    turns = [TextTurn(value=_instruction(custom, defaults), role="user"), question]
    if system_prompt := _words(custom, "system_prompt") or defaults.system_prompt:
        turns.insert(0, TextTurn(value=system_prompt, role="system"))
    return NeMoMultimodalConversation(
        id=example.id if isinstance(example, Cut) else custom["id"],
        turns=[*turns, TextTurn(value=answer, role="assistant")],
        token_equivalent_duration=defaults.token_equivalent_duration,
        custom=custom,
    )


def _words(custom: Mapping, field: str) -> str | None:
    """A field of a record that the model is given as text."""
    words = custom.get(field)
    if words is not None and not (isinstance(words, str) and is_unicode(words)):
        raise InvalidRecord(f"{field} is not a string")
    return words


def _instruction(custom: Mapping, defaults: SourceDefaults) -> str:
    if context := _words(custom, "context") or defaults.context:
        return context
    return translation_instruction(custom["target_lang"], custom["source_lang"])
