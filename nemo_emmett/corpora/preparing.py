"""From a corpus's parts to a folder that the dataloader reads; independent of the publisher's layout.

    text/{part}.{language}         one sentence a line, line-aligned across the languages; {part}.ids next to them
    speech/{part}.jsonl            a NeMo manifest, each recording with its translations
    audio/{part}/                  recordings as FLAC, or as unpacked from the publisher's archives
    speech/{part}/                 instead of both, with shards: NeMo's tars or Lhotse Shar
    input_cfg/{part}.yaml          a value for a recipe's ``input_cfg``
    corpus.json                    description of the corpus, its content, causes of skipped rows; written last

The same options give the same bytes, whatever the number of processes and however often the work was interrupted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nemo_emmett.config import escape_interpolations
from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence, Skipped
from nemo_emmett.corpora.output_folder import CorpusFolder, Staging
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.processes import available_cores, forked_pool

if TYPE_CHECKING:
    from tqdm import tqdm

    from nemo_emmett.corpora.audio_files import Chunk
    from nemo_emmett.corpora.filtering import FilterConfig

AUDIO = ("keep", "flac", "tar", "shar")

SHARD_SIZE = 512
"""Recordings in a shard: some 80 MB of FLAC for sentences of ten seconds."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class PartSummary:
    """The content of a part."""

    name: str
    split: str
    languages: tuple[str, ...]
    spoken: str | None
    sentences: int
    hours: float  # 0 of text
    skipped: Mapping[str, int]  # cause -> sentences


@dataclass(frozen=True)
class CorpusSummary:
    """The content of a prepared corpus."""

    folder: Path
    name: str
    parts: tuple[PartSummary, ...]
    made_now: bool  # False if it was finished before
    missing: tuple[str, ...] = ()  # languages that were asked for and are in no part


@dataclass(frozen=True)
class _Job:
    """The options of a preparation."""

    out: Path
    audio: str
    shard_size: int
    filters: FilterConfig | None
    num_jobs: int
    show_progress: bool

    @property
    def staging(self) -> Staging:
        return CorpusFolder(self.out).staging

    def bar(self, title: str, total: int | None) -> tqdm:
        """A progress bar, if it is wanted and there is a terminal."""
        from tqdm import tqdm

        return tqdm(desc=title, total=total, disable=None if self.show_progress else True)


def prepare_corpus(
    corpus: Corpus,
    source: Path | str,
    out: Path | str,
    *,
    selection: Selection | None = None,
    audio: Literal["keep", "flac", "tar", "shar"] = "keep",
    shard_size: int = SHARD_SIZE,
    filters: FilterConfig | None = None,
    num_jobs: int | None = None,
    show_progress: bool = True,
) -> CorpusSummary:
    """Write a corpus as manifests, text and shards into ``out``. The same options give the same bytes.

    A finished corpus of the same options is left as it is; an unfinished one is completed.

    Args:
        corpus: which one.
        source: the folder or the archive that its publisher distributes.
        out: the folder to write to; created if it does not exist.
        selection: languages, splits and further sources; by default everything in the source.
        audio: recordings as they are, as 16 kHz FLAC files, in NeMo's tars or in Lhotse Shar.
        shard_size: recordings in a shard.
        filters: which sentences of training splits to leave out. Other splits are never filtered: scores on them
            would not be comparable.
        num_jobs: processes to work with; by default one for each core. Does not change the result.
        show_progress: show a bar.

    Raises:
        ConfigError: if an option has a value that cannot work.
        DataError: if files are missing or damaged, or if ``out`` cannot be written to, holds anything else, is being
            written by another process or is inside of ``source``.
    """
    source, out, selection = Path(source), Path(out), selection or Selection()
    if audio not in AUDIO:
        raise ConfigError(f"audio: '{audio}' is not one of {', '.join(AUDIO)}.")
    if shard_size < 1:
        raise ConfigError(f"shard_size: {shard_size} must be 1 or more.")
    if num_jobs is not None and num_jobs < 1:
        raise ConfigError(f"num_jobs: {num_jobs} must be 1 or more; leave it out for one for each core.")
    job = _Job(out, audio, shard_size, filters, num_jobs or available_cores(), show_progress)
    plan = _plan(corpus, source, selection, job)
    folder = CorpusFolder(out)
    if (finished := folder.finished(plan, _identity)) is not None:
        return _summary(out, finished, made_now=False)
    if out.resolve().is_relative_to(source.resolve()):  # some readers take all files below the source
        raise DataError(f"'{out}' is inside the source, '{source}'; give the corpus a folder outside of it.")
    parts = corpus.read(source, selection)
    _check_parts(corpus, parts, filters)
    described = [{"name": part.name, "languages": part.languages} for part in parts]
    with folder.begun({**plan, "parts": described}, _identity) as begun:
        _refuse_other_parts(out, begun["parts"], parts)
        spoken = [part for part in parts if part.spoken is not None]
        summaries = [*_write_texts(parts, job), *(_write_speech(part, job) for part in spoken)]
        content = {**plan, "parts": [asdict(summary) for summary in summaries]}
        folder.finish(content)
    return _summary(out, content, made_now=True)


