"""Every NeMo dataloader config works in our loader, and without a feature of ours its batches are NeMo's own.

``CASES`` is the table: what a recipe's ``train_ds`` may hold, one entry for each source type that NeMo knows and for
each group of its keys. Each is loaded by NeMo's factory and by ours, and compared example by example, down to the
samples of the audio and the tokens of the text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, RecordingSet, SupervisionSegment
from lhotse.cut import Cut
from lhotse.shar import SharWriter
from lhotse.testing.dummies import dummy_temporal_array
from lhotse.utils import fix_random_seed
from nemo.collections.common.data.lhotse import dataloader as nemo_dataloader
from nemo.collections.common.data.lhotse.indexed_adapters import create_index, create_tar_index
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator
from nemo.collections.common.data.lhotse.text_adapters import AudioTurn
from omegaconf import OmegaConf

from nemo_emmett.data import get_multimodal_dataloader
from nemo_emmett.data.config.sources import known_types

LOCATOR = "<|audio|>"
RATE = 16000
RECORDINGS = 8
WORDS = ("one", "two", "three", "four")
BATCHES = 6  # of two examples: beyond one pass over eight records, where the data repeats

SETTINGS = {
    "batch_size": 2,
    "seed": 0,
    "shard_seed": 0,
    "shuffle": True,
    "shuffle_buffer_size": 8,
    "bucket_buffer_size": 16,
    "num_cuts_for_bins_estimate": 8,
    "concurrent_bucketing": False,
}


# Data


class Files:
    """The data of all cases, in one folder; each is made when a case first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, write: Callable[[Path], Any]) -> str:
        """The file of this name, which ``write`` makes unless it exists."""
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        return str(path)

    def tone(self, index: int, prefix: str = "tone", seconds: float = 0.0, channels: int = 1, rate: int = RATE) -> str:
        """A recording that no other equals, of 0.5 to 1.2 seconds by default."""
        seconds = seconds or 0.5 + 0.1 * index
        time = np.arange(round(seconds * rate)) / rate
        samples = [0.2 * np.sin(2 * np.pi * (150 + 20 * index + 70 * channel) * time) for channel in range(channels)]
        name = f"{prefix}{index}.wav"
        return self.path(name, lambda path: soundfile.write(path, np.stack(samples, axis=1), rate))

    def lines(self, name: str, lines: Sequence[Any]) -> str:
        """A text file, JSON lines where they are not strings."""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        return self.path(name, lambda path: path.write_text("".join(f"{text}\n" for text in texts)))

    def records(self, indices: Sequence[int] = range(RECORDINGS), **fields: Any) -> list[dict]:
        """The records of a NeMo manifest."""
        return [
            {
                "audio_filepath": self.tone(i),
                "duration": round(0.5 + 0.1 * i, 3),
                "sampling_rate": RATE,
                "text": " ".join(WORDS[: i % 4 + 1]),
                "lang": "en" if i % 2 else "de",
                **fields,
            }
            for i in indices
        ]

    def manifest(self, name: str = "speech.json", indices: Sequence[int] = range(RECORDINGS), **fields: Any) -> str:
        return self.lines(name, self.records(indices, **fields))

    def sharded_manifest(self) -> str:
        for shard in range(2):
            self.manifest(f"shard_{shard}.json", range(4 * shard, 4 * shard + 4))
        return f"{self.folder}/shard__OP_0..1_CL_.json"

    def tarred(self, folder: str = "tar", shards: int = 2, **fields: Any) -> dict:
        """The keys of tarred audio in shards, each with a manifest of its own."""
        for shard in range(shards):
            members = self.records(range(shard, RECORDINGS, shards), shard_id=shard, **fields)
            self.path(f"{folder}/audio_{shard}.tar", lambda path, members=members: _tar(path, members))
            named = [{**r, "audio_filepath": Path(r["audio_filepath"]).name} for r in members]
            self.lines(f"{folder}/manifest_{shard}.json", named)
        numbers = f"_OP_0..{shards - 1}_CL_"
        return {
            "manifest_filepath": f"{self.folder}/{folder}/manifest_{numbers}.json",
            "tarred_audio_filepaths": f"{self.folder}/{folder}/audio_{numbers}.tar",
        }

    def one_manifest_for_all_shards(self) -> dict:
        keys = self.tarred()
        folder = self.folder / "tar"
        lines = [line for i in range(2) for line in (folder / f"manifest_{i}.json").read_text().splitlines()]
        return {**keys, "manifest_filepath": self.lines("tar/tarred_all.json", lines)}

    def cuts(self, name: str = "cuts.jsonl.gz", make: Callable[[Cut], Cut] = lambda cut: cut) -> str:
        """A lhotse manifest."""
        cuts = CutSet([make(cut) for cut in LazyNeMoIterator([self.manifest()])])
        return self.path(name, cuts.to_file)

    def shar(self, name: str = "shar") -> str:
        def write(path: Path) -> None:
            with TemporaryDirectory() as folder:  # lhotse does not write into folders with a "%" in their names
                with SharWriter(folder, fields={"recording": "wav"}, shard_size=3) as writer:
                    for cut in LazyNeMoIterator([self.manifest()]):
                        writer.write(cut)
                shutil.copytree(folder, path)

        return self.path(name, write)

    def text(self, name: str = "text.en", word: str = "one", count: int = RECORDINGS) -> str:
        return self.lines(name, [" ".join([word] * (i % 4 + 1)) for i in range(count)])

    def text_shards(self, language: str, words: Sequence[str]) -> str:
        """The name of text files in shards."""
        for shard, word in enumerate(words):
            self.text(f"text_{shard}.{language}", word)
        return f"{self.folder}/text__OP_0..{len(words) - 1}_CL_.{language}"

    def text_pair(self) -> dict:
        return {"source_paths": self.text("text.en"), "target_paths": self.text("text.de", "eins")}

    def conversations(self) -> str:
        return self.lines(
            "conversations.jsonl",
            [
                {
                    "id": f"conversation-{i}",
                    "conversations": [
                        {"type": "text", "from": "User", "value": "one two"},
                        {"type": "audio", "from": "User", "value": self.tone(i), "duration": 0.5},
                        {"type": "text", "from": "Assistant", "value": " ".join(WORDS[: i % 4 + 1])},
                    ],
                }
                for i in range(RECORDINGS)
            ],
        )

    def tarred_conversations(self) -> dict:
        members = self.records(range(4))
        tar = self.path("conversations/audio_0.tar", lambda path: _tar(path, members))
        manifest = self.lines(
            "conversations/manifest_0.jsonl",
            [
                {
                    "id": f"tarred-{i}",
                    "conversations": [
                        {"type": "audio", "from": "User", "value": f"tone{i}.wav", "duration": 0.5},
                        {"type": "text", "from": "Assistant", "value": "two"},
                    ],
                }
                for i in range(4)
            ],
        )
        return {"manifest_filepath": manifest, "tarred_audio_filepaths": tar}

    def share_gpt(self, name: str = "share_gpt.jsonl") -> str:
        return self.lines(name, [self._share_gpt(i, sound=self.tone(i)) for i in range(RECORDINGS)])

    def indexed_share_gpt(self) -> str:
        path = self.share_gpt("indexed.jsonl")
        self.path("indexed.jsonl.idx", lambda index: create_index(path, index))
        return path

    def tarred_share_gpt(self) -> dict:
        members = self.records(range(4))
        tar = self.path("share_gpt/audio_0.tar", lambda path: _tar(path, members))
        lines = [self._share_gpt(i, sound=f"tone{i}.wav") for i in range(4)]
        return {
            "manifest_filepath": self.lines("share_gpt/manifest_0.jsonl", lines),
            "tarred_audio_filepaths": tar,
        }

    def webdataset(self, name: str, indexed: bool) -> str:
        """A folder with a tar file of pairs of JSON and audio."""

        def write(path: Path) -> None:
            path.mkdir()
            with tarfile.open(path / "shard-0.tar", "w") as tar:
                for i in range(4):
                    lines = self.lines(f"{name}-{i}.json", [self._share_gpt(i)])
                    tar.add(lines, arcname=f"{i}.json")
                    tar.add(self.tone(i), arcname=f"{i}.wav")
            if indexed:
                create_tar_index(path / "shard-0.tar", path / "shard-0.tar.idx")

        return self.path(name, write)

    def _share_gpt(self, index: int, **fields: Any) -> dict:
        turns = [
            {"from": "human", "value": "one <sound> two"},
            {"from": "gpt", "value": " ".join(WORDS[: index % 4 + 1])},
        ]
        return {"id": f"share-{index}", "conversations": turns, **fields}

    def sft(self) -> str:
        turns = [{"from": "User", "value": "one two"}, {"from": "Assistant", "value": "eins zwei"}]
        rows = [{"conversations": [*turns[:1], {**turns[1], "value": "zwei " * (i + 1)}]} for i in range(RECORDINGS)]
        return self.lines("sft.jsonl", rows)

    def parquet(self) -> str:
        rows = [
            {
                "id": f"row-{i}",
                "audio": {"bytes": Path(self.tone(i)).read_bytes(), "path": f"{i}.wav"},
                "text": WORDS[i % 4],
                "duration": 0.5 + 0.1 * i,
                "lang": "en",
            }
            for i in range(RECORDINGS)
        ]

        def write(path: Path) -> None:
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)

        return self.path("speech.parquet", write)

    def dialogues(self) -> str:
        """Cuts with a turn of the user and one of the agent, whose voice is a recording of its own."""

        def make(cut: Cut) -> Cut:
            middle = cut.duration / 2
            turns = (("user", 0.0, "one"), ("agent", middle, "<|0|> two <|3|>"))
            cut.supervisions = [
                SupervisionSegment(f"{cut.id}-{who}", cut.recording_id, start, middle, text=text, speaker=who)
                for who, start, text in turns
            ]
            agent = Recording.from_file(self.tone(int(Path(cut.id).stem[-1]), "agent", cut.duration))
            segments = {who: [{"start": start, "end": start + middle, "text": text}] for who, start, text in turns}
            cut.custom = {
                "target_audio": agent,
                "user_segments": segments["user"],
                "agent_segments": segments["agent"],
            }
            return cut

        return self.cuts("dialogues.jsonl.gz", make)

    def speaking(self) -> str:
        """Cuts for speech synthesis: what to say, and another recording of the voice to say it in."""

        def make(cut: Cut) -> Cut:
            spoken = Recording.from_file(self.tone(int(Path(cut.id).stem[-1]), "target", cut.duration))
            cut.custom = {"target_audio": spoken, "context_audio": spoken}
            cut.supervisions[0].speaker = "agent"
            return cut

        return self.cuts("speaking.jsonl.gz", make)

    def judged(self) -> str:
        """Cuts that NeMo's quality filters take apart: every other one passes each of them."""

        def make(cut: Cut) -> Cut:
            index = int(Path(cut.id).stem[-1])
            good = index % 2 == 0
            cut.custom["validation_status"] = "pass" if good or index == 1 else "fail"
            similarity = 0.9 if good or index == 3 else 0.1
            cut.supervisions[0].custom = {"cer": 0.01 * index, "context_speaker_similarity": similarity}
            return cut

        return self.cuts("judged.jsonl.gz", make)

    def stereo(self) -> str:
        records = [
            {"audio_filepath": self.tone(i, "stereo", channels=2), "duration": 0.5 + 0.1 * i, "text": "one", "ear": 1}
            for i in range(4)
        ]
        return self.lines("stereo.json", records)

    def segments(self) -> str:
        """Several records of one recording, without its sampling rate: NeMo opens it."""
        long = self.tone(0, "long", seconds=3.0)
        return self.lines(
            "segments.json",
            [{"audio_filepath": long, "offset": 0.5 * i, "duration": 0.7, "text": WORDS[i]} for i in range(4)],
        )

    def room(self) -> str:
        """A manifest of impulse responses."""
        path = self.tone(0, "room", seconds=0.05)
        return self.path("rooms.jsonl.gz", RecordingSet.from_recordings([Recording.from_file(path)]).to_file)

    def recipe(self) -> str:
        """An ``input_cfg`` in a file of its own."""
        sources = [{"type": "nemo", "manifest_filepath": self.manifest()}]
        return self.path("input_cfg.yaml", lambda path: OmegaConf.save(OmegaConf.create(sources), path))


