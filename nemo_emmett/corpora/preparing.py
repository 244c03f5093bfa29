"""From a corpus's parts to a folder that the dataloader reads; knows no publisher.

    text/{part}.{language}         one sentence a line, line-aligned across the languages; {part}.ids beside them
    speech/{part}.jsonl            a NeMo manifest, each recording with its translations
    audio/{part}/                  recordings as FLAC, or as unpacked from the publisher's archives
    speech/{part}/                 instead of both, with shards: NeMo's tars or Lhotse Shar
    input_cfg/{part}.yaml          what a recipe's ``input_cfg`` takes
    corpus.json                    what the corpus is and holds, what was skipped and why; written last

The same options give the same bytes, whatever the number of processes and however often the work was cut off.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nemo_emmett.config import escape_interpolations
from nemo_emmett.corpora.claim import CorpusFolder, identity_of, plan_of, refuse_inside, refuse_other_parts
from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence, Skipped
from nemo_emmett.corpora.writing import Workshop
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.processes import available_cores, end_with_parent

if TYPE_CHECKING:
    from nemo_emmett.corpora.audio_files import Chunk
    from nemo_emmett.corpora.hygiene import HygieneConfig

AUDIO = ("keep", "flac", "tar", "shar")

SHARD_SIZE = 512
"""Recordings in a shard: some 80 MB of FLAC for sentences of ten seconds."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class PartSummary:
    """What a part holds."""

    name: str
    split: str
    languages: tuple[str, ...]
    spoken: str | None
    sentences: int
    hours: float  # 0 of text
    skipped: Mapping[str, int]  # cause -> sentences


@dataclass(frozen=True)
class CorpusSummary:
    """What a prepared corpus holds."""

    folder: Path
    name: str
    parts: tuple[PartSummary, ...]
    made_now: bool  # False if it was there already
    missing: tuple[str, ...] = ()  # languages that were asked for and are in no part


@dataclass(frozen=True)
class _Job:
    """What all steps of a preparation need to know."""

    out: Path
    audio: str
    shard_size: int
    hygiene: HygieneConfig | None
    num_jobs: int
    show_progress: bool

    @property
    def workshop(self) -> Workshop:
        return CorpusFolder(self.out).workshop


def prepare_corpus(
    corpus: Corpus,
    source: Path | str,
    out: Path | str,
    *,
    selection: Selection | None = None,
    audio: Literal["keep", "flac", "tar", "shar"] = "keep",
    shard_size: int = SHARD_SIZE,
    hygiene: HygieneConfig | None = None,
    num_jobs: int | None = None,
    show_progress: bool = True,
) -> CorpusSummary:
    """Write a corpus as manifests, text and shards into ``out``. The same options give the same bytes.

    A finished corpus of the same options is left as it is; an unfinished one is completed.

    Args:
        corpus: which one.
        source: the folder or the archive that its publisher distributes.
        out: the folder to fill; made if it is not there.
        selection: languages, splits and further sources; by default all that is there.
        audio: recordings as they are, as 16 kHz FLAC files, in NeMo's tars or in Lhotse Shar.
        shard_size: recordings in a shard.
        hygiene: which sentences of training splits to leave out. Other splits are never filtered: their scores would
            not be comparable any more.
        num_jobs: processes to work with; by default one for each core. Does not change the result.
        show_progress: show a bar.

    Raises:
        ConfigError: if an option has a value that cannot work.
        DataError: if files are missing or damaged, ``out`` cannot be written to, holds anything else already, is being
            written by another process or lies in ``source``.
    """
    source, out, selection = Path(source), Path(out), selection or Selection()
    _check(audio, shard_size, num_jobs)
    job = _Job(out, audio, shard_size, hygiene, num_jobs or available_cores(), show_progress)
    options = {"audio": audio, "shard_size": shard_size, "hygiene": None if hygiene is None else hygiene.described()}
    plan = plan_of(corpus, source, selection, options)
    folder = CorpusFolder(out)
    if (finished := folder.finished(plan, identity_of)) is not None:
        return _summary(out, finished, made_now=False)
    refuse_inside(out, source)
    parts = corpus.read(source, selection)
    _check_parts(corpus, parts, hygiene)
    described = [{"name": part.name, "languages": part.languages} for part in parts]
    with folder.work({**plan, "parts": described}, identity_of) as begun:
        refuse_other_parts(out, begun["parts"], parts)
        summaries = [asdict(summary) for summary in [*_write_texts(parts, job), *_write_speech(parts, job)]]
        content = {**plan, "parts": summaries}
        folder.finish(content)
    return _summary(out, content, made_now=True)


