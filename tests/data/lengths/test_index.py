"""A length index says what NeMo's chain makes of each record, and how NeMo's constraints measure that."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from lhotse.cut import Cut
from nemo.collections.common.data.lhotse.sampling import (
    FixedBucketBatchSizeConstraint2D,
    MultimodalFixedBucketBatchSizeConstraint2D,
    MultimodalSamplingConstraint,
)
from nemo.collections.common.data.lhotse.text_adapters import NeMoMultimodalConversation

from nemo_emmett.data.blending.weights import blend_of
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.nemo_config import sampler_config, with_keys_of_dataset
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.data.lengths.measures import Measures
from nemo_emmett.data.readers.base import Records
from nemo_emmett.data.readers.examples import ExampleKind, Examples
from nemo_emmett.data.readers.random_access import open_records
from nemo_emmett.data.readers.registry import defaults_of
from nemo_emmett.data.sampling.transforms import TransformPipeline
from nemo_emmett.prompts.families import forbidden_text
from nemo_emmett.prompts.t5 import EmmettT5PromptFormatter
from tests.data.test_count_equals_training import AUDIO, CASES, SECONDS, SPOKEN, as_pattern, instructed, write_tone

TOKEN = 0.08
COMMON = {"audio_locator_tag": "<|audio|>", "token_equivalent_duration": TOKEN, "batch_size": 2}
KINDS = ExampleKind.TRANSLATION, ExampleKind.CONVERSATION, ExampleKind.AS_READ


def group_of(config: dict):
    (group,) = parse_dataset({**COMMON, **config}, "data.train_ds").groups
    return group


def opened(config: dict, tokenizer, kind: ExampleKind = ExampleKind.TRANSLATION, **keys) -> LengthIndex | None:
    (index,) = open_length_indexes([group_of(config)], tokenizer, kind, **keys).values()
    return index


def measured_by_nemo(example, *, has_tokens: bool) -> tuple:
    """One example by each of NeMo's constraints, and what its filters look at."""
    multimodal = [
        MultimodalSamplingConstraint(TOKEN, batch_size=1, measure_total_length=total).measure_length(example)
        for total in (False, True)
    ]
    two = MultimodalFixedBucketBatchSizeConstraint2D([(0.0, 0.0)], [1], token_equivalent_duration=TOKEN)
    if has_tokens:
        multimodal.append(tuple(two.measure_length(example)))
        if isinstance(example, Cut):
            multimodal.append(tuple(FixedBucketBatchSizeConstraint2D([(0.0, 0.0)], [1]).measure_length(example)))
    if isinstance(example, Cut):
        multimodal.append(example.duration)
    elif isinstance(example, NeMoMultimodalConversation) and not example.is_text_only:
        multimodal.append(sum(cut.duration for cut in example.list_cuts()))
    return tuple(multimodal)


def measured_by_index(m: Measures, i: int, *, has_tokens: bool) -> tuple:
    """The same from the arrays."""
    if m.is_cut[i]:
        frames = math.ceil(m.seconds[i] / TOKEN)
        own = [frames, frames + m.totals[i]]
        own += [(frames, m.outputs[i]), (m.seconds[i], m.outputs[i])] if has_tokens else []
        return (*own, m.seconds[i])
    own = [m.inputs[i], m.totals[i], *([(m.inputs[i], m.outputs[i])] if has_tokens else [])]
    return (*own, *([] if np.isnan(m.seconds[i]) else [m.seconds[i]]))


def by_training(config: dict, tokenizer, kind: ExampleKind) -> tuple[list[list[list]], SkippedRecords]:
    """What each example of each record becomes, by the readers and the chain of a training, example by example."""
    group, skipped = group_of(config), SkippedRecords()
    structured = sampler_config(group)
    (source,) = group.sources
    source = with_keys_of_dataset(source, structured)
    records = open_records(source, skipped, kind)
    chain = TransformPipeline(structured, tokenizer, (), skipped)
    made = []
    for shard, size in enumerate(records.shard_sizes):
        records.prepare(shard, 0, size)
        for number in range(size):
            found = records.read(shard, number)
            if kind is not ExampleKind.AS_READ:
                forbidden = forbidden_text(group.prompt_format, tokenizer)
                found = Examples(found, kind, defaults_of(source), skipped, forbidden)
            made.append([chain.run([example], [0]) for example in found])
    return made, skipped