def _tar(path: Path, records: Sequence[dict]) -> None:
    with tarfile.open(path, "w") as tar:
        for record in records:
            tar.add(record["audio_filepath"], arcname=Path(record["audio_filepath"]).name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("configs"))


# The table

CASES: dict[str, Callable[[Files], dict]] = {}
"""Name of a case, and what it adds to ``SETTINGS``."""

TEXT = {"prompt_format": "plain", "use_multimodal_sampling": True, "token_equivalent_duration": 0.08}
CONVERSATION = {**TEXT, "audio_locator_tag": LOCATOR}


def case(name: str, **settings: Any) -> Callable:
    """Add a source (what the decorated function makes of the files) under these settings to the table."""

    def add(make: Callable[[Files], dict]) -> Callable[[Files], dict]:
        CASES[name] = lambda files: {**settings, **make(files)}
        return make

    return add


def source(kind: str, **keys: Any) -> dict:
    return {"input_cfg": [{"type": kind, **keys}]}


def nemo(files: Files) -> dict:
    return source("nemo", manifest_filepath=files.manifest())


def tarred(files: Files) -> dict:
    return source("nemo_tarred", **files.tarred())


def txt_pair(files: Files) -> dict:
    return source("txt_pair", **files.text_pair(), source_language="en", target_language="de")


