"""The answer of an example: the translation, or in two steps the transcript and then the translation.

Two-step formats (``emmett_t5_two_step``, ``emmett_qwen_two_step``, ...) differ from the formats that they are named
after in one thing: speech whose transcript is known is answered by the transcript, a separator and the translation, as
in a chain of thought. Contexts are the same, and so are the answers of text, of speech without a transcript, and of
speech that is transcribed.

The separator cannot occur in a transcript. In chat formats it is a line break, since a transcript is put on one line;
T5's tokenizers have no line breaks, so it is their first sentinel token, which as a control token is no text
(``prompts/control_tokens.py``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.encoding import token_id
from nemo_emmett.prompts.markup import Markup, Prompt
from nemo_emmett.prompts.request import Request

SUFFIX = "_two_step"
"""With which the names of two-step formats end."""

SENTINEL = Markup("<extra_id_0>")
"""The separator of T5 formats."""

Decode = Callable[[Sequence[int]], str]
"""Ids to text, without special tokens."""


class Answer(NamedTuple):
    """A generated answer."""

    translation: str  # the whole answer where it has no separator
    transcript: str | None = None  # None where none was asked for, or given
    is_malformed: bool = False  # in two steps, but without a separator


class DirectAnswer:
    """Mixin of our prompt formats: the answer is the translation."""

    is_two_step: ClassVar[bool] = False

    def answer_of(self, request: Request) -> Prompt:
        """The text of the answer of a request that has one."""
        return Prompt([request.answer])

    def parse_answer(self, ids: Sequence[int], decode: Decode) -> Answer:
        """What a generated answer says.

        Args:
            ids: up to the token that ends the answer, which is not among them.
            decode: by the tokenizer.
        """
        return Answer(decode(ids).strip())


class _TwoStepAnswer(DirectAnswer):
    is_two_step: ClassVar[bool] = True

    def answer_of(self, request: Request) -> Prompt:
        """Transcript, separator and translation; the translation where there is no transcript."""
        if request.transcript is None:
            return super().answer_of(request)
        return Prompt([" ".join(request.transcript.split()), *self.separator(), request.answer])

    @abstractmethod
    def separator(self) -> Sequence[str]:
        """What is between transcript and translation.

        Raises:
            ConfigError: if the tokenizer does not have it.
        """


class TwoStepT5(_TwoStepAnswer):
    """``transcript <extra_id_0> translation``."""

    tokenizer: Any
    NAME: str

    def separator(self) -> Sequence[str]:
        """See :class:`_TwoStepAnswer`."""
        self._sentinel()
        return " ", SENTINEL, " "

    def parse_answer(self, ids: Sequence[int], decode: Decode) -> Answer:
        """See :class:`DirectAnswer`."""
        ids, sentinel = list(ids), self._sentinel()
        if sentinel not in ids:
            return Answer(decode(ids).strip(), is_malformed=True)
        place = ids.index(sentinel)
        return Answer(decode(ids[place + 1 :]).strip(), decode(ids[:place]).strip())

    def _sentinel(self) -> int:
        if (number := token_id(self.tokenizer, SENTINEL)) is None:
            raise ConfigError(
                f"prompt_format {self.NAME}: the tokenizer has no token '{SENTINEL}', which separates transcript and "
                f"translation; use {self.NAME.removesuffix(SUFFIX)}, or a tokenizer with T5's sentinel tokens."
            )
        return number


class TwoStepChat(_TwoStepAnswer):
    """The transcript on a line, and below it the translation."""

    def separator(self) -> Sequence[str]:
        """See :class:`_TwoStepAnswer`."""
        return ("\n",)

    def parse_answer(self, ids: Sequence[int], decode: Decode) -> Answer:
        """See :class:`DirectAnswer`."""
        text = decode(ids).strip()
        transcript, separator, translation = text.partition("\n")
        if not separator:
            return Answer(text, is_malformed=True)
        return Answer(translation.strip(), transcript.strip())


def is_two_step(prompt_format: str | None) -> bool:
    """Whether answers of a prompt format have two steps."""
    return prompt_format is not None and prompt_format.startswith("emmett_") and prompt_format.endswith(SUFFIX)
