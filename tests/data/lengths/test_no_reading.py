"""What a length index answers, no record is read for; and the answers are those of reading."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from omegaconf import OmegaConf

from nemo_emmett.cli import main
from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.bucketing.length_stats import Lengths, measure, measure_stream, solve
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.io.line_index import LineIndex
from nemo_emmett.data.io.sidecar import HIDDEN_FOLDER
from nemo_emmett.data.lengths import building
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.readers.base import Records
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import DataError
from nemo_emmett.planning.blend_report import read_recipe, streams_of
from nemo_emmett.planning.lengths import lengths_of_groups
from tests.data.test_count_equals_training import CASES, instructed, trained, write_tone

KIND = ExampleKind.TRANSLATION
COMMON = {"audio_locator_tag": "<|audio|>", "token_equivalent_duration": 0.08, "prompt_format": "emmett_t5"}

_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes, Path)):
        _opened.append(str(arguments[0]))


sys.addaudithook(_note_opened)


@contextmanager
def nothing_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside this context no file of data is opened and no record is read, also of files that are open already."""
    global _opened

    def refuse(self, *place) -> None:
        raise AssertionError(f"{type(self).__name__} reads {place}")

    _opened = []
    try:
        with monkeypatch.context() as patches:
            patches.setattr(Records, "read", refuse)
            patches.setattr(LineIndex, "read", refuse)
            yield
    finally:
        opened, _opened = _opened, None
    data = [p for p in opened if Path(p).is_relative_to(folder) and HIDDEN_FOLDER not in p and Path(p).suffix in DATA]
    assert data == []


DATA = {".json", ".jsonl", ".gz", ".tar", ".tsv", ".wav", ".en", ".de", ".fr"}


def group_of(config: dict):
    (group,) = parse_dataset({**COMMON, **config}, "data.train_ds").groups
    return group


def rows(lengths: Lengths) -> list[tuple]:
    """The lengths in an order of their own: a mix of sources has none."""
    return sorted(zip(*lengths.sides, strict=True))


FILTERS = {
    "none": {},
    "durations and rates": {"max_duration": 0.6, "max_tps": 13.0, "min_tpt": 1},
    "tokens": {"use_multimodal_sampling": True, "max_tokens": 5},
    "tokens in all": {"use_multimodal_sampling": True, "measure_total_length": False, "max_tpt": 1.2},
    "quality": {"max_cer": 0.5, "keep": "good"},
}


STREAMED_OTHERWISE = {"nemo_tarred", "nemo_in_compressed_tars", "shar", "shar_fields"}
"""Cases with faults that a stream without audio does not see, or ends at."""


def found(function: Callable[..., Lengths], *arguments, **keys) -> tuple:
    """The lengths and what was left out, or the sentence that says that nothing is left."""
    try:
        lengths = function(*arguments, **keys)
    except DataError as error:
        return (str(error),)
    return rows(lengths), list(lengths.dropped.items()), lengths.unit


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("name", sorted(CASES.keys() - STREAMED_OTHERWISE))
def test_lengths_are_those_of_reading(tmp_path, tokenizer, name, filters) -> None:
    config, _ = CASES[name](tmp_path)
    is_text = config["input_cfg"][0]["type"] in ("parallel_text", "txt_pair")
    group = group_of({**config, **FILTERS[filters], **({"use_multimodal_sampling": True} if is_text else {})})
    for two_dimensional in (False, True):
        given = {"two_dimensional": two_dimensional}
        assert found(measure, group, tokenizer, KIND, **given) == found(measure_stream, group, tokenizer, KIND, **given)


@pytest.mark.parametrize("name", sorted(STREAMED_OTHERWISE))
def test_lengths_are_those_of_training(tmp_path, tokenizer, name) -> None:
    config, _ = CASES[name](tmp_path)
    config["prompt_format"] = "emmett_t5"
    examples, seconds, _ = trained(config, tokenizer, SpeechTextDataset(tokenizer))
    lengths = measure(group_of(config), tokenizer, KIND, two_dimensional=False)
    assert (len(lengths.inputs), lengths.inputs.sum()) == (examples, pytest.approx(seconds, abs=1e-3))