def all_entries(index: LengthIndex) -> tuple[np.ndarray, Measures]:
    return index.read_blocks(np.arange(len(index.block_shards)))


def entries_of_records(index: LengthIndex) -> Iterator[list[int]]:
    """The entries of each record in turn, by ``locate``."""
    shards, numbers, places, counts = index.locate(np.arange(index.num_entries))
    found: dict[tuple[int, int], list[int]] = {}
    for entry, (shard, number, place) in enumerate(
        zip(shards.tolist(), numbers.tolist(), places.tolist(), strict=True)
    ):
        assert place == len(found.setdefault((shard, number), []))
        found[shard, number].append(entry)
    assert counts.tolist() == [len(found[key]) for key in zip(shards.tolist(), numbers.tolist(), strict=True)]
    for shard, size in enumerate(index.shard_sizes.tolist()):
        yield from (found.get((shard, number), []) for number in range(size))


def check(config: dict, tokenizer, kind: ExampleKind = ExampleKind.TRANSLATION) -> LengthIndex:
    """Compare an index with what a training makes of the same data."""
    index = opened(config, tokenizer, kind)
    made, skipped = by_training(config, tokenizer, kind)
    has_tokens = tokenizer is not None and config.get("pretokenize", True)
    entries, measures = all_entries(index)
    assert entries.tolist() == list(range(index.num_entries))
    for own, expected in zip(entries_of_records(index), made, strict=True):
        if index.is_one_to_one:
            assert len(own) == len(expected)
            assert [measures.inputs[i] >= 0 for i in own] == [bool(one) for one in expected]
            own = [i for i in own if measures.inputs[i] >= 0]
        examples = [example for one in expected for example in one]
        assert [measured_by_index(measures, i, has_tokens=has_tokens) for i in own] == [
            measured_by_nemo(example, has_tokens=has_tokens) for example in examples
        ]
    assert index.is_one_to_one == all(len(one) <= 1 for record in made for one in record)
    reported = SkippedRecords()
    index.report(reported)
    assert reported.read_count == skipped.read_count
    not_of_audio = Counter({k: n for k, n in skipped.counts.items() if as_pattern(k[1]) not in AUDIO})
    if not_of_audio == skipped.counts:
        assert reported.counts == skipped.counts
    assert not_of_audio <= reported.counts
    assert reported.records() <= skipped.records(), "a record may have a fault of its audio as well"
    return index


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("nemo_with_extra_fields",)])
def test_every_format_and_every_cause(tmp_path, tokenizer, name) -> None:
    config, causes = CASES[name](tmp_path)
    config = {**config, "prompt_format": "emmett_t5"}
    if name in ("nemo_in_compressed_tars", "nemo_in_a_list"):  # a training streams these
        index = opened(config, tokenizer)
        reported = SkippedRecords()
        index.report(reported)
        assert Counter(as_pattern(c) for (_, c), n in reported.counts.items() for _ in range(n)) == (
            causes if name == "nemo_in_compressed_tars" else Counter({c: n // 2 for c, n in causes.items()})
        )
        return
    index = check(config, tokenizer)
    assert index.num_entries > 0


def test_a_language_by_another_code_has_the_same_index(tmp_path, tokenizer) -> None:
    config, _ = CASES["nemo"](tmp_path)
    (entry,) = config["input_cfg"]
    identities = {}
    for kind in (ExampleKind.TRANSLATION, ExampleKind.AS_READ):
        for code in ("de", "deu_Latn", "fr"):
            for place in ("key", "tag"):
                named = {"target_lang": code} if place == "key" else {"tags": {"target_lang": code}}
                index = opened(
                    {**config, "input_cfg": [{**entry, **named}], "prompt_format": "emmett_t5"}, tokenizer, kind
                )
                identities[kind, place, code] = index.identity
    for place in ("key", "tag"):
        of = {code: identities[ExampleKind.TRANSLATION, place, code] for code in ("de", "deu_Latn", "fr")}
        assert of["de"] == of["deu_Latn"] != of["fr"]
        as_read = {code: identities[ExampleKind.AS_READ, place, code] for code in ("de", "deu_Latn")}
        assert as_read["de"] != as_read["deu_Latn"], "NeMo's own formats may write the code as it is"


def test_what_has_no_numbers_has_no_index(tmp_path, tokenizer) -> None:
    config, _ = CASES["nemo_with_extra_fields"](tmp_path)
    assert opened({**config, "prompt_format": "emmett_t5"}, tokenizer) is None


@pytest.mark.parametrize(
    ("make", "kind"),
    [(make, kind) for make in ("nemo", "lhotse", "shar") for kind in KINDS] + [("many", kind) for kind in KINDS[:2]],
)
def test_every_kind_of_example(tmp_path, tokenizer, make, kind) -> None:
    config, _ = CASES[make](tmp_path)
    formats = {"prompt_format": "plain"} if kind is ExampleKind.CONVERSATION else {}
    config |= {"prompt_format": "emmett_t5"} if kind is ExampleKind.TRANSLATION else formats
    if kind is ExampleKind.CONVERSATION:
        config["input_cfg"][0]["tags"] = {"context": "translate"}
    check(config, tokenizer, kind)


def test_text_without_a_prompt_format_measures_no_tokens(tmp_path, tokenizer) -> None:
    """NeMo has no length for it either; its constraints raise."""
    config, _ = CASES["pair"](tmp_path)
    _, measures = all_entries(opened(config, tokenizer, ExampleKind.AS_READ))
    assert measures.inputs.tolist() == measures.outputs.tolist() == measures.totals.tolist() == [0] * len(measures)
    assert len(measures) > 0


def test_conversations_with_instructions(tmp_path, tokenizer) -> None:
    check(instructed(tmp_path)[0], tokenizer, ExampleKind.CONVERSATION)


def test_four_languages_make_twelve_examples_a_line(write_lines, tokenizer) -> None:
    sides = {
        language: str(write_lines(f"a.{language}", ["one two", "" if language == "de" else "three", "two " * n]))
        for n, language in enumerate(("en", "de", "fr", "es"), start=1)
    }
    index = check({"input_cfg": [{"type": "parallel_text", "paths": sides}], "prompt_format": "emmett_t5"}, tokenizer)
    assert [len(entries) for entries in entries_of_records(index)] == [12, 6, 12]
    assert index.is_one_to_one


def test_shards_gzip_and_blocks(tmp_path, tokenizer) -> None:
    rng = random.Random(0)
    for shard, size in enumerate((0, 700, 1, 256, 0, 257)):
        for side in ("en", "de"):
            lines = ["one two three " * rng.randint(0, 3) for _ in range(size)]
            with gzip.open(tmp_path / f"a_{shard}.{side}.gz", "wt") as file:
                file.writelines(f"{line}\n" for line in lines)
    paths = {k: f"{tmp_path}/a__OP_0..5_CL_.{s}.gz" for k, s in (("source_paths", "en"), ("target_paths", "de"))}
    source = {"type": "parallel_text", "source_lang": "en", "target_lang": "de", **paths}
    index = check({"input_cfg": [source], "prompt_format": "emmett_t5"}, tokenizer)
    assert index.shard_sizes.tolist() == [0, 700, 1, 256, 0, 257]
    assert index.block_shards.tolist() == [1, 1, 1, 2, 3, 5, 5]
    assert index.block_records.tolist() == [0, 256, 512, 0, 0, 0, 256]
    entries, measures = all_entries(index)
    some, of_some = index.read_blocks(np.array([6, 2, 0]))
    parts = [np.arange(*index.block_entries[b : b + 2]) for b in (6, 2, 0)]
    assert some.tolist() == np.concatenate(parts).tolist()
    assert of_some.inputs.tolist() == measures.inputs[some].tolist()
    assert index.read_blocks(np.empty(0, int))[0].tolist() == []
    chosen = rng.sample(range(index.num_entries), 50)
    whole = index.locate(entries)
    assert [part.tolist() for part in index.locate(np.array(chosen))] == [part[chosen].tolist() for part in whole]
    with pytest.raises(IndexError, match="numbered from 0"):
        index.locate(np.array([index.num_entries]))


def spoken(folder: Path, *fields: dict, seconds: float = SECONDS) -> dict:
    good = {**SPOKEN, "audio_filepath": write_tone(folder / "a.wav"), "duration": seconds, "sampling_rate": 16000}
    (folder / "m.json").write_text("".join(json.dumps({**good, **more}) + "\n" for more in fields))
    return {"input_cfg": [{"type": "nemo", "manifest_filepath": f"{folder}/m.json"}], "prompt_format": "emmett_t5"}


ALTERNATIVES = {"alt_text": {"a": {"text": "one two", "lang": "en"}, "b": {"text": "two", "lang": "de"}}}


def test_alternatives_of_a_text_without_reading_the_audio(tmp_path, tokenizer) -> None:
    config = spoken(tmp_path, {}, ALTERNATIVES, {"text": "one two three"})
    del config["prompt_format"]
    index = check(config, tokenizer, ExampleKind.AS_READ)
    assert [len(entries) for entries in entries_of_records(index)] == [1, 3, 1]
    assert not index.is_one_to_one
    (tmp_path / "a.wav").unlink()
    (tmp_path / "m.json").write_text((tmp_path / "m.json").read_text() * 2)
    assert opened(config, tokenizer, ExampleKind.AS_READ).num_entries == 10


MAPS: dict[str, Callable[[], dict]] = {
    "windows": lambda: {"cut_into_windows_duration": 0.2},
    "speeds": lambda: {"perturb_speed": True},
    "padding": lambda: {"pad_min_duration": 0.9},
    "truncation": lambda: {"truncate_duration": 0.3},
    "rate": lambda: {"sample_rate": 8000},
    "no tokens": lambda: {"pretokenize": False, "prompt_format": None},
    "no format": lambda: {"prompt_format": None},
    "quality": lambda: {"max_cer": 0.5, "keep": "good", "min_context_speaker_similarity": 0.5},
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_and_filters_of_quality(tmp_path, tokenizer, name) -> None:
    two = {"target_lang": ["de", "es"], "translations": {"de": "eins", "es": "uno dos tres"}}
    config = {**spoken(tmp_path, {}, two, {"validation_status": "bad"}, {"validation_status": "good"}), **MAPS[name]()}
    index = check(config, tokenizer)
    assert index.is_one_to_one == (name not in ("windows", "speeds"))
    if name == "quality":
        _, measures = all_entries(index)
        assert measures.inputs.tolist() == [3, 3, 3, -1, 3]  # tokens of the prompt
        assert np.isnan(measures.seconds[3])
        assert index.filtered == {"keep": 1}


def test_windows_of_text(write_lines, tokenizer) -> None:
    paths = {"source_paths": str(write_lines("a.en", ["one two three four", "one"] * 3))}
    paths["target_paths"] = str(write_lines("a.de", ["one", "two"] * 3))
    config = {"input_cfg": [{"type": "parallel_text", "target_lang": "de", "source_lang": "en", **paths}]}
    config |= {"prompt_format": "emmett_t5", "use_multimodal_sampling": True, "cut_text_into_windows_tokens": 2}
    check(config, tokenizer)


def test_a_text_that_cannot_be_prompted_keeps_its_place(tmp_path, tokenizer, write_lines) -> None:
    lines = [json.dumps({"source": "one", "target": "two", "target_lang": lang}) for lang in ("de", "ja", "es")]
    source = {"type": "parallel_text", "paths": str(write_lines("a.jsonl", lines)), "source_lang": "en"}
    index = check({"input_cfg": [source], "prompt_format": "emmett_t5"}, tokenizer)
    assert index.num_entries == 3


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """Shard and number of each record that is read."""
    read, real = [], Records.read
    monkeypatch.setattr(Records, "read", lambda self, *place: read.append(place) or real(self, *place))
    return read


def test_batches_bins_weights_and_filters_of_lengths_cost_no_reading(tmp_path, tokenizer, reads) -> None:
    config = spoken(tmp_path, *[{}] * 5)
    opened(config, tokenizer)
    assert len(reads) == 5
    for keys in (
        {"batch_size": 7, "shuffle": True, "seed": 3, "shard_seed": 4, "drop_last": True, "num_workers": 2},
        {"batch_size": None, "batch_duration": 10, "quadratic_duration": 5},
        {"bucket_duration_bins": [1.0, 2.0], "bucket_batch_size": [2, 1], "batch_size": None},
        {"bucket_duration_bins": "auto", "num_buckets": 2, "num_sub_buckets": 2},
        {"use_multimodal_sampling": True, "batch_tokens": 100, "measure_total_length": True},
        {"min_duration": 1, "max_duration": 2, "min_tps": 1, "max_tps": 2, "min_tpt": 1, "max_tpt": 2},
        {"min_tokens": 1, "max_tokens": 5, "token_equivalent_duration": 0.04},
        {"noise_path": str(tmp_path / "m.json"), "rir_enabled": True},
    ):
        opened({**config, **keys}, tokenizer)
        assert len(reads) == 5, keys
    weighted = {**config["input_cfg"][0], "weight": 3.0}
    opened({**config, "input_cfg": [weighted]}, tokenizer)
    assert len(reads) == 5


def test_weights_of_sizes_read_no_record_that_has_been_measured(tmp_path, tokenizer, reads, write_lines) -> None:
    speech = spoken(tmp_path, *[{}] * 5)["input_cfg"][0]
    sides = {
        "source_paths": str(write_lines("a.en", ["one two"] * 4)),
        "target_paths": str(write_lines("a.de", ["x"] * 4)),
    }
    text = {"type": "parallel_text", "source_lang": "en", "target_lang": "de", **sides}
    config = {"input_cfg": [speech, text], "weights": "auto", "prompt_format": "emmett_t5"}
    open_length_indexes([group_of(config)], tokenizer, ExampleKind.TRANSLATION)
    assert len(reads) == 9
    blend = blend_of(group_of(config), tokenizer=tokenizer, kind=ExampleKind.TRANSLATION)
    assert [leaf.weight for leaf in blend.leaves()] == [pytest.approx(5 * SECONDS / TOKEN), 12]
    assert len(reads) == 9


def test_what_changes_the_examples_is_measured_again(tmp_path, tokenizer, reads) -> None:
    config = spoken(tmp_path, *[{}] * 3)
    opened(config, tokenizer)
    source = config["input_cfg"][0]
    others = [
        *(make() for name, make in MAPS.items()),
        {"prompt_format": "emmett_mbart"},
        {"audio_locator_tag": "<|other|>"},
        {"input_cfg": [{**source, "target_lang": "fr"}]},
        {"input_cfg": [{**source, "tags": {"context": "x"}}]},
        {"text_field": "answer"},
    ]
    for number, keys in enumerate(others, start=2):
        opened({**config, **keys}, tokenizer)
        assert len(reads) == 3 * number, keys
    opened(config, tokenizer, ExampleKind.AS_READ)
    opened(config, None)
    assert len(reads) == 3 * (len(others) + 3)
    opened(config, tokenizer)
    assert len(reads) == 3 * (len(others) + 3), "the first one is still there"


def test_a_prompt_format_is_identified_by_what_it_makes(tmp_path, tokenizer, reads, monkeypatch) -> None:
    config = spoken(tmp_path, {})
    opened(config, tokenizer)
    real = EmmettT5PromptFormatter.encode_requests

    def doubled(self, requests):
        return [{**r, "context_ids": r["context_ids"].repeat(2)} for r in real(self, requests)]

    monkeypatch.setattr(EmmettT5PromptFormatter, "encode_requests", doubled)
    opened(config, tokenizer)
    assert len(reads) == 2


def test_it_says_the_same_wherever_the_folder_is(tmp_path, tokenizer, reads) -> None:
    (tmp_path / "here").mkdir()
    config = spoken(tmp_path / "here", {}, {"text": ""}, {"target_lang": "klingon"})
    opened(config, tokenizer)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = {**config["input_cfg"][0], "manifest_filepath": f"{tmp_path}/there/m.json"}
    reported = SkippedRecords()
    opened({**config, "input_cfg": [moved]}, tokenizer).report(reported)
    assert len(reads) == 3
    assert {(r.source, r.place) for r in reported.first} == {(f"{tmp_path}/there/m.json", f"line {n}") for n in (2, 3)}


def test_arrays_take_no_more_than_their_values_need(write_lines, tokenizer) -> None:
    paths = {"source_paths": str(write_lines("a.en", ["one", "one two"] * 500))}
    paths["target_paths"] = str(write_lines("a.de", ["eins", "eins zwei " * 200] * 500))
    config = {"input_cfg": [{"type": "parallel_text", "source_lang": "en", "target_lang": "de", **paths}]}
    index = opened({**config, "prompt_format": "emmett_t5"}, tokenizer)
    large = {name: array.dtype.str for name, array in index.contents.large.items()}
    assert large == {"inputs": "|u1", "outputs": "<u2", "skips": "|u1"}
    assert index.size.examples == 1000
    assert index.size.tokens == 500 * (1 + 2 + 1 + 400)
