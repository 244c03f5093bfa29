"""The instruction to translate in plain English, and the turns of a dialog that asks for a translation."""

from __future__ import annotations

from typing import Any

from nemo_emmett.prompts.language_codes import normalized
from nemo_emmett.prompts.languages import language_name
from nemo_emmett.prompts.markup import Prompt, joined


def translation_instruction(target_lang: str, source_lang: str | None = None) -> str:
    """The instruction to translate, in English, for language models that follow instructions; to transcribe, where both
    languages are the same.

    Example:
        >>> translation_instruction("de", "en"), translation_instruction("de")
        ('Translate from English to German:', 'Translate to German:')
    """
    if normalized(source_lang) == normalized(target_lang):
        return f"Transcribe in {language_name(target_lang)}:"
    if source_lang is None:
        return f"Translate to {language_name(target_lang)}:"
    return f"Translate from {language_name(source_lang)} to {language_name(target_lang)}:"


def translation_turns(formatter: Any, message: str, target_lang: str, source_lang: str | None = None) -> list[dict]:
    """The dialog that asks for a translation, as turns of a NeMo prompt format.

    Args:
        formatter: a NeMo ``PromptFormatter`` (class or object).
        message: the text to translate, or the audio locator tag; text as a
            :class:`~nemo_emmett.prompts.markup.Prompt` holds no locator.
        target_lang: language code of the translation.
        source_lang: language code of the message, where known.

    Returns:
        A list of turns for ``formatter.encode_dialog``: with the languages in slots if the format has such slots,
        otherwise with an instruction in front of the message.
    """
    slots = formatter.get_slots("user")
    if not {"source_lang", "target_lang"} & set(slots):
        instruction = translation_instruction(target_lang, source_lang)
        content = joined([instruction, message]) if isinstance(message, Prompt) else f"{instruction} {message}"
        return [{"role": "user", "slots": {"message": content}}]
    values = {"message": message, "target_lang": target_lang, "source_lang": source_lang}
    return [{"role": "user", "slots": {name: values[name] for name in values if name in slots}}]
