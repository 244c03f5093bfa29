"""Recordings in every form of speech: the same samples whichever keys a record has, and the same causes."""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, SupervisionSegment
from lhotse.cut import MonoCut
from lhotse.shar import SharWriter

from nemo_emmett.audio_file import AudioFault
from nemo_emmett.data.config.sources import parse_source
from nemo_emmett.data.io.audio import load_waveform, with_checked_audio
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.random_access import open_records
from nemo_emmett.data.readers.registry import open_source

from ..test_dataset import recording_of

RATE = 16000
NOISE = np.random.default_rng(0).normal(0, 0.1, 3 * RATE)

Segment = tuple[float | None, float]  # offset, duration
SEGMENTS: list[Segment] = [(None, 3.0), (None, 1.0), (0, 1.0), (0.5, 1.0), (2.5, 0.5), (2.0, 1.05), (2.95, 0.1)]


def heard(config: Mapping, streamed: bool) -> dict[str, np.ndarray | str]:
    """What each record gives, by its text: its samples at 16 kHz, or the cause for which it is skipped."""
    skipped, source = SkippedRecords(), parse_source({"force_finite": True, **config}, "train_ds")
    found: dict[str, np.ndarray | str] = {}
    records = None if streamed else open_records(source, skipped, ExampleKind.TRANSLATION)
    if records is None:
        cuts = list(open_source(source, skipped, ExampleKind.TRANSLATION)[0])
    else:
        cuts = [cut for shard, n in enumerate(records.shard_sizes) for i in range(n) for cut in records.read(shard, i)]
    for cut in cuts:
        try:
            found[cut.supervisions[0].text] = load_waveform(cut.resample(RATE)).numpy()
        except AudioFault as fault:
            found[cut.supervisions[0].text] = str(fault)
    found |= {str(int(bad.place.removeprefix("line ")) - 1): bad.cause for bad in skipped.first}
    return dict(sorted(found.items()))


def records_of(audio: str, segments: Sequence[Segment], **fields) -> str:
    """A manifest of segments whose texts are their numbers, from 0."""
    records = [
        {"audio_filepath": audio, "duration": d, "text": str(i), **({} if o is None else {"offset": o}), **fields}
        for i, (o, d) in enumerate(segments)
    ]
    return "".join(json.dumps(record) + "\n" for record in records)


def write_tar(path: Path, members: Sequence[tuple[str, Path]], mode: str = "w") -> str:
    with tarfile.open(path, mode) as tar:
        for name, file in members:
            tar.add(file, name)
    return str(path)


def forms(path: Path, segments: Sequence[Segment], rate: int, channels: int = 1, **fields) -> dict[str, dict]:
    """A recording's segments as sources of all kinds, whose manifests may declare another sampling rate."""
    folder = path.parent
    for name, keys in {"opened": {}, "declared": {"sampling_rate": rate}, "wrong": {"sample_rate": 11025}}.items():
        (folder / f"{name}.json").write_text(records_of(str(path), segments, **keys, **fields))
    (folder / "manifest_0.json").write_text(records_of(path.name, segments, **fields))
    cuts = []
    for declared in (rate, 11025):
        for i, (offset, duration) in enumerate(segments):
            recording = recording_of(path, 9.0, declared, channels)
            cut = recording.to_cut()
            cut.id, cut.start, cut.duration = f"{declared}-{i}", float(offset or 0), duration
            cut.supervisions = [SupervisionSegment(cut.id, recording.id, 0, duration, text=str(i))]
            cut.custom = dict(fields)
            cuts.append(cut)
    CutSet(cuts[: len(segments)]).to_file(folder / "cuts.jsonl")
    CutSet(cuts[len(segments) :]).to_file(folder / "wrong_cuts.jsonl")
    return {
        **{name: {"type": "nemo", "manifest_filepath": f"{folder}/{name}.json"} for name in ("opened", "declared")},
        "wrong": {"type": "nemo", "manifest_filepath": f"{folder}/wrong.json"},
        "cuts": {"type": "lhotse", "cuts_path": f"{folder}/cuts.jsonl"},
        "wrong cuts": {"type": "lhotse", "cuts_path": f"{folder}/wrong_cuts.jsonl"},
        **{
            name: {
                "type": "nemo_tarred",
                "manifest_filepath": f"{folder}/manifest_0.json",
                "tarred_audio_filepaths": write_tar(folder / f"audio_0.{name}", [(path.name, path)], mode),
            }
            for name, mode in (("tar", "w"), ("tar.gz", "w:gz"))
        },
    }


def heard_in_all(path: Path, segments: Sequence[Segment], rate: int = RATE, **how) -> dict[str, dict]:
    """What each form gives, read by number and as a stream."""
    return {
        f"{name} {'streamed' if streamed else 'by number'}": heard(config, streamed)
        for name, config in forms(path, segments, rate, **how).items()
        for streamed in (False, True)
    }


