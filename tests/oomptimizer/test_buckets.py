"""What bins bound: the longest example of each bucket, by how its group measures examples."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.buckets import Shape, is_zip, read_groups

SPEECH = {"input_cfg": [{"type": "nemo_tarred"}]}
TEXT = {"input_cfg": [{"type": "txt_pair"}, {"type": "group", "input_cfg": [{"type": "parallel_text"}]}]}
IN_TOKENS = {"use_multimodal_sampling": True}
FRAME = {"token_equivalent_duration": 0.08}


def longest(group: dict, bins: Any, **options: Any) -> Shape:
    """The shape of the last bucket of a dataset without groups."""
    (read,) = read_groups(OmegaConf.create({**group, "bucket_duration_bins": bins}), **options).values()
    return read.buckets[-1].shape


@pytest.mark.parametrize(
    ("group", "bins", "shape"),
    [
        (SPEECH, [2.0, 10.0], Shape("audio", 10.0, 0, 120)),  # 12 tokens a second
        (SPEECH, [[2, 8], [10, 50]], Shape("audio", 10.0, 0, 50)),
        (SPEECH | IN_TOKENS | FRAME, [[50, 8], [100, 50]], Shape("audio", 8.0, 0, 50)),  # all of it speech
        (SPEECH | IN_TOKENS | FRAME, [100], Shape("audio", 8.0, 100, 100, total=True)),  # NeMo's default
        (SPEECH | IN_TOKENS | FRAME | {"measure_total_length": False}, [100], Shape("audio", 8.0, 0, 100)),
        (TEXT | IN_TOKENS, [[16, 8], [64, 50]], Shape("text", 0.0, 64, 50)),
        (TEXT | IN_TOKENS, [64], Shape("text", 0.0, 64, 64, total=True)),
        (TEXT | IN_TOKENS | {"measure_total_length": False}, [64], Shape("text", 0.0, 64, 64)),
    ],
)
def test_the_longest_example_of_a_bucket(group: dict, bins: list, shape: Shape) -> None:
    assert longest(group, bins) == shape


def test_a_group_that_holds_speech_and_text_is_taken_to_be_all_speech() -> None:
    mixed = {"input_cfg": [*SPEECH["input_cfg"], *TEXT["input_cfg"]]} | IN_TOKENS | FRAME
    assert longest(mixed, [[100, 20]]) == Shape("audio", 8.0, 0, 20)


def test_the_models_token_equivalent_duration_is_used_if_the_recipe_has_none() -> None:
    assert longest(SPEECH | IN_TOKENS, [[100, 20]], token_equivalent_duration=0.04).seconds == 4.0


def test_groups_are_measured_each_by_its_own_config() -> None:
    train_ds = {"multi_config": True, "sampler_fusion": "zip", "sampler_weights": {"speech": 1, "text": 1}, **FRAME}
    speech = SPEECH | IN_TOKENS | {"bucket_duration_bins": [[100, 20]]}
    text = TEXT | IN_TOKENS | {"bucket_duration_bins": [[10, 5], [30, 9]]}
    config = OmegaConf.create({**train_ds, "speech": speech, "text": text})
    groups = read_groups(config)
    assert {name: group.modality for name, group in groups.items()} == {"speech": "audio", "text": "text"}
    assert groups["speech"].buckets[0].shape.seconds == 8.0
    assert [str(bucket) for bucket in groups["text"].buckets] == ["text: bucket 1 [10, 5]", "text: bucket 2 [30, 9]"]
    assert is_zip(config)
    assert not is_zip(OmegaConf.create({"sampler_fusion": "zip"}))


def test_under_mux_the_bins_are_those_of_train_ds() -> None:
    train_ds = {"multi_config": True, "sampler_fusion": "mux", "bucket_duration_bins": [[10, 5]], **IN_TOKENS}
    (group,) = read_groups(OmegaConf.create({**train_ds, "a": TEXT, "b": TEXT})).values()
    assert group.modality == "text"
    (group,) = read_groups(OmegaConf.create({**train_ds, **FRAME, "a": TEXT, "b": SPEECH})).values()
    assert group.modality == "audio"


def test_sources_may_be_in_a_file(tmp_path) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text("- {type: txt_pair}\n")
    assert longest({"input_cfg": str(path), **IN_TOKENS}, [[10, 5]]).modality == "text"
    with pytest.raises(ConfigError, match=r"train_ds\.input_cfg: gone\.yaml cannot be read"):
        longest({"input_cfg": "gone.yaml", **IN_TOKENS}, [[10, 5]])


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        (
            TEXT,
            "train_ds.use_multimodal_sampling: is false, so lengths are in seconds, but the group holds text alone",
        ),
        (SPEECH | IN_TOKENS, "train_ds.token_equivalent_duration: is missing"),
        (
            SPEECH | IN_TOKENS | {"token_equivalent_duration": 0},
            "train_ds.token_equivalent_duration: 0 cannot be used;",
        ),
        (SPEECH | {"use_multimodal_sampling": "false"}, "train_ds.use_multimodal_sampling: 'false' cannot be used;"),
        (SPEECH | {"multi_config": "no"}, "train_ds.multi_config: 'no' cannot be used; give true or false, or null."),
        ({"input_cfg": [3]}, "train_ds.input_cfg: [3] cannot be used; give a list of sources"),
        ({"input_cfg": [{"type": "nemo", "tags": "en"}]}, "train_ds: tags of a source: en cannot be used"),
    ],
)
def test_a_group_that_cannot_be_measured_is_reported(group: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        longest(group, [[10, 5]])
    assert str(error.value).startswith(sentence)


def test_a_group_without_any_size_learns_of_both_ways() -> None:
    """docs/how-to/out-of-memory.md has the same two."""
    for config, key in ((SPEECH | {"max_duration": 10.0}, "max_duration"), (TEXT | IN_TOKENS, "max_tokens")):
        with pytest.raises(
            ConfigError, match=rf"write the bins .* give batch_size, which it replaces, with {key}, the"
        ):
            read_groups(OmegaConf.create(config))


def one_size(config: dict) -> tuple[str | None, Shape]:
    (group,) = read_groups(OmegaConf.create(config)).values()
    (bucket,) = group.buckets
    return group.limit_key, bucket.shape


def test_a_group_of_one_batch_size_is_one_bucket_up_to_its_longest_example() -> None:
    assert one_size(SPEECH | {"batch_size": 4, "max_duration": 10.0}) == ("max_duration", Shape("audio", 10.0, 0, 120))
    in_tokens = {"batch_size": 4, "max_tokens": 64, **IN_TOKENS}
    assert one_size(TEXT | in_tokens) == ("max_tokens", Shape("text", 0.0, 64, 64, total=True))
    assert one_size(SPEECH | FRAME | in_tokens)[1].seconds == pytest.approx(5.12)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            SPEECH | {"batch_size": 4},
            "train_ds.max_duration: is missing; OOMptimizer finds this group's one batch_size",
        ),
        (SPEECH | {"batch_size": 4, "max_duration": float("inf")}, "train_ds.max_duration: inf is no bound"),
        (TEXT | IN_TOKENS | {"batch_size": 4}, "train_ds.max_tokens: is missing"),
        (SPEECH | {"batch_size": 4, "use_bucketing": True}, "train_ds.bucket_duration_bins: is missing"),
        (SPEECH | {"batch_duration": 100}, "train_ds.bucket_duration_bins: is missing"),
        (
            {"input_cfg": [{"type": "lhotse_as_conversation"}], "batch_size": 4, "max_duration": 10.0},
            "train_ds.use_multimodal_sampling: is false, so lengths are in seconds, but the group holds conversations "
            "(type: lhotse_as_conversation), whose length is in tokens; set it to true.",
        ),
    ],
)
def test_a_group_without_buckets_needs_a_batch_size_and_a_bound(config: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_groups(OmegaConf.create(config))
    assert str(error.value).startswith(sentence)


def test_packed_rows_are_one_bucket() -> None:
    (group,) = read_groups(OmegaConf.create({**TEXT, "packing": True, "row_tokens": 64, "batch_size": 8})).values()
    assert (group.bins, group.limit_key) == ((64.0,), "row_tokens")
    assert group.buckets[0].shape == Shape("text", 0.0, 64, 64)
    speech = {**SPEECH, **FRAME, "packing": True, "row_tokens": [100, 60], "batch_size": 8}
    (group,) = read_groups(OmegaConf.create(speech)).values()
    assert group.bins == ((100.0, 60.0),)
    assert group.buckets[0].shape == Shape("audio", 8.0, 100, 60)
    with pytest.raises(ConfigError, match=r"^train_ds.token_equivalent_duration: is missing; rows are in tokens"):
        read_groups(OmegaConf.create({**speech, "token_equivalent_duration": None}))
    with pytest.raises(ConfigError, match=r"^train_ds.row_tokens: 0 cannot be used"):
        read_groups(OmegaConf.create({**speech, "row_tokens": 0}))
