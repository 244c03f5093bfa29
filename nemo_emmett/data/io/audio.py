"""Reads the audio of a cut by the headers of its files, not by what the manifest declares.

lhotse trusts the manifest: it reads a file of another sampling rate at the wrong speed, raises on a file that is longer
than declared, and extends one that is up to half a second short by reflecting its end.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch
from lhotse import AudioSource, Recording
from lhotse.augmentation import AudioTransform, Resample, Speed, Tempo
from lhotse.cut import Cut, MixedCut, MonoCut, MultiCut, PaddingCut
from lhotse.utils import fastcopy

from nemo_emmett.audio_file import RUNS_A_COMMAND, AudioFault, CheckedSource, Header, fitted, load_samples, read_header
from nemo_emmett.data.io import commands


def load_waveform(cut: Cut) -> torch.Tensor:
    """Read a cut's audio, mixed down to one channel.

    Returns:
        float32 tensor (T_samples,).

    Raises:
        AudioFault: if the audio is missing or incomplete; its text is the cause.
    """
    cut = with_checked_audio(cut)
    is_augmented = isinstance(cut, MixedCut) or any(
        not isinstance(transform, Resample) for transform in cut.recording.transforms or ()
    )
    cause = "augmentation failed" if is_augmented else "unreadable audio"
    return torch.from_numpy(load_samples(cut, cause)).mean(dim=0)


def with_checked_audio(cut: Cut) -> Cut:
    """The cut with recordings as their headers describe them; their samples are checked on loading.

    A recording of another sampling rate than declared is resampled from its own. A cut that ends slightly after its
    recording is shortened. Audio behind URLs and commands is left as declared.

    Raises:
        AudioFault: if a recording is missing, or its cut ends too long after it; its text is the cause.
    """
    if commands.is_refused(cut):
        raise AudioFault(RUNS_A_COMMAND)
    return _with_recordings_by_header(cut)


def _with_recordings_by_header(cut: Cut) -> Cut:
    if isinstance(cut, MixedCut):
        tracks = [fastcopy(track, cut=_with_recordings_by_header(track.cut)) for track in cut.tracks]
        return fastcopy(cut, tracks=tracks)
    if isinstance(cut, PaddingCut) or not cut.has_recording:
        return cut
    declared = cut.recording
    if any(source.type not in ("file", "memory") for source in declared.sources):
        return cut
    sources, headers = zip(*map(_opened, declared.sources), strict=True)
    if len({header.sampling_rate for header in headers}) > 1:
        raise AudioFault("channels of different sampling rates")
    recording = _as_declared(declared, _recording_by_header(declared, sources, headers))
    missing = max(header.missing for header in headers)
    try:
        duration = fitted(recording.duration, cut.start, cut.duration, missing)
    except AudioFault as fault:
        path = sources[0].source if sources[0].type == "file" else None
        raise AudioFault(str(fault), path) from None
    if recording.num_channels == 1 or declared.num_channels > 1:
        return fastcopy(cut, recording=recording, duration=duration)
    # NeMo declares one channel for every file if the manifest has its sampling rate.
    return MultiCut(
        cut.id, cut.start, duration, recording.channel_ids, cut.supervisions, recording=recording, custom=cut.custom
    )


def _opened(source: AudioSource) -> tuple[CheckedSource, Header]:
    """A source with the header of its audio."""
    if source.type == "file":
        header = read_header(str(source.source))
    else:
        encoded = source.source  # for a member of a tar file this reads its bytes
        if not isinstance(encoded, bytes):
            raise AudioFault("unreadable audio")
        source = AudioSource("memory", source.channels, encoded)
        header = read_header(io.BytesIO(encoded))
    return CheckedSource(source, header), header


def _recording_by_header(
    declared: Recording, sources: tuple[CheckedSource, ...], headers: tuple[Header, ...]
) -> Recording:
    """The recording as its headers describe it, without transforms."""
    channels = sorted(channel for source in declared.sources for channel in source.channels)
    for source, of_manifest, header in zip(sources, declared.sources, headers, strict=True):
        if len(of_manifest.channels) == header.num_channels:
            source.channels = list(of_manifest.channels)
        elif channels != [0]:
            raise AudioFault("other channels than declared")
        else:
            channels = list(source.channels)
    num_samples, rate = min(header.num_samples for header in headers), headers[0].sampling_rate
    return Recording(declared.id, list(sources), rate, num_samples, num_samples / rate, channels)


def _as_declared(declared: Recording, recording: Recording) -> Recording:
    """A recording with the transforms of the declared one, at the declared sampling rate."""
    transforms = [
        t if isinstance(t, AudioTransform) else AudioTransform.from_dict(t) for t in declared.transforms or []
    ]
    if not (transforms and isinstance(transforms[0], Resample)):
        at_first = next((t.source_sampling_rate for t in transforms if isinstance(t, Resample)), declared.sampling_rate)
        recording = recording.resample(at_first)
    for transform in transforms:
        if isinstance(transform, Resample) and transform.target_sampling_rate != recording.sampling_rate:
            recording = recording.resample(transform.target_sampling_rate)
        elif isinstance(transform, Resample) and transform.source_sampling_rate != recording.sampling_rate:
            pass  # the manifest declares another rate than the file's, which is the target's already
        elif isinstance(transform, Speed):
            recording = recording.perturb_speed(transform.factor, affix_id=False)
        elif isinstance(transform, Tempo):
            recording = recording.perturb_tempo(transform.factor, affix_id=False)
        else:
            recording = fastcopy(recording, transforms=[*(recording.transforms or []), transform])
    if declared.transforms and recording.channel_ids != declared.channel_ids and declared.num_channels > 1:
        # after an impulse response with several microphones
        recording = fastcopy(recording, channel_ids=declared.channel_ids)
    return recording


def _parts_with_audio(cut: Cut) -> Iterator[Cut]:
    if isinstance(cut, MixedCut):
        for track in cut.tracks:
            yield from _parts_with_audio(track.cut)
    elif not isinstance(cut, PaddingCut) and cut.has_recording:
        yield cut


def audio_path(cut: Cut) -> str | None:
    """The file of a cut's audio; None if it is in memory, behind a URL, or in several files."""
    paths = {
        str(source.source)
        for part in _parts_with_audio(cut)
        for source in part.recording.sources
        if isinstance(source, AudioSource) and source.type == "file"
    }
    return paths.pop() if len(paths) == 1 else None


def audio_start(cut: Cut) -> float | None:
    """The start of a cut's audio in its file, in seconds; None if the audio is transformed or not in one file."""
    is_as_recorded = isinstance(cut, MonoCut) and not cut.recording.transforms
    return cut.start if is_as_recorded and audio_path(cut) is not None else None
