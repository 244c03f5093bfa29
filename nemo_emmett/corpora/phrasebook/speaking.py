"""From texts to a folder of text, recordings by eSpeak NG, and manifests.

    text/{split}.{language}              one sentence a line, line-aligned across languages
    audio/{split}/{language}/*.wav       16 kHz, mono, 16 bits
    speech/{split}.{language}.jsonl      a NeMo manifest, paths relative to it, each recording with its translations
    {name}.json                          configuration, counts, hours, versions; written last

The folder can be moved as a whole.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from tqdm import tqdm

from nemo_emmett.corpora.extras import installed_version
from nemo_emmett.corpora.output_folder import CorpusFolder
from nemo_emmett.corpora.phrasebook.espeak import SAMPLING_RATE, Voice, espeak_version
from nemo_emmett.corpora.phrasebook.speaker import Speaker, Utterance
from nemo_emmett.errors import ConfigError
from nemo_emmett.processes import available_cores

UTTERANCES_PER_REQUEST = 16
"""Some hundred milliseconds of work: short in relation to a corpus, long in relation to a pipe's round trip."""


@dataclass(frozen=True)
class Spoken:
    """A sentence to be spoken in one of its languages."""

    split: str
    language: str
    name: str  # valid in a file name, unique in this split and language
    texts: Mapping[str, str]  # in every language
    voice: Voice
    fields: Mapping[str, Any]  # additional fields of its manifest entry

    @property
    def path(self) -> Path:
        """Relative to the corpus's folder."""
        return Path("audio", self.split, self.language, f"{self.name}.wav")


@dataclass(frozen=True)
class Contents:
    """The content of a corpus."""

    languages: Sequence[str]  # of its texts
    texts: Mapping[str, Sequence[Mapping[str, str]]]  # split -> sentences, each in every language
    spoken_languages: Sequence[str]
    recordings: Sequence[Spoken]


@dataclass(frozen=True)
class SpokenSummary:
    """The size of a corpus. ``hours`` and ``recordings`` are by split and language."""

    folder: Path
    items: Mapping[str, int]  # sentences of each split
    recordings: Mapping[str, Mapping[str, int]]
    hours: Mapping[str, Mapping[str, float]]
    made_now: bool  # False if it was finished before


def prepare_spoken(
    out: Path,
    name: str,
    title: str,
    config: Mapping[str, Any],
    contents: Callable[[], Contents],
    *,
    writers: Sequence[str] = (),
    num_jobs: int | None = None,
    show_progress: bool = True,
) -> SpokenSummary:
    """Write and speak a corpus into ``out``. The same configuration gives the same bytes.

    A finished corpus of the same configuration is left as it is; an unfinished one is completed.

    Args:
        out: the folder to write to; created if it does not exist.
        name: in the keys of messages and the name of the summary: "phrasebook".
        title: of the corpus in messages.
        config: all that the contents depend on, as plain JSON values.
        contents: called for the content, unless the corpus is finished.
        writers: libraries that the texts depend on.
        num_jobs: processes to speak with; by default one for each core. Does not change the result.
        show_progress: show a bar while the recordings are made.

    Raises:
        ConfigError: if ``num_jobs`` is below 1.
        DataError: if ``out`` cannot be written to, holds anything else or is being written by another process.
        EmmettError: if a library is missing or an utterance cannot be spoken.
    """
    if num_jobs is not None and num_jobs < 1:
        raise ConfigError(f"{name}.num_jobs: {num_jobs} must be 1 or more; leave it out for one for each core")
    versions = {**{library: installed_version(library) for library in (*writers, "soxr")}, "espeak": espeak_version()}
    plan = {"config": dict(config), "versions": versions}
    folder = CorpusFolder(out, name, title)
    # A finished corpus does not depend on the versions, an unfinished one must be completed with the same.
    if (finished := folder.finished(plan, itemgetter("config"))) is not None:
        return _summary(out, finished, made_now=False)
    content = contents()
    with folder.begun(plan, _config_and_versions_of):
        for split, sentences in content.texts.items():
            for language in content.languages:
                lines = [f"{texts[language]}\n" for texts in sentences]
                folder.staging.write_text(folder.path / "text" / f"{split}.{language}", "".join(lines))
        _speak(folder, content.recordings, num_jobs or available_cores(), show_progress)
        totals = _write_manifests(folder, content)
        folder.finish({**plan, **totals})
    return _summary(out, totals, made_now=True)


