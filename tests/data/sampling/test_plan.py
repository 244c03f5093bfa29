"""From a config to samplers, through the loader."""

from __future__ import annotations

import gzip
import json
from itertools import chain, islice
from pathlib import Path

import pytest
from nemo.collections.speechlm2.data.salm_dataset import SALMDataset

from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.errors import ConfigError

from ..conftest import LOCATOR
from ..corpora import Corpus, dataset_of, ids_of


@pytest.fixture
def load(tokenizer):
    def build(config: dict, rank: int = 0, world_size: int = 1, dataset=None):
        config = {
            "seed": 0,
            "shard_seed": 0,
            "shuffle": True,
            "prompt_format": "emmett_t5",
            "audio_locator_tag": LOCATOR,
            "token_equivalent_duration": 0.08,
            **config,
        }
        return get_multimodal_dataloader(config, rank, world_size, dataset or SpeechTextDataset(tokenizer), tokenizer)

    return build


@pytest.fixture
def groups(tmp_path) -> dict:
    corpus = Corpus(tmp_path)
    return {
        "speech": {"input_cfg": [corpus.source("speech_de", 40)]},
        "text": {"input_cfg": [corpus.source("text_de", 300), corpus.source("text_fr", 20)]},
    }


MUX = {"multi_config": True, "sampler_fusion": "mux", "use_multimodal_sampling": True, "batch_size": 10}


def test_mux_puts_all_groups_into_one_batch_by_their_weights(load, groups):
    loader = load({**MUX, **groups, "sampler_weights": {"speech": 0.3, "text": 0.7}})
    seen = [dataset_of(i) for batch in islice(loader, 40) for i in ids_of(batch)]
    shares = {name: seen.count(name) / 400 for name in set(seen)}
    assert shares == pytest.approx({"speech_de": 0.3, "text_de": 0.35, "text_fr": 0.35}, abs=0.005)


def test_mux_with_derived_weights_weighs_speech_and_text_in_tokens(load, groups):
    loader = load({**MUX, **groups, "weights": "auto"})
    seen = [dataset_of(i) for batch in islice(loader, 60) for i in ids_of(batch)]
    assert seen.count("text_de") > 10 * seen.count("text_fr") > 0


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            {"batch_size": 4},
            r"data.train_ds.text.batch_size: under sampler_fusion: mux .* set data.train_ds.batch_size",
        ),
        ({"max_duration": 4.0}, r"data.train_ds.text.max_duration: .* set data.train_ds.max_duration"),
    ],
)
def test_mux_refuses_groups_with_batches_of_their_own(load, groups, group, message):
    groups["text"].update(group)
    with pytest.raises(ConfigError, match=message):
        load({**MUX, **groups})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sampling": "lhotse"}, "sampling: 'lhotse' cannot be used; give 'auto' or 'emmett' or 'nemo'"),
        (
            {"sampling": "nemo", "weights": "auto"},
            r"weights: NeMo's samplers cannot weigh by auto; set sampling: emmett",
        ),
        ({"weights": "hours"}, "weights: 'hours' cannot be used; give 'auto'"),
    ],
)
def test_what_cannot_work_is_told(load, groups, keys, message):
    with pytest.raises(ConfigError, match=message):
        load({"input_cfg": groups["speech"]["input_cfg"], "batch_size": 2, **keys})


def test_noise_from_tar_files_is_left_to_nemo_and_refused_by_ours(load, groups, tmp_path):
    noise = Corpus(tmp_path, tarred=True, seed=1).source("speech_es", 6)
    config = {
        "input_cfg": groups["speech"]["input_cfg"],
        "batch_size": 2,
        "noise_path": {key: noise[key] for key in ("manifest_filepath", "tarred_audio_filepaths")},
    }
    assert load(config).progress is None
    with pytest.raises(ConfigError, match="noise_path: noise_path names tar files"):
        load({**config, "sampling": "emmett"})


def test_bins_are_found_where_they_are_asked_for(load, groups):
    text = {**groups["text"], "use_multimodal_sampling": True, "bucket_batch_size": [6, 5, 4], "num_buckets": 3}
    loader = load({**text, "bucket_duration_bins": "auto", "measure_total_length": False})
    (reader,) = loader.dataset.readers
    assert len(reader.pipeline.constraint.max_seq_len_buckets) == 3
    sizes = {len(batch["text"]["examples"]) for batch in islice(loader, 30)}
    assert sizes == {4, 5, 6}


