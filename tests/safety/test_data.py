"""Data runs no command: records that name one are skipped and counted, sources that do are refused, unless allowed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item, get_current_io_backend, open_best

from nemo_emmett.data import SpeechTextDataset, check_data_config, get_multimodal_dataloader
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.io import commands
from nemo_emmett.errors import ConfigError
from tests.conftest import write_tone
from tests.data.conftest import LOCATOR, tokenizer  # noqa: F401 - a fixture
from tests.safety.conftest import Payload

LANGUAGES = {"source_lang": "en", "target_lang": "de"}


class AsRead(torch.utils.data.Dataset):
    """A dataset of somebody else: loads the audio, and what the cuts carry."""

    def __getitem__(self, cuts: CutSet) -> list:
        for cut in cuts:
            cut.load_audio()
            for key, value in (cut.custom or {}).items():
                if isinstance(value, Recording):
                    cut.load_custom(key)
        return [cut.id for cut in cuts]


class ReadsItself(SpeechTextDataset):
    """One of ours, changed by somebody else so that it loads the audio in its own way."""

    def __getitem__(self, cuts: CutSet) -> list:
        return AsRead()[cuts]


@pytest.fixture(autouse=True)
def _in_the_payloads_folder(payload: Payload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(payload.folder)


@pytest.fixture
def tone(tmp_path: Path) -> Path:
    return write_tone(tmp_path / "tone.wav", 0.5)


def good_cut(tone: Path, number: int = 0) -> MonoCut:
    cut = Recording.from_file(tone, recording_id=f"good-{number}").to_cut().with_id(f"good-{number}")
    cut.supervisions = [SupervisionSegment(cut.id, cut.id, 0, cut.duration, text="eins zwei", language="de")]
    return cut


def recording(kind: str, source: str) -> dict:
    source = {"type": kind, "channels": [0], "source": source}
    return {"id": "bad", "sources": [source], "sampling_rate": 16000, "num_samples": 8000, "duration": 0.5}


def sphere_file(payload: Payload) -> Path:
    """A recording whose name a shell takes for commands; they leave their mark in the folder that Python runs in."""
    path = payload.folder / f"x;touch {payload.marker.name};.sph"
    write_tone(payload.folder / "sphere.wav", 0.5).rename(path)
    return path


def in_its_recording(cut: dict, payload: Payload) -> dict:
    return cut | {"recording": recording("command", payload.command)}


def in_a_pipe(cut: dict, payload: Payload) -> dict:
    return cut | {"recording": recording("url", f"pipe:{payload.command}")}


def in_the_name_of_a_sphere_file(cut: dict, payload: Payload) -> dict:
    # lhotse gives the name to a shell; the file is there.
    return cut | {"recording": recording("file", str(sphere_file(payload)))}


def in_a_track(cut: dict, payload: Payload) -> dict:
    good, bad = (deserialize_item(copy.deepcopy(one)) for one in (cut, in_its_recording(cut, payload)))
    return good.mix(bad).with_id("bad").to_dict()


def in_an_impulse_response(cut: dict, payload: Payload) -> dict:
    reverb = {"name": "ReverbWithImpulseResponse", "kwargs": {"rir": recording("command", payload.command)}}
    return cut | {"recording": cut["recording"] | {"transforms": [reverb]}}


def in_a_custom_field(cut: dict, payload: Payload) -> dict:
    return cut | {"custom": {"target_audio": recording("command", payload.command)}}


def too_deep_to_look_into(cut: dict, payload: Payload) -> dict:
    nested: dict = {}
    for _ in range(600):
        nested = {"x": nested}
    return cut | {"custom": {"nested": nested}}


CUTS = (
    in_its_recording,
    in_a_pipe,
    in_the_name_of_a_sphere_file,
    in_a_track,
    in_an_impulse_response,
    in_a_custom_field,
    too_deep_to_look_into,
)


@pytest.fixture
def cuts_with(tone: Path, tmp_path: Path, payload: Payload) -> Callable[..., Path]:
    """A manifest of cuts of which the second runs a command."""

    def write(make: Callable, name: str = "cuts.jsonl") -> Path:
        cuts = [good_cut(tone, number).to_dict() for number in range(4)]
        cuts[1] = make({**cuts[1], "id": "bad"}, payload)
        path = tmp_path / name
        lines = [json.dumps(cut) for cut in cuts]
        path.write_text("\n".join(lines) + "\n" if name.endswith("l") else f"[{', '.join(lines)}]")
        return path

    return write


def loader_of(source: dict, dataset, tokenizer, **keys):  # noqa: F811
    config = {
        "input_cfg": [source | LANGUAGES],
        "batch_size": 1,
        "force_finite": True,
        "shuffle": False,
        "num_workers": 0,
        "min_duration": 0,
        "use_multimodal_sampling": False,
        "sample_rate": 16000,
        **keys,
    }
    if isinstance(dataset, SpeechTextDataset):
        config |= {"prompt_format": "emmett_t5", "audio_locator_tag": LOCATOR, "token_equivalent_duration": 0.08}
    return get_multimodal_dataloader(config, 0, 1, dataset, tokenizer)


def ids(loader) -> set:
    found = set()
    for batch in loader:
        of_batch = batch if isinstance(batch, list) else [e["id"] for e in batch.get("audio", {}).get("examples", [])]
        found.update(of_batch)
    return found


@pytest.mark.parametrize("make", CUTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("reader", ["cuts.jsonl", "cuts.json", "as_read", "reads_itself"])
def test_a_record_that_names_a_command_is_skipped_and_counted(
    tokenizer,  # noqa: F811
    cuts_with: Callable,
    payload: Payload,
    make: Callable,
    reader: str,
) -> None:
    path = cuts_with(make, "cuts.json" if reader == "cuts.json" else "cuts.jsonl")
    datasets = {"as_read": lambda _: AsRead(), "reads_itself": ReadsItself}
    dataset = datasets.get(reader, SpeechTextDataset)(tokenizer)
    found, loaders = set(), []

    def read() -> None:
        loader = loader_of({"type": "lhotse", "cuts_path": str(path)}, dataset, tokenizer, max_bad_records=None)
        loaders.append(loader)
        found.update(ids(loader))

    said = payload.refused(read)
    assert said == ""
    assert found == {"good-0", "good-2", "good-3"}
    assert loaders[0].skipped_records.causes() == {"runs a command": 1}


@pytest.mark.parametrize("dataset", ["ours", "as_read", "reads_itself"])
def test_each_cut_is_looked_into_once(tokenizer, tone: Path, tmp_path: Path, monkeypatch, dataset: str) -> None:  # noqa: F811
    looked_into, stored = [], commands._stored

    def note(thing: object) -> Iterator:
        if isinstance(thing, Cut):
            looked_into.append(thing.id)
        return stored(thing)

    monkeypatch.setattr(commands, "_stored", note)
    CutSet([good_cut(tone, number) for number in range(3)]).to_file(tmp_path / "cuts.jsonl")
    made = {"ours": SpeechTextDataset, "as_read": lambda _: AsRead(), "reads_itself": ReadsItself}[dataset](tokenizer)
    ids(loader_of({"type": "lhotse", "cuts_path": str(tmp_path / "cuts.jsonl")}, made, tokenizer))
    assert sorted(looked_into) == ["good-0", "good-1", "good-2"]


@pytest.mark.parametrize("make", CUTS[:1], ids=lambda make: make.__name__)
def test_shar_is_no_way_round(
    tokenizer,  # noqa: F811
    cuts_with: Callable,
    payload: Payload,
    make: Callable,
    tmp_path: Path,
) -> None:
    (tmp_path / "shar").mkdir()
    cuts_with(make).rename(tmp_path / "shar" / "cuts.000000.jsonl")
    source = {"type": "lhotse_shar", "shar_path": str(tmp_path / "shar")}
    for keys in ({}, {"sampling": "nemo"}):
        found: set = set()
        payload.refused(
            lambda keys=keys, found=found: found.update(
                ids(loader_of(source, SpeechTextDataset(tokenizer), tokenizer, max_bad_records=None, **keys))
            )
        )
        assert found == {"good-0", "good-2", "good-3"}


def test_commands_run_where_the_recipe_allows_them(
    tokenizer,  # noqa: F811
    cuts_with: Callable,
    payload: Payload,
    tone: Path,
) -> None:
    def make(cut: dict, payload: Payload) -> dict:
        return cut | {"recording": recording("command", f"{payload.command}; cat {tone}")}

    source = {"type": "lhotse", "cuts_path": str(cuts_with(make))}
    for dataset in (SpeechTextDataset(tokenizer), AsRead()):
        assert len(ids(loader_of(source, dataset, tokenizer, allow_commands=True))) == 4
        assert payload.ran
        payload.marker.unlink()
    with pytest.raises(ConfigError, match="allow_commands: 'yes' cannot be used; give true or false"):
        loader_of(source, AsRead(), tokenizer, allow_commands="yes")


def sources(payload: Payload) -> dict[str, dict]:
    pipe = f"pipe:{payload.command}"
    return {
        "nemo": {"type": "nemo", "manifest_filepath": pipe},
        "nemo with spaces": {"type": "nemo", "manifest_filepath": f" {pipe}"},
        "nemo list": {"type": "nemo", "manifest_filepath": [[pipe, 1.0]]},
        "tar": {"type": "nemo_tarred", "manifest_filepath": "m.json", "tarred_audio_filepaths": pipe},
        "cuts": {"type": "lhotse", "cuts_path": pipe},
        "cuts in lines": {"type": "lhotse", "cuts_path": f"{pipe} #.jsonl"},
        "shar": {"type": "lhotse_shar", "shar_path": {"cuts": [pipe], "recording": [pipe]}},
        "text": {"type": "parallel_text", "source_paths": pipe, "target_paths": pipe},
        "text of many": {"type": "parallel_text", "paths": {"en": pipe, "de": pipe}},
        "txt_pair": {"type": "txt_pair", "source_paths": pipe, "target_paths": pipe, "target_language": "de"},
        "conversation": {"type": "multimodal_conversation", "manifest_filepath": pipe},
        "fields": {
            "type": "nemo",
            "manifest_filepath": "m.json",
            "extra_fields": [{"type": "text_iter", "name": "x", "path": pipe}],
        },
        "as conversation": {"type": "lhotse_as_conversation", "input_cfg": [{"type": "lhotse", "cuts_path": pipe}]},
        "says that it may": {"type": "nemo", "manifest_filepath": pipe, "allow_commands": True},
    }


@pytest.mark.parametrize("place", ["recipe", "file", "group"])
@pytest.mark.parametrize("name", sources(SimpleNamespace(command="")))
def test_a_source_that_is_the_output_of_a_command_is_refused(
    tokenizer,  # noqa: F811
    payload: Payload,
    tmp_path: Path,
    name: str,
    place: str,
) -> None:
    entries = [sources(payload)[name] | LANGUAGES]
    if place == "file":
        (tmp_path / "input_cfg.yaml").write_text(yaml.safe_dump(entries))
        entries = str(tmp_path / "input_cfg.yaml")
    elif place == "group":
        entries = [{"type": "group", "weight": 1.0, "input_cfg": entries}]
    config = {"input_cfg": entries, "batch_size": 1, "num_workers": 0, "force_finite": True}
    for read in (
        lambda: next(iter(get_multimodal_dataloader(config, 0, 1, AsRead(), tokenizer))),
        lambda: check_data_config(config),
    ):
        said = payload.refused(read)
        assert said.startswith("ConfigError: data.train_ds.input_cfg")
        assert "allow_commands: true" in said


@pytest.mark.parametrize("key", ["noise_path", "rir_path", "input_cfg"])
def test_no_other_path_of_a_dataset_is_a_command(
    tokenizer,  # noqa: F811
    payload: Payload,
    tone: Path,
    tmp_path: Path,
    key: str,
) -> None:
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps({"audio_filepath": str(tone), "duration": 0.5, "text": "eins"}) + "\n")
    config = {"input_cfg": [{"type": "nemo", "manifest_filepath": str(manifest)}], "batch_size": 1, "num_workers": 0}
    config |= {key: f"pipe:{payload.command}", "rir_enabled": True}
    said = payload.refused(lambda: next(iter(get_multimodal_dataloader(config, 0, 1, AsRead(), tokenizer))))
    assert said.startswith(f"ConfigError: data.train_ds.{key}")


def test_a_conversation_whose_recording_has_the_name_of_a_command(
    tokenizer,  # noqa: F811
    payload: Payload,
    tmp_path: Path,
) -> None:
    name = sphere_file(payload).name
    turns = [{"type": "audio", "value": name, "from": "User", "duration": 0.5}, {"type": "text", "value": "eins"}]
    turns[1]["from"] = "Assistant"
    manifest = payload.folder / "m.jsonl"
    manifest.write_text(json.dumps({"id": "bad", "conversations": turns}) + "\n")
    source = {"type": "multimodal_conversation", "manifest_filepath": str(manifest), "audio_locator_tag": LOCATOR}
    payload.refused(lambda: ids(loader_of(source, SpeechTextDataset(tokenizer), tokenizer)))


@pytest.mark.parametrize("rate", [{}, {"sampling_rate": 16000}], ids=["without rate", "with rate"])
def test_a_manifest_whose_recording_has_the_name_of_a_command(
    tokenizer,  # noqa: F811
    payload: Payload,
    tone: Path,
    rate: dict,
) -> None:
    name = sphere_file(payload).name
    manifest = payload.folder / "m.json"
    records = [{"audio_filepath": path, "duration": 0.5, "text": "eins", **rate} for path in (name, str(tone))]
    manifest.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"type": "nemo", "manifest_filepath": str(manifest)}
    loader = loader_of(source, SpeechTextDataset(tokenizer), tokenizer, max_bad_records=None)
    payload.refused(lambda: ids(loader))
    assert loader.skipped_records.causes() == {"runs a command": 1}


def test_others_pipes_open_as_ever(cuts_with: Callable, tokenizer, payload: Payload) -> None:  # noqa: F811
    loader = loader_of(
        {"type": "lhotse", "cuts_path": str(cuts_with(in_its_recording, "cuts.json"))},
        SpeechTextDataset(tokenizer),
        tokenizer,
        max_bad_records=None,
    )
    ids(loader)
    with open_best("pipe:echo one", "rb") as pipe:
        assert pipe.read().strip() == b"one"
    assert get_current_io_backend().handles_special_case("pipe:x")


def test_the_key_is_known_to_the_check_of_recipes() -> None:
    source = {"type": "nemo", "manifest_filepath": "m.json"}
    assert parse_dataset({"input_cfg": [source], "allow_commands": True}, "train_ds").unknown_keys == ()
    with pytest.raises(ConfigError, match="did you mean 'allow_commands'"):
        parse_dataset({"input_cfg": [source], "allow_comands": True}, "train_ds")