def conversations(files: Files) -> dict:
    return source("multimodal_conversation", manifest_filepath=files.conversations())


def with_dropped_array(cut: Cut) -> Cut:
    """A cut with the metadata alone of an array in memory."""
    return cut.with_custom("indexes", dummy_temporal_array(0)).drop_in_memory_data()


# Source types

case("nemo")(nemo)
case("nemo/files opened for their rate")(
    lambda f: source("nemo", manifest_filepath=f.manifest("no_rate.json", sampling_rate=None))
)
case("nemo/segments of a recording")(lambda f: source("nemo", manifest_filepath=f.segments()))
case("nemo/sharded manifest")(lambda f: source("nemo", manifest_filepath=f.sharded_manifest()))
case("nemo/list of manifests")(
    lambda f: source("nemo", manifest_filepath=[[f.manifest("a.json", range(5))], [f.manifest("b.json", range(5, 8))]])
)
case("nemo/relative paths")(
    lambda f: source(
        "nemo",
        manifest_filepath=f.lines(
            "relative.json", [{**r, "audio_filepath": Path(r["audio_filepath"]).name} for r in f.records()]
        ),
    )
)
case("nemo/records to skip and other fields")(
    lambda f: source(
        "nemo",
        manifest_filepath=f.lines(
            "other.json", [{**r, "said": "two", "spoken": "fr", "_skipme": i == 2} for i, r in enumerate(f.records())]
        ),
        text_field="said",
        lang_field="spoken",
    )
)
case("nemo/extra fields")(
    lambda f: source(
        "nemo",
        manifest_filepath=f.manifest(),
        extra_fields=[
            {"type": "text_iter", "name": "question", "path": f.text("questions.txt", "three", 2 * RECORDINGS)},
            {"type": "text_sample", "name": "hint", "path": f.text("hints.txt", "four")},
        ],
    )
)
case("nemo/alternative texts")(
    lambda f: source(
        "nemo",
        manifest_filepath=f.manifest("alternatives.json", alt_text={"fr": {"text": "un deux", "lang": "fr", "to": 1}}),
    )
)
case("nemo/metadata only", metadata_only=True)(nemo)
case("nemo/endless in the worker", force_iterable_dataset=True)(nemo)
case("nemo_tarred")(tarred)
case("nemo_tarred/once", force_finite=True)(tarred)
case("nemo_tarred/in order", shuffle=False)(tarred)
case("nemo_tarred/map-style", force_map_dataset=True, force_finite=True)(tarred)
case("nemo_tarred/type nemo")(lambda f: source("nemo", **f.tarred()))
case("nemo_tarred/one manifest for all shards")(lambda f: source("nemo_tarred", **f.one_manifest_for_all_shards()))
case("nemo_tarred/list of data sets")(
    lambda f: source(
        "nemo_tarred",
        **{key: [[f.tarred()[key]], [f.tarred("more", 3)[key]]] for key in f.tarred()},
    )
)
case("nemo_tarred/list of data sets with weights")(
    lambda f: source(
        "nemo_tarred",
        manifest_filepath=[[f.tarred()["manifest_filepath"], 2], [f.tarred("more", 3)["manifest_filepath"], 0.5]],
        tarred_audio_filepaths=[
            [f.tarred(folder, n)["tarred_audio_filepaths"]] for folder, n in (("tar", 2), ("more", 3))
        ],
    )
)
case("nemo_tarred/few open streams", max_open_streams=2)(
    lambda f: source(
        "nemo_tarred",
        **{key: [[f.tarred()[key]], [f.tarred("more", 3)[key]]] for key in f.tarred()},
    )
)
case("nemo_tarred/manifests that name a subset", skip_missing_manifest_entries=True)(
    lambda f: source(
        "nemo_tarred",
        manifest_filepath=f.lines(
            "tar/subset_manifest_0.json",
            (Path(f.tarred()["manifest_filepath"]).parent / "manifest_0.json").read_text().splitlines()[1:],
        ),
        tarred_audio_filepaths=f"{f.folder}/tar/audio_0.tar",
    )
)
case("nemo_tarred/slices", slice_length=2)(tarred)
case("nemo_tarred/metadata only", metadata_only=True)(tarred)
case("lhotse")(lambda f: source("lhotse", cuts_path=f.cuts()))
case("lhotse/plain lines")(lambda f: source("lhotse", cuts_path=f.cuts("cuts.jsonl")))
case("lhotse/one document")(lambda f: source("lhotse", cuts_path=f.cuts("cuts.json")))
case("lhotse/path object")(lambda f: source("lhotse", cuts_path=Path(f.cuts())))
case("lhotse/array whose data was dropped")(
    lambda f: source("lhotse", cuts_path=f.cuts("no_data.jsonl", with_dropped_array))
)
case("lhotse_shar")(lambda f: source("lhotse_shar", shar_path=f.shar()))
case("lhotse_shar/once", force_finite=True)(lambda f: source("lhotse_shar", shar_path=f.shar()))
case("lhotse_shar/list")(lambda f: source("lhotse", shar_path=[f.shar(), f.shar("shar2")]))
case("lhotse_shar/list with weights")(lambda f: source("lhotse_shar", shar_path=[[f.shar(), 1], [f.shar("shar2"), 3]]))
case("lhotse_shar/fields")(
    lambda f: source(
        "lhotse_shar",
        shar_path={
            "cuts": f"{f.shar()}/cuts._OP_000000..000002_CL_.jsonl.gz",
            "recording": f"{f.shar()}/recording._OP_000000..000002_CL_.tar",
        },
    )
)
case("lhotse_shar/slices", slice_length=2)(lambda f: source("lhotse_shar", shar_path=f.shar()))
case("lhotse_shar/metadata only", metadata_only=True)(lambda f: source("lhotse_shar", shar_path=f.shar()))
case("txt", **TEXT)(lambda f: source("txt", paths=f.text(), language="en"))
case("txt/windows of tokens", **TEXT, cut_text_into_windows_tokens=2)(
    lambda f: source("txt", paths=f.text(), language="en")
)
case("txt_jsonl", **TEXT)(
    lambda f: source(
        "txt_jsonl",
        paths=f.lines("text.jsonl", [{"said": WORDS[i % 4]} for i in range(RECORDINGS)]),
        language="en",
        text_field="said",
    )
)
case("txt_pair", **TEXT)(txt_pair)
case("txt_pair/once", **TEXT, force_finite=True)(txt_pair)
case("txt_pair/shards", **TEXT)(
    lambda f: source(
        "txt_pair",
        source_paths=f.text_shards("en", ["one", "two"]),
        target_paths=f.text_shards("de", ["eins", "zwei"]),
    )
)
case("txt_pair/path objects", **TEXT)(
    lambda f: source(
        "txt_pair",
        **{key: Path(path) for key, path in f.text_pair().items()},
        source_language="en",
        target_language="de",
    )
)
case("txt_pair/questions", **TEXT)(
    lambda f: source(
        "txt_pair", **f.text_pair(), questions_path=f.text("questions.txt", "three", 16), questions_language="en"
    )
)
case("nemo_sft_jsonl", **TEXT)(lambda f: source("nemo_sft_jsonl", paths=f.sft(), language="en"))
case("multimodal_conversation", **CONVERSATION)(conversations)
case("multimodal_conversation/tarred", **CONVERSATION)(
    lambda f: source("multimodal_conversation", **f.tarred_conversations())
)
case("multimodal_conversation/context", **CONVERSATION)(
    lambda f: source("multimodal_conversation", **f.tarred_conversations(), tags={"context": "three"})
)
case("share_gpt", **CONVERSATION)(
    lambda f: source("share_gpt", manifest_filepath=f.share_gpt(), audio_placeholders=["<sound>"])
)
case("share_gpt/indexed", **CONVERSATION)(
    lambda f: source("share_gpt", manifest_filepath=f.indexed_share_gpt(), audio_placeholders="<sound>")
)
case("share_gpt/tarred", **CONVERSATION)(
    lambda f: source("share_gpt", **f.tarred_share_gpt(), audio_placeholders=["<sound>"])
)
case("share_gpt_webdataset", **CONVERSATION)(
    lambda f: source("share_gpt_webdataset", data_dir=f.webdataset("web", indexed=False))
)
case("share_gpt_webdataset/indexed", **CONVERSATION)(
    lambda f: source("share_gpt_webdataset", data_dir=f.webdataset("indexed_web", indexed=True))
)
case("lhotse_as_conversation/nemo", **CONVERSATION)(
    lambda f: source("lhotse_as_conversation", manifest_filepath=f.manifest(), tags={"context": "three"})
)
case("lhotse_as_conversation/tarred", **CONVERSATION)(lambda f: source("lhotse_as_conversation", **f.tarred()))
case("lhotse_as_conversation/cuts", **CONVERSATION)(lambda f: source("lhotse_as_conversation", cuts_path=f.cuts()))
case("lhotse_as_conversation/path object", **CONVERSATION)(
    lambda f: source("lhotse_as_conversation", cuts_path=Path(f.cuts()))
)
case("lhotse_as_conversation/shar", **CONVERSATION)(lambda f: source("lhotse_as_conversation", shar_path=f.shar()))
case("lhotse_as_conversation/input_cfg", **CONVERSATION)(
    lambda f: source(
        "lhotse_as_conversation",
        input_cfg=[
            {"type": "nemo", "manifest_filepath": f.manifest("a.json", range(5)), "weight": 0.7},
            {"type": "nemo", "manifest_filepath": f.manifest("b.json", range(5, 8)), "weight": 0.3},
        ],
        tags={"context": "four"},
    )
)
case("sqa_as_conversation", **CONVERSATION)(
    lambda f: source(
        "sqa_as_conversation", manifest_filepath=f.manifest("questions.json", question="one two", answer="zwei")
    )
)
case("s2s_as_conversation", **CONVERSATION)(lambda f: source("s2s_as_conversation", cuts_path=f.dialogues()))
case("s2s_as_conversation/roles", **CONVERSATION)(
    lambda f: source(
        "s2s_as_conversation",
        cuts_path=f.dialogues(),
        input_roles=["user"],
        output_roles=["agent"],
        strip_timestamp_tokens=False,
    )
)
case("s2s_duplex_overlap_as_s2s_duplex")(
    lambda f: source("s2s_duplex_overlap_as_s2s_duplex", cuts_path=f.dialogues(), move_agent_text_back_by=0.1)
)
case("s2s_duplex_reverse_role")(lambda f: source("s2s_duplex_reverse_role", cuts_path=f.dialogues()))
case("lhotse_magpietts_data_as_continuation")(
    lambda f: source("lhotse_magpietts_data_as_continuation", cuts_path=f.speaking(), sample_rate=RATE)
)
case("nemo_tarred_to_duplex")(lambda f: source("nemo_tarred_to_duplex", **f.tarred(), agent_silence_duration=0.2))
case("multi_speaker_simulator", force_map_dataset=True)(
    lambda f: source(
        "multi_speaker_simulator",
        manifest_filepath=f.lines(
            "speakers.json", [{**r, "speaker_id": f"speaker{i % 3}"} for i, r in enumerate(f.records())]
        ),
        simulator_type="lsmix",
        min_delay=0.1,
    )
)
case("parquet")(lambda f: source("parquet", manifest_filepath=f.parquet()))

