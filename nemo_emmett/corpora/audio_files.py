"""A publisher's recordings, as they are or as 16 kHz FLAC: in files, in NeMo's tars, in Lhotse Shar.

Each chunk of recordings is written independently, so that any number of processes gives the same files.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import numpy as np
import soundfile
import soxr
from lhotse import Recording as LhotseRecording
from lhotse import SupervisionSegment
from lhotse.shar import SharWriter

from nemo_emmett.audio_file import AudioFault, Header, fitted, load_samples, open_recording, read_header
from nemo_emmett.corpora.corpus import Recording, Sentence, is_seconds
from nemo_emmett.corpora.output_folder import Staging
from nemo_emmett.errors import DataError

SAMPLING_RATE = 16_000
"""Of FLAC that is written, in Hz: the rate of speech encoders."""

_LONGEST_NAME = 200
"""Bytes of a file's name before its suffix; file systems allow 255."""


class UnusableRecording(Exception):
    """A recording cannot be used; the message is the cause under which it is counted."""


@dataclass(frozen=True)
class Chunk:
    """Sentences whose recordings are written together."""

    part: str  # name of the part
    spoken: str  # ISO 639-1
    number: int  # in the part, from 0
    sentences: Sequence[Sentence]


@dataclass(frozen=True)
class Written:
    """The result of a chunk."""

    entries: Sequence[Mapping[str, Any]]  # of a NeMo manifest
    skipped: Mapping[str, int]  # cause -> sentences


def write_chunk(chunk: Chunk, audio: str, out: Path, staging: Staging) -> Written:
    """Write the recordings of a chunk, unless they are written already.

    Args:
        chunk: sentences with recordings in files, not in archives.
        audio: ``keep``, ``flac``, ``tar`` or ``shar``.
        out: folder of the corpus.
        staging: where files are made and the result of the chunk is kept.
    """
    unit = f"{chunk.part}-{chunk.number:06d}"
    if (result := staging.result_of(unit)) is None:
        result = {"entries": [], "skipped": defaultdict(int)}
        writer = _WRITERS[audio](chunk, out, staging)
        for sentence in chunk.sentences:
            try:
                result["entries"].append(writer.add(sentence))
            except UnusableRecording as cause:
                result["skipped"][str(cause)] += 1
        writer.close()
        staging.mark_done(unit, result)
    return Written(result["entries"], result["skipped"])


def unpack(
    recordings: Sequence[Recording], folder: Path, staging: Staging, advance: Callable[[int], Any] = lambda _: None
) -> list[Recording]:
    """Unpack the archives that contain recordings, each in one pass.

    Args:
        recordings: the required ones; those that are in no archive stay where they are.
        folder: receives ``{archive}/{member}``.
        staging: where files are made.
        advance: called with the number of recordings that are unpacked, now or before.

    Returns:
        The recordings as files, also those that were not found in their archive.

    Raises:
        DataError: if an archive is missing or damaged, or a recording would be unpacked to outside of ``folder``.
    """
    wanted: dict[Path, dict[str, Path]] = defaultdict(dict)
    unpacked = []
    for recording in recordings:
        if recording.member is None:
            unpacked.append(recording)
            continue
        member = PurePosixPath(recording.member)
        if member.is_absolute() or ".." in member.parts:
            raise DataError(
                f"'{recording.path}': '{member}' would be unpacked to outside of its folder; such an archive is not "
                "the publisher's, download it again."
            )
        path = folder / recording.path.name.split(".tar")[0] / member
        wanted[recording.path][str(member)] = path
        unpacked.append(replace(recording, path=path, member=None))
    for archive, members in wanted.items():
        missing = {member: path for member, path in members.items() if not path.exists()}
        advance(len(members) - len(missing))
        if missing:
            _unpack_archive(archive, missing, staging, advance)
    return unpacked


def manifest_entry(sentence: Sentence, spoken: str, **audio: Any) -> dict[str, Any]:
    """A record of a NeMo manifest; without translations it asks for a transcript."""
    translations = {language: text for language, text in sentence.texts.items() if language != spoken}
    languages = {"translations": translations} if translations else {"source_lang": spoken, "target_lang": spoken}
    return {"id": sentence.id, **audio, "text": sentence.texts[spoken], "lang": spoken, **languages}


