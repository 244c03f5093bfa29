"""The transcripts of speech examples, prompted as text: what a text example of the same sentence would be given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lhotse.cut import Cut, MixedCut
from nemo.collections.common.data.lhotse.text_adapters import Formattable, SourceTargetTextExample, TextExample
from nemo.collections.common.data.prompt_fn import apply_prompt_format_fn
from nemo.collections.common.prompts import PromptFormatter

from nemo_emmett.prompts.encoding import encode_texts
from nemo_emmett.prompts.markup import Prompt
from nemo_emmett.prompts.request import request_of
from nemo_emmett.prompts.seq2seq import Seq2SeqPrompt

_FIELD = "emmett_transcript"

TRANSCRIPT_KEYS = ("transcript_ids", "text_context_ids")
"""What a speech example with a transcript is given: the transcript's tokens, and its prompt as text."""


def set_transcript(cut: Cut, transcript: str) -> None:
    """Have :func:`prompt_transcripts` prompt a transcript for a cut; an empty one has no tokens.

    Args:
        cut: of speech; its custom fields are replaced by a copy.
        transcript: without whitespace around it, as texts are read.
    """
    holder = _holder(cut)
    holder.custom = {**(holder.custom or {}), _FIELD: transcript}


def transcript_of(example: Cut | Formattable) -> str | None:
    """The transcript of :func:`set_transcript`; None if there is none."""
    return (getattr(_holder(example), "custom", None) or {}).get(_FIELD)


def prompt_transcripts(examples: Sequence[Cut | Formattable], prompt_formatter: PromptFormatter) -> None:
    """Give each cut of :func:`set_transcript` its ``transcript_ids`` and ``text_context_ids``, (T,) int64.

    ``transcript_ids`` are the tokens of the transcript alone. ``text_context_ids`` are the ``context_ids`` of a text
    example of the transcript, with the languages, the instruction and the answer of the cut. Both are empty where the
    transcript is. Other examples are left as they are.

    Args:
        examples: changed in place.
        prompt_formatter: a prompt format made with the tokenizer.
    """
    cuts = [cut for cut in examples if isinstance(cut, Cut) and transcript_of(cut) is not None]
    if not cuts:
        return
    with_text = [cut for cut in map(_holder, cuts) if cut.custom[_FIELD]]
    texts = [as_text(cut, cut.custom[_FIELD]) for cut in with_text]
    if isinstance(prompt_formatter, Seq2SeqPrompt):
        encoded = prompt_formatter.encode_requests([request_of(text)._replace(answer=None) for text in texts])
    else:
        encoded = [apply_prompt_format_fn(text, prompt_formatter) for text in texts]
    tokens = encode_texts(prompt_formatter.tokenizer, [Prompt([text.source.text]) for text in texts])
    of_cut = iter(zip(tokens, encoded, strict=True))
    for cut in map(_holder, cuts):
        if cut.custom[_FIELD]:
            ids, prompted = next(of_cut)
            made = torch.tensor(ids, dtype=torch.int64), prompted["context_ids"]
        else:
            made = (torch.zeros(0, dtype=torch.int64),) * 2
        for key, value in zip(TRANSCRIPT_KEYS, made, strict=True):
            setattr(cut, key, value)


def as_text(cut: Cut, transcript: str) -> SourceTargetTextExample:
    """The text example of which the transcript of a cut is the source and the text of its supervision the target."""
    custom = cut.custom
    answer = cut.supervisions[0].text if cut.supervisions else None
    return SourceTargetTextExample(
        source=TextExample(transcript, language=custom.get("source_lang")),
        target=TextExample(answer, language=custom.get("target_lang")),
        custom={"id": cut.id, **custom},
    )


def transcript_ids(example: Cut | Formattable) -> dict[str, torch.Tensor]:
    """What :func:`prompt_transcripts` has given an example, by its key; an empty dict if nothing."""
    found = {key: getattr(_holder(example), key, None) for key in TRANSCRIPT_KEYS}
    return {key: ids for key, ids in found.items() if ids is not None}


def _holder(example: Cut | Formattable) -> Cut | Formattable:
    """The cut with the custom fields: of a mixed cut its first recording."""
    return example._first_non_padding_cut if isinstance(example, MixedCut) else example