# Without input_cfg

case("classic/manifest")(lambda f: {"manifest_filepath": f.manifest()})
case("classic/tarred")(lambda f: f.tarred())
case("classic/cuts")(lambda f: {"cuts_path": f.cuts()})
case("classic/shar")(lambda f: {"shar_path": f.shar()})
case("classic/list")(
    lambda f: {"manifest_filepath": [[f.manifest("a.json", range(5))], [f.manifest("b.json", range(5, 8))]]}
)

# Groups


def two(files: Files, first: float | None = None, second: float | None = None) -> list[dict]:
    """Two sources, weighted or not."""
    sources = []
    for name, indices, weight in (("a.json", range(5), first), ("b.json", range(5, 8), second)):
        entry = {"type": "nemo", "manifest_filepath": files.manifest(name, indices)}
        sources.append(entry if weight is None else {**entry, "weight": weight})
    return sources


def nested(files: Files) -> list[dict]:
    tail = {"type": "lhotse", "cuts_path": files.cuts(), "weight": 0.2, "tags": {"task": "tail"}}
    group = {"type": "group", "input_cfg": two(files, 10, 1), "weight": 0.8, "tags": {"task": "head", "level": 1}}
    return [group, tail]


case("groups/unweighted")(lambda f: {"input_cfg": two(f)})
case("groups/weights")(lambda f: {"input_cfg": two(f, 0.7, 0.3)})
case("groups/weights once", force_finite=True)(lambda f: {"input_cfg": two(f, 0.7, 0.3)})
case("groups/tags")(
    lambda f: source("nemo", manifest_filepath=f.manifest(), tags={"task": "asr", "lang": "es", "level": 2})
)
case("groups/nested")(lambda f: {"input_cfg": nested(f)})
case("groups/in a file")(lambda f: {"input_cfg": f.recipe()})
case("groups/nested in a file")(
    lambda f: {"input_cfg": [{"type": "group", "input_cfg": f.recipe(), "weight": 0.5}, {**two(f)[0], "weight": 0.5}]}
)
case("groups/temperature", reweight_temperature=0.5)(lambda f: {"input_cfg": two(f, 10, 1)})
case("groups/temperature per level", reweight_temperature=[1.0, 0.0])(lambda f: {"input_cfg": nested(f)})
case("groups/few open streams", max_open_streams=1, force_iterable_dataset=True)(
    lambda f: {"input_cfg": two(f, 0.7, 0.3)}
)
case("groups/keys of a source", shuffle=False)(
    lambda f: {"input_cfg": [{**s, "shuffle": True, "shard_seed": 7} for s in two(f, 0.5, 0.5)]}
)
case("groups/plain and tarred", force_iterable_dataset=True)(
    lambda f: {"input_cfg": [{**two(f)[0], "weight": 0.5}, {"type": "nemo_tarred", **f.tarred(), "weight": 0.5}]}
)

