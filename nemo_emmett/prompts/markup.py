"""Strings whose parts were written by a user or by a prompt format.

In :class:`Markup` control tokens are control tokens; anywhere else they are text (``prompts/control_tokens.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

AUDIO_LOCATOR = "<|audio|>"
"""The audio locator where a model names no other."""


class Markup(str):
    """Text that no user wrote, of a template or an audio locator: its control tokens are control tokens."""

    __slots__ = ()


class Prompt(str):
    """Users' texts and :class:`Markup`, put together.

    It is a string, since NeMo's prompt formats and their checks take messages as such; ``parts`` keeps the parts.

    Example:
        >>> Prompt([Markup("<de>"), " ", "strike: <s>one</s>"])
        '<de> strike: <s>one</s>'
    """

    parts: tuple[str, ...]

    def __new__(cls, parts: Iterable[str]) -> Prompt:
        """Of texts, markup, and other prompts, whose parts become its own."""
        parts = tuple(chain.from_iterable(part.parts if isinstance(part, Prompt) else (part,) for part in parts))
        made = super().__new__(cls, "".join(parts))
        made.parts = parts
        return made

    def __getnewargs__(self) -> tuple[tuple[str, ...]]:
        return (self.parts,)


def joined(texts: Iterable[str], separator: str = " ") -> Prompt:
    """``separator.join(texts)``."""
    return Prompt([part for text in texts for part in (separator, text)][1:])


def with_locators(text: str, locator: str) -> Prompt:
    """A text in which each audio locator is markup."""
    return joined(text.split(locator), Markup(locator))


class UserTextPrompt:
    """Mixin of the prompt formats that encode a user's text as text, whatever control tokens it spells.

    Messages are :class:`Prompt` where they come from data. In a plain string, as callers of NeMo's ``encode_dialog``
    write them, an audio locator marks a recording; all else is text.
    """

    def as_prompt(self, message: str) -> Prompt:
        """A message of a turn."""
        if isinstance(message, (Markup, Prompt)):
            return Prompt([message])
        return with_locators(message, getattr(self.tokenizer, "audio_locator_tag", AUDIO_LOCATOR))