def plain(found: Mapping) -> list:
    """Causes, and the lengths of what was heard."""
    return [value if isinstance(value, str) else len(value) for value in found.values()]


def assert_alike(found: Mapping[str, Mapping], tolerance: float = 0.0) -> dict:
    """Check that all forms give the same; returns it."""
    first, *others = found.values()
    for name, other in zip(list(found)[1:], others, strict=True):
        assert plain(other) == plain(first), name
        for key, value in first.items():
            if not isinstance(value, str):
                assert np.allclose(other[key], value, rtol=0, atol=tolerance), (name, key)
    return first


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_segment_is_the_same_samples_in_every_form(tmp_path, subtype) -> None:
    soundfile.write(tmp_path / "a.wav", NOISE, RATE, subtype=subtype)
    samples = soundfile.read(tmp_path / "a.wav", dtype="float32")[0]
    found = assert_alike(heard_in_all(tmp_path / "a.wav", SEGMENTS))
    for (offset, duration), segment in zip(SEGMENTS, found.values(), strict=True):
        start = round((offset or 0) * RATE)
        assert np.array_equal(segment, samples[start : start + round(duration * RATE)])


@pytest.mark.parametrize(
    ("name", "rate", "how"),
    [
        ("a.wav", 8000, {}),
        ("a.flac", 44100, {}),
        ("a.ogg", 22050, {"subtype": "VORBIS"}),
        ("a.opus", 48000, {"format": "OGG", "subtype": "OPUS"}),
        ("a.mp3", 44100, {}),
        ("a.aiff", 32000, {}),
    ],
)
def test_the_header_says_the_sampling_rate(tmp_path, name, rate, how) -> None:
    """440 Hz stay 440 Hz, whatever the manifest declares."""
    time = np.arange(3 * rate) / rate
    soundfile.write(tmp_path / name, 0.1 * np.sin(2 * np.pi * 440 * time), rate, **how)
    segments = [(None, 3.0), (0.5, 1.0), (None, 1.0)]
    found = assert_alike(heard_in_all(tmp_path / name, segments, rate), tolerance=1e-6)
    assert plain(found) == [48000, 16000, 16000]
    for segment in found.values():
        spectrum = np.abs(np.fft.rfft(segment * np.hanning(len(segment))))
        assert abs(np.argmax(spectrum) * RATE / len(segment) - 440) < 2


