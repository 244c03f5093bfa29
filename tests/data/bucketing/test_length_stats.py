"""From a config to its bins: lengths as NeMo measures them, what is dropped and why, and the command that shows it."""

from __future__ import annotations

import json
import logging as python_logging

import numpy as np
import pytest
from click.testing import CliRunner
from nemo.collections.common.data.lhotse.dataloader import determine_bucket_duration_bins
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_emmett.cli import main
from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.bucketing import length_stats
from nemo_emmett.data.bucketing.bins import optimal_bins, optimal_bins_2d
from nemo_emmett.data.bucketing.length_stats import Lengths, as_nemo_writes, solve
from nemo_emmett.data.config.dataset_config import DatasetConfig, GroupConfig, parse_dataset
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.planning.bins_report import bins_of_dataset, draw_bins, tokenizer_of
from nemo_emmett.planning.blend_report import read_recipe
from nemo_emmett.planning.known_by_model import known_by_model
from nemo_emmett.plugin import find_model

LOCATOR = "<|audio|>"
WHERE = "data.train_ds"
TRANSLATION = ExampleKind.TRANSLATION


def dataset(section: dict) -> DatasetConfig:
    return parse_dataset(section, WHERE)


def group_of(section: dict) -> GroupConfig:
    (group,) = dataset(section).groups
    return group


def measure(section: dict, tokenizer, **options) -> Lengths:
    return length_stats.measure(group_of(section), tokenizer, TRANSLATION, **options)


def auto_bins(section: dict, tokenizer) -> list:
    return length_stats.auto_bins(group_of(section), tokenizer, TRANSLATION)


@pytest.fixture
def text(write_lines) -> dict:
    """Texts of 1 to 8 words with answers of one word more; every word is a token."""
    sources = ["one " * n for n in range(1, 9)]
    targets = ["eins " * (n + 1) for n in range(1, 9)]
    return {
        "prompt_format": "emmett_t5",
        "use_multimodal_sampling": True,
        "measure_total_length": False,  # as for encoder-decoders
        "input_cfg": [
            {
                "type": "parallel_text",
                "source_paths": str(write_lines("a.en", sources)),
                "target_paths": str(write_lines("a.de", targets)),
                "source_lang": "en",
                "target_lang": "de",
            }
        ],
    }


@pytest.fixture
def spoken(speech) -> dict:
    """Eight recordings of 1.0 to 1.7 s, to be translated to German and Spanish."""
    return {
        "prompt_format": "emmett_t5",
        "audio_locator_tag": LOCATOR,
        "token_equivalent_duration": 0.08,
        "input_cfg": [{"type": "nemo", "manifest_filepath": str(speech(8))}],
    }


def test_text_is_measured_in_tokens(text, tokenizer) -> None:
    lengths = measure(text, tokenizer, two_dimensional=True)
    # <de> and </s> around the source, </s> behind the target.
    assert lengths.inputs.tolist() == [n + 2 for n in range(1, 9)]
    assert lengths.outputs.tolist() == [n + 2 for n in range(1, 9)]
    assert (lengths.unit, lengths.share_kept) == ("tokens", 1.0)


def test_one_length_is_that_of_input_and_output_unless_told_otherwise(text, tokenizer) -> None:
    del text["measure_total_length"]  # NeMo's default is made for decoders
    lengths = measure(text, tokenizer, two_dimensional=False)
    assert lengths.inputs.tolist() == [2 * (n + 2) for n in range(1, 9)]


def test_speech_is_measured_in_seconds_or_in_tokens(spoken, tokenizer) -> None:
    seconds = measure(spoken, tokenizer, two_dimensional=False)
    assert seconds.inputs.tolist() == pytest.approx(np.repeat(np.arange(10, 18) / 10, 2).tolist())
    assert (seconds.unit, seconds.outputs) == ("seconds", None)
    tokens = measure({**spoken, "use_multimodal_sampling": True}, tokenizer, two_dimensional=True)
    frames = [13, 14, 15, 17, 18, 19, 20, 22]  # of 80 ms, begun ones included
    assert tokens.inputs.tolist() == np.repeat(frames, 2).tolist()
    # NeMo counts all tokens of a prompted recording: <de> <|audio|> </s> eins zwei </s>.
    assert set(tokens.outputs) == {6}