def test_a_text_with_a_control_token_is_not_measured(tmp_path, tokenizer) -> None:
    config, _ = instructed(tmp_path)
    group = group_of({**config, "prompt_format": "plain", "use_multimodal_sampling": True})
    for function in (measure, measure_stream):
        assert len(function(group, tokenizer, ExampleKind.CONVERSATION, two_dimensional=False).inputs) == 2


def test_a_filter_that_needs_more_than_lengths_is_applied_by_reading(tmp_path, tokenizer) -> None:
    config, _ = instructed(tmp_path)
    group = group_of({**config, "prompt_format": "plain", "use_multimodal_sampling": True, "min_tpt": 1})
    given = {"two_dimensional": True}
    by_reading = found(measure_stream, group, tokenizer, ExampleKind.CONVERSATION, **given)
    assert found(measure, group, tokenizer, ExampleKind.CONVERSATION, **given) == by_reading
    assert "TokenPerTokenFilter" in str(by_reading)


def test_what_two_filters_leave_out_counts_for_quality(tmp_path, tokenizer) -> None:
    config, _ = CASES["nemo_with_other_fields"](tmp_path)
    manifest = tmp_path / "m.json"
    good = json.loads(manifest.read_text().splitlines()[0])
    fields = [{}, {"validation_status": "bad"}, {"duration": 0.1}, {"duration": 0.1, "validation_status": "bad"}]
    manifest.write_text("".join(json.dumps({**good, "validation_status": "good", **f}) + "\n" for f in fields))
    group = group_of({**config, "keep": "good", "min_duration": 0.2})
    for function in (measure, measure_stream):
        lengths = function(group, tokenizer, KIND, two_dimensional=False)
        assert lengths.dropped == {"ValidationStatusFilter": 2, "DurationFilter": 1}


def mixed(folder: Path) -> dict:
    """Recordings and texts of 1 to 40 words, in two groups of records that share batches."""
    wave = write_tone(folder / "a.wav")
    records = [{"audio_filepath": wave, "text": "one " * n, "duration": n / 20} for n in range(1, 11)]
    (folder / "m.json").write_text(
        "".join(json.dumps({**r, "lang": "en", "target_lang": "de"}) + "\n" for r in records)
    )
    for language in ("en", "de"):
        (folder / f"a.{language}").write_text("".join("one " * n + "\n" for n in range(1, 41)))
    text = {
        "source_paths": f"{folder}/a.en",
        "target_paths": f"{folder}/a.de",
        "source_lang": "en",
        "target_lang": "de",
    }
    return {
        "use_multimodal_sampling": True,
        "input_cfg": [{"type": "nemo", "manifest_filepath": f"{folder}/m.json"}, {"type": "parallel_text", **text}],
    }


AUTO = {"bucket_duration_bins": "auto", "num_buckets": 2, "num_sub_buckets": 2, "bucket_batch_size": [4, 3, 2, 1]}