def _plan(corpus: Corpus, source: Path, selection: Selection, job: _Job) -> dict[str, Any]:
    """All that the files depend on, as plain JSON values: the same plan gives the same files."""
    # Keys and values are those that corpora of earlier versions have in their corpus.json.
    options = {
        "source": str(source.absolute()),
        "languages": selection.languages,
        "splits": selection.splits,
        "beside": {name: str(Path(path).absolute()) for name, path in selection.extra_sources.items()},
        "audio": job.audio,
        "shard_size": job.shard_size,
        "hygiene": None if job.filters is None else job.filters.described(),
    }
    described = {key: getattr(corpus, key) for key in ("name", "title", "release", "licence", "url")}
    return json.loads(json.dumps({**described, "options": options}, default=str))


def _identity(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {"corpus": plan["name"], "release": plan["release"], **plan["options"]}


def _refuse_other_parts(out: Path, begun: Sequence[Mapping[str, Any]], parts: Sequence[Part]) -> None:
    """Raise DataError if the source has other parts than when ``out`` was begun: finished work would not match them."""
    before = {part["name"]: tuple(part["languages"]) for part in begun}
    now = {part.name: tuple(part.languages) for part in parts}
    if before != now:
        name = next(name for name in (*before, *now) if before.get(name) != now.get(name))
        was, is_now = (", ".join(found.get(name, ("nothing",))) for found in (before, now))
        raise DataError(
            f"The source has changed since '{out}' was begun: '{name}' was {was} and is {is_now}; delete the folder "
            "and start again."
        )


def _write_texts(parts: Sequence[Part], job: _Job) -> list[PartSummary]:
    texts = [part for part in parts if part.spoken is None]
    # A single part is written in this process, where its sentences can be counted.
    if len(texts) == 1 or job.num_jobs == 1:
        with job.bar("Writing sentences", None) as bar:
            return [_write_text(part, job, bar.update) for part in texts]
    with job.bar("Writing text", len(texts)) as bar:
        summaries = []
        for summary in _each(_write_text, [(part, job) for part in texts], job.num_jobs):
            summaries.append(summary)
            bar.update()
    return summaries


def _write_text(part: Part, job: _Job, advance: Callable[[int], Any] = lambda _: None) -> PartSummary:
    """Write a text part, unless it is written already. Files of a killed run are replaced."""
    unit = f"{part.name}.text"
    if (result := job.staging.result_of(unit)) is None:
        skipped: Counter[str] = Counter()
        count = 0
        paths = {language: job.out / "text" / f"{part.name}.{language}" for language in part.languages}
        with ExitStack() as stack:
            names = [*paths.values(), job.out / "text" / f"{part.name}.ids"]
            unfinished = [stack.enter_context(job.staging.atomic_file(path)) for path in names]
            *files, ids = [stack.enter_context(open(path, "w", encoding="utf-8", newline="\n")) for path in unfinished]
            for sentence in _usable(part, job.filters, skipped, advance):
                for language, file in zip(part.languages, files, strict=True):
                    file.write(f"{sentence.texts[language]}\n")
                ids.write(f"{_one_line(sentence.id)}\n")
                count += 1
            _check_any(part, count, skipped)
        languages = {language: str(path.absolute()) for language, path in paths.items()}
        _write_input_cfg(part, {"type": "parallel_text", "paths": languages}, job)
        result = {"sentences": count, "hours": 0.0, "skipped": dict(sorted(skipped.items()))}
        job.staging.mark_done(unit, result)
    return PartSummary(part.name, part.split, tuple(part.languages), part.spoken, **result)


def _write_speech(part: Part, job: _Job) -> PartSummary:
    """Write a part with recordings, unless it is written already."""
    # Imported before processes are forked, which inherit its libraries (lhotse and torch take seconds).
    from nemo_emmett.corpora.audio_files import json_lines, write_chunk

    unit = f"{part.name}.speech"
    if (result := job.staging.result_of(unit)) is None:
        skipped: Counter[str] = Counter()
        chunks = _chunks(part, job, skipped)
        entries: list[Mapping[str, Any]] = []
        with job.bar(f"Writing {part.name}", sum(len(chunk.sentences) for chunk in chunks)) as bar:
            tasks = [(chunk, job.audio, job.out, job.staging) for chunk in chunks]
            for written in _each(write_chunk, tasks, job.num_jobs):
                entries.extend(written.entries)
                skipped.update(written.skipped)
                bar.update(len(written.entries) + sum(written.skipped.values()))
        _check_any(part, len(entries), skipped)
        if job.audio in ("keep", "flac"):
            job.staging.write_text(job.out / "speech" / f"{part.name}.jsonl", json_lines(entries))
        _write_input_cfg(part, _speech_source(part, job, len(chunks)), job)
        hours = round(sum(entry["duration"] for entry in entries) / 3600, 4)
        result = {"sentences": len(entries), "hours": hours, "skipped": dict(sorted(skipped.items()))}
        job.staging.mark_done(unit, result)
    return PartSummary(part.name, part.split, tuple(part.languages), part.spoken, **result)


def _chunks(part: Part, job: _Job, skipped: Counter[str]) -> list[Chunk]:
    """The usable sentences of a spoken part by shards, their recordings in files."""
    from nemo_emmett.corpora.audio_files import Chunk, unpack

    sentences = list(_usable(part, job.filters, skipped))
    folder = job.out / "audio" / part.name if job.audio == "keep" else job.staging.folder / "audio" / part.name
    recordings = [sentence.recording for sentence in sentences]
    if packed := sum(recording.member is not None for recording in recordings):
        with job.bar(f"Unpacking {part.name}", packed) as bar:
            unpacked = unpack(recordings, folder, job.staging, bar.update)
        sentences = [replace(one, recording=file) for one, file in zip(sentences, unpacked, strict=True)]
    starts = range(0, len(sentences), job.shard_size)
    return [
        Chunk(part.name, part.spoken, number, sentences[start : start + job.shard_size])
        for number, start in enumerate(starts)
    ]


def _usable(
    part: Part, filters: FilterConfig | None, skipped: Counter[str], advance: Callable[[int], Any] = lambda _: None
) -> Iterator[Sentence]:
    """The usable sentences of a part, their texts on one line each; the others are counted by cause."""
    filter_cause = _filter(part, filters)
    ids: set[str] = set()  # of recordings, whose files are named after them
    for sentence in part.sentences():
        if isinstance(sentence, Skipped):
            skipped[sentence.cause] += 1
            continue
        if part.spoken is not None:
            if sentence.id in ids:
                skipped["id occurs twice"] += 1
                continue
            ids.add(sentence.id)
        advance(1)
        sentence = replace(sentence, texts={language: _one_line(text) for language, text in sentence.texts.items()})
        cause = _fault(part, sentence) or filter_cause(sentence.texts)
        if cause is None:
            yield sentence
        else:
            skipped[cause] += 1


def _fault(part: Part, sentence: Sentence) -> str | None:
    """The cause for which a sentence cannot be used, whatever the options."""
    needed = part.languages if part.spoken is None else (part.spoken,)
    if any(not sentence.texts.get(language) for language in needed) or not all(sentence.texts.values()):
        return "empty text"
    try:
        "".join((sentence.id, *sentence.texts.values())).encode()
    except UnicodeEncodeError:  # readers decode bytes that are not UTF-8 as lone surrogates
        return "not UTF-8"
    if part.spoken is not None and sentence.recording is None:
        return "missing recording"
    return None


def _filter(part: Part, filters: FilterConfig | None) -> Callable[[Mapping[str, str]], str | None]:
    """The function that gives the cause for which a sentence's texts are filtered out."""
    if filters is None or not _is_training(part):
        return lambda _: None
    from nemo_emmett.corpora.filtering import SentenceFilter

    if part.spoken is not None:
        filters = replace(filters, deduplicate=False)  # a sentence read by several speakers is no duplicate
    return SentenceFilter(filters, part.languages).cause


def _is_training(part: Part) -> bool:
    return part.split.startswith("train")


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        text = re.sub(r"\s*[\r\n]+\s*", " ", text)
    return text.strip()


def _speech_source(part: Part, job: _Job, num_shards: int) -> dict[str, str]:
    """The entry of a spoken part in an ``input_cfg``."""
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
    job.staging.write_text(job.out / "input_cfg" / f"{part.name}.yaml", content)


def _escaped(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry in whose paths OmegaConf finds no interpolations."""
    return {
        key: _escaped(value) if isinstance(value, Mapping) else escape_interpolations(value)
        for key, value in entry.items()
    }


def _each(function: Callable[..., Result], tasks: Sequence[tuple], num_jobs: int) -> Iterator[Result]:
    """The results of a function in the tasks' order, computed in ``num_jobs`` processes."""
    if num_jobs == 1 or not tasks:
        yield from (function(*task) for task in tasks)
        return
    # Forked processes inherit the tasks, whose readers' closures cannot be pickled; only their numbers are sent.
    with forked_pool(min(num_jobs, len(tasks)), _inherit, function, tasks) as pool:
        yield from pool.map(_run_task, range(len(tasks)))


_inherited: list[Any] = []  # in a forked process: the function and its tasks


def _inherit(function: Callable[..., Any], tasks: Sequence[tuple]) -> None:
    _inherited[:] = [function, tasks]


def _run_task(number: int) -> Any:
    function, tasks = _inherited
    return function(*tasks[number])


def _check_parts(corpus: Corpus, parts: Sequence[Part], filters: FilterConfig | None) -> None:
    if not parts:
        raise DataError(f"Nothing of {corpus.title} is there; needed: {corpus.files}")
    names = [part.name for part in parts]  # files are named after parts
    assert len(set(names)) == len(names), f"parts of {corpus.name} share a name: {names}"
    if filters is not None and not any(_is_training(part) for part in parts):
        splits = ", ".join(dict.fromkeys(part.split for part in parts))
        raise ConfigError(
            f"Only training splits are filtered, and {corpus.title} has none among {splits}; leave the options out."
        )


def _check_any(part: Part, count: int, skipped: Mapping[str, int]) -> None:
    if not count:
        causes = ", ".join(f"{cause}: {number:,}" for cause, number in sorted(skipped.items())) or "it is empty"
        raise DataError(f"Nothing of '{part.name}' can be used ({causes}); check the source and the options.")


def _summary(out: Path, content: Mapping[str, Any], made_now: bool) -> CorpusSummary:
    parts = tuple(PartSummary(**{**part, "languages": tuple(part["languages"])}) for part in content["parts"])
    found = {language for part in parts for language in part.languages}
    asked = dict.fromkeys(content["options"]["languages"] or ())
    missing = tuple(language for language in asked if language not in found)
    return CorpusSummary(out, content["name"], parts, made_now, missing)