# Several samplers


def multi_config(fusion: str, **settings: Any) -> Callable[[Files], dict]:
    def make(files: Files) -> dict:
        return {
            "multi_config": True,
            "sampler_fusion": fusion,
            "short": {**SETTINGS, "manifest_filepath": files.manifest("a.json", range(5)), "batch_size": 1},
            "long": {**SETTINGS, "manifest_filepath": files.manifest("b.json", range(5, 8)), "batch_size": 2},
            **settings,
        }

    return make


case("multi_config/zip")(multi_config("zip"))
case("multi_config/round_robin")(multi_config("round_robin"))
case("multi_config/randomized_round_robin")(multi_config("randomized_round_robin"))
case("multi_config/randomized_round_robin with weights")(
    multi_config("randomized_round_robin", sampler_weights={"short": 0.8, "long": 0.2})
)
for fusion in ("zip", "round_robin", "randomized_round_robin"):
    case(f"multi_config/{fusion} of speech and text")(
        lambda f, fusion=fusion: {
            "multi_config": True,
            "sampler_fusion": fusion,
            "speech": {**SETTINGS, **CONVERSATION, **source("lhotse_as_conversation", **f.tarred())},
            "pairs": {**SETTINGS, **TEXT, **txt_pair(f), "batch_size": 3},
        }
    )