class _Writer:
    """Writes the recordings of a chunk one after the other; ``add`` returns the record of a NeMo manifest."""

    def __init__(self, chunk: Chunk, out: Path, staging: Staging) -> None:
        self.chunk, self.spoken, self.out, self.staging = chunk, chunk.spoken, out, staging
        self.shards = out / "speech" / chunk.part

    def flac_entry(self, sentence: Sentence, samples: np.ndarray, path: str, **more: Any) -> dict[str, Any]:
        """The record of a FLAC file."""
        audio = {"audio_filepath": path, "duration": len(samples) / SAMPLING_RATE, "sampling_rate": SAMPLING_RATE}
        return manifest_entry(sentence, self.spoken, **audio, **more)

    def close(self) -> None:
        """Complete what was written."""


class _Kept(_Writer):
    """Leaves recordings as the publisher has them."""

    def add(self, sentence: Sentence) -> dict[str, Any]:
        recording, header = measured(sentence.recording)
        if header.is_float:  # only float samples can be NaN or infinite
            read_samples(recording)
        # Relative to files in the corpus, which move with it.
        inside = recording.path.is_relative_to(self.out)
        path = Path(os.path.relpath(recording.path, self.out / "speech")) if inside else recording.path.absolute()
        is_whole = recording.start == 0 and header.duration - recording.duration < 1 / header.sampling_rate
        offset = {} if is_whole else {"offset": recording.start}
        audio = {"audio_filepath": path.as_posix(), **offset, "duration": recording.duration}
        # With a rate, NeMo's own reader takes a segment at the beginning of a longer file for the whole file.
        if is_whole or recording.start != 0:
            audio["sampling_rate"] = header.sampling_rate
        return manifest_entry(sentence, self.spoken, **audio)


class _FlacFiles(_Writer):
    """Writes a FLAC file for each recording."""

    def add(self, sentence: Sentence) -> dict[str, Any]:
        path = self.out / "audio" / self.chunk.part / f"{_file_name(sentence.id)}.flac"
        samples = read_samples(sentence.recording)
        with self.staging.atomic_file(path) as unfinished:
            unfinished.write_bytes(_flac(samples))
        return self.flac_entry(sentence, samples, f"../audio/{self.chunk.part}/{path.name}")


class _NemoTar(_Writer):
    """Writes a tar of FLAC files and its manifest."""

    def __init__(self, chunk: Chunk, out: Path, staging: Staging) -> None:
        super().__init__(chunk, out, staging)
        self.entries: list[dict[str, Any]] = []
        self.bytes = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.bytes, mode="w")  # noqa: SIM115

    def add(self, sentence: Sentence) -> dict[str, Any]:
        samples = read_samples(sentence.recording)
        data = _flac(samples)
        member = tarfile.TarInfo(f"{_file_name(sentence.id)}.flac")  # without owner and time: always the same bytes
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))
        self.entries.append(self.flac_entry(sentence, samples, member.name, shard_id=self.chunk.number))
        return self.entries[-1]

    def close(self) -> None:
        self.tar.close()
        with self.staging.atomic_file(self.shards / f"audio_{self.chunk.number}.tar") as unfinished:
            unfinished.write_bytes(self.bytes.getvalue())
        self.staging.write_text(self.shards / f"manifest_{self.chunk.number}.json", json_lines(self.entries))


class _Shar(_Writer):
    """Writes a shard of Lhotse Shar."""

    def __init__(self, chunk: Chunk, out: Path, staging: Staging) -> None:
        super().__init__(chunk, out, staging)
        self.unfinished = staging.folder / f"{chunk.part}-{chunk.number:06d}.shar"
        shutil.rmtree(self.unfinished, ignore_errors=True)  # of a killed preparation
        self.unfinished.mkdir(parents=True)
        # A link: Lhotse takes "%" in a folder's name for a number, and a folder called x.tar for a tar file.
        self.links = TemporaryDirectory()
        link = Path(self.links.name, "shar")
        link.symlink_to(self.unfinished.absolute())
        self.writer = SharWriter(link, fields={"recording": "flac"}, shard_size=None)
        self.writer.__enter__()

    def add(self, sentence: Sentence) -> dict[str, Any]:
        samples = read_samples(sentence.recording)
        recording = LhotseRecording.from_bytes(_flac(samples), recording_id=sentence.id)
        cut = recording.to_cut()
        cut.id = sentence.id
        entry = manifest_entry(sentence, self.spoken, duration=cut.duration)
        text = {"text": entry["text"], "language": self.spoken}
        cut.supervisions = [SupervisionSegment(sentence.id, sentence.id, start=0, duration=cut.duration, **text)]
        cut.custom = {key: entry[key] for key in ("lang", "translations", "source_lang", "target_lang") if key in entry}
        self.writer.write(cut)
        return entry

    def close(self) -> None:
        self.writer.__exit__(None, None, None)
        self.links.cleanup()
        cuts, tar = self.unfinished / "cuts.jsonl.gz", self.unfinished / "recording.tar"
        if tar.exists():  # it does not if no recording could be read
            with self.staging.atomic_file(self.shards / f"recording.{self.chunk.number:06d}.tar") as unfinished:
                os.replace(tar, unfinished)
            with self.staging.atomic_file(self.shards / f"cuts.{self.chunk.number:06d}.jsonl.gz") as unfinished:
                # compressed again, since Lhotse's gzip contains the time of writing
                unfinished.write_bytes(gzip.compress(gzip.decompress(cuts.read_bytes()), mtime=0))
        shutil.rmtree(self.unfinished)


