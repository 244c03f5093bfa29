"""The base of the prompt formats of encoder-decoders: turns become the ids of a context and of an answer.

The context is the encoder's input, the answer the decoder's target. A format defines a turn, as a :class:`Segment`; the
rest is here, for one example (NeMo's interface) and for many (:meth:`Seq2SeqPrompt.encode_requests`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from nemo.collections.common.data.lhotse.text_adapters import NeMoMultimodalConversation, SourceTargetTextExample
from nemo.collections.common.data.prompt_fn import registered_prompt_format_fn

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.prompts.answers import DirectAnswer
from nemo_emmett.prompts.encoding import encode_texts
from nemo_emmett.prompts.markup import Prompt, UserTextPrompt
from nemo_emmett.prompts.request import Request, request_of, target_language


class Segment(NamedTuple):
    """A turn before it is tokenised: a :class:`Prompt` and the special tokens around it."""

    before: tuple[int, ...]
    text: Prompt
    after: tuple[int, ...]


class Seq2SeqPrompt(DirectAnswer, UserTextPrompt):
    """Mixin that makes a NeMo ``PromptFormatter`` one of an encoder-decoder.

    Its ``encode_dialog`` takes NeMo's turns, the user's with the slots ``message``, ``target_lang`` and, where known,
    ``source_lang``, the assistant's with ``message`` and ``target_lang``; slots that a format does not use may be left
    out.
    """

    OUTPUT_ROLE = "assistant"

    @cached_property
    def eos_id(self) -> int:
        """The tokenizer's EOS; NeMo's property looks it up at each access."""
        return self.tokenizer.eos

    @abstractmethod
    def context_segment(self, message: Prompt, target_lang: str | None, source_lang: str | None) -> Segment:
        """A message in the encoder's input.

        Raises:
            ConfigError: for a language that the model does not have.
        """

    @abstractmethod
    def answer_segment(self, answer: Prompt, target_lang: str | None) -> Segment:
        """An answer as the decoder's target.

        Raises:
            ConfigError: for a language that the model does not have.
        """

    def decoder_start(self, target_lang: str | None) -> list[int] | None:
        """Ids that the decoder reads before the first one it generates; None: the model's own start token alone.

        Pass them to Hugging Face ``generate`` as ``decoder_input_ids`` (B, len) with their first as
        ``decoder_start_token_id``: unlike ``forced_bos_token_id`` they may differ within a batch.

        Raises:
            ConfigError: if the family needs the language and it is not known, or not the model's.
        """
        return None

    def encode_dialog(self, turns: list[dict], **_: object) -> dict[str, torch.Tensor]:
        """NeMo's ``PromptFormatter.encode_dialog``: user turns, then the assistant's if the answer is known.

        Raises:
            ConfigError: for a turn without a message, or a language that is missing or not the model's.
        """
        segments = [self._segment_of(turn) for turn in turns]
        return _tensors(self._encode(segments), [turn["role"] == self.OUTPUT_ROLE for turn in turns])

    def encode_requests(self, requests: Sequence[Request]) -> list[dict[str, torch.Tensor]]:
        """The same for many examples, whose texts are tokenised together.

        Returns:
            For each, ``input_ids``, ``context_ids`` and, where there is an answer, ``answer_ids``, (T,) int64, and
            ``mask``, (T,) bool, true on the answer.

        Raises:
            DataError: naming the first example whose languages are not known, or not the model's.
        """
        segments: list[list[Segment]] = []
        for request in requests:
            target_lang = target_language(request)
            try:
                of_request = [self.context_segment(Prompt([request.message]), target_lang, request.source_lang)]
                if request.answer is not None:
                    of_request.append(self.answer_segment(self.answer_of(request), target_lang))
            except ConfigError as error:
                raise DataError(f"example {request.example_id}: {error}") from error
            segments.append(of_request)
        ids = iter(self._encode([segment for of_request in segments for segment in of_request]))
        return [_tensors([next(ids) for _ in of_request], [False, True][: len(of_request)]) for of_request in segments]

    def _segment_of(self, turn: Mapping) -> Segment:
        slots = turn.get("slots") or {"message": turn.get("content")}
        message, target_lang = slots.get("message"), slots.get("target_lang")
        if turn["role"] not in self.TEMPLATE or message is None:
            raise ConfigError(
                f"prompt_format {self.NAME}: {turn} is no turn of it; a turn has a role, {' or '.join(self.TEMPLATE)}, "
                "and among its slots a message."
            )
        if turn["role"] == self.OUTPUT_ROLE:
            return self.answer_segment(self.as_prompt(message), target_lang)
        return self.context_segment(self.as_prompt(message), target_lang, slots.get("source_lang"))

    def _encode(self, segments: Sequence[Segment]) -> list[list[int]]:
        texts = encode_texts(self.tokenizer, [segment.text for segment in segments])
        return [[*s.before, *ids, *s.after] for s, ids in zip(segments, texts, strict=True)]


def _tensors(turns: Sequence[list[int]], is_answer: Sequence[bool]) -> dict[str, torch.Tensor]:
    """The result of NeMo's prompt formats; the context is all but the last turn, if that is an answer."""
    # By way of NumPy: torch.tensor takes three times as long for a list of forty integers.
    ids = np.array(list(chain.from_iterable(turns)), dtype=np.int64)
    input_ids = torch.from_numpy(ids)
    if not is_answer[-1]:
        return {"input_ids": input_ids, "context_ids": input_ids}
    context_len = len(ids) - len(turns[-1])
    mask, start = np.zeros(len(ids), bool), 0
    for turn, answers in zip(turns, is_answer, strict=True):
        mask[start : start + len(turn)] = answers
        start += len(turn)
    return {
        "input_ids": input_ids,
        "context_ids": torch.from_numpy(ids[:context_len]),  # of the same memory
        "answer_ids": torch.from_numpy(ids[context_len:]),
        "mask": torch.from_numpy(mask),
    }


@registered_prompt_format_fn(Cut, Seq2SeqPrompt)
@registered_prompt_format_fn(SourceTargetTextExample, Seq2SeqPrompt)
@registered_prompt_format_fn(NeMoMultimodalConversation, Seq2SeqPrompt)
def seq2seq_prompt(
    example: Cut | SourceTargetTextExample | NeMoMultimodalConversation, prompt: Seq2SeqPrompt
) -> dict[str, torch.Tensor]:
    """NeMo's function for one example; for many there is :func:`nemo_emmett.prompts.formatting.format_many`."""
    return prompt.encode_requests([request_of(example)])[0]
