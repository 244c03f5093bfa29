"""``emmett_m2m100``, ``emmett_nllb``, ``emmett_mbart50`` and ``emmett_mbart``: languages as tokens of their own.

These families were pretrained with a token for the language of each side. Ids are put together as their Hugging Face
tokenizers do it, so ``answer_ids`` are what ``tokenizer(text_target=...)`` gives as labels:

==================  ======================  ======================  ===================
format              ``context_ids``         ``answer_ids``          decoder starts with
==================  ======================  ======================  ===================
``emmett_m2m100``   ``__de__ text </s>``    ``__fr__ text </s>``    ``</s> __fr__``
``emmett_nllb``     ``deu_Latn text </s>``  ``fra_Latn text </s>``  ``</s> fra_Latn``
``emmett_mbart50``  ``de_DE text </s>``     ``fr_XX text </s>``     ``</s> fr_XX``
``emmett_mbart``    ``text </s> de_DE``     ``text </s> fr_XX``     ``fr_XX``
==================  ======================  ======================  ===================

In training, when ``answer_ids`` are the ``labels``, the decoder reads them one token later: ``decoder_start_token_id``,
which is ``</s>``, comes in front; mBART, which has no start token, takes the last of the labels there. So the first
three are trained to begin with the language's token, which ``generate`` forces with ``forced_bos_token_id``, or, for a
batch of several languages, with :meth:`~nemo_emmett.prompts.seq2seq.Seq2SeqPrompt.decoder_start`.

Speech takes the place of the text, ``__de__ <|audio|> </s>``. Where the source language is not known its token is left
out; the tokenizers of the families would put English.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import ClassVar

from nemo.collections.common.prompts.formatter import EOS_SLOT, Modality, PromptFormatter

from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.encoding import token_id
from nemo_emmett.prompts.languages import flores_code, m2m100_code, mbart_code, with_name
from nemo_emmett.prompts.markup import Prompt
from nemo_emmett.prompts.seq2seq import Segment, Seq2SeqPrompt


class LanguageTokenPrompt(Seq2SeqPrompt):
    """A side is its language's token, its text and ``</s>``; a family defines the token of a language."""

    FAMILY: ClassVar[str]
    """Its name for messages."""

    @staticmethod
    @abstractmethod
    def language_token(language: str) -> str | None:
        """The family's token of a language code, None where it has none."""

    @cached_property
    def _language_ids(self) -> dict[str, int]:
        return {}

    def language_id(self, language: str) -> int:
        """The id of a language's token.

        Raises:
            ConfigError: if the family, or this tokenizer, has no token for the language.
        """
        if language not in self._language_ids:
            token, named = self.language_token(language), with_name(language)
            if token is None:
                raise ConfigError(
                    f"{self.FAMILY} has no token for the language {named}; leave out the data in that language "
                    f"(prompt_format {self.NAME}), or use another model: T5 and decoder-only ones take any language."
                )
            number = token_id(self.tokenizer, token)
            if number is None:
                raise ConfigError(
                    f"prompt_format {self.NAME}: the tokenizer has no token '{token}' for the language {named}; use "
                    "the prompt format of the tokenizer's own family."
                )
            self._language_ids[language] = number
        return self._language_ids[language]

    def has_language(self, language: str) -> bool:
        """Whether the tokenizer has a token for a language."""
        token = self.language_token(language)
        return token is not None and token_id(self.tokenizer, token) is not None

    def context_segment(self, message: Prompt, target_lang: str | None, source_lang: str | None) -> Segment:
        """``__de__ message </s>``; without a source language ``message </s>``."""
        return self._side(message, source_lang)

    def answer_segment(self, answer: Prompt, target_lang: str | None) -> Segment:
        """``__fr__ answer </s>``."""
        if not target_lang:
            raise ConfigError(f"prompt_format {self.NAME}: an answer needs the slot target_lang, such as 'de'.")
        return self._side(answer, target_lang)

    def decoder_start(self, target_lang: str | None) -> list[int]:
        """``</s> __fr__``, the start token of these families and the target language's."""
        return [self.eos_id, self._first_id(target_lang)]

    def _first_id(self, target_lang: str | None) -> int:
        if not target_lang:
            raise ConfigError(
                f"prompt_format {self.NAME}: an answer begins with its language's token, but the language is not "
                "known; give `target_lang`, such as 'de', to generate or in the slots of the user's turn."
            )
        return self.language_id(target_lang)

    def _side(self, text: Prompt, language: str | None) -> Segment:
        before = (self.language_id(language),) if language else ()
        return Segment(before, text, (self.eos_id,))


def _template(side: str) -> dict[str, dict]:
    """NeMo's description of the turns, by the template of one side."""
    languages = {"user": "source_lang", "assistant": "target_lang"}
    return {
        role: {
            "template": side.replace("|lang|", f"|{language}|"),
            "slots": {language: Modality.Text, "message": Modality.Text},
        }
        for role, language in languages.items()
    }


class EmmettM2M100PromptFormatter(LanguageTokenPrompt, PromptFormatter):
    """M2M100: ``__de__ text </s>``."""

    NAME = "emmett_m2m100"
    FAMILY = "M2M100"
    TEMPLATE: ClassVar[dict] = _template(f"__|lang|__ |message|{EOS_SLOT}")

    @staticmethod
    def language_token(language: str) -> str | None:
        """``__de__``."""
        code = m2m100_code(language)
        return code and f"__{code}__"


class EmmettNLLBPromptFormatter(LanguageTokenPrompt, PromptFormatter):
    """NLLB: ``deu_Latn text </s>``, as its tokenizer does it without ``legacy_behaviour``."""

    NAME = "emmett_nllb"
    FAMILY = "NLLB"
    TEMPLATE: ClassVar[dict] = _template(f"|lang| |message|{EOS_SLOT}")
    language_token = staticmethod(flores_code)


class EmmettMBart50PromptFormatter(LanguageTokenPrompt, PromptFormatter):
    """mBART-50: ``de_DE text </s>``."""

    NAME = "emmett_mbart50"
    FAMILY = "mBART-50"
    TEMPLATE: ClassVar[dict] = _template(f"|lang| |message|{EOS_SLOT}")
    language_token = staticmethod(mbart_code)


class EmmettMBartPromptFormatter(LanguageTokenPrompt, PromptFormatter):
    """mBART of 25 languages: ``text </s> de_DE``; answers too end in their language."""

    NAME = "emmett_mbart"
    FAMILY = "mBART"
    TEMPLATE: ClassVar[dict] = _template(f"|message|{EOS_SLOT} |lang|")
    language_token = staticmethod(mbart_code)

    def decoder_start(self, target_lang: str | None) -> list[int]:
        """``fr_XX``, which is where the labels' last token goes in training."""
        return [self._first_id(target_lang)]

    def _side(self, text: Prompt, language: str | None) -> Segment:
        after = (self.language_id(language),) if language else ()
        return Segment((), text, (self.eos_id, *after))