def test_what_nemos_filters_drop_is_counted(text, spoken, tokenizer) -> None:
    settings = {**text, "min_tokens": 4, "max_tpt": 1.0}
    lengths = measure(settings, tokenizer, two_dimensional=True)
    assert lengths.inputs.tolist() == list(range(4, 11))
    assert lengths.dropped == {"TokenCountFilter": 1}
    assert lengths.share_kept == 7 / 8
    lengths = measure({**spoken, "max_duration": 1.45}, tokenizer, two_dimensional=True)
    assert lengths.dropped == {"DurationFilter": 6}
    assert len(lengths.inputs) == 10


def test_a_limit_and_examples_from_elsewhere(text, tokenizer) -> None:
    limited = measure(text, tokenizer, two_dimensional=False, limit=3)
    assert limited.inputs.tolist() == [3, 4, 5]
    # Weighted sources start over when they end: a sample has the proportions of the blend.
    weighted = {**text, "input_cfg": [{**text["input_cfg"][0], "weight": 1.0}]}
    assert len(measure(weighted, tokenizer, two_dimensional=False, limit=20).inputs) == 20
    assert len(measure(weighted, tokenizer, two_dimensional=False).inputs) == 8

    from nemo.collections.common.data.lhotse.text_adapters import SourceTargetTextExample, TextExample

    pair = SourceTargetTextExample(TextExample("one two", "en"), TextExample("eins", "de"), custom={"id": "given"})
    nested = {
        **text,
        "input_cfg": [{"type": "group", "input_cfg": text["input_cfg"]}],
        "reweight_temperature": [1.0, 0.5],
    }
    for section in (text, nested):
        group = group_of(section)
        given = length_stats.measure_stream(group, tokenizer, TRANSLATION, two_dimensional=True, sample=[pair])
        assert (given.inputs.tolist(), given.outputs.tolist()) == ([4], [2])
    assert len(measure(nested, tokenizer, two_dimensional=True).inputs) == 8