_WRITERS = {"keep": _Kept, "flac": _FlacFiles, "tar": _NemoTar, "shar": _Shar}


def json_lines(entries: Iterable[Mapping[str, Any]]) -> str:
    """Records as the text of a manifest."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def measured(recording: Recording) -> tuple[Recording, Header]:
    """A recording with its duration in seconds, and the header of its file.

    Raises:
        UnusableRecording: if it cannot be read, is shorter than it should be, or has invalid times.
    """
    if not is_seconds(recording.start) or recording.start < 0:
        raise UnusableRecording("invalid start")
    if recording.duration is not None and (not is_seconds(recording.duration) or recording.duration < 0):
        raise UnusableRecording("invalid duration")
    header = _header(recording.path)
    left = header.duration - recording.start
    duration = left if recording.duration is None else recording.duration
    if duration <= 0:
        raise UnusableRecording("empty recording")
    try:
        duration = fitted(header.duration, recording.start, duration, header.missing)
    except AudioFault as fault:
        raise _unusable(fault) from fault
    return replace(recording, duration=duration), header


def read_samples(recording: Recording) -> np.ndarray:
    """A recording at ``SAMPLING_RATE``, its channels averaged: float32, shape (samples,).

    Raises:
        UnusableRecording: if it cannot be read, is shorter than it should be, or has NaN or infinite samples.
    """
    recording, header = measured(recording)
    try:
        audio = open_recording(recording.path, header)
        samples = load_samples(audio, offset=recording.start, duration=recording.duration)
    except AudioFault as fault:
        raise _unusable(fault) from fault
    mono = samples.mean(axis=0)
    rate = header.sampling_rate
    return mono if rate == SAMPLING_RATE else soxr.resample(mono, rate, SAMPLING_RATE)


@lru_cache(maxsize=64)
def _header(path: Path) -> Header:
    """The header of an audio file; cached, since one talk holds hundreds of recordings."""
    try:
        return read_header(str(path))
    except AudioFault as fault:
        raise _unusable(fault) from fault


def _unusable(fault: AudioFault) -> UnusableRecording:
    """A fault as cause; ``missing audio`` is called ``missing recording`` here."""
    return UnusableRecording(re.sub(" audio$", " recording", str(fault)))


def _flac(samples: np.ndarray) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def _file_name(identity: str) -> str:
    """A file name for an id; different ids have different names."""
    name = quote(identity, safe=" ")
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return f"{name[: _LONGEST_NAME - len(digest)]}{digest}"


def _unpack_archive(
    archive: Path, members: Mapping[str, Path], staging: Staging, advance: Callable[[int], Any]
) -> None:
    left = dict(members)
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                # PurePosixPath removes the leading "./" of some archives.
                if member.isfile() and (path := left.pop(str(PurePosixPath(member.name)), None)) is not None:
                    with staging.atomic_file(path) as unfinished, open(unfinished, "wb") as copy:
                        shutil.copyfileobj(tar.extractfile(member), copy)
                    advance(1)
                if not left:
                    return
    except FileNotFoundError:
        raise DataError(f"'{archive}' does not exist; download it, or correct the path.") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the machine, such as a full disk
            raise
        raise DataError(f"'{archive}' cannot be unpacked ({error}); download it again.") from error