def test_examples_that_fit_into_no_bucket_are_counted(load, groups, caplog):
    text = {**groups["text"], "use_multimodal_sampling": True, "measure_total_length": False, "force_finite": True}
    loader = load({**text, "bucket_duration_bins": [5, 8], "bucket_batch_size": [4, 4]})
    arrived = sum(len(batch["text"]["examples"]) for batch in loader)
    (line,) = [record.getMessage() for record in caplog.records if "NeMo's filters" in record.getMessage()]
    assert f"Of 320 examples {arrived / 320:.1%} passed" in line
    assert f"{320 - arrived} by bucket_duration_bins" in line
    assert 0 < arrived < 320


@pytest.mark.parametrize(("before", "after"), [(2, 0), (1, 3)])
def test_resuming_with_other_workers_changes_nothing(load, groups, before, after):
    config = {**groups["text"], "use_multimodal_sampling": True, "batch_size": 5, "force_finite": True}
    whole = [ids_of(batch) for batch in load(config)]
    first = load({**config, "num_workers": before})
    seen = [ids_of(batch) for batch in islice(first, 12)]
    again = load({**config, "num_workers": after})
    again.load_state_dict(first.state_dict())
    assert seen + [ids_of(batch) for batch in again] == whole
    assert sorted(i for ids in whole for i in ids) == sorted(set(chain(*whole)))
    assert len(set(chain(*whole))) == 320


def test_a_loader_says_how_many_batches_a_pass_has(load, groups):
    config = {**groups["text"], "use_multimodal_sampling": True, "batch_size": 5, "num_workers": 1}
    loader = load({**config, "force_finite": True})
    assert len(loader) == len(list(loader)) == 64
    assert len(loader) == len(list(loader)), "of the next pass"
    text = {key: value for key, value in groups["text"].items() if key != "batch_size"}
    both = {name: {**text, "use_multimodal_sampling": True, "batch_size": size} for name, size in (("a", 5), ("b", 7))}
    fused = {**both, "multi_config": True, "sampler_fusion": "round_robin", "force_finite": True}
    assert len(load(fused)) == len(list(load(fused))) == 64 + 46
    with pytest.raises(TypeError, match="the data has no end"):
        len(load(config))


