"""A publisher's recordings, as they are or as 16 kHz FLAC: in files, in NeMo's tars, in Lhotse Shar.

Work is done by chunks of recordings, each by itself, so that any number of processes gives the same files.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nemo_emmett.corpora.corpus import Recording, Sentence
from nemo_emmett.corpora.writing import Workshop
from nemo_emmett.errors import DataError

if TYPE_CHECKING:
    import numpy as np

SAMPLING_RATE = 16_000
"""Of FLAC that is written, in Hz: what speech encoders take."""

TRUNCATION_TOLERANCE = 0.1
"""Seconds that a recording may be shorter than its publisher's tables say, as in the dataloader."""

_LONGEST_NAME = 200
"""Bytes of a file's name before its ending; file systems take 255."""


class UnusableRecording(Exception):
    """A recording cannot be used; the message is the cause, as it is counted."""


@dataclass(frozen=True)
class Chunk:
    """Sentences whose recordings are written together."""

    part: str  # name of the part
    spoken: str  # ISO 639-1
    number: int  # in the part, from 0
    sentences: Sequence[Sentence]


@dataclass(frozen=True)
class Written:
    """What came of a chunk."""

    entries: Sequence[Mapping[str, Any]]  # of a NeMo manifest
    skipped: Mapping[str, int]  # cause -> sentences


def write_chunk(chunk: Chunk, audio: str, out: Path, workshop: Workshop) -> Written:
    """Write the recordings of a chunk, unless they are written already.

    Args:
        chunk: sentences with recordings in files, not in archives.
        audio: ``keep``, ``flac``, ``tar`` or ``shar``.
        out: folder of the corpus.
        workshop: notes that the chunk is done.
    """
    unit = f"{chunk.part}-{chunk.number:06d}"
    if (record := workshop.record(unit)) is None:
        record = {"entries": [], "skipped": defaultdict(int)}
        convert = _CONVERTERS[audio](chunk, out, workshop)
        for sentence in chunk.sentences:
            try:
                record["entries"].append(convert.add(sentence))
            except UnusableRecording as cause:
                record["skipped"][str(cause)] += 1
        convert.close()
        workshop.note(unit, record)
    return Written(record["entries"], record["skipped"])


def unpack(
    recordings: Iterable[Recording], folder: Path, workshop: Workshop, advance: Callable[[int], None] = lambda _: None
) -> Callable[[Recording], Recording]:
    """Unpack the archives that recordings lie in, each in one pass.

    Args:
        recordings: those that are needed; the ones outside archives are left where they are.
        folder: receives ``{archive}/{member}``.
        workshop: where files are made.
        advance: is told of each recording that is unpacked, or was.

    Returns:
        Where a recording lies afterwards, whether or not it was there to be unpacked.

    Raises:
        DataError: if an archive is missing or damaged, or a recording would be unpacked to outside of ``folder``.
    """
    wanted: dict[Path, dict[str, Path]] = defaultdict(dict)
    for recording in recordings:
        if recording.member is not None:
            _refuse_outside(recording)
            wanted[recording.path][_normal(recording.member)] = _place(recording, folder)
    for archive, members in wanted.items():
        missing = {member: path for member, path in members.items() if not path.exists()}
        advance(len(members) - len(missing))
        if missing:
            _unpack_archive(archive, missing, workshop, advance)
    return partial(_unpacked, folder=folder)


def manifest_entry(sentence: Sentence, spoken: str, **audio: Any) -> dict[str, Any]:
    """A record of a NeMo manifest; where nothing is translated it asks for a transcript."""
    translations = {language: text for language, text in sentence.texts.items() if language != spoken}
    languages = {"translations": translations} if translations else {"source_lang": spoken, "target_lang": spoken}
    return {"id": sentence.id, **audio, "text": sentence.texts[spoken], "lang": spoken, **languages}


class _Kept:
    """Recordings as their publisher has them."""

    def __init__(self, chunk: Chunk, out: Path, workshop: Workshop) -> None:
        self.spoken = chunk.spoken
        self.folder = out / "speech"

    def add(self, sentence: Sentence) -> dict[str, Any]:
        recording, rate = measured(sentence.recording)
        # What was unpacked into the corpus moves with it.
        inside = recording.path.is_relative_to(self.folder.parent)
        path = Path(os.path.relpath(recording.path, self.folder)) if inside else recording.path.absolute()
        audio = {"audio_filepath": path.as_posix(), **_stretch(recording), "duration": recording.duration}
        # With a rate, NeMo's readers take a stretch from the beginning of a longer file for all of it.
        if audio.get("offset") != 0:
            audio["sampling_rate"] = rate
        return manifest_entry(sentence, self.spoken, **audio)

    def close(self) -> None:
        pass


