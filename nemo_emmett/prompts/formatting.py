"""Many examples prompted at once: their texts go to the tokenizer together."""

from __future__ import annotations

from collections.abc import Sequence

from lhotse.cut import Cut
from nemo.collections.common.data.lhotse.text_adapters import Formattable
from nemo.collections.common.data.prompt_fn import apply_prompt_format_fn
from nemo.collections.common.prompts import PromptFormatter

from nemo_emmett.prompts.request import EXAMPLE_TYPES, request_of
from nemo_emmett.prompts.seq2seq import Seq2SeqPrompt
from nemo_emmett.prompts.transcripts import prompt_transcripts


def format_many(examples: Sequence[Cut | Formattable], prompt_formatter: PromptFormatter) -> None:
    """Give each example what NeMo's ``tokenize_with_prompt`` gives one: ``input_ids``, ``context_ids``, ...; and the
    tokens of its transcript, where its source asks for them.

    With our formats of encoder-decoders all texts are tokenised in one call; with any other, NeMo's among them, the
    examples are prompted one after another.

    Args:
        examples: cuts, text pairs, conversations; changed in place.
        prompt_formatter: a prompt format made with the tokenizer.

    Raises:
        DataError: naming the first example whose languages are not known; then none is changed.
    """
    if isinstance(prompt_formatter, Seq2SeqPrompt) and all(isinstance(e, EXAMPLE_TYPES) for e in examples):
        encoded = prompt_formatter.encode_requests([request_of(example) for example in examples])
    else:
        encoded = [apply_prompt_format_fn(example, prompt_formatter) for example in examples]
    for example, tensors in zip(examples, encoded, strict=True):
        for key, value in tensors.items():
            setattr(example, key, value)
    prompt_transcripts(examples, prompt_formatter)


def format_one(example: Cut | Formattable, prompt_format: PromptFormatter) -> Cut | Formattable:
    """:func:`format_many` of one example, which is returned."""
    format_many([example], prompt_format)
    return example
