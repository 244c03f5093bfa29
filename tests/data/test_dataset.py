"""Examples to batches: what is in them, how they are padded, and what audio is refused."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from lhotse import AudioSource, CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut
from nemo.collections.common.data.lhotse.text_adapters import (
    AudioTurn,
    NeMoMultimodalConversation,
    SourceTargetTextExample,
    TextExample,
    TextTurn,
)

from nemo_emmett.data import SpeechTextDataset
from nemo_emmett.data.io.audio import AudioFault, audio_start, load_waveform
from nemo_emmett.errors import DataError

PAD = 0


def recording_of(path, seconds: float, rate: int = 16000, channels: int = 1) -> Recording:
    """A recording as a manifest declares it, whatever the file holds."""
    return Recording(
        id=str(path),
        sources=[AudioSource("file", list(range(channels)), str(path))],
        sampling_rate=rate,
        num_samples=round(seconds * rate),
        duration=seconds,
        channel_ids=list(range(channels)),
    )


def cut_of(path, seconds: float, tokens: int = 2, channels: int = 1):
    cut = recording_of(path, seconds, channels=channels).to_cut()
    cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, 0, seconds, text="eins", language="de")]
    cut.custom = {"source_lang": "en", "target_lang": "de", "context_ids": torch.arange(1, tokens + 1)}
    cut.custom["answer_ids"] = torch.arange(1, tokens + 2)
    return cut


def pair(tokens: int) -> SourceTargetTextExample:
    custom = {"id": f"pair-{tokens}", "source_lang": "en", "target_lang": "de"}
    example = SourceTargetTextExample(TextExample("one", "en"), TextExample("eins", "de"), custom=custom)
    example.context_ids, example.answer_ids = torch.arange(1, tokens + 1), torch.arange(1, tokens)
    return example


@pytest.fixture
def dataset(tokenizer) -> SpeechTextDataset:
    return SpeechTextDataset(tokenizer)


def test_each_modality_is_padded_by_itself_on_the_right(dataset, write_tone) -> None:
    short, long = write_tone("a.wav", 1.0), write_tone("b.wav", 1.5)
    batch = dataset[CutSet([pair(4), cut_of(short, 1.0, tokens=2), pair(2), cut_of(long, 1.5, tokens=3)])]
    text, audio = batch["text"], batch["audio"]
    assert text["context_ids"].tolist() == [[1, 2, 3, 4], [1, 2, PAD, PAD]]
    assert text["context_lens"].tolist() == [4, 2]
    assert text["answer_ids"].tolist() == [[1, 2, 3], [1, PAD, PAD]]
    assert text["answer_lens"].tolist() == [3, 1]
    assert audio["context_ids"].tolist() == [[1, 2, PAD], [1, 2, 3]]
    assert audio["answer_ids"].tolist() == [[1, 2, 3, PAD], [1, 2, 3, 4]]
    assert audio["audios"].shape == (2, 24000)
    assert audio["audio_lens"].tolist() == [16000, 24000]
    assert audio["audios"][0, 16000:].abs().max() == 0
    assert audio["audios"].dtype == torch.float32
    assert np.allclose(audio["audios"][1], soundfile.read(long, dtype="float32")[0])
    assert all(batch[m][k].dtype == torch.int64 for m in batch for k in ("context_ids", "answer_ids", "answer_lens"))
    assert audio["audio_lens"].dtype == torch.int64


def test_one_modality_alone(dataset, write_tone) -> None:
    assert list(dataset[CutSet([pair(2)])]) == ["text"]
    assert list(dataset[CutSet([cut_of(write_tone("a.wav"), 1.0)])]) == ["audio"]


def test_examples_describe_themselves(dataset, write_tone) -> None:
    path = write_tone("a.wav")
    batch = dataset[CutSet([cut_of(path, 1.0), pair(2)])]
    common = {"source_lang": "en", "target_lang": "de", "target_text": "eins"}
    speech = {"id": str(path), "modality": "audio", "source_text": None, "audio_path": str(path), "audio_start": 0.0}
    text = {"id": "pair-2", "modality": "text", "source_text": "one", "audio_path": None, "audio_start": None}
    assert batch["audio"]["examples"] == [{**common, **speech}]
    assert batch["text"]["examples"] == [{**common, **text}]


def test_conversations_give_their_recordings_in_order(dataset, write_tone) -> None:
    cuts = [cut_of(write_tone(f"{i}.wav", seconds), seconds) for i, seconds in enumerate((0.5, 1.0))]
    turns = [AudioTurn(cut, "user", "<|audio|>") for cut in cuts] + [TextTurn("eins", "assistant")]
    talk = NeMoMultimodalConversation("talk", turns, custom={"target_lang": "de"})
    talk.context_ids, talk.answer_ids = torch.tensor([3, 3]), torch.tensor([5])
    chat = NeMoMultimodalConversation("chat", [TextTurn("one", "user"), TextTurn("eins", "assistant")], custom={})
    chat.context_ids, chat.answer_ids = torch.tensor([7]), torch.tensor([5])
    batch = dataset[CutSet([talk, chat])]
    assert batch["audio"]["audio_lens"].tolist() == [8000, 16000]
    assert [e["id"] for e in batch["audio"]["examples"]] == ["talk"]
    assert [(e["id"], e["source_text"], e["target_text"]) for e in batch["text"]["examples"]] == [
        ("chat", "one", "eins")
    ]


def test_several_channels_are_averaged(dataset, tmp_path) -> None:
    left, right = np.full(8000, 0.5), np.full(8000, -0.1)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    batch = dataset[CutSet([cut_of(tmp_path / "stereo.wav", 0.5, channels=2)])]
    assert batch["audio"]["audios"].shape == (1, 8000)
    assert torch.allclose(batch["audio"]["audios"], torch.tensor(0.2))


def test_unreadable_audio_costs_its_example_only(dataset, write_tone, tmp_path) -> None:
    missing = cut_of(tmp_path / "missing.wav", 1.0)
    missing.manifest_origin, missing.manifest_place = "m.json", "line 4"
    batch = dataset[CutSet([missing, cut_of(write_tone("a.wav"), 1.0), pair(2)])]
    assert batch["audio"]["audios"].shape == (1, 16000)
    assert len(batch["text"]["examples"]) == 1
    expected = [f"m.json, line 4 ({tmp_path}/missing.wav): missing audio"]
    assert [str(r) for r in dataset.skipped_records.drain().skipped] == expected
    assert dataset[CutSet([missing])] == {}


def test_an_example_without_a_prompt_is_named(dataset) -> None:
    example = SourceTargetTextExample(TextExample("one"), TextExample("eins"), custom={"id": "a:1"})
    with pytest.raises(DataError, match="example a:1 has no context_ids: set prompt_format"):
        dataset[CutSet([example])]


# Faults of audio files


def cause_of(cut) -> str | None:
    try:
        load_waveform(cut)
    except AudioFault as cause:
        return str(cause)
    return None


def halved(path, content: bytes):
    path.write_bytes(content[: len(content) // 2])
    return path


def test_faults_of_files_are_told_apart(write_tone, tmp_path) -> None:
    wav = write_tone("good.wav").read_bytes()
    soundfile.write(tmp_path / "good.flac", np.random.default_rng(0).uniform(-0.1, 0.1, 16000), 16000)
    soundfile.write(tmp_path / "hollow.wav", np.zeros(0), 16000)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "noise.wav").write_bytes(b"no audio at all " * 100)
    (tmp_path / "header.wav").write_bytes(wav[:30])
    halved(tmp_path / "cut.wav", wav)
    halved(tmp_path / "cut.flac", (tmp_path / "good.flac").read_bytes())
    causes = {
        "good.wav": None,
        "good.flac": None,
        "missing.wav": "missing audio",
        "empty.wav": "empty audio",
        "hollow.wav": "empty audio",
        "noise.wav": "unreadable audio",
        "header.wav": "truncated audio",
        "cut.wav": "truncated audio",
        "cut.flac": "unreadable audio",  # its header is intact; the decoder fails midway
    }
    assert {name: cause_of(cut_of(tmp_path / name, 1.0)) for name in causes} == causes


def test_a_recording_shorter_than_declared_is_not_filled_up(write_tone) -> None:
    """lhotse reflects what is missing, up to half a second."""
    path = write_tone("a.wav", 1.0)
    assert cause_of(cut_of(path, 1.4)) == "truncated audio"
    assert cause_of(cut_of(path, 1.05)) is None
    assert cause_of(cut_of(path, 0.8)) is None


def test_a_cut_off_file_serves_the_segments_that_it_still_holds(write_tone) -> None:
    path = write_tone("long.wav", 4.0)
    halved(path, path.read_bytes())
    recording = recording_of(path, 4.0)
    early, late = (MonoCut("c", start, 1.0, 0, recording=recording) for start in (0.5, 2.5))
    assert cause_of(early) is None
    assert cause_of(late) == "truncated audio"


def test_a_wav_whose_header_was_cut_too_is_truncated_even_where_the_manifest_believes_it(write_tone) -> None:
    path = write_tone("a.wav")
    halved(path, path.read_bytes())
    assert cause_of(Recording.from_file(path).to_cut()) == "truncated audio"


def test_speed_perturbation_asks_for_more_of_the_file(write_tone) -> None:
    whole = cut_of(write_tone("a.wav", 1.0), 1.0)
    assert cause_of(whole.perturb_speed(0.9)) is None
    assert len(load_waveform(whole.perturb_speed(1.1))) == round(16000 / 1.1)
    longer = cut_of(write_tone("b.wav", 1.0), 1.2)
    assert cause_of(longer.perturb_speed(1.1)) == "truncated audio"
    assert cause_of(whole.resample(8000)) is None


def test_a_conversation_with_one_fault_leaves_none_of_its_recordings_behind(dataset, write_tone, tmp_path) -> None:
    """Those read before the fault would be heard in place of the next example's."""
    cuts = [cut_of(write_tone("good.wav", 0.5), 0.5), cut_of(tmp_path / "missing.wav", 1.0)]
    talk = NeMoMultimodalConversation("talk", [AudioTurn(cut, "user", "<|audio|>") for cut in cuts], custom={})
    talk.context_ids, talk.answer_ids = torch.tensor([3, 3]), torch.tensor([5])
    batch = dataset[CutSet([talk, cut_of(write_tone("next.wav", 1.5), 1.5)])]
    assert len(batch["audio"]["examples"]) == 1
    assert batch["audio"]["audio_lens"].tolist() == [24000]
    assert batch["audio"]["audios"].shape == (1, 24000)


def test_where_a_segment_begins_in_its_file_is_told_unless_its_audio_is_changed(write_tone) -> None:
    segment = cut_of(write_tone("talk.wav", 2.0), 2.0).truncate(offset=0.75, duration=0.5)
    assert audio_start(segment) == 0.75
    assert audio_start(segment.perturb_speed(1.1)) is None
    assert audio_start(segment.pad(duration=1.0)) is None
    assert audio_start(segment.move_to_memory()) is None