class _FlacFiles:
    """A FLAC file for each recording."""

    def __init__(self, chunk: Chunk, out: Path, workshop: Workshop) -> None:
        self.spoken, self.workshop = chunk.spoken, workshop
        self.folder = out / "audio" / chunk.part

    def add(self, sentence: Sentence) -> dict[str, Any]:
        path = self.folder / f"{_file_name(sentence.id)}.flac"
        samples = read_samples(sentence.recording)
        with self.workshop.whole(path) as unfinished:
            unfinished.write_bytes(_flac(samples))
        return manifest_entry(
            sentence,
            self.spoken,
            audio_filepath=f"../audio/{self.folder.name}/{path.name}",
            duration=len(samples) / SAMPLING_RATE,
            sampling_rate=SAMPLING_RATE,
        )

    def close(self) -> None:
        pass


class _NemoTar:
    """A tar of FLAC files and its manifest."""

    def __init__(self, chunk: Chunk, out: Path, workshop: Workshop) -> None:
        self.spoken, self.number, self.workshop = chunk.spoken, chunk.number, workshop
        self.folder = out / "speech" / chunk.part
        self.entries: list[dict[str, Any]] = []
        self.bytes = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.bytes, mode="w")  # noqa: SIM115

    def add(self, sentence: Sentence) -> dict[str, Any]:
        samples = read_samples(sentence.recording)
        data = _flac(samples)
        member = tarfile.TarInfo(f"{_file_name(sentence.id)}.flac")  # of no owner and no time: the same bytes always
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))
        entry = manifest_entry(
            sentence,
            self.spoken,
            audio_filepath=member.name,
            duration=len(samples) / SAMPLING_RATE,
            sampling_rate=SAMPLING_RATE,
            shard_id=self.number,
        )
        self.entries.append(entry)
        return entry

    def close(self) -> None:
        self.tar.close()
        with self.workshop.whole(self.folder / f"audio_{self.number}.tar") as unfinished:
            unfinished.write_bytes(self.bytes.getvalue())
        self.workshop.write_text(self.folder / f"manifest_{self.number}.json", json_lines(self.entries))


class _Shar:
    """A shard of Lhotse Shar."""

    def __init__(self, chunk: Chunk, out: Path, workshop: Workshop) -> None:
        from lhotse.shar import SharWriter

        self.spoken, self.number, self.workshop = chunk.spoken, chunk.number, workshop
        self.folder = out / "speech" / chunk.part
        self.unfinished = workshop.folder / f"{chunk.part}-{chunk.number:06d}.shar"
        shutil.rmtree(self.unfinished, ignore_errors=True)  # of a preparation that was killed
        self.unfinished.mkdir(parents=True)
        # Lhotse takes "%" in a folder's name for a number, and a folder called x.tar for a tar file.
        self.links = TemporaryDirectory()
        link = Path(self.links.name, "shar")
        link.symlink_to(self.unfinished.absolute())
        self.writer = SharWriter(link, fields={"recording": "flac"}, shard_size=None)
        self.writer.__enter__()

    def add(self, sentence: Sentence) -> dict[str, Any]:
        from lhotse import Recording as LhotseRecording
        from lhotse import SupervisionSegment

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
        if tar.exists():  # nothing is written where no recording could be read
            with self.workshop.whole(self.folder / f"recording.{self.number:06d}.tar") as unfinished:
                os.replace(tar, unfinished)
            with self.workshop.whole(self.folder / f"cuts.{self.number:06d}.jsonl.gz") as unfinished:
                # Lhotse's gzip carries the time at which it was written.
                unfinished.write_bytes(gzip.compress(gzip.decompress(cuts.read_bytes()), mtime=0))
        shutil.rmtree(self.unfinished)


_CONVERTERS = {"keep": _Kept, "flac": _FlacFiles, "tar": _NemoTar, "shar": _Shar}