# Batch sizes and buckets

BINS_2D = [[0.8, 1], [0.8, 3], [1.2, 2], [1.2, 4]]

case("batch/duration", batch_size=None, batch_duration=2.0)(nemo)
case("batch/duration and size", batch_size=3, batch_duration=2.0)(nemo)
case("batch/quadratic", batch_size=None, batch_duration=2.0, quadratic_duration=1.0)(nemo)
case("batch/drop last", batch_size=3, drop_last=True)(nemo)
case("batch/in order", shuffle=False)(nemo)
case("batch/other seeds", seed=7, shard_seed=11)(nemo)
case("batch/randomized", shard_seed="randomized", seed=3)(tarred)
case(
    "buckets/between durations",
    batch_size=None,
    batch_duration=2.0,
    use_bucketing=True,
    num_buckets=3,
    max_duration=2.0,
)(nemo)
case("buckets/estimated", batch_size=None, batch_duration=2.0, use_bucketing=True, num_buckets=3)(nemo)
case("buckets/tarred", batch_size=None, batch_duration=2.0, use_bucketing=True, num_buckets=3)(tarred)
case("buckets/given", batch_size=None, batch_duration=2.0, bucket_duration_bins=[0.7, 0.9])(nemo)
case("buckets/batch size each", batch_size=None, bucket_duration_bins=[0.7, 0.9, 1.3], bucket_batch_size=[3, 2, 1])(
    nemo
)
case("buckets/too long for the last", batch_size=None, bucket_duration_bins=[0.7, 0.9], bucket_batch_size=[2, 1])(nemo)
case("buckets/2D", batch_size=None, bucket_duration_bins=BINS_2D, bucket_batch_size=[3, 2, 2, 1])(nemo)
case(
    "buckets/2D lenient",
    batch_size=None,
    bucket_duration_bins=BINS_2D,
    bucket_batch_size=[3, 2, 2, 1],
    bucketing_2d_strict_mode=False,
)(nemo)
case(
    "buckets/2D with a ratio each",
    batch_size=None,
    bucket_duration_bins=BINS_2D,
    bucket_batch_size=[3, 2, 2, 1],
    max_tps=[9.0, 9.0, 9.0, 3.0],
)(nemo)
case("multimodal/tokens", **TEXT | {"batch_size": None, "batch_tokens": 12})(txt_pair)
case("multimodal/quadratic", **TEXT | {"batch_size": None, "batch_tokens": 12, "quadratic_factor": 4.0})(txt_pair)
case("multimodal/input length", **TEXT | {"batch_size": None, "batch_tokens": 8, "measure_total_length": False})(
    txt_pair
)
case("multimodal/speech", **CONVERSATION | {"batch_size": None, "batch_tokens": 40})(nemo)
case("multimodal/conversations", **CONVERSATION | {"batch_size": None, "batch_tokens": 40})(conversations)
case(
    "multimodal/speech and text",
    **CONVERSATION | {"batch_size": None, "batch_tokens": 40, "force_iterable_dataset": True},
)(
    lambda f: {
        "input_cfg": [
            {**tarred(f)["input_cfg"][0], "type": "lhotse_as_conversation", "weight": 0.5},
            {**txt_pair(f)["input_cfg"][0], "weight": 0.5},
        ]
    }
)
case("multimodal/buckets", **TEXT | {"batch_size": None, "batch_tokens": 16, "use_bucketing": True, "num_buckets": 2})(
    txt_pair
)
case(
    "multimodal/buckets 1D",
    **TEXT | {"batch_size": None, "bucket_duration_bins": [4, 10], "bucket_batch_size": [3, 2]},
)(txt_pair)
case(
    "multimodal/buckets 2D",
    **TEXT
    | {"batch_size": None, "bucket_duration_bins": [[2, 3], [6, 2], [6, 9]], "bucket_batch_size": [3, 2, 2]}
    | {"measure_total_length": False},
)(txt_pair)
case(
    "multimodal/buckets 2D with a ratio each",
    **TEXT
    | {"batch_size": None, "bucket_duration_bins": [[2, 3], [6, 2], [6, 9]], "bucket_batch_size": [3, 2, 2]}
    | {"measure_total_length": False, "max_tpt": [2.0, 2.0, 1.5]},
)(txt_pair)

# Filters

