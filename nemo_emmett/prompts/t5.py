"""``emmett_t5``: the prompt of multilingual encoder-decoders of the T5 kind, ``<de> text</s>``; ``emmett_ul2`` for UL2.

The target language comes first as a tag, as in EMMeTT's T5 backbone (arXiv 2409.13523, section 3; NeMo's ``t5nmt``).
Speech takes the place of the text: ``<de> <|audio|></s>``. The tag is one token if the tokenizer has it, otherwise
several. NeMo's own ``t5nmt`` has no place for an audio locator.

UL2 was pretrained with a token in front for its task, ``[S2S]`` for the continuation of a text by another
(arXiv 2205.05131, section 3.1.2).
"""

from __future__ import annotations

from typing import ClassVar

from nemo.collections.common.prompts.formatter import EOS_SLOT, Modality, PromptFormatter

from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.language_codes import normalized
from nemo_emmett.prompts.markup import Markup, Prompt
from nemo_emmett.prompts.seq2seq import Segment, Seq2SeqPrompt

_MODE = "[S2S]"


class EmmettT5PromptFormatter(Seq2SeqPrompt, PromptFormatter):
    """``context_ids`` are ``<target_lang> message</s>`` and ``answer_ids`` ``answer</s>``; no source language."""

    NAME = "emmett_t5"
    TEMPLATE: ClassVar[dict] = {
        "user": {
            "template": f"<|target_lang|> |message|{EOS_SLOT}",
            "slots": {"target_lang": Modality.Text, "message": Modality.Text},
        },
        "assistant": {"template": f"|message|{EOS_SLOT}", "slots": {"message": Modality.Text}},
    }

    def context_segment(self, message: Prompt, target_lang: str | None, source_lang: str | None) -> Segment:
        """``<de> message</s>``."""
        if not target_lang:
            raise ConfigError(f"prompt_format {self.NAME}: a user's turn needs the slot target_lang, such as 'de'.")
        # As one text: a tokenizer's encoding of a space may depend on the token before it.
        return Segment((), Prompt([Markup(f"<{normalized(target_lang)}>"), " ", message]), (self.eos_id,))

    def answer_segment(self, answer: Prompt, target_lang: str | None) -> Segment:
        """``answer</s>``."""
        return Segment((), answer, (self.eos_id,))


class EmmettUL2PromptFormatter(EmmettT5PromptFormatter):
    """``emmett_t5`` behind UL2's token for sequence to sequence: ``[S2S] <de> message</s>``."""

    NAME = "emmett_ul2"
    TEMPLATE: ClassVar[dict] = EmmettT5PromptFormatter.TEMPLATE | {
        "user": EmmettT5PromptFormatter.TEMPLATE["user"]
        | {"template": f"{_MODE} {EmmettT5PromptFormatter.TEMPLATE['user']['template']}"}
    }

    def context_segment(self, message: Prompt, target_lang: str | None, source_lang: str | None) -> Segment:
        """``[S2S] <de> message</s>``."""
        before, text, after = super().context_segment(message, target_lang, source_lang)
        return Segment(before, Prompt([Markup(_MODE), " ", text]), after)