def _write_texts(parts: Sequence[Part], job: _Job) -> list[PartSummary]:
    texts = [part for part in parts if part.spoken is None]
    if not texts:
        return []
    from nemo_emmett.corpora.progress import counting

    # One part is worked on in this process, where its sentences can be counted as they pass.
    if len(texts) == 1 or job.num_jobs == 1:
        with counting("Writing sentences", None, job.show_progress) as advance:
            return [_write_text(part, job, advance) for part in texts]
    with counting("Writing text", len(texts), job.show_progress) as advance:
        return list(_each(_write_text, [(part, job) for part in texts], job.num_jobs, lambda _: advance(1)))


def _write_text(part: Part, job: _Job, advance: Callable[[int], None] = lambda _: None) -> PartSummary:
    """Write a text part, unless it is written already. Files of the languages replace what a killed run left."""
    unit = f"{part.name}.text"
    if (record := job.workshop.record(unit)) is None:
        skipped: Counter[str] = Counter()
        count = 0
        paths = {language: job.out / "text" / f"{part.name}.{language}" for language in part.languages}
        with ExitStack() as stack:
            names = [*paths.values(), job.out / "text" / f"{part.name}.ids"]
            unfinished = [stack.enter_context(job.workshop.whole(path)) for path in names]
            *files, ids = [stack.enter_context(open(path, "w", encoding="utf-8", newline="\n")) for path in unfinished]
            for sentence in _usable(part, job.hygiene, skipped, advance):
                for language, file in zip(part.languages, files, strict=True):
                    file.write(f"{sentence.texts[language]}\n")
                ids.write(f"{_one_line(sentence.id)}\n")
                count += 1
            _check_any(part, count, skipped)
        languages = {language: str(path.absolute()) for language, path in paths.items()}
        _write_input_cfg(part, {"type": "parallel_text", "paths": languages}, job)
        record = {"sentences": count, "hours": 0.0, "skipped": dict(sorted(skipped.items()))}
        job.workshop.note(unit, record)
    return _part_summary(part, record)


def _write_speech(parts: Sequence[Part], job: _Job) -> list[PartSummary]:
    return [_write_spoken(part, job) for part in parts if part.spoken is not None]


def _write_spoken(part: Part, job: _Job) -> PartSummary:
    from nemo_emmett.corpora.audio_files import json_lines, write_chunk
    from nemo_emmett.corpora.progress import counting

    unit = f"{part.name}.speech"
    if (record := job.workshop.record(unit)) is not None:
        return _part_summary(part, record)
    skipped: Counter[str] = Counter()
    chunks = _chunks(part, job, skipped)
    entries: list[Mapping[str, Any]] = []
    with counting(f"Writing {part.name}", sum(len(chunk.sentences) for chunk in chunks), job.show_progress) as advance:
        tasks = [(chunk, job.audio, job.out, job.workshop) for chunk in chunks]
        for written in _each(write_chunk, tasks, job.num_jobs):
            entries.extend(written.entries)
            skipped.update(written.skipped)
            advance(len(written.entries) + sum(written.skipped.values()))
    _check_any(part, len(entries), skipped)
    if job.audio in ("keep", "flac"):
        job.workshop.write_text(job.out / "speech" / f"{part.name}.jsonl", json_lines(entries))
    _write_input_cfg(part, _speech_source(part, job, len(chunks)), job)
    hours = round(sum(entry["duration"] for entry in entries) / 3600, 4)
    record = {"sentences": len(entries), "hours": hours, "skipped": dict(sorted(skipped.items()))}
    job.workshop.note(unit, record)
    return _part_summary(part, record)