case("filter/duration", min_duration=0.6, max_duration=1.0)(nemo)
case("filter/duration of conversations", **CONVERSATION, min_duration=0.4, max_duration=0.6)(conversations)
case("filter/tokens per second", max_tps=3.0)(nemo)
case("filter/tokens", **TEXT, min_tokens=4, max_tokens=7)(txt_pair)
case("filter/input tokens", **TEXT, min_tokens=2, max_tokens=3, measure_total_length=False)(txt_pair)
case("filter/tokens per token", **TEXT, max_tpt=1.5)(txt_pair)
case("filter/error rate", max_cer=0.045)(lambda f: source("lhotse", cuts_path=f.judged()))
case("filter/validation status")(lambda f: source("lhotse", cuts_path=f.judged()))
case("filter/other validation status", keep="fail")(lambda f: source("lhotse", cuts_path=f.judged()))
case("filter/similar speaker", min_context_speaker_similarity=0.5)(lambda f: source("lhotse", cuts_path=f.judged()))

# Audio


def noises(files: Files) -> str:
    return files.lines(
        "noises.json",
        [
            {"audio_filepath": files.tone(i, "noise", seconds=0.4 + i), "duration": 0.4 + i, "sampling_rate": RATE}
            for i in range(2)
        ],
    )


def noise_cuts(files: Files) -> str:
    return files.path("noises.jsonl.gz", CutSet(list(LazyNeMoIterator([noises(files)]))).to_file)


case("noise/manifest", noise_snr=[5, 15], noise_mix_prob=0.7)(lambda f: {**nemo(f), "noise_path": noises(f)})
case("noise/cuts", noise_mix_prob=1.0)(lambda f: {**nemo(f), "noise_path": noise_cuts(f)})
case("noise/named by keys")(lambda f: {**nemo(f), "noise_path": {"manifest_filepath": noises(f)}})
case("noise/tarred speech", noise_mix_prob=0.7)(lambda f: {**tarred(f), "noise_path": noises(f)})
case("speed", perturb_speed=True)(nemo)
case("speed/tarred", perturb_speed=True)(tarred)
case("concatenation", concatenate_samples=True, batch_size=4, concatenate_duration_factor=3.0, db_norm=None)(nemo)
case(
    "concatenation/as it is",
    concatenate_samples=True,
    batch_size=4,
    concatenate_gap_seconds=0.2,
    concatenate_merge_supervisions=False,
    db_norm=None,
)(nemo)
case("truncation/start", truncate_duration=0.6, truncate_offset_type="start")(nemo)
case("truncation/end", truncate_duration=0.6, truncate_offset_type="end", keep_excessive_supervisions=False)(nemo)
case("truncation/random", truncate_duration=0.6)(nemo)
case("windows", cut_into_windows_duration=0.4)(nemo)
case("windows/overlapping", cut_into_windows_duration=0.4, cut_into_windows_hop=0.2)(nemo)
case("padding", pad_min_duration=1.0)(nemo)
case("padding/both sides", pad_min_duration=1.0, pad_direction="both")(nemo)
case("rooms/manifest", rir_enabled=True, rir_prob=0.7)(lambda f: {**nemo(f), "rir_path": f.room()})
case("lowpass", lowpass_enabled=True, lowpass_prob=0.7)(nemo)
case("compression", compression_enabled=True, compression_prob=0.7, compression_codecs=["mp3", "vorbis"])(nemo)
case(
    "compression/weights",
    compression_enabled=True,
    compression_codecs=["mp3", "opus"],
    compression_codec_weights=[1, 3],
)(nemo)
case("clipping", clipping_enabled=True, clipping_prob=0.7)(nemo)
case("clipping/plain", clipping_enabled=True, clipping_normalize=False, clipping_oversampling=None)(nemo)
case("sampling rate", sample_rate=8000)(nemo)
case("channel", channel_selector=1)(lambda f: {"manifest_filepath": f.stereo()})
case("channel/named by the record", channel_selector="ear")(lambda f: {"manifest_filepath": f.stereo()})
case(
    "everything at once",
    perturb_speed=True,
    pad_min_duration=0.8,
    max_duration=1.3,
    noise_mix_prob=0.5,
    lowpass_enabled=True,
    batch_size=None,
    batch_duration=3.0,
    use_bucketing=True,
    num_buckets=3,
)(lambda f: {"input_cfg": nested(f), "noise_path": noises(f)})

# Tokens

case("tokens/none", pretokenize=False)(nemo)
case("tokens/prompt", prompt_format="plain")(nemo)


# Loading them


class Identity(torch.utils.data.Dataset):
    """Says of each example what a dataset could see of it."""

    def __getitem__(self, cuts: CutSet) -> list[dict]:
        return [seen_of(example) for example in cuts]


ONLY_OURS = ("manifest_origin", "manifest_place")
"""Fields by which our readers say where a record is; NeMo's tarred reader has the first as well."""

OF_SAMPLING = ("input_ids", "context_ids", "answer_ids", "mask", "num_tokens", "dataloading_info")
"""Fields that NeMo writes into an example; the cut of a conversation may share the fields of the conversation."""


def seen_of(example: Any, but: Sequence[str] = ()) -> dict:
    """What an example is, but for some of its fields, with sums of its audio and tokens."""
    custom = getattr(example, "custom", None) or {}
    seen = {"class": type(example).__name__, "id": getattr(example, "id", None)}
    seen["custom"] = {key: plain(value) for key, value in custom.items() if key not in (*ONLY_OURS, *but)}
    if isinstance(example, Cut):
        return seen | seen_of_cut(example)
    for key in (*OF_SAMPLING, "tokens", "text", "language", "data", "source", "target", "question"):
        seen[key] = plain(getattr(example, key, None))
    if hasattr(example, "turns"):
        seen["turns"] = [
            (turn.role, turn.text, turn.audio_locator_tag, seen_of(turn.cut, but=OF_SAMPLING))
            if isinstance(turn, AudioTurn)
            else (turn.role, turn.value)
            for turn in example.turns
        ]
    return seen


