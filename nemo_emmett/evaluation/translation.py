"""Translate the batches of test sets with a model, and measure the model's speed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from tqdm import tqdm

from nemo_emmett.errors import ModelError
from nemo_emmett.evaluation.results import Throughput, Translation
from nemo_emmett.modules.batch import split_modalities
from nemo_emmett.prompts.answers import Answer
from nemo_emmett.prompts.encoding import encode_texts
from nemo_emmett.prompts.markup import Prompt

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Translated:
    """Translations, and the model's speed."""

    batches: dict[str, list[list[Translation]]]  # of each test set, in order; empty where no record could be read
    throughput: dict[str, Throughput]  # by modality

    @property
    def translations(self) -> list[Translation]:
        """All translations in order."""
        return [one for batches in self.batches.values() for batch in batches for one in batch]


def translate(
    model: Any,
    test_sets: Mapping[str, Iterable[Batch]],
    *,
    num_beams: int = 1,
    max_new_tokens: int | None = None,
    progress: bool = True,
) -> Translated:
    """Translate every example of every test set, in the order in which the test sets give them.

    Args:
        model: one of ``nemo_emmett.models``, or any object that has ``device``, ``pad_id``, ``tokenizer``,
            ``translate_batch`` (or ``answer_batch``, which is preferred) and, for speech, ``sampling_rate``.
        test_sets: name -> loader of batches ``{"audio": {...}, "text": {...}}`` (docs/architecture.md).
        num_beams: 1 is greedy search.
        max_new_tokens: longest translation; None leaves it to the model.
        progress: show a bar per test set.

    Raises:
        ModelError: if the model returns another number of translations than the batch has examples.
    """
    translated: dict[str, list[list[Translation]]] = {test_set: [] for test_set in test_sets}
    throughput: dict[str, Throughput] = {}
    for test_set, loader in test_sets.items():
        for batch in tqdm(loader, desc=f"Translating {test_set}", unit="batch", disable=None if progress else True):
            translations = []
            # A batch of which no record could be read is empty; the loader counts and reports such records.
            for modality, part in split_modalities(batch, model.pad_id).items() if batch else ():
                answers, speed = _timed_translations(model, part, num_beams, max_new_tokens)
                before = throughput.get(modality)
                throughput[modality] = speed if before is None else before.combined_with(speed)
                translations += _records(test_set, modality, part, answers, model)
            translated[test_set].append(translations)
    return Translated(translated, throughput)


def merge_ranks(parts: Sequence[Translated]) -> Translated:
    """The results of one process, from those of several that translated the batches in turn (round-robin).

    The throughput is that of all processes together.
    """
    throughput: dict[str, Throughput] = {}
    for part in parts:
        for modality, speed in part.throughput.items():
            before = throughput.get(modality)
            throughput[modality] = speed if before is None else before.combined_with(speed, in_parallel=True)
    batches = {}
    for test_set in parts[0].batches:
        rounds = zip_longest(*(part.batches[test_set] for part in parts))
        batches[test_set] = [batch for in_round in rounds for batch in in_round if batch is not None]
    return Translated(batches, throughput)


def _timed_translations(
    model: Any, batch: Batch, num_beams: int, max_new_tokens: int | None
) -> tuple[list[Answer], Throughput]:
    started = time.perf_counter()
    with torch.inference_mode():
        moved, how = move_data_to_device(dict(batch), model.device), {"num_beams": num_beams}
        how["max_new_tokens"] = max_new_tokens
        if hasattr(model, "answer_batch"):
            answers = model.answer_batch(moved, **how)
        else:
            answers = [Answer(translation) for translation in model.translate_batch(moved, **how)]
    seconds = time.perf_counter() - started
    if len(answers) != len(batch["examples"]):
        raise ModelError(
            f"{type(model).__name__}.translate_batch returned {len(answers)} translations for a batch of "
            f"{len(batch['examples'])} examples: it must return one for each."
        )
    recordings = _recording_seconds(batch, model)
    translations = [Prompt([answer.translation]) for answer in answers]
    return answers, Throughput(
        seconds,
        len(answers),
        tokens=sum(map(len, encode_texts(model.tokenizer, translations))),
        audio_seconds=sum(recordings) if recordings else None,
    )


def _records(test_set: str, modality: str, batch: Batch, answers: list[Answer], model: Any) -> list[Translation]:
    examples = batch["examples"]
    seconds: list[float | None] = list(_recording_seconds(batch, model))
    if len(seconds) != len(examples):  # text, or examples that need not hold exactly one recording each
        seconds = [None] * len(examples)
    return [
        Translation(
            test_set=test_set,
            id=str(example["id"]),
            modality=modality,
            source_lang=example["source_lang"],
            target_lang=example["target_lang"],
            source_text=example["source_text"],
            reference=example["target_text"],
            hypothesis=answer.translation,
            audio_path=None if example["audio_path"] is None else str(example["audio_path"]),
            audio_start=example["audio_start"],
            duration=duration,
            transcript=answer.transcript,
            is_malformed=answer.is_malformed,
        )
        for example, answer, duration in zip(examples, answers, seconds, strict=True)
    ]


def _recording_seconds(batch: Batch, model: Any) -> list[float]:
    """Seconds of each recording of a batch; none for text."""
    if "audio_lens" not in batch:
        return []
    return [samples / model.sampling_rate for samples in batch["audio_lens"].tolist()]