def _chunks(part: Part, job: _Job, skipped: Counter[str]) -> list[Chunk]:
    """The usable sentences of a spoken part by shards, their recordings in files."""
    from nemo_emmett.corpora.audio_files import Chunk, unpack
    from nemo_emmett.corpora.progress import counting

    sentences = list(_usable(part, job.hygiene, skipped))
    folder = job.out / "audio" / part.name if job.audio == "keep" else job.workshop.folder / "audio" / part.name
    recordings = [sentence.recording for sentence in sentences]
    packed = sum(recording.member is not None for recording in recordings)
    with counting(f"Unpacking {part.name}", packed, job.show_progress and packed > 0) as advance:
        locate = unpack(recordings, folder, job.workshop, advance)
    sentences = [replace(sentence, recording=locate(sentence.recording)) for sentence in sentences]
    starts = range(0, len(sentences), job.shard_size)
    return [
        Chunk(part.name, part.spoken, number, sentences[start : start + job.shard_size])
        for number, start in enumerate(starts)
    ]


def _usable(
    part: Part,
    hygiene: HygieneConfig | None,
    skipped: Counter[str],
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Sentence]:
    """The sentences of a part that can be used, their texts on one line each; the others are counted by cause."""
    judge = _judge(part, hygiene)
    for sentence in _without_doubles(part, skipped):
        advance(1)
        sentence = replace(sentence, texts={language: _one_line(text) for language, text in sentence.texts.items()})
        cause = _fault(part, sentence) or judge(sentence.texts)
        if cause is None:
            yield sentence
        else:
            skipped[cause] += 1


def _without_doubles(part: Part, skipped: Counter[str]) -> Iterator[Sentence]:
    """The sentences of a part, without what its reader skipped.

    Recordings get files named after their ids, so these must differ.
    """
    seen: set[str] = set()
    for sentence in part.sentences():
        if isinstance(sentence, Skipped):
            skipped[sentence.cause] += 1
        elif part.spoken is None:
            yield sentence
        elif sentence.id in seen:
            skipped["id occurs twice"] += 1
        else:
            seen.add(sentence.id)
            yield sentence


def _fault(part: Part, sentence: Sentence) -> str | None:
    """Why a sentence cannot be used, whatever the options."""
    needed = part.languages if part.spoken is None else (part.spoken,)
    if any(not sentence.texts.get(language) for language in needed) or not all(sentence.texts.values()):
        return "empty text"
    if not all(map(_is_utf8, (sentence.id, *sentence.texts.values()))):
        return "not UTF-8"
    if part.spoken is not None and sentence.recording is None:
        return "missing recording"
    return None


def _judge(part: Part, hygiene: HygieneConfig | None) -> Callable[[Mapping[str, str]], str | None]:
    if hygiene is None or not _is_training(part):
        return lambda _: None
    from nemo_emmett.corpora.hygiene import Hygiene

    if part.spoken is not None:
        hygiene = replace(hygiene, deduplicate=False)  # one sentence read by several speakers is no duplicate
    return Hygiene(hygiene, part.languages).cause


def _is_training(part: Part) -> bool:
    return part.split.startswith("train")


def _is_utf8(text: str) -> bool:
    """Whether a text can be written: readers keep bytes that are not UTF-8 as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        text = re.sub(r"\s*[\r\n]+\s*", " ", text)
    return text.strip()


def _speech_source(part: Part, job: _Job, num_shards: int) -> dict[str, str]:
    """A part's entry in an ``input_cfg``."""
    folder = (job.out / "speech").absolute()
    if job.audio == "shar":
        return {"type": "lhotse_shar", "shar_path": str(folder / part.name)}
    if job.audio == "tar":
        shards = f"_OP_0..{num_shards - 1}_CL_"
        return {
            "type": "nemo_tarred",
            "manifest_filepath": str(folder / part.name / f"manifest_{shards}.json"),
            "tarred_audio_filepaths": str(folder / part.name / f"audio_{shards}.tar"),
        }
    return {"type": "nemo", "manifest_filepath": str(folder / f"{part.name}.jsonl")}