def seen_of_cut(cut: Cut) -> dict:
    seen = {"start": getattr(cut, "start", None), "duration": cut.duration, "rate": cut.sampling_rate}
    seen["supervisions"] = [plain(supervision) for supervision in cut.supervisions]
    is_metadata = isinstance(cut, MonoCut) and cut.recording.sources[0].type in ("dummy", "shar")
    seen["audio"] = None if is_metadata else plain(cut.load_audio())
    return seen


def plain(value: Any) -> Any:
    """A value that can be compared: arrays by their sum, records by their fields."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    if isinstance(value, Recording):
        return plain(value.load_audio())
    if hasattr(value, "__dict__"):
        return {key: plain(item) for key, item in vars(value).items() if key not in ONLY_OURS}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in ONLY_OURS}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def batches_of(loader: Any) -> list:
    """The first batches of a loader.

    lhotse draws the ids of mixed cuts, and some of its random offsets, from the process's own generators, which NeMo's
    factory seeds and ours leaves to the training.
    """
    fix_random_seed(0)
    return list(islice(loader, BATCHES))


def stock(config: dict, rank: int, world_size: int, tokenizer: Any) -> list:
    """The batches of NeMo's own factory."""
    config = OmegaConf.create(config)
    name = "multi" if config.get("multi_config") else "single"
    factory = getattr(nemo_dataloader, f"get_lhotse_dataloader_from_{name}_config")
    factory = getattr(factory, "__wrapped__", factory)
    return batches_of(factory(config, rank, world_size, Identity(), tokenizer))


def ours(config: dict, rank: int, world_size: int, tokenizer: Any) -> list:
    """The batches of our factory."""
    return batches_of(get_multimodal_dataloader(OmegaConf.create(config), rank, world_size, Identity(), tokenizer))


ON_TWO_RANKS = (
    "nemo",
    "nemo/list of manifests",
    "nemo_tarred",
    "lhotse",
    "lhotse_shar",
    "txt_pair",
    "multimodal_conversation",
    "groups/nested",
    "multi_config/zip",
    "multi_config/round_robin of speech and text",
    "buckets/estimated",
    "buckets/2D",
    "multimodal/buckets 2D",
    "speed",
)

IN_WORKERS = (
    "nemo",
    "nemo_tarred",
    "lhotse_shar",
    "txt_pair",
    "lhotse_as_conversation/tarred",
    "multi_config/zip",
    "buckets/2D",
)


def configs() -> Iterator[Any]:
    """Each case alone, some of them on each of two ranks or with two workers."""
    for name in CASES:
        yield pytest.param(name, 0, 1, 0, id=name)
    for name in ON_TWO_RANKS:
        for rank in (0, 1):
            yield pytest.param(name, rank, 2, 0, id=f"{name}, rank {rank} of 2")
    for name in IN_WORKERS:
        yield pytest.param(name, 0, 1, 2, id=f"{name}, two workers")


def test_the_table_holds_every_source_type_of_nemo() -> None:
    tested = {name.split("/")[0] for name in CASES}
    assert set(known_types()) - {"group", "parallel_text", "speech_tsv"} <= tested  # those of NeMo


@pytest.mark.parametrize(("name", "rank", "world_size", "workers"), configs())
def test_batches_equal_those_of_nemo(files, tokenizer, name, rank, world_size, workers) -> None:
    config = {**SETTINGS, **CASES[name](files), "num_workers": workers}
    expected = stock(config, rank, world_size, tokenizer)
    assert expected, "the case itself must yield something"
    assert ours(config, rank, world_size, tokenizer) == expected


@pytest.mark.parametrize("name", CASES)
def test_it_builds_and_yields_under_our_sampling(files, tokenizer, name) -> None:
    batches = ours({**SETTINGS, **CASES[name](files), "sampling": "emmett"}, 0, 1, tokenizer)
    assert batches


ODD_NAME = "corpus (v1) [2,3] <x> {a,b} _OP_0..1_CL_ #1: 50% ~$*?=ä ("
"""A folder whose name NeMo's readers take for a pattern, and YAML for a comment and a mapping."""

IN_AN_ODD_FOLDER = {
    "nemo": (
        "nemo/list of manifests",
        "nemo/relative paths",
        "nemo_tarred/list of data sets",
        "lhotse/one document",
        "lhotse_shar/list",
        "lhotse_shar/fields",
        "txt",
        "txt_jsonl",
        "txt_pair/questions",
        "nemo_sft_jsonl",
        "multimodal_conversation/tarred",
        "share_gpt/tarred",
        "lhotse_as_conversation/tarred",
        "lhotse_as_conversation/input_cfg",
        "multi_speaker_simulator",
        "parquet",
        "classic/tarred",
        "noise/named by keys",
        "rooms/manifest",
    ),
    "emmett": (
        "nemo/sharded manifest",
        "nemo_tarred",
        "lhotse",
        "lhotse_shar",
        "lhotse_shar/fields",
        "txt_pair/shards",
        "groups/in a file",
        "noise/manifest",
        "noise/cuts",
    ),
}
"""Cases that together name files by every key, under both samplings."""


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("odd") / ODD_NAME
    folder.mkdir()
    return Files(folder)


@pytest.mark.parametrize(
    ("sampling", "name"), [(who, name) for who, names in IN_AN_ODD_FOLDER.items() for name in names]
)
def test_a_folder_may_have_any_name(files, odd_files, tokenizer, sampling, name) -> None:
    inside, outside = (
        ours({**SETTINGS, **CASES[name](of), "sampling": sampling}, 0, 1, tokenizer) for of in (odd_files, files)
    )
    assert inside
    assert repr(inside).replace(str(odd_files.folder), str(files.folder)) == repr(outside)