def json_lines(entries: Iterable[Mapping[str, Any]]) -> str:
    """A manifest's text."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def measured(recording: Recording) -> tuple[Recording, int]:
    """A recording with its duration in seconds, and its sampling rate in Hz.

    Raises:
        UnusableRecording: if it cannot be read or is shorter than it should be.
    """
    seconds, rate = _length(recording.path)
    left = seconds - recording.start
    duration = left if recording.duration is None else recording.duration
    if duration > left + TRUNCATION_TOLERANCE:
        raise UnusableRecording("truncated recording")
    duration = min(duration, left)
    if duration <= 0:
        raise UnusableRecording("empty recording")
    return replace(recording, duration=duration), rate


def read_samples(recording: Recording) -> np.ndarray:
    """A recording at ``SAMPLING_RATE``, its channels averaged: float32, shape (samples,).

    Raises:
        UnusableRecording: if it cannot be read or is shorter than it should be.
    """
    import soundfile
    import soxr

    recording, rate = measured(recording)
    try:
        with soundfile.SoundFile(recording.path) as file:
            file.seek(round(recording.start * rate))
            samples = file.read(round(recording.duration * rate), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        samples = _read_by_lhotse(recording)
    if not len(samples):
        raise UnusableRecording("empty recording")
    # An MP3 that was cut off still tells the length that it had.
    if len(samples) < (recording.duration - TRUNCATION_TOLERANCE) * rate:
        raise UnusableRecording("truncated recording")
    mono = samples.mean(axis=1)
    return mono if rate == SAMPLING_RATE else soxr.resample(mono, rate, SAMPLING_RATE)


@lru_cache(maxsize=64)
def _length(path: Path) -> tuple[float, int]:
    """Seconds and sampling rate of an audio file. Talks are cut into hundreds of recordings, one after the other."""
    import soundfile

    if not path.is_file():
        raise UnusableRecording("missing recording")
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError:
        return _length_by_lhotse(path)
    return info.frames / info.samplerate, info.samplerate


def _length_by_lhotse(path: Path) -> tuple[float, int]:
    """The same for what libsndfile cannot read, such as AAC; Lhotse asks FFmpeg."""
    from lhotse.audio.backend import info

    from nemo_emmett.data.commands import CAUSE, is_command

    if is_command(str(path)):  # whatever reads it next reads it by this name
        raise UnusableRecording(CAUSE)
    try:
        found = info(path)
    except Exception as error:  # each of its backends raises its own kind
        raise UnusableRecording("unreadable recording") from error
    return found.duration, int(found.samplerate)


def _read_by_lhotse(recording: Recording) -> np.ndarray:
    from lhotse.audio.backend import read_audio

    try:
        samples, _ = read_audio(str(recording.path), offset=recording.start, duration=recording.duration)
    except Exception as error:  # each of its backends raises its own kind
        raise UnusableRecording("unreadable recording") from error
    return samples.reshape(-1, samples.shape[-1]).T


def _flac(samples: np.ndarray) -> bytes:
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def _stretch(recording: Recording) -> dict[str, float]:
    """The ``offset`` of a recording that is not all of its file."""
    seconds, rate = _length(recording.path)
    is_whole = recording.start == 0 and seconds - recording.duration < 1 / rate
    return {} if is_whole else {"offset": recording.start}


def _file_name(identity: str) -> str:
    """An id as a file's name; different ids have different names."""
    name = quote(identity, safe=" ")
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return f"{name[: _LONGEST_NAME - len(digest)]}{digest}"


def _normal(member: str) -> str:
    return str(PurePosixPath(member))  # without a leading "./", which some archives have


def _refuse_outside(recording: Recording) -> None:
    member = PurePosixPath(recording.member)
    if member.is_absolute() or ".." in member.parts:
        raise DataError(
            f"'{recording.path}': '{member}' would be unpacked to outside of its folder; such an archive is not the "
            "publisher's, download it anew."
        )


def _place(recording: Recording, folder: Path) -> Path:
    return folder / recording.path.name.split(".tar")[0] / _normal(recording.member)


def _unpacked(recording: Recording, folder: Path) -> Recording:
    return recording if recording.member is None else replace(recording, path=_place(recording, folder), member=None)


def _unpack_archive(
    archive: Path, members: Mapping[str, Path], workshop: Workshop, advance: Callable[[int], None]
) -> None:
    left = dict(members)
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                if member.isfile() and (path := left.pop(_normal(member.name), None)) is not None:
                    with workshop.whole(path) as unfinished, open(unfinished, "wb") as copy:
                        shutil.copyfileobj(tar.extractfile(member), copy)
                    advance(1)
                if not left:
                    return
    except FileNotFoundError:
        raise DataError(f"'{archive}' does not exist; download it, or correct the path.") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the machine, such as a full disk, not of the archive
            raise
        raise DataError(f"'{archive}' cannot be unpacked ({error}); download it again.") from error
