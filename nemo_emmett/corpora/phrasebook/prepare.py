"""From a configuration to a folder of text, recordings and manifests.

    text/{split}.{language}              one item a line, line-aligned across languages
    audio/{split}/{language}/*.wav       16 kHz, mono, 16 bits
    speech/{split}.{language}.jsonl      a NeMo manifest, paths relative to it, each recording with its translations
    phrasebook.json                      configuration, counts, hours, versions; written last

The folder can be moved as a whole.
"""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemo_emmett.corpora.phrasebook.config import PhrasebookConfig
from nemo_emmett.corpora.phrasebook.espeak import SAMPLING_RATE, espeak_version
from nemo_emmett.corpora.phrasebook.extras import installed_version
from nemo_emmett.corpora.phrasebook.items import Phrase, candidate_items, share_out, split_phrases
from nemo_emmett.corpora.phrasebook.speaker import Speaker, Utterance
from nemo_emmett.corpora.phrasebook.voices import check_variants, draw_voice
from nemo_emmett.corpora.phrasebook.writing import write_item
from nemo_emmett.errors import ConfigError, DataError

SUMMARY_FILE = "phrasebook.json"
STARTED_FILE = "phrasebook.started.json"
"""Stands in an unfinished phrasebook: what it is going to hold."""

_UTTERANCES_A_REQUEST = 16
"""Some hundred milliseconds of work: short against the whole, long against a pipe's round trip."""


@dataclass(frozen=True)
class PhrasebookSummary:
    """What a phrasebook holds. ``hours`` and ``recordings`` are by split and language."""

    folder: Path
    items: Mapping[str, int]
    recordings: Mapping[str, Mapping[str, int]]
    hours: Mapping[str, Mapping[str, float]]
    made_now: bool  # False if it was there already


@dataclass(frozen=True)
class _Recording:
    split: str
    language: str
    phrase: Phrase
    rendition: int

    @property
    def name(self) -> str:
        """``price-eur-12-50-0``: the item and the rendition, fit for a file's name."""
        item = str(self.phrase.item).lower().replace(":", "-").replace(".", "-")
        return f"{item}-{self.rendition}"

    @property
    def path(self) -> Path:
        """Relative to the phrasebook's folder."""
        return Path("audio", self.split, self.language, f"{self.name}.wav")


def prepare_phrasebook(
    out: Path | str,
    config: PhrasebookConfig | None = None,
    *,
    num_jobs: int | None = None,
    show_progress: bool = True,
) -> PhrasebookSummary:
    """Write and speak the phrasebook into ``out``. The same configuration gives the same bytes.

    A finished phrasebook of the same configuration is left as it is; an unfinished one is completed.

    Args:
        out: the folder to fill; made if it is not there.
        config: what to put into it.
        num_jobs: processes to speak with; by default one for each core. Does not change the result.
        show_progress: show a bar while the recordings are made.

    Raises:
        ConfigError: if the configuration asks for more items than there are or for an unknown voice, or ``num_jobs``
            is below 1.
        DataError: if ``out`` holds anything else already.
        EmmettError: if a library is missing or an utterance cannot be spoken.
    """
    if num_jobs is not None and num_jobs < 1:
        raise ConfigError(f"phrasebook.num_jobs: {num_jobs} must be 1 or more; leave it out for one for each core")
    out, config = Path(out), config or PhrasebookConfig()
    plan = {"config": config.as_dict(), "versions": _versions()}
    if (finished := _read_json(out / SUMMARY_FILE)) is not None:
        _refuse_difference(out, finished["config"], plan["config"])
        return _summary(out, finished, made_now=False)
    check_variants(config)
    splits = _split(config)
    _claim(out, plan)
    recordings = list(_recordings(splits, config))
    _write_texts(out, splits, config.languages)
    _speak(out, recordings, config, num_jobs or _available_cores(), show_progress)
    totals = _write_manifests(out, recordings, splits, config.languages)
    _write_json(out / STARTED_FILE, {**plan, **totals})
    os.replace(out / STARTED_FILE, out / SUMMARY_FILE)
    return _summary(out, totals, made_now=True)


def _split(config: PhrasebookConfig) -> dict[str, list[Phrase]]:
    # Those held out first, so that the training split gives way to them and does not change them by its size.
    sizes = {"test": config.test_items, "dev": config.dev_items, "train": config.train_items}
    return split_phrases(
        {item_type: list(candidate_items(item_type, config)) for item_type in config.types},
        {split: share_out(size, config.types) for split, size in sizes.items()},
        lambda item: {language: write_item(item, language) for language in config.languages},
        config.seed,
    )


def _recordings(splits: Mapping[str, Sequence[Phrase]], config: PhrasebookConfig) -> Iterable[_Recording]:
    for split, phrases in splits.items():
        spoken, renditions = (config.spoken_train_items, config.renditions) if split == "train" else (None, 1)
        for language in config.languages:
            for phrase in phrases[:spoken]:
                for rendition in range(renditions):
                    yield _Recording(split, language, phrase, rendition)


