"""Encoded audio in tar files: the names by which that of a record is found, and the cuts made of it."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import soundfile
from lhotse import AudioSource, Recording
from lhotse.cut import Cut
from lhotse.serialization import open_best
from lhotse.utils import compute_num_samples

from nemo_emmett.audio_file import AudioFault, CheckedSource, Header, fitted, load_samples, read_header, recording_from
from nemo_emmett.data.io.files import is_local
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.data.io.tar_index import Member, TarIndex, normal_name
from nemo_emmett.data.readers.json_records import Record

_SEGMENT = re.compile(r"^(?P<stem>.+)-sub\d+(?P<ext>\.\w+)?$")
"""A recording with several segments has one tar member, and manifest records named ``<member>-sub1.wav``, ..."""


def member_names(record: Record) -> list[str]:
    """The names that the tar member of a record's audio may have: the record's own, then that of a recording of which
    it is a segment.

    Raises:
        InvalidRecord: if the record names none.
    """
    name = record.data.get("audio_filepath")
    if not isinstance(name, str):
        raise InvalidRecord("no audio_filepath")
    if (segment := _SEGMENT.match(name)) is None:
        return [name]
    return [name, segment["stem"] + (segment["ext"] or "")]


def names_in(tar_path: str) -> set[str]:
    """The normal names of the files in a tar file, up to where it breaks off."""
    names = set()
    try:
        where = {"name": tar_path} if is_local(tar_path) else {"fileobj": open_best(tar_path, mode="rb")}
        with tarfile.open(**where, mode="r:*" if is_local(tar_path) else "r|*") as tar:
            names.update(normal_name(member.name) for member in tar if member.isfile())
    except (tarfile.ReadError, EOFError):
        pass  # the reader of the members reports it
    return names


def cut_of_encoded(
    name: str,
    header: Header,
    offset: float,
    duration: float,
    whole: AudioSource,
    part: Callable[[float], AudioSource],
) -> Cut:
    """The cut of a record whose audio is all or a part of a recording.

    Args:
        name: id of the recording.
        header: of the recording.
        offset: where the part begins, in seconds.
        duration: of the part, in seconds.
        whole: the recording's source.
        part: makes the source of the part, given the duration that is there.

    Raises:
        AudioFault: if the recording does not reach so far.
    """
    duration = fitted(header.duration, offset, duration, header.missing)
    if offset == 0 and header.duration - duration < 0.5 / header.sampling_rate:
        return recording_from(name, whole, header).to_cut()
    num_samples = compute_num_samples(duration, header.sampling_rate)
    return Recording(name, [part(duration)], header.sampling_rate, num_samples, duration).to_cut()


def encoded_part(audio: bytes, header: Header, offset: float, duration: float) -> bytes:
    """A part of encoded audio as WAV, with the very samples of the whole.

    Raises:
        AudioFault: if it cannot be decoded, or holds values that are not numbers.
    """
    source = CheckedSource(AudioSource("memory", [], audio), header)
    samples = load_samples(recording_from("whole", source, header), offset=offset, duration=duration).T
    part, subtype = io.BytesIO(), "FLOAT"
    if header.subtype == "PCM_16":
        samples, subtype = (samples * 32768).astype(np.int16), "PCM_16"
    soundfile.write(part, samples, header.sampling_rate, format="WAV", subtype=subtype)
    return part.getvalue()


class AudioInTar(AudioSource):
    """Encoded audio in a tar file. For lhotse it is audio in memory, but each access to it reads it from disk.

    Args:
        member: where its bytes are.
        channels: numbers of its channels.
    """

    def __init__(self, member: Member, channels: Sequence[int]) -> None:
        self.type = "memory"
        self.channels = list(channels)
        self.video = None
        self.member = member

    @property
    def source(self) -> bytes:
        """The encoded audio.

        Raises:
            AudioFault: if the tar file has changed, or is gone.
        """
        try:
            audio = self.member.read()
        except OSError as error:
            raise AudioFault("missing audio") from error
        if len(audio) < self.member.size:
            raise AudioFault("truncated audio")
        return audio


class SegmentInTar(AudioInTar):
    """A part of encoded audio in a tar file, cut out at each access.

    Args:
        member: where the bytes of the whole recording are.
        header: of the whole recording.
        offset: where the part begins, in seconds.
        duration: of the part, in seconds.
    """

    def __init__(self, member: Member, header: Header, offset: float, duration: float) -> None:
        super().__init__(member, range(header.num_channels))
        self.header = header
        self.offset = offset
        self.duration = duration

    @property
    def source(self) -> bytes:
        """The part, encoded as WAV.

        Raises:
            AudioFault: if it cannot be decoded.
        """
        return encoded_part(super().source, self.header, self.offset, self.duration)


def cut_in_tar(name: str, member: Member, offset: float, duration: float) -> Cut:
    """The cut of a member, as the streaming reader makes it; only the header is read now, the audio later.

    Raises:
        AudioFault: if its header shows that the audio cannot be used.
    """
    try:
        header = read_header(member.open())
    except OSError as error:
        raise AudioFault("unreadable audio") from error
    whole = AudioInTar(member, range(header.num_channels))
    return cut_of_encoded(name, header, offset, duration, whole, partial(SegmentInTar, member, header, offset))


def note_damage(tar: TarIndex, skipped_records: SkippedRecords, record: tuple[str, str]) -> None:
    """Report the damage of a tar file under a record whose audio is missing, since it may lie behind the damage."""
    if tar.damage is not None:
        skipped_records.add(tar.path, f"after {tar.damage}", "unreadable tar", record=record)