def test_what_cannot_be_measured(text, spoken, tokenizer) -> None:
    def refused(error, settings, with_tokenizer=True) -> str:
        with pytest.raises(error) as caught:
            measure(settings, tokenizer if with_tokenizer else None, two_dimensional=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no tokenizer" in refused(ConfigError, text, with_tokenizer=False)
    speech = {**spoken, "use_multimodal_sampling": True}
    del speech["token_equivalent_duration"]
    assert f"{WHERE}.token_equivalent_duration: missing" in refused(ConfigError, speech)
    group = {**text, "use_multimodal_sampling": False}
    above = {"multi_config": True, "use_multimodal_sampling": True, "text": group}  # not inherited, as in NeMo
    assert f"{WHERE}.text.use_multimodal_sampling: is false" in refused(ConfigError, above)
    assert "of 8 records (8 x TokenCountFilter)" in refused(DataError, {**text, "max_tokens": 1})


# bucket_duration_bins: auto


def test_auto_bins_are_the_optimum_of_the_sample(text, tokenizer) -> None:
    settings = {**text, "num_buckets": 3, "bucket_duration_bins": "auto", "num_cuts_for_bins_estimate": 6}
    lengths = np.arange(3, 9)
    # Without batch sizes the last bucket is open, so that longer examples than those of the sample have a place.
    assert auto_bins({**settings, "batch_tokens": 50}, tokenizer) == optimal_bins(lengths, 3)[:-1]
    sized = {**settings, "bucket_batch_size": [3, 2, 1]}
    assert auto_bins(sized, tokenizer) == optimal_bins(lengths, 3) == [4, 6, 8]
    nested = {**settings, "num_buckets": 2, "num_sub_buckets": 2, "bucket_batch_size": [4, 3, 2, 1]}
    bins = auto_bins(nested, tokenizer)
    assert bins == optimal_bins_2d(lengths, lengths, 2, 2)
    assert determine_bucket_duration_bins(OmegaConf.create({"bucket_duration_bins": bins})) == [tuple(b) for b in bins]


def test_auto_bins_are_logged_to_be_pasted(text, tokenizer) -> None:
    settings = {**text, "num_buckets": 2, "bucket_batch_size": [1, 1]}
    messages = []
    handler = python_logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging._logger.addHandler(handler)
    try:
        auto_bins(settings, tokenizer)
    finally:
        logging._logger.removeHandler(handler)
    assert any(message.endswith("bucket_duration_bins: [6,10]") for message in messages)


def test_auto_bins_need_fitting_batch_sizes(text, tokenizer) -> None:
    with pytest.raises(ConfigError, match="bucket_batch_size: missing; with num_sub_buckets each of the 2 x 2"):
        auto_bins({**text, "num_buckets": 2, "num_sub_buckets": 2}, tokenizer)
    with pytest.raises(ConfigError, match=r"has 3 sizes for 2 buckets; give one for each of \[6,10\]"):
        auto_bins({**text, "num_buckets": 2, "bucket_batch_size": [1, 2, 3]}, tokenizer)


def test_every_example_arrives_in_batches_of_its_bucket(text, tokenizer) -> None:
    lengths = np.arange(3, 11)
    bins = optimal_bins_2d(lengths, lengths, 2, 2)  # strips up to 6 and 10, outputs up to 4, 6 and 8, 10
    settings = {**text, "bucket_duration_bins": bins, "bucket_batch_size": [8] * 4, "force_finite": True, "seed": 0}
    batches = [
        sorted(batch["text"]["context_lens"].tolist())
        for batch in get_multimodal_dataloader(settings, 0, 1, SpeechTextDataset(tokenizer), tokenizer)
    ]
    assert sorted(batches) == [[3, 4], [5, 6], [7, 8], [9, 10]]


# The report


def test_each_group_has_its_own_bins(text, spoken, tokenizer) -> None:
    settings = {"multi_config": True, "prompt_format": "emmett_t5", "speech": {**spoken}, "text": {**text}}
    settings["text"]["num_sub_buckets"] = 2
    speech, pairs = bins_of_dataset(dataset(settings), tokenizer, num_buckets=2)
    assert (speech.place, pairs.place) == (f"{WHERE}.speech", f"{WHERE}.text")
    assert speech.bins == [1.3, 1.7]
    assert pairs.bins == solve(pairs.lengths, 2, 2)
    # By hand: 16 recordings, the cap 1.3 for 1.0 to 1.3 and 1.7 for the others, each pads 2 x (0.3 + 0.2 + 0.1).
    assert speech.padding.amount == pytest.approx(2 * 2 * 0.6)
    assert speech.padding.amount <= next(iter(speech.padding_before.values())).amount


def test_groups_that_share_batches_share_bins(text, tokenizer) -> None:
    source = {"input_cfg": text.pop("input_cfg")}
    settings = {**text, "multi_config": True, "sampler_fusion": "mux", "first": source, "second": dict(source)}
    (group,) = bins_of_dataset(dataset(settings), tokenizer, num_buckets=2)
    assert (group.place, len(group.lengths.inputs)) == (WHERE, 16)


def test_the_recipes_own_bins_are_shown_beside(text, tokenizer) -> None:
    (group,) = bins_of_dataset(dataset({**text, "bucket_duration_bins": [5, 9]}), tokenizer, num_buckets=2)
    assert group.padding_before["as configured"].kept == 7  # the longest has 10 tokens
    # Three of 3, 4, 5 and four of 6 to 9: 2 + 1 and 3 + 2 + 1.
    assert group.padding_before["as configured"].amount == 9


def test_outliers_are_left_out_and_counted(text, tokenizer, write_lines) -> None:
    source = text["input_cfg"][0]
    source["source_paths"] = str(write_lines("b.en", ["one two three"] * 40 + ["one two three"]))
    source["target_paths"] = str(write_lines("b.de", ["eins", "eins zwei"] * 20 + ["eins " * 50]))
    (group,) = bins_of_dataset(dataset(text), tokenizer, num_buckets=1, num_sub_buckets=1, outliers=4)
    assert group.lengths.dropped == {"outliers": 1}
    assert group.lengths.share_kept == 40 / 41
    assert group.bins == [[5, 3]]
    assert group.max_ratio == ("max_tpt", [0.6])
    with pytest.raises(ConfigError, match="give --num-sub-buckets"):
        bins_of_dataset(dataset(text), tokenizer, outliers=4)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("parallel_text", "a.en is text"),
        (
            "lhotse_as_conversation",
            r"c.json is read as conversations \(type: lhotse_as_conversation\), whose",
        ),
    ],
)
def test_examples_without_seconds_have_bins_in_tokens_only(text, tokenizer, kind: str, reason: str) -> None:
    pairs = {**text["input_cfg"][0], "target_paths": "a.en", "source_paths": "a.de"}
    source = pairs if kind == "parallel_text" else {"type": kind, "manifest_filepath": "c.json"}
    section = {**text, "input_cfg": [source], "use_multimodal_sampling": False}
    sentence = rf"{WHERE}\.use_multimodal_sampling: is false, .* but {reason}.*; set use_multimodal_sampling: true"
    with pytest.raises(ConfigError, match=sentence):
        bins_of_dataset(dataset(section), tokenizer, num_buckets=2)