def test_a_recording_that_ends_too_early_is_truncated_in_every_form(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", NOISE, RATE)
    segments = [(None, 3.2), (2.0, 1.2), (3.0, 0.05), (5.0, 1.0), (None, 3.1), (2.95, 0.15)]
    found = assert_alike(heard_in_all(tmp_path / "a.wav", segments))
    assert plain(found) == ["truncated audio"] * 4 + [48000, 800]


def test_an_mp3_that_holds_less_than_its_header_says_ends_where_it_does(tmp_path) -> None:
    soundfile.write(tmp_path / "whole.mp3", np.tile(NOISE, 3), RATE)
    content = (tmp_path / "whole.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(content[:-200])
    there = len(soundfile.read(tmp_path / "a.mp3")[0])
    assert 9 * RATE - 1600 < there < 9 * RATE - 100
    assert plain(assert_alike(heard_in_all(tmp_path / "a.mp3", [(None, 9.0), (8.5, 0.5)]))) == [
        there,
        there - 8.5 * RATE,
    ]
    (tmp_path / "a.mp3").write_bytes(content[: len(content) // 2])
    assert plain(assert_alike(heard_in_all(tmp_path / "a.mp3", [(None, 9.0), (1.0, 1.0)]))) == ["truncated audio", RATE]


# WAV files whose header is not true

DATA, RIFF = 2 * len(NOISE), 2 * len(NOISE) + 36
THREE = [(None, 3.0), (0.5, 0.5), (2.5, 0.5)]


@pytest.mark.parametrize(
    ("riff", "data", "missing", "expected"),
    [
        (RIFF, DATA, 0, [48000, 8000, 8000]),
        (0, 0, 0, [48000, 8000, 8000]),
        (RIFF, 0, 0, [48000, 8000, 8000]),
        (0xFFFFFFFF, 0xFFFFFFFF, 0, [48000, 8000, 8000]),
        (0xFFFFFFFF, 0, 0, [48000, 8000, 8000]),
        (0x7FFFF024, 0x7FFFF000, 0, [48000, 8000, 8000]),
        (RIFF, DATA, 726, [48000 - 363, 8000, 8000 - 363]),
        (RIFF, DATA, 3200, [48000 - 1600, 8000, 8000 - 1600]),
        (RIFF, DATA, 3300, ["truncated audio", 8000, "truncated audio"]),
        (0, 0, 3300, ["truncated audio", 8000, "truncated audio"]),
        (RIFF + 500, DATA, 0, [48000, 8000, 8000]),
    ],
)
def test_a_wav_holds_what_is_there(tmp_path, riff, data, missing, expected) -> None:
    """Streaming writers leave sizes of 0 or as large as can be; field recorders declare a little too much."""
    soundfile.write(tmp_path / "a.wav", NOISE, RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8], content[40:44] = struct.pack("<I", riff), struct.pack("<I", data)
    (tmp_path / "a.wav").write_bytes(content[: len(content) - missing])
    found = assert_alike(heard_in_all(tmp_path / "a.wav", THREE))
    assert plain(found) == expected
    whole = np.round(NOISE * 32768) / 32768
    for (offset, _), segment in zip(THREE, found.values(), strict=True):
        if not isinstance(segment, str):
            start = round((offset or 0) * RATE)
            assert np.allclose(segment, whole[start : start + len(segment)], atol=1e-4)


def test_an_empty_wav_with_further_chunks_is_empty(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0), RATE)
    with (tmp_path / "a.wav").open("ab") as file:
        file.write(b"LIST" + struct.pack("<I", 8) + b"INFOICMT")
    assert plain(assert_alike(heard_in_all(tmp_path / "a.wav", [(None, 1.0)]))) == ["empty audio"]


# Values

NO_NUMBERS, TOO_LARGE = "audio holds values that are not numbers", "audio far above full scale"


@pytest.mark.parametrize(
    ("name", "how", "value", "cause"),
    [
        *(
            ("a.wav", {"subtype": subtype}, value, cause)
            for subtype in ("FLOAT", "DOUBLE")
            for value, cause in ((np.nan, NO_NUMBERS), (-np.inf, NO_NUMBERS), (1e29, TOO_LARGE), (-5e3, TOO_LARGE))
        ),
        ("a.wav", {"subtype": "FLOAT"}, 4.0, None),
        ("a.aiff", {"subtype": "FLOAT"}, np.nan, NO_NUMBERS),
        ("a.caf", {"format": "CAF", "subtype": "DOUBLE"}, np.nan, NO_NUMBERS),
        ("a.w64", {"format": "W64", "subtype": "FLOAT"}, 1e29, TOO_LARGE),
        ("a.rf64", {"format": "RF64", "subtype": "FLOAT"}, np.inf, NO_NUMBERS),
    ],
)
def test_one_sample_that_is_no_number_costs_the_segments_that_hold_it(tmp_path, name, how, value, cause) -> None:
    samples = NOISE.copy()
    samples[2 * RATE] = value
    soundfile.write(tmp_path / name, samples, RATE, **how)
    found = assert_alike(heard_in_all(tmp_path / name, [(None, 3.0), (1.9, 0.2), (0.5, 1.0), (2.5, 0.5)]))
    assert plain(found) == [cause or 48000, cause or 3200, 16000, 8000]


# Channels


def test_channels_are_selected_alike_in_every_form(tmp_path) -> None:
    channels = np.stack([NOISE, -NOISE / 2, NOISE / 4], axis=1)
    soundfile.write(tmp_path / "a.wav", channels, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", NOISE, RATE, subtype="FLOAT")
    whole = soundfile.read(tmp_path / "a.wav", dtype="float32")[0]
    segments = [(None, 3.0), (0.5, 1.0)]

    def select(selector, path="a.wav", **fields) -> dict:
        num_channels = 3 if path == "a.wav" else 1
        sources = forms(tmp_path / path, segments, RATE, num_channels, **fields)
        return assert_alike(
            {
                f"{name}{streamed}": heard({**config, "channel_selector": selector}, streamed)
                for name, config in sources.items()
                for streamed in (False, True)
            }
        )

    for selector in (None, "average"):
        assert np.allclose(select(selector)["0"], whole.mean(axis=1), atol=1e-7)
    for channel in (0, 2):
        assert np.array_equal(select(channel)["0"], whole[:, channel])
        assert np.array_equal(select("ear", ear=channel)["1"], whole[8000:24000, channel])
    assert np.array_equal(select(0, "mono.wav")["0"], soundfile.read(tmp_path / "mono.wav", dtype="float32")[0])
    assert plain(select(1, "mono.wav")) == ["no channel 1"] * 2
    assert plain(select(3)) == ["no channel 3"] * 2
    assert plain(select("ear")) == ["no field 'ear' to select a channel by"] * 2
    for value in ("left", -1, True):
        assert plain(select("ear", ear=value)) == ["invalid channel"] * 2


def test_channels_of_shar_are_selected(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([NOISE, NOISE / 2], axis=1), RATE)
    cut = recording_of(tmp_path / "a.wav", 3.0, channels=2).to_cut()
    cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0, 3.0, text="0")]
    (tmp_path / "shar").mkdir()
    with SharWriter(str(tmp_path / "shar"), fields={"recording": "wav"}, shard_size=1) as writer:
        writer.write(cut)
    config = {"type": "lhotse_shar", "shar_path": str(tmp_path / "shar"), "channel_selector": 1}
    for streamed in (False, True):
        assert np.allclose(heard(config, streamed)["0"], NOISE / 2, atol=1e-4)


def test_channels_other_than_declared_are_no_channels(write_tone) -> None:
    """lhotse would take the first sample off a recording with one channel, and give the rest for its second."""
    recording = recording_of(write_tone("a.wav"), 1.0, channels=2)
    with pytest.raises(AudioFault, match="other channels than declared"):
        load_waveform(MonoCut("c", 0, 1.0, 1, recording=recording))


# Members of tar files


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("members", "records", "expected"),
    [
        (["talk.wav", "talk-sub1.wav"], ["talk.wav", "talk-sub1.wav", "talk-sub2.wav"], [0, 1, 0]),
        (["talk-sub1.wav", "talk.wav"], ["talk-sub2.wav", "talk-sub1.wav"], [1, 0]),
        (["s-sub1.wav", "s-sub2.wav"], ["s-sub1.wav", "s-sub2.wav", "s-sub3.wav"], [0, 1, "missing audio"]),
        (["./a.wav", "b.wav"], ["a.wav", "./b.wav"], [0, 1]),
        (["./a/b-sub7.wav", "./a/b.wav"], ["a/b-sub7.wav", "a/b-sub8.wav", "b.wav"], [0, 1, "missing audio"]),
        (["data/a.wav"], ["/data/a.wav"], [0]),
    ],
)
def test_a_record_has_the_member_of_its_own_name_or_that_of_its_recording(
    tmp_path, members, records, expected, streamed, mode
) -> None:
    for i in range(len(members)):
        soundfile.write(tmp_path / f"{i}.wav", np.full(RATE, (i + 1) / 8), RATE)
    tar = write_tar(tmp_path / "audio_0.tar", [(name, tmp_path / f"{i}.wav") for i, name in enumerate(members)], mode)
    lines = [json.dumps({"audio_filepath": name, "duration": 1.0, "text": str(i)}) for i, name in enumerate(records)]
    (tmp_path / "manifest_0.json").write_text("\n".join(lines))
    keys = {"manifest_filepath": f"{tmp_path}/manifest_0.json", "tarred_audio_filepaths": tar}
    found = heard({"type": "nemo_tarred", "skip_missing_manifest_entries": True, **keys}, streamed)
    heard_of = [value if isinstance(value, str) else round(float(value[0]) * 8) - 1 for value in found.values()]
    assert heard_of == expected


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tar_file_without_any_member_of_the_manifest_is_reported_once(tmp_path, write_tone, streamed) -> None:
    names = [f"{letter}.wav" for letter in "abcd"]
    tar = write_tar(tmp_path / "audio_0.tar", [(f"x/{name}", write_tone(name)) for name in names])
    (tmp_path / "manifest_0.json").write_text("".join(records_of(name, [(None, 1.0)]) for name in names))
    skipped, manifest = SkippedRecords(), f"{tmp_path}/manifest_0.json"
    source = parse_source(
        {"type": "nemo_tarred", "manifest_filepath": manifest, "tarred_audio_filepaths": tar, "force_finite": True}, "x"
    )
    if streamed:
        assert list(open_source(source, skipped, ExampleKind.TRANSLATION)[0]) == []
    else:
        records = open_records(source, skipped, ExampleKind.TRANSLATION)
        assert [records.read(0, number) for number in range(4)] == [[]] * 4
    cause = "no member of the tar file is in the manifest"
    assert skipped.causes() == {"missing audio": 4, cause: 1}
    (note,) = [bad for bad in skipped.first if bad.cause == cause]
    assert note.place == f"{tar} holds x/a.wav, x/b.wav, x/c.wav, ...; the manifest names a.wav, b.wav, c.wav, ..."
    assert skipped.count() == 4, "records are bad once"


def test_what_is_done_to_a_recording_is_done_to_the_checked_one(tmp_path) -> None:
    soundfile.write(tmp_path / "a.wav", NOISE, RATE)
    cut = recording_of(tmp_path / "a.wav", 3.0, RATE, 1).to_cut()
    for oversampling in (None, 1, 2):
        clipped = cut.clip_amplitude(gain_db=6.0, oversampling=oversampling)
        assert with_checked_audio(clipped).recording.transforms == clipped.recording.transforms