def test_a_sample_has_the_shares_of_the_blend(tmp_path, tokenizer) -> None:
    config = mixed(tmp_path)
    speech, text = config["input_cfg"]
    weighted = {**config, "input_cfg": [{**speech, "weight": 0.8}, {**text, "weight": 0.2}]}

    def seen(config: dict, limit: int, **keys) -> list[tuple]:
        group = group_of({**config, **keys})
        indexes = open_length_indexes([group], tokenizer, KIND)
        sample = measure(group, tokenizer, KIND, two_dimensional=True, limit=limit, indexes=indexes)
        return list(zip(*sample.sides, strict=True))

    of_speech = set(seen({**config, "input_cfg": [speech]}, 10))
    sample = seen(weighted, 100)
    assert len(sample) == 100
    assert sum(row in of_speech for row in sample) == 80, "a source starts over when it ends"
    assert seen(weighted, 100, shuffle=True, seed=1) == seen(weighted, 100, shuffle=True, seed=2)
    # Finite data, and a single source: each example once.
    every = sorted(rows(measure(group_of(config), tokenizer, KIND, two_dimensional=True)))
    assert sorted(seen(weighted, 1000, force_finite=True)) == every
    assert len(seen({**config, "input_cfg": [text]}, 1000, shuffle=True)) == 40
    shuffled = seen({**config, "input_cfg": [text]}, 20, shuffle=True)
    assert len(set(shuffled)) == 20
    assert len(seen({**config, "input_cfg": [text]}, 25, shuffle=True)) == 25
    assert shuffled != seen({**config, "input_cfg": [text]}, 20), "the first lines are the shortest"
    # What filters leave out is of the sample.
    filtered = measure(group_of({**weighted, "max_tokens": 20}), tokenizer, KIND, two_dimensional=True, limit=100)
    assert len(filtered.inputs) + filtered.dropped["TokenCountFilter"] == 100


def test_a_limit_builds_no_index(tmp_path, tokenizer, monkeypatch) -> None:
    group = group_of(mixed(tmp_path))
    first = measure(group, tokenizer, KIND, two_dimensional=True, limit=7)
    assert len(first.inputs) == 7
    assert not list(tmp_path.glob(f"{HIDDEN_FOLDER}/*.lengths"))
    measure(group, tokenizer, KIND, two_dimensional=True)
    with nothing_read(tmp_path, monkeypatch):
        assert len(measure(group, tokenizer, KIND, two_dimensional=True, limit=7).inputs) == 7


def test_an_index_that_another_rank_does_not_see_is_not_used(tmp_path, tokenizer, monkeypatch) -> None:
    """Otherwise ranks would measure by index and by reading, and differ in their bins."""
    group = group_of(mixed(tmp_path))
    open_length_indexes([group], tokenizer, KIND)
    assert None not in open_length_indexes([group], tokenizer, KIND, build=False).values()

    def gather(_, value: object) -> list:
        return [value, [False] * len(value)] if isinstance(value, list) else [value]

    monkeypatch.setattr(building._Ranks, "gather", gather)
    assert set(open_length_indexes([group], tokenizer, KIND, build=False).values()) == {None}


def test_what_leaves_nothing_is_the_same_sentence(tmp_path, tokenizer) -> None:
    config, _ = CASES["pair"](tmp_path)
    group = group_of({**config, "use_multimodal_sampling": True, "max_tokens": 1})
    sentences = set()
    for function in (measure, measure_stream):
        with pytest.raises(DataError) as caught:
            function(group, tokenizer, KIND, two_dimensional=True)
        sentences.add(str(caught.value))
    (sentence,) = sentences
    assert "of 5 records (2 x empty text, 1 x not UTF-8, 2 x TokenCountFilter)" in sentence


@pytest.fixture
def recipe(tmp_path, tokenizer) -> Path:
    model = {"pretrained_llm": tokenizer.tokenizer.name_or_path, "prompt_format": "emmett_t5"}
    data = {**COMMON, **mixed(tmp_path), "weights": "auto", "max_tokens": 30}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"model": model, "data": {"train_ds": data}}))
    return path


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", ["bins", "blend"])
def test_commands_read_nothing_and_print_what_reading_prints(recipe, tmp_path, monkeypatch, command) -> None:
    arguments = [command, str(recipe)]
    if command == "bins":
        arguments += ["--num-buckets", "2", "--num-sub-buckets", "2"]
    printed("index", str(recipe))
    with nothing_read(tmp_path, monkeypatch):
        by_index = printed(*arguments)
    if command == "bins":
        # Texts of n words have 2 (n + 2) tokens: 13 of 40 have at most 30, and the filter passes all recordings.
        assert "23 examples, 46.00 % of those measured (left out: 27 x TokenCountFilter)" in by_index
        monkeypatch.setattr("nemo_emmett.planning.bins_report.measure", measure_stream)
        assert printed(*arguments) == by_index


