"""``emmett_t5``: the prompt of multilingual encoder-decoders of the T5 kind, ``<de> text</s>``.

The target language stands in front as a tag, as EMMeTT's T5 backbone has it (arXiv 2409.13523, section 3; NeMo's
``t5nmt``). Speech stands where the text would: ``<de> <|audio|></s>``. Where the tokenizer has the tag as one token
it is one token, otherwise it is spelled in pieces. NeMo's own ``t5nmt`` has no place for an audio locator.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from lhotse.cut import Cut, MixedCut
from nemo.collections.common.data.lhotse.text_adapters import (
    AudioTurn,
    NeMoMultimodalConversation,
    SourceTargetTextExample,
)
from nemo.collections.common.data.prompt_fn import registered_prompt_format_fn
from nemo.collections.common.prompts.formatter import EOS_SLOT, Modality, PromptFormatter

from nemo_emmett.errors import DataError


class EmmettT5PromptFormatter(PromptFormatter):
    """User: ``<target_lang> message</s>``; assistant: ``message</s>``."""

    NAME = "emmett_t5"
    OUTPUT_ROLE = "assistant"
    TEMPLATE: ClassVar[dict] = {
        "user": {
            "template": f"<|target_lang|> |message|{EOS_SLOT}",
            "slots": {"target_lang": Modality.Text, "message": Modality.Text},
        },
        OUTPUT_ROLE: {"template": f"|message|{EOS_SLOT}", "slots": {"message": Modality.Text}},
    }


def _encode(
    prompt: EmmettT5PromptFormatter, example_id: object, target_lang: str | None, message: str, answer: str | None
) -> dict[str, torch.Tensor]:
    if not target_lang:
        raise DataError(
            f"example {example_id}: its target language is not known; "
            "give its source a `target_lang`, or each of its records one."
        )
    turns = [{"role": "user", "slots": {"target_lang": target_lang, "message": message}}]
    if answer is not None:
        turns.append({"role": prompt.OUTPUT_ROLE, "slots": {"message": answer}})
    return prompt.encode_dialog(turns)


@registered_prompt_format_fn(Cut, EmmettT5PromptFormatter)
def speech_prompt(cut: Cut, prompt: EmmettT5PromptFormatter) -> dict[str, torch.Tensor]:
    """Prompt for a cut: ``target_lang`` and ``audio_locator_tag`` are its custom fields, the answer is its text."""
    if isinstance(cut, MixedCut):
        cut = cut._first_non_padding_cut
    custom = cut.custom or {}
    answer = cut.supervisions[0].text if cut.supervisions else None
    return _encode(prompt, cut.id, custom.get("target_lang"), custom["audio_locator_tag"], answer)


@registered_prompt_format_fn(SourceTargetTextExample, EmmettT5PromptFormatter)
def text_prompt(example: SourceTargetTextExample, prompt: EmmettT5PromptFormatter) -> dict[str, torch.Tensor]:
    """Prompt for a pair of sentences; the target's language is the tag."""
    example_id = (example.custom or {}).get("id", example.source.text)
    return _encode(prompt, example_id, example.target.language, example.source.text, example.target.text)


@registered_prompt_format_fn(NeMoMultimodalConversation, EmmettT5PromptFormatter)
def conversation_prompt(
    example: NeMoMultimodalConversation, prompt: EmmettT5PromptFormatter
) -> dict[str, torch.Tensor]:
    """Prompt for a conversation: all user turns are the message, the assistant's turn is the answer."""
    message, answer = [], None
    for turn in example.turns:
        if turn.role == prompt.OUTPUT_ROLE:
            answer = turn.value
        else:
            message.append(turn.audio_locator_tag if isinstance(turn, AudioTurn) else turn.value)
    return _encode(prompt, example.id, (example.custom or {}).get("target_lang"), " ".join(message), answer)
