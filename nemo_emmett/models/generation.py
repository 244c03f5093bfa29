"""Generation: answers to prompts, and translations of texts and recordings.

Shapes: B examples, T context tokens, A answer tokens, R recordings, N samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice, takewhile
from math import ceil
from pathlib import Path
from typing import Any

import torch
from nemo.collections.common.prompts import PromptFormatter
from nemo.utils import logging
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from nemo_emmett.audio_chunks import check_chunk_seconds, join_translations
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.models.exported import chunk_seconds_of, untrained_warning
from nemo_emmett.models.greedy import greedy_search, leaves_early
from nemo_emmett.models.inputs import (
    BATCH_TOKENS,
    Input,
    check_inputs,
    fill_batches,
    is_recording,
    load_recordings,
    recording_seconds,
    split_recording,
)
from nemo_emmett.modules.batch import pack_left, padding_mask
from nemo_emmett.modules.evaluation_mode import evaluation_mode
from nemo_emmett.prompts.answers import Answer
from nemo_emmett.prompts.families import forbidden_text, prompt_formatter, stop_ids
from nemo_emmett.prompts.instruction import translation_turns
from nemo_emmett.prompts.languages import check_language
from nemo_emmett.prompts.markup import Markup, Prompt
from nemo_emmett.prompts.seq2seq import Seq2SeqPrompt
from nemo_emmett.typed_config import PositiveWhole, parse_value

_PLAIN_SEARCH: dict[str, Any] = {
    **dict.fromkeys(("do_sample", "early_stopping"), False),
    **dict.fromkeys(("length_penalty", "temperature", "top_p", "typical_p", "repetition_penalty"), 1.0),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length"), 0),
    **dict.fromkeys(("min_p", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), None),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), None),
    **dict.fromkeys(("min_new_tokens", "max_new_tokens", "max_length"), None),
    "num_beams": 1,
    "top_k": 50,
}
"""Hugging Face's own defaults, passed in every call, since pretrained checkpoints configure others: Qwen's sample and
punish repetition, NLLB's use beam search, mBART's force a last token."""


class Generation:
    """Mixin of :class:`~nemo_emmett.models.base.SpeechTextModel`: generation and translation."""

    warned_targets: frozenset[str] = frozenset()  # languages that are not warned of again

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor | Sequence[Sequence[dict]],
        audios: Tensor | None = None,
        audio_lens: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        enable_thinking: bool | None = None,
        target_lang: str | Sequence[str | None] | None = None,
        **generate_options: Any,
    ) -> Tensor:
        """Answer prompts; the arguments up to ``enable_thinking`` are those of NeMo's ``SALM.generate``.

        The search is greedy by default, whatever the pretrained checkpoint's generation config sets.

        Args:
            prompts: (B, T) context ids, padded on either side; or conversations, lists of turns such as
                ``{"role": "user", "slots": {...}, "audio": ["a.wav"]}``. In a message the audio locator marks a
                recording; other control tokens are text.
            audios: (R, N) float32 recordings in the order of the locators, unless the conversations name files.
            audio_lens: (R,) int64, samples.
            generation_config: of transformers; ``generate_options`` override what it sets.
            enable_thinking: passed on to prompt formats of models that reason before they answer.
            target_lang: language of the answers, of all or of each, for encoder-decoders whose decoder begins with a
                language's token; default: the slot ``target_lang`` of each conversation.
            generate_options: passed on to Hugging Face ``generate``.

        Returns:
            (B, A) int64 generated ids, without those that the decoder started with.

        Raises:
            DataError: if a conversation has another number of locators than of audio files, or a batch of recordings.
            ConfigError: if audio is given in two ways, or a language is needed and not known, or not the model's.
        """
        _check_prompts(prompts)
        if audios is not None and audios.numel() == 0:  # NeMo's batches of text
            audios = audio_lens = None
        if audios is not None and (audio_lens is None or audios.dim() != 2):
            raise DataError("audios: give them as a tensor (R, N) of R recordings, and their audio_lens, (R,) samples.")
        if isinstance(prompts, Tensor):
            context_ids, context_lens = pack_left(prompts, padding_mask(prompts, self.pad_id), self.pad_id)
        else:
            contexts = self._contexts_of(prompts, enable_thinking)
            context_ids, context_lens = self._collate_contexts(contexts)
            if paths := [path for turns in prompts for path in _audio_paths(turns)]:
                if audios is not None:
                    raise ConfigError(
                        "audio is given twice, as `audios` and as files in the prompts; leave out either."
                    )
                audios, audio_lens = load_recordings(paths, self.sampling_rate)
            target_lang = [_target_lang(turns) for turns in prompts] if target_lang is None else target_lang
        batch = {"context_ids": context_ids.to(self.device), "context_lens": context_lens.to(self.device)}
        if audios is not None:
            batch |= {"audios": audios.to(self.device), "audio_lens": audio_lens.to(self.device)}
        languages = [target_lang] * len(context_ids) if isinstance(target_lang, str) else target_lang
        if languages is not None:
            if len(languages) != len(context_ids):
                raise ConfigError(
                    f"target_lang: {len(languages)} languages for {len(context_ids)} prompts; give one for each, "
                    "or one for all."
                )
            batch["examples"] = [{"target_lang": language} for language in languages]
        if generation_config is not None:
            options = generation_config.to_diff_dict().items()
            options = {name: value for name, value in options if name != "transformers_version" and value is not None}
            generate_options = options | generate_options
        return self._generate_answers(batch, generate_options)

    @torch.no_grad()
    def translate_batch(self, batch: Mapping, num_beams: int = 1, max_new_tokens: int | None = None) -> list[str]:
        """Translations of the contexts of a one-modality batch, B strings."""
        return [answer.translation for answer in self.answer_batch(batch, num_beams, max_new_tokens)]

    @torch.no_grad()
    def answer_batch(self, batch: Mapping, num_beams: int = 1, max_new_tokens: int | None = None) -> list[Answer]:
        """Answers to the contexts of a one-modality batch, B: translations and, of speech with a two-step prompt
        format, transcripts."""
        answer_ids = self._generate_answers(batch, {"num_beams": num_beams, "max_new_tokens": max_new_tokens})
        stops = set(stop_ids(self._prompt_formatter(), self.tokenizer))
        # The padding after an answer may be an ordinary token, where a tokenizer has no padding token.
        answers = [list(takewhile(lambda token: token not in stops, answer)) for answer in answer_ids.tolist()]
        formatter, tokenizer = self._prompt_formatter(), self.tokenizer.tokenizer
        if not getattr(formatter, "is_two_step", False):
            return [Answer(text.strip()) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        has_steps = [batch.get("audios") is not None] * len(answers)
        for row, example in enumerate(batch.get("examples") or ()):  # what is transcribed has one step
            has_steps[row] &= example.get("source_lang") != example.get("target_lang")
        return [
            formatter.parse_answer(answer, decode) if in_steps else Answer(decode(answer).strip())
            for answer, in_steps in zip(answers, has_steps, strict=True)
        ]

    def translate(
        self,
        inputs: Sequence[Input],
        source_lang: str | Sequence[str | None] | None,
        target_lang: str | Sequence[str],
        *,
        num_beams: int = 1,
        max_new_tokens: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        batch_size: int | None = None,
        chunk_seconds: float | None = None,
    ) -> list[str]:
        """Translate texts and recordings. A long recording is cut at its quietest places, and the translations of its
        parts are joined.

        Args:
            inputs: sentences, paths of audio files (a ``Path``, or a string that ends like one), segments of them
                (:class:`~nemo_emmett.models.inputs.Segment`), and recordings in memory
                (:class:`~nemo_emmett.models.inputs.Waveform`).
            source_lang: language code of the inputs, of all or of each, for prompts that name it; None if it is not
                known.
            target_lang: language code of the translations, of all or of each.
            num_beams: beams of the search; 1 is greedy.
            max_new_tokens: longest translation; default: the model's.
            batch_tokens: most positions of the language model's input in a batch, padding included.
            batch_size: most inputs of a batch; default: as many as ``batch_tokens`` allows.
            chunk_seconds: longest part of a recording that is translated at once; ``float("inf")``: recordings are
                not cut. Default: the longest recordings that the model was trained on, if its config says how long
                they were (``max_duration`` of the training data), otherwise 30.

        Returns:
            One translation per input, in their order; of answers in two steps, the translations alone.

        Raises:
            ConfigError: for a language that is unknown, or that the model has no token for.
            DataError: for an audio file that is missing or cannot be read.

        Example:
            >>> model.translate(["ten past nine", Path("nine.wav")], "en", "de")
            ['zehn nach neun', 'neun']
        """
        check_inputs(inputs)
        sources = _of_each(source_lang, len(inputs), "source_lang")
        targets = _of_each(target_lang, len(inputs), "target_lang")
        chunk_seconds = chunk_seconds_of(self.cfg) if chunk_seconds is None else chunk_seconds
        check_chunk_seconds(chunk_seconds, "chunk_seconds")
        parts = [split_recording(item, chunk_seconds) if is_recording(item) else [item] for item in inputs]
        input_of_part = [number for number, of_input in enumerate(parts) for _ in of_input]
        answers = self.answer_inputs(
            list(chain(*parts)),
            [sources[number] for number in input_of_part],
            [targets[number] for number in input_of_part],
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            batch_tokens=batch_tokens,
            batch_size=batch_size,
        )
        if malformed := sum(answer.is_malformed for answer in answers):
            recordings = sum(map(is_recording, chain(*parts)))
            logging.warning(
                f"{malformed} of {recordings} answers to recordings are not a transcript and a translation: they are "
                "returned whole."
            )
        translations = (answer.translation for answer in answers)
        return [
            join_translations(list(islice(translations, len(of_input))), target)
            for of_input, target in zip(parts, targets, strict=True)
        ]

    @torch.no_grad()
    def answer_inputs(
        self,
        inputs: Sequence[Input],
        source_lang: str | Sequence[str | None] | None,
        target_lang: str | Sequence[str],
        *,
        num_beams: int = 1,
        max_new_tokens: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        batch_size: int | None = None,
    ) -> list[Answer]:
        """As :meth:`translate`, with the transcripts of recordings where the prompt format has two steps; recordings
        are not cut."""
        parse_value(PositiveWhole, num_beams, "num_beams")
        parse_value(PositiveWhole | None, max_new_tokens, "max_new_tokens")
        parse_value(PositiveWhole | None, batch_size, "batch_size")
        check_inputs(inputs)
        sources = _of_each(source_lang, len(inputs), "source_lang")
        targets = _of_each(target_lang, len(inputs), "target_lang")
        self._warn_of_untrained(targets)
        contexts = self._translation_contexts(inputs, sources, targets)
        recordings = {i: item for i, item in enumerate(inputs) if is_recording(item)}
        answers: dict[int, Answer] = {}
        for chosen in self._batches(contexts, recordings, batch_tokens, batch_size):
            context_ids, context_lens = self._collate_contexts([contexts[i] for i in chosen])
            examples = [{"source_lang": sources[i], "target_lang": targets[i]} for i in chosen]
            batch = {"context_ids": context_ids, "context_lens": context_lens, "examples": examples}
            if chosen[0] in recordings:
                audios, audio_lens = load_recordings([recordings[i] for i in chosen], self.sampling_rate)
                batch |= {"audios": audios.to(self.device), "audio_lens": audio_lens.to(self.device)}
            answers |= zip(chosen, self.answer_batch(batch, num_beams, max_new_tokens), strict=True)
        return [answers[i] for i in range(len(inputs))]

    def input_lengths(
        self,
        inputs: Sequence[Input],
        source_lang: str | Sequence[str | None] | None,
        target_lang: str | Sequence[str],
    ) -> list[int]:
        """Positions of the language model's input that each input takes.

        Raises:
            ConfigError, DataError: as :meth:`translate`, which reads recordings as well.
        """
        check_inputs(inputs)
        sources = _of_each(source_lang, len(inputs), "source_lang")
        targets = _of_each(target_lang, len(inputs), "target_lang")
        contexts = self._translation_contexts(inputs, sources, targets)
        return [self._length(context, item) for context, item in zip(contexts, inputs, strict=True)]

    def _translation_contexts(
        self, inputs: Sequence[Input], sources: Sequence[str | None], targets: Sequence[str]
    ) -> list[Tensor]:
        """The context that asks for the translation of each input, (T,) ids."""
        formatter, locator = self._prompt_formatter(), Markup(self.options.audio_locator_tag)
        if isinstance(formatter, Seq2SeqPrompt):  # it raises for a language that it lacks: before anything is generated
            for target in set(targets):
                formatter.decoder_start(target)
        messages = [locator if is_recording(item) else Prompt([str(item)]) for item in inputs]
        return self._contexts_of(
            [
                translation_turns(formatter, message, target, source)
                for message, source, target in zip(messages, sources, targets, strict=True)
            ]
        )

    def _length(self, context: Tensor, item: Input) -> int:
        """Positions of the language model's input: a recording's replace its locator."""
        if not is_recording(item):
            return len(context)
        return len(context) + ceil(recording_seconds(item) / self.token_equivalent_duration) - 1

    def _warn_of_untrained(self, target_langs: Collection[str]) -> None:
        new = set(target_langs) - self.warned_targets
        self.warned_targets |= new
        if new and (sentence := untrained_warning(self.cfg, new)):
            logging.warning(f"target_lang: {sentence}")

    def _prompt_formatter(self) -> PromptFormatter:
        """The model's prompt format, made with its tokenizer."""
        return prompt_formatter(self.options.prompt_format, self.tokenizer)

    def _contexts_of(
        self, conversations: Sequence[Sequence[dict]], enable_thinking: bool | None = None
    ) -> list[Tensor]:
        """The context of each conversation, (T,) ids."""
        formatter = self._prompt_formatter()
        hints = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        forbidden = forbidden_text(self.options.prompt_format, self.tokenizer)
        contexts = []
        for number, turns in enumerate(conversations):
            if forbidden is not None:
                self._check_texts(turns, forbidden)
            # Copied, since formats of NeMo write into the turns.
            encoded = formatter.encode_dialog(turns=[dict(turn) for turn in turns], **hints)
            contexts.append(encoded["context_ids"])
            locators, files = int((contexts[-1] == self.audio_locator_id).sum()), len(_audio_paths(turns))
            if files not in (0, locators):
                raise DataError(
                    f"conversation {number}: its turns name {files} audio files, but the audio locators "
                    f"({self.options.audio_locator_tag}) in their messages are {locators}; "
                    "put one where each recording belongs."
                )
        return contexts

    def _check_texts(self, turns: Sequence[Mapping], forbidden: re.Pattern) -> None:
        """Refuse texts in which a prompt format of NeMo's would find control tokens other than audio locators."""
        for turn in turns:
            for text in (turn.get("content"), *(turn.get("slots") or {}).values()):
                if found := forbidden.search(str(text or "").replace(self.options.audio_locator_tag, "")):
                    raise DataError(
                        f"a text holds '{found[0]}', which prompt_format {self.options.prompt_format} takes for the "
                        "control token; use a format of ours (emmett_...), which takes it for text, or leave it out."
                    )

    def _batches(
        self,
        contexts: Sequence[Tensor],
        recordings: Mapping[int, Input],
        batch_tokens: int,
        batch_size: int | None,
    ) -> Iterator[list[int]]:
        """Batches of one modality, speech first."""
        for is_speech in (True, False):
            numbers = [i for i in range(len(contexts)) if (i in recordings) == is_speech]
            sizes = {i: self._length(contexts[i], recordings.get(i, "")) for i in numbers}
            yield from fill_batches(sizes, batch_tokens, batch_size)

    def _collate_contexts(self, contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        lens = torch.tensor([len(ids) for ids in contexts])
        ids = pad_sequence(list(contexts), batch_first=True, padding_value=self.pad_id)
        return ids.to(self.device), lens.to(self.device)

    def _generate_answers(self, batch: Mapping, options: Mapping[str, Any]) -> Tensor:
        """(B, A) ids by the options; those that are absent are of a greedy search up to the end of the answer."""
        search = _PLAIN_SEARCH | {
            "eos_token_id": stop_ids(self._prompt_formatter(), self.tokenizer),
            "pad_token_id": self.pad_id,
        }
        search |= options
        if search["min_new_tokens"] is not None and "min_length" not in options:
            del search["min_length"]  # transformers warns of both
        if search["max_new_tokens"] is None and search["max_length"] is None:
            search["max_new_tokens"] = self.options.max_new_tokens
        # Compiled blocks are compiled for training: a cache that grows would have them compiled again and again.
        eager = torch.compiler.set_stance("force_eager") if self.options.compile else nullcontext()
        with evaluation_mode(self), eager:
            return self.generate_answers(batch, **search)

    def search_answers(
        self,
        inputs: Mapping[str, Tensor],
        options: Mapping[str, Any],
        select: Callable[[Tensor], None] = lambda kept_R: None,
    ) -> Tensor:
        """Hugging Face ``generate`` of the language model.

        Args:
            inputs: ``inputs_embeds`` (B, S, H) and ``attention_mask`` (B, S) of ``generate``.
            options: of ``generate``.
            select: of :func:`~nemo_emmett.models.greedy.greedy_search`.
        """
        gate = getattr(self.llm, "speech_gate", None)

        def select_all(kept_R: Tensor) -> None:
            select(kept_R)
            if gate is not None:
                gate.select(kept_R)

        embeds_BSH = inputs["inputs_embeds"]
        if leaves_early(options, len(embeds_BSH), embeds_BSH.device):
            options = options | {"custom_generate": greedy_search(select_all)}
        return self.llm.generate(**inputs, **options)


def _of_each(languages: str | Sequence[str | None] | None, count: int, key: str) -> list[Any]:
    """The language of each input, in its one form (``language_code``).

    Raises:
        ConfigError: naming the key, for a language that is unknown, or another number of them than of inputs.
    """
    each = [languages] * count if languages is None or isinstance(languages, str) else list(languages)
    if len(each) != count:
        raise ConfigError(f"{key}: {len(each)} languages for {count} inputs; give one for each, or one for all.")
    optional = key == "source_lang"
    checked = {code: None if code is None and optional else check_language(code, key) for code in dict.fromkeys(each)}
    return [checked[code] for code in each]


def _check_prompts(prompts: Tensor | Sequence[Sequence[dict]]) -> None:
    is_tensor = isinstance(prompts, Tensor)
    if not (prompts.dim() == 2 if is_tensor else all(isinstance(turn, Mapping) for turns in prompts for turn in turns)):
        raise DataError("prompts: give a tensor (B, T) of ids, or a list of conversations, each a list of turns.")
    if (prompts.numel() if is_tensor else len(prompts)) == 0:
        raise DataError("prompts: there are none; give at least one.")


def _target_lang(turns: Sequence[dict]) -> str | None:
    """The target language in the slots of a conversation's last turn that has one."""
    languages = [(turn.get("slots") or {}).get("target_lang") for turn in turns]
    return next((language for language in reversed(languages) if language), None)


def _audio_paths(turns: Sequence[dict]) -> list[str | Path]:
    """The audio files of a conversation."""
    named = [turn.get("audio") or [] for turn in turns]
    return [path for audio in named for path in ([audio] if isinstance(audio, (str, Path)) else audio)]