def _write_input_cfg(part: Part, entry: Mapping[str, Any], job: _Job) -> None:
    import yaml

    content = yaml.safe_dump([_escaped(entry)], sort_keys=False, allow_unicode=True)
    job.workshop.write_text(job.out / "input_cfg" / f"{part.name}.yaml", content)


def _escaped(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry whose paths OmegaConf reads as they are."""
    return {
        key: _escaped(value) if isinstance(value, Mapping) else escape_interpolations(value)
        for key, value in entry.items()
    }


def _each(
    function: Callable[..., Result],
    tasks: Iterable[tuple],
    num_jobs: int,
    done: Callable[[Result], Any] = lambda _: None,
) -> Iterator[Result]:
    """The results of a function, in the tasks' order, from several processes where that is asked for."""
    results: Iterable[Result] = (function(*task) for task in tasks)
    if num_jobs > 1:
        from joblib import Parallel, delayed

        # Loky's processes start without a copy of this one, and take readers' closures, which pickle does not.
        calls = [delayed(_in_worker)(os.getpid(), function, *task) for task in tasks]
        results = Parallel(n_jobs=num_jobs, backend="loky", return_as="generator")(calls)
    try:
        for result in results:
            done(result)
            yield result
    except KeyboardInterrupt:
        if num_jobs > 1:
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=False, kill_workers=True)  # else they finish their tasks first
        raise


def _in_worker(parent: int, function: Callable[..., Result], *task: Any) -> Result:
    if not any(thread.name == "end-with-parent" for thread in threading.enumerate()):
        end_with_parent(parent)
    return function(*task)


def _check(audio: str, shard_size: int, num_jobs: int | None) -> None:
    if audio not in AUDIO:
        raise ConfigError(f"audio: '{audio}' is not one of {', '.join(AUDIO)}.")
    if shard_size < 1:
        raise ConfigError(f"shard_size: {shard_size} must be 1 or more.")
    if num_jobs is not None and num_jobs < 1:
        raise ConfigError(f"num_jobs: {num_jobs} must be 1 or more; leave it out for one for each core.")


def _check_parts(corpus: Corpus, parts: Sequence[Part], hygiene: HygieneConfig | None) -> None:
    if not parts:
        raise DataError(f"Nothing of {corpus.title} is there; what is needed: {corpus.files}")
    names = [part.name for part in parts]  # of files, input_cfg/{part}.yaml among them
    assert len(set(names)) == len(names), f"parts of {corpus.name} share a name: {names}"
    if hygiene is not None and not any(_is_training(part) for part in parts):
        splits = ", ".join(dict.fromkeys(part.split for part in parts))
        raise ConfigError(
            f"Only training splits are filtered, and {corpus.title} has none among {splits}; leave the options out."
        )


def _check_any(part: Part, count: int, skipped: Mapping[str, int]) -> None:
    if not count:
        causes = ", ".join(f"{cause}: {number:,}" for cause, number in sorted(skipped.items())) or "it is empty"
        raise DataError(f"Nothing of '{part.name}' can be used ({causes}); check the source and the options.")


def _part_summary(part: Part, record: Mapping[str, Any]) -> PartSummary:
    return PartSummary(part.name, part.split, tuple(part.languages), part.spoken, **record)


def _summary(out: Path, content: Mapping[str, Any], made_now: bool) -> CorpusSummary:
    parts = tuple(PartSummary(**{**part, "languages": tuple(part["languages"])}) for part in content["parts"])
    there = {language for part in parts for language in part.languages}
    asked = dict.fromkeys(content["options"]["languages"] or ())
    missing = tuple(language for language in asked if language not in there)
    return CorpusSummary(out, content["name"], parts, made_now, missing)