def test_bins_are_written_as_nemo_reads_them() -> None:
    assert as_nemo_writes([[3.0, 12.0], [4.5, 7.0]]) == "[[3,12],[4.5,7]]"
    assert OmegaConf.create(f"bins: {as_nemo_writes([1.07, 20.0])}").bins == [1.07, 20]


# The command


@pytest.fixture
def recipe(text, tokenizer, tmp_path) -> str:
    """A recipe whose model says what the dataset's config does not."""
    dataset = {key: value for key, value in text.items() if key != "prompt_format"}
    model = {"pretrained_llm": tokenizer.tokenizer.name_or_path, "prompt_format": "emmett_t5"}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"model": model, "data": {"train_ds": dataset}}))
    return str(path)


def test_the_command_prints_bins_and_draws_them(recipe, tmp_path) -> None:
    picture = tmp_path / "bins.png"
    arguments = ["bins", recipe, "--num-buckets", "2", "--num-sub-buckets", "2", "--output", str(picture)]
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lengths = np.arange(3, 11)
    bins = as_nemo_writes(optimal_bins_2d(lengths, lengths, 2, 2))
    lines = result.output.splitlines()
    assert f"bucket_duration_bins: {bins}" in lines
    assert any("8 examples, 100.00 % of those measured" in line for line in lines)
    # Least padding by hand: strips up to 6 and 10, outputs 3, 4 | 5, 6 and 7, 8 | 9, 10 in them.
    # Inputs pad 2 x (3 + 2 + 1) = 12 of 64, outputs 4 x 1 = 4 of 56.
    (least,) = (line for line in lines if line.startswith("least padding"))
    assert "18.75 %" in least
    assert "7.14 %" in least
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_dimension_is_drawn_too(text, tokenizer, tmp_path) -> None:
    groups = bins_of_dataset(dataset(text), tokenizer, num_buckets=2)
    draw_bins(groups, tmp_path / "bins.png")
    assert (tmp_path / "bins.png").stat().st_size > 5_000
    with pytest.raises(DataError, match="cannot be written"):
        draw_bins(groups, tmp_path / "nowhere" / "bins.png")


def test_the_command_tells_mistakes_in_a_sentence(recipe, tmp_path) -> None:
    result = CliRunner().invoke(main, ["bins", recipe, "--section", "data.test_ds"])
    assert result.exit_code == 2
    result = CliRunner().invoke(main, ["bins", recipe, "--outliers", "4"])
    assert result.exit_code == 2


def test_a_recipes_model_says_what_its_data_needs(recipe) -> None:
    content = OmegaConf.load(recipe)
    known = known_by_model(content, find_model)
    defaults = {**known.defaults, "token_equivalent_duration": 0.04}
    found = read_recipe(content, recipe, None, defaults)
    (group,) = found.dataset.groups
    assert group.place == WHERE
    assert group.prompt_format == "emmett_t5"
    assert group.token_equivalent_duration == 0.04
    assert tokenizer_of(found, None, known.tokenizer).token_to_id(LOCATOR) is not None