def _write_texts(out: Path, splits: Mapping[str, Sequence[Phrase]], languages: Sequence[str]) -> None:
    for split, phrases in splits.items():
        for language in languages:
            lines = [f"{phrase.texts[language]}\n" for phrase in phrases]
            _write_text(out / "text" / f"{split}.{language}", "".join(lines))


def _speak(
    out: Path, recordings: Sequence[_Recording], config: PhrasebookConfig, num_jobs: int, show_progress: bool
) -> None:
    # A file that is there is whole and, since it was made for the same plan, right.
    missing = [recording for recording in recordings if not (out / recording.path).exists()]
    for folder in {(out / recording.path).parent for recording in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    requests: SimpleQueue[list[Utterance]] = SimpleQueue()
    for start in range(0, len(missing), _UTTERANCES_A_REQUEST):
        requests.put([_utterance(out, r, config) for r in missing[start : start + _UTTERANCES_A_REQUEST]])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show_progress) as progress:
        task = progress.add_task("Speaking the phrasebook", total=len(recordings))
        progress.advance(task, len(recordings) - len(missing))

        def work() -> None:
            with Speaker() as speaker:
                while (utterances := _next(requests)) is not None:
                    speaker.say(utterances)
                    progress.advance(task, len(utterances))

        with ThreadPoolExecutor(num_jobs) as pool:
            try:
                for worker in as_completed([pool.submit(work) for _ in range(min(num_jobs, requests.qsize()))]):
                    worker.result()
            finally:
                # After a failure or Ctrl-C the others stop at their next request.
                while _next(requests) is not None:
                    pass


def _utterance(out: Path, recording: _Recording, config: PhrasebookConfig) -> Utterance:
    phrase = recording.phrase
    voice = draw_voice(phrase.item, recording.language, recording.rendition, config)
    return Utterance(phrase.texts[recording.language], voice, str(out / recording.path))


def _next(requests: SimpleQueue) -> list[Utterance] | None:
    try:
        return requests.get_nowait()
    except Empty:
        return None


def _write_manifests(
    out: Path,
    recordings: Sequence[_Recording],
    splits: Mapping[str, Sequence[Phrase]],
    languages: Sequence[str],
) -> dict[str, Any]:
    """Write a manifest for each split and language; returns the counts and hours."""
    counts: dict[str, dict[str, int]] = {split: {} for split in splits}
    hours: dict[str, dict[str, float]] = {split: {} for split in splits}
    for split in splits:
        for language in languages:
            entries = [_manifest_entry(out, r) for r in recordings if (r.split, r.language) == (split, language)]
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
            _write_text(out / "speech" / f"{split}.{language}.jsonl", "".join(lines))
            counts[split][language] = len(entries)
            hours[split][language] = round(sum(entry["duration"] for entry in entries) / 3600, 4)
    return {
        "items": {split: len(phrases) for split, phrases in splits.items()},
        "recordings": counts,
        "hours": hours,
    }


def _manifest_entry(out: Path, recording: _Recording) -> dict[str, Any]:
    texts = recording.phrase.texts
    with wave.open(str(out / recording.path)) as file:
        samples = file.getnframes()
    return {
        "id": f"{recording.split}-{recording.language}-{recording.name}",
        "audio_filepath": (Path("..") / recording.path).as_posix(),
        "duration": samples / SAMPLING_RATE,
        "sampling_rate": SAMPLING_RATE,
        "text": texts[recording.language],
        "lang": recording.language,
        "translations": {language: text for language, text in texts.items() if language != recording.language},
        "item": str(recording.phrase.item),
    }


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Make ``out`` this plan's folder, unless it holds something else."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give the phrasebook a folder")
    if (started := _read_json(out / STARTED_FILE)) is not None:
        _refuse_difference(out, _flat(started), _flat(plan))
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out} is not empty and holds no phrasebook; give the phrasebook a folder of its own")
    _write_json(out / STARTED_FILE, plan)


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {**plan["config"], **{f"version of {name}": version for name, version in plan["versions"].items()}}


def _refuse_difference(out: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    keys = [key for key in asked if there.get(key) != asked[key]] + [key for key in there if key not in asked]
    if keys:
        differences = ", ".join(f"{key} ({there.get(key)} there, {asked.get(key)} asked)" for key in keys)
        raise DataError(
            f"{out} holds a phrasebook that differs in {differences}; give another folder or delete this one"
        )


def _summary(out: Path, totals: Mapping[str, Any], made_now: bool) -> PhrasebookSummary:
    return PhrasebookSummary(out, totals["items"], totals["recordings"], totals["hours"], made_now)


def _versions() -> dict[str, str]:
    return {**{name: installed_version(name) for name in ("num2words", "babel", "soxr")}, "espeak": espeak_version()}


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(content, encoding="utf-8")
    os.replace(unfinished, path)