def test_weights_of_sizes_read_nothing(recipe, tmp_path, monkeypatch, tokenizer) -> None:
    found = read_recipe(OmegaConf.load(recipe), str(recipe), None, {})
    before = streams_of(found, tokenizer)
    with nothing_read(tmp_path, monkeypatch):
        again = streams_of(found, tokenizer)
    assert again == before


def as_data(recipe: Path, tokenizer, **keys) -> MultimodalDataModule:
    config = OmegaConf.load(recipe).data
    config.train_ds.update(OmegaConf.create(keys))
    return MultimodalDataModule(config, tokenizer, SpeechTextDataset(tokenizer))


def test_what_is_planned_reads_nothing(recipe, tmp_path, monkeypatch, tokenizer) -> None:
    data = as_data(recipe, tokenizer, **AUTO)
    (group,) = parse_dataset(data.cfg.train_ds, "data.train_ds").groups
    expected = rows(measure_stream(group, tokenizer, KIND, two_dimensional=True))
    printed("index", str(recipe))
    with nothing_read(tmp_path, monkeypatch):
        (lengths,) = lengths_of_groups(data, {"": True}).values()
        (sample,) = lengths_of_groups(data, {"": True}, 30).values()
        data.resolve_bins()
    assert rows(lengths) == expected
    assert len(sample.inputs) + sum(sample.dropped.values()) == 30
    of_training = measure(group, tokenizer, KIND, two_dimensional=True, limit=group.num_cuts_for_bins_estimate)
    assert data.cfg.train_ds.bucket_duration_bins == solve(of_training, 2, 2)


@pytest.mark.parametrize("weights", ["auto", None])
def test_a_training_finds_bins_without_reading(recipe, tmp_path, monkeypatch, tokenizer, weights) -> None:
    data = as_data(recipe, tokenizer, **AUTO, weights=weights, seed=0, shard_seed=0, shuffle=True)
    (group,) = parse_dataset(data.cfg.train_ds, "data.train_ds").groups
    expected = measure_stream(group, tokenizer, KIND, two_dimensional=True)
    first = data.train_dataloader()._source  # builds the indexes
    # Checks of the config look for the first example of each source that passes its filters.
    with nothing_read(tmp_path, monkeypatch):
        again = data.train_dataloader()._source
    bins = [loader.dataset.readers[0].pipeline.constraint.max_seq_len_buckets for loader in (first, again)]
    assert np.array_equal(*bins)
    assert np.max(bins[0], axis=0).tolist() == [max(side) for side in expected.sides]
    data.resolve_bins()
    assert np.array_equal(data.cfg.train_ds.bucket_duration_bins, bins[0])
    assert next(iter(again))


def test_without_an_index_a_training_reads(recipe, tmp_path, monkeypatch, tokenizer) -> None:
    """A planted fault: the check of reads notices them."""
    data = as_data(recipe, tokenizer, **AUTO)
    with pytest.raises(AssertionError, match=r"reads|assert"), nothing_read(tmp_path, monkeypatch):
        data.train_dataloader()


def test_nemos_samplers_take_a_sample_without_an_index(tmp_path, tokenizer) -> None:
    config = mixed(tmp_path)
    config["input_cfg"] = config["input_cfg"][1:]
    keys = {"sampling": "nemo", "seed": 0, "shard_seed": 0, "force_finite": True, "use_bucketing": True}
    loader = get_multimodal_dataloader(
        {**COMMON, **config, **AUTO, **keys}, 0, 1, SpeechTextDataset(tokenizer), tokenizer
    )
    assert sum(len(batch["text"]["examples"]) for batch in loader) == 40
    assert not list(tmp_path.glob(f"{HIDDEN_FOLDER}/*.lengths"))