def test_resuming_with_other_ranks_keeps_the_order_of_examples(load, groups):
    config = {**groups["text"], "use_multimodal_sampling": True, "batch_size": 4}
    whole = [i for batch in islice(load(config), 30) for i in ids_of(batch)]
    one = load(config)
    iterator = iter(one)
    seen = [i for _ in range(10) for i in ids_of(next(iterator))]
    state = one.state_dict()
    ranks = [load(config, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    steps = zip(*(islice(rank, 10) for rank in ranks), strict=True)
    rest = [i for step in steps for batch in step for i in ids_of(batch)]
    assert seen + rest == whole


def test_what_has_changed_since_the_checkpoint_is_told(load, tmp_path, groups, caplog):
    config = {"input_cfg": groups["text"]["input_cfg"], "use_multimodal_sampling": True, "batch_size": 4}
    loader = load(config)
    next(iter(loader))
    state = loader.state_dict()
    for language in ("en", "fr"):
        with open(tmp_path / f"text_fr.{language}", "a") as file:
            file.write("un\n")
    changed = load({**config, "seed": 5, "shard_seed": 5})
    changed.load_state_dict(state)
    assert len(ids_of(next(iter(changed)))) == 4
    assert "shuffled by the seed 0, this run's is by 5" in caplog.text
    assert "makes 21 examples, 20 when the checkpoint was written" in caplog.text


def test_the_directions_of_a_line_do_not_share_a_batch(load, tmp_path):
    languages = ("de", "en", "es", "fr")
    for language in languages:
        (tmp_path / f"train.{language}").write_text("".join(f"un {number}\n" for number in range(1000)))
    paths = {language: str(tmp_path / f"train.{language}") for language in languages}
    text = {"input_cfg": [{"type": "parallel_text", "paths": paths}], "use_multimodal_sampling": True}
    loader = load({**text, "batch_size": 32})
    batches = [[i.split(":")[1] for i in ids_of(batch)] for batch in islice(loader, 200)]
    distinct = sum(len(set(lines)) for lines in batches) / len(batches)
    assert distinct > 29, "32 at random of 1,000 lines in twelve directions would be 31.5"

    finite = load({**text, "batch_size": 32, "force_finite": True, "num_workers": 2})
    ids = [i for batch in finite for i in ids_of(batch)]
    assert len(ids) == len(set(ids)) == 1000 * 12


@pytest.mark.parametrize("keys", [{"extra_fields": []}, {"slice_length": 1000}])
def test_streams_are_opened_by_each_worker_itself(load, tmp_path, keys):
    """A stream that planning has begun to read would share its place in the file with the workers."""
    line = Path(Corpus(tmp_path).source("speech_de", 1)["manifest_filepath"]).read_text()
    manifest = str(tmp_path / "many.json")
    Path(manifest).write_text(line * 1500)  # more than a reader's buffer holds
    source = {"type": "nemo", "manifest_filepath": [[manifest, 1.0], [manifest, 2.0]], "target_lang": "de", **keys}
    loader = load({"input_cfg": [source], "batch_size": 50, "force_finite": True, "num_workers": 2})
    for _ in range(2):
        assert len([i for batch in loader for i in ids_of(batch)]) == 3000
    assert loader.skipped_records.count() == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_records_inside_conversations_are_counted(load, tmp_path, tokenizer, workers):
    """NeMo reads the conversions, our reader the manifest inside; planning has read from it before."""
    manifest = Path(Corpus(tmp_path).source("speech_de", 10)["manifest_filepath"])
    manifest.write_text("{not json\n" + manifest.read_text())
    source = {"type": "lhotse_as_conversation", "manifest_filepath": str(manifest), "audio_locator_tag": LOCATOR}
    config = {"input_cfg": [source], "batch_size": 2, "force_finite": True, "num_workers": workers}
    loader = load(config, dataset=SALMDataset(tokenizer))
    for passes in (1, 2):
        assert len(list(loader)) == 5
        assert loader.skipped_records.read_count == 11 * passes
        assert loader.skipped_records.causes() == {"not JSON": 1}
        assert list(loader.skipped_records.shares().values()) == [pytest.approx(1 / 11)]


def test_fewer_ranks_lose_nothing_that_waited(load, groups):
    buckets = {"bucket_duration_bins": [8, 16, 30], "bucket_batch_size": [4, 4, 4]}
    config = {**groups["text"], "use_multimodal_sampling": True, **buckets, "force_finite": True}
    for steps in (3, 12, 16):
        ranks = [load(config, rank, 4) for rank in range(4)]
        seen = [i for rank in ranks for batch in islice(rank, steps) for i in ids_of(batch)]
        one = load(config)
        one.load_state_dict(ranks[0].state_dict())
        rest = [i for batch in one for i in ids_of(batch)]
        assert len(seen) + len(rest) == 320
        assert len(set(seen + rest)) == 320


def test_more_ranks_in_the_last_steps_stay_together(load, groups):
    config = {**groups["text"], "use_multimodal_sampling": True, "batch_size": 4, "force_finite": True}
    one = load(config)
    steps = sum(1 for _ in load(config))
    seen = [i for batch in islice(one, steps - 1) for i in ids_of(batch)]
    ranks = [load(config, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(one.state_dict())
    rest = [[i for batch in rank for i in ids_of(batch)] for rank in ranks]
    assert len(seen) + sum(map(len, rest)) == 320


def test_a_changed_blend_goes_on_with_the_sources_that_were_there(load, tmp_path):
    corpus = Corpus(tmp_path)
    a, b, c = (corpus.source(name, 300) for name in ("text_de", "text_es", "text_fr"))
    config = {"use_multimodal_sampling": True, "batch_size": 5}
    before = load({**config, "input_cfg": [a, b]})
    seen = [i for batch in islice(before, 40) for i in ids_of(batch)]
    after = load({**config, "input_cfg": [c, b, a]})
    after.load_state_dict(before.state_dict())
    rest = [i for batch in islice(after, 50) for i in ids_of(batch)]
    assert not set(seen) & set(rest)
    assert sum(dataset_of(i) == "text_fr" for i in rest) > 60


def test_mux_keeps_the_languages_of_its_groups(load, groups, tmp_path):
    manifest = tmp_path / "many.json"
    record = {"audio_filepath": str(tmp_path / "speech_de_00000.wav"), "duration": 0.1, "sampling_rate": 16000}
    lines = [json.dumps({**record, "text": "one", "translations": {"de": "eins", "fr": "un"}})] * 10
    manifest.write_text("\n".join(lines))
    speech = {"input_cfg": [{"type": "nemo", "manifest_filepath": str(manifest)}], "target_lang": "de"}
    loader = load({**MUX, "speech": speech, "text": groups["text"], "max_bad_records": None})
    (found,) = {
        e["target_lang"] for batch in islice(loader, 10) for e in batch.get("audio", {}).get("examples", [])
    } or {"none"}
    assert found == "de"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": {"inptu_cfg": []}}, r"data.train_ds.text.inptu_cfg: under sampler_fusion: mux a group has"),
        ({"text": {"target_lang": "de"}}, r"data.train_ds.text.input_cfg: missing"),
    ],
)
def test_mux_tells_what_a_group_lacks(load, groups, change, message):
    with pytest.raises(ConfigError, match=message):
        load({**MUX, **groups, **change})


def test_concatenation_is_refused(load, groups):
    with pytest.raises(ConfigError, match="concatenate_samples: would join recordings but not their prompts"):
        load({"input_cfg": groups["speech"]["input_cfg"], "batch_size": 2, "concatenate_samples": True})


def test_the_order_of_data_does_not_depend_on_where_it_lies(load, tmp_path):
    seen = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        source = Corpus(tmp_path / folder).source("text_de", 300)
        loader = load({"input_cfg": [source], "use_multimodal_sampling": True, "batch_size": 10})
        seen.append([ids_of(batch) for batch in islice(loader, 40)])
    assert seen[0] == seen[1]


def test_a_source_goes_on_by_the_seed_of_its_checkpoint(load, tmp_path):
    """As with ``seed: trng``, which is another in each run."""
    config = {"input_cfg": [Corpus(tmp_path).source("text_de", 300)], "use_multimodal_sampling": True, "batch_size": 10}
    first = load({**config, "seed": 1, "shard_seed": 1})
    before = [ids_of(batch) for batch in islice(first, 10)]
    again = load({**config, "seed": 2, "shard_seed": 2})
    again.load_state_dict(first.state_dict())
    after = [ids_of(batch) for batch in islice(again, 20)]
    assert sorted(i for batch in before + after for i in batch) == sorted(
        f"text_de.en:{number}" for number in range(1, 301)
    )


def test_data_that_can_only_be_read_from_its_beginning_is_streamed_and_the_log_says_so(load, groups, tmp_path, caplog):
    (tmp_path / "more.en.gz").write_bytes(gzip.compress(b"one\n" * 9))
    (tmp_path / "more.fr.gz").write_bytes(gzip.compress(b"un\n" * 9))
    languages = {"source_lang": "en", "target_lang": "fr"}
    paths = {"source_paths": f"{tmp_path}/more.en.gz", "target_paths": f"{tmp_path}/more.fr.gz"}
    source = {"type": "parallel_text", **paths, **languages}
    loader = load({"input_cfg": [source], "use_multimodal_sampling": True, "batch_size": 3, "force_finite": True})
    assert sum(len(ids_of(batch)) for batch in loader) == 9
    assert "more.fr.gz can only be read from its beginning, so all data is streamed" in caplog.text
    with pytest.raises(TypeError):
        len(loader)


def test_a_type_that_nemo_reads_is_named_as_the_reason_to_stream(load, tmp_path, tokenizer, caplog):
    manifest = Corpus(tmp_path).source("speech_de", 4)["manifest_filepath"]
    source = {"type": "lhotse_as_conversation", "manifest_filepath": manifest, "audio_locator_tag": LOCATOR}
    config = {"input_cfg": [source], "batch_size": 2, "force_finite": True}
    assert len(list(load(config, dataset=SALMDataset(tokenizer)))) == 2
    reason = (
        "is of the type lhotse_as_conversation, which NeMo reads from its beginning (type: nemo has an index), so all"
    )
    assert f"{manifest} {reason}" in caplog.text
    caplog.clear()
    list(
        load({**config, "input_cfg": [{**source, "type": "nemo", "target_lang": "de"}]}, dataset=SALMDataset(tokenizer))
    )
    assert "so all data is streamed" not in caplog.text