def _config_and_versions_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of an unfinished corpus, which must be completed with the versions that it was begun with."""
    return {**plan["config"], **{f"version of {name}": version for name, version in plan["versions"].items()}}


def _speak(folder: CorpusFolder, recordings: Sequence[Spoken], num_jobs: int, show_progress: bool) -> None:
    # A file that exists is complete and, since it was made for the same plan, right.
    missing = [recording for recording in recordings if not (folder.path / recording.path).exists()]
    utterances = [
        Utterance(recording.texts[recording.language], recording.voice, str(folder.path / recording.path))
        for recording in missing
    ]
    requests: SimpleQueue[list[Utterance]] = SimpleQueue()
    for start in range(0, len(utterances), UTTERANCES_PER_REQUEST):
        requests.put(utterances[start : start + UTTERANCES_PER_REQUEST])
    bar = tqdm(
        desc=f"Speaking the {folder.title}",
        total=len(recordings),
        initial=len(recordings) - len(missing),
        disable=None if show_progress else True,
    )

    def work() -> None:
        with Speaker(folder.staging.folder) as speaker:
            while (utterances := _next(requests)) is not None:
                speaker.say(utterances)
                with bar.get_lock():  # tqdm's own count is not thread-safe
                    bar.update(len(utterances))

    with bar, ThreadPoolExecutor(num_jobs) as pool:
        try:
            for worker in as_completed([pool.submit(work) for _ in range(min(num_jobs, requests.qsize()))]):
                worker.result()
        finally:
            # After a failure or Ctrl-C the other threads end when the queue is empty.
            while _next(requests) is not None:
                pass


def _next(requests: SimpleQueue) -> list[Utterance] | None:
    try:
        return requests.get_nowait()
    except Empty:
        return None


def _write_manifests(folder: CorpusFolder, content: Contents) -> dict[str, Any]:
    """Write a manifest for each split and spoken language; returns the counts and hours."""
    counts: dict[str, dict[str, int]] = {split: {} for split in content.texts}
    hours: dict[str, dict[str, float]] = {split: {} for split in content.texts}
    for split in content.texts:
        for language in content.spoken_languages:
            spoken = [r for r in content.recordings if (r.split, r.language) == (split, language)]
            entries = [_manifest_entry(folder.path, recording) for recording in spoken]
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
            folder.staging.write_text(folder.path / "speech" / f"{split}.{language}.jsonl", "".join(lines))
            counts[split][language] = len(entries)
            hours[split][language] = round(sum(entry["duration"] for entry in entries) / 3600, 4)
    items = {split: len(sentences) for split, sentences in content.texts.items()}
    return {"items": items, "recordings": counts, "hours": hours}


def _manifest_entry(out: Path, recording: Spoken) -> dict[str, Any]:
    with wave.open(str(out / recording.path)) as file:
        samples = file.getnframes()
    return {
        "id": f"{recording.split}-{recording.language}-{recording.name}",
        "audio_filepath": (Path("..") / recording.path).as_posix(),
        "duration": samples / SAMPLING_RATE,
        "sampling_rate": SAMPLING_RATE,
        "text": recording.texts[recording.language],
        "lang": recording.language,
        "translations": {other: text for other, text in recording.texts.items() if other != recording.language},
        **recording.fields,
    }


def _summary(out: Path, totals: Mapping[str, Any], made_now: bool) -> SpokenSummary:
    return SpokenSummary(out, totals["items"], totals["recordings"], totals["hours"], made_now)
