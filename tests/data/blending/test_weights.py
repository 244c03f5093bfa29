"""Shares of the sources in a blend: as NeMo weighs them, or by what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
from click.testing import CliRunner
from nemo.collections.common.data.lhotse import cutset
from omegaconf import OmegaConf
from rich.console import Console

from nemo_emmett import cli
from nemo_emmett.data.blending import weights as blend_module
from nemo_emmett.data.blending.weights import Node
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.planning.blend_report import Recipe, print_blend, streams_of

WHERE = "data.train_ds"


def blend_of(section: dict, place: str, **options) -> Node:
    """The blend of a dataset without groups."""
    (group,) = parse_dataset(section, place).groups
    return blend_module.blend_of(group, **options)


def shares(node: Node) -> list[float]:
    return [leaf.share for leaf in node.leaves()]


def group(*members: dict, **keys) -> dict:
    return {"type": "group", "input_cfg": list(members), **keys}


@pytest.fixture
def hours(write_manifest) -> Callable[..., dict]:
    """A source of so many hours of speech, an hour a record."""

    def make(name: str, count: int, **keys) -> dict:
        record = {"audio_filepath": "nowhere.wav", "duration": 3600.0, "text": "one", "lang": "en"}
        path = write_manifest(f"{name}.json", [record] * count)
        return {"type": "nemo", "manifest_filepath": str(path), "target_lang": "de", **keys}

    return make


@pytest.fixture
def words(write_lines) -> Callable[..., dict]:
    """A text source of so many words on each side, one word a line."""

    def make(name: str, count: int, **keys) -> dict:
        return {
            "type": "parallel_text",
            "source_paths": str(write_lines(f"{name}.en", ["one"] * count)),
            "target_paths": str(write_lines(f"{name}.de", ["eins"] * count)),
            "source_lang": "en",
            "target_lang": "de",
            **keys,
        }

    return make


class TestAsNeMo:
    """Each config is given to NeMo's own reader, too, and what it hands to its multiplexer is compared."""

    @pytest.fixture
    def nemos(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict], list[list[float]]]:
        def weights_of(config: dict) -> list[list[float]]:
            seen = []

            def mux(*cutsets, weights, **kwargs):
                seen.append([1 / len(cutsets)] * len(cutsets) if weights is None else weights)
                return cutsets[0]

            with monkeypatch.context() as patched:
                patched.setattr(cutset, "mux", mux)
                cutset.read_cutset_from_config(OmegaConf.create(deepcopy(config)))
            return seen

        return weights_of

    @staticmethod
    def levels(node: Node) -> Iterator[list[float]]:
        """The shares of the members of each group that has several, in the order in which NeMo combines them."""
        for child in node.children:
            yield from TestAsNeMo.levels(child)
        if len(node.children) > 1:
            yield [child.share / node.share for child in node.children]

    @pytest.fixture
    def nested(self, hours) -> Callable[..., dict]:
        """Three levels; the second group has a single member, and itself a group."""

        def make(inner: dict | None = None, weighted: bool = True, **keys) -> dict:
            sources = [hours(name, 1) for name in "abcdef"]
            if weighted:
                for source, weight in zip(sources, (3, 1, 5, 0.5, 2, 7), strict=True):
                    source["weight"] = weight
            of_groups = [{"weight": w} for w in (1, 9, 4)] if weighted else [{}] * 3
            first = group(sources[0], sources[1], **of_groups[0], **(inner or {}))
            second = group(group(sources[2], sources[3], sources[4], **of_groups[2]), **of_groups[1])
            return {"input_cfg": [first, second, sources[5]], **keys}

        return make

    @pytest.mark.parametrize(
        ("temperature", "inner"),
        [
            (None, None),
            (0.5, None),
            (0, None),
            (1.5, None),
            ([0.5, 0.0, 2.0], None),
            ([1.0, 0.3, 0.3], {"reweight_temperature": [0.25]}),
            ([1.0, 0.3, 0.3], {"reweight_temperature": []}),
            (0.5, {"reweight_temperature": None}),
            (None, {"reweight_temperature": [0.25, 0.5]}),
        ],
    )
    def test_weights_and_temperatures(self, nested, nemos, temperature, inner) -> None:
        config = nested(inner, reweight_temperature=temperature)
        ours, expected = list(self.levels(blend_of(config, WHERE))), nemos(config)
        assert len(ours) == len(expected) == 3
        for level, of_nemo in zip(ours, expected, strict=True):
            assert level == pytest.approx(of_nemo, rel=1e-12)

    def test_without_weights_members_are_equal_whatever_the_temperature(self, nested, nemos) -> None:
        config = nested(weighted=False, reweight_temperature=0.5)
        assert list(self.levels(blend_of(config, WHERE))) == [pytest.approx(level) for level in nemos(config)]
        assert shares(blend_of(config, WHERE)) == pytest.approx([1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9, 1 / 3])

    def test_groups_in_files(self, nested, nemos, tmp_path: Path) -> None:
        config = nested()
        inside = tmp_path / "second.yaml"
        inside.write_text(json.dumps(config["input_cfg"][1]["input_cfg"]))
        config["input_cfg"][1]["input_cfg"] = str(inside)
        outside = tmp_path / "all.yaml"
        outside.write_text(json.dumps(config["input_cfg"]))
        config |= {"input_cfg": str(outside), "reweight_temperature": [0.5, 0.0, 2.0]}
        ours, expected = list(self.levels(blend_of(config, WHERE))), nemos(config)
        assert ours == [pytest.approx(level) for level in expected]
        assert blend_of(config, WHERE).children[1].children[0].place == f"{WHERE}.input_cfg.1.input_cfg.0"

    def test_by_hand(self, nested) -> None:
        # outer 1 : 9 : 7 at temperature 0.5 is 1 : 3 : sqrt(7); then 3 : 1, equal; then 5 : 0.5 : 2 squared
        root = blend_of(nested(reweight_temperature=[0.5, 0.0, 2.0]), WHERE)
        outer = 1 + 3 + 7**0.5
        expected = [0.5 / outer, 0.5 / outer, *(3 / outer * w / 29.25 for w in (25, 0.25, 4)), 7**0.5 / outer]
        assert shares(root) == pytest.approx(expected)
        assert sum(shares(root)) == pytest.approx(1.0)

    @pytest.mark.parametrize("temperature", [[0.5, 0.5], [0.5] * 4])
    def test_a_list_of_the_wrong_length_is_refused_as_nemo_does(self, nested, nemos, temperature) -> None:
        config = nested(reweight_temperature=temperature)
        with pytest.raises(ValueError, match="nesting depth"):
            nemos(config)
        with pytest.raises(ConfigError, match=r"data\.train_ds\.reweight_temperature: has \d values.*3 levels deep"):
            blend_of(config, WHERE)

    def test_nothing_is_counted(self, nested, monkeypatch: pytest.MonkeyPatch) -> None:
        counted = []
        monkeypatch.setattr(blend_module, "sizes_of", lambda sources, *_: counted.extend(sources) or [])
        root = blend_of(nested(), WHERE)
        assert counted == []
        assert all(leaf.size is None for leaf in root.leaves())


class TestTree:
    def test_sources_are_those_of_the_dataset(self, hours, words) -> None:
        settings = {
            "source_lang": "en",
            "input_cfg": [
                group(hours("a", 1, tags={"domain": "news"}), words("b", 1), tags={"task": "ast"}),
                hours("c", 1),
            ],
        }
        root = blend_of(settings, WHERE)
        assert [leaf.source for leaf in root.leaves()] == parse_dataset(settings, WHERE).sources
        assert [leaf.place for leaf in root.leaves()] == [s.place for s in parse_dataset(settings, WHERE).sources]
        assert (root.name, root.children[0].name) == ("train_ds", "task: ast")

    def test_a_classic_config_is_one_source(self, hours) -> None:
        settings = {"manifest_filepath": hours("a", 2)["manifest_filepath"], "weights": "auto"}
        (leaf,) = blend_of(settings, WHERE).leaves()
        assert (leaf.share, leaf.place) == (1.0, WHERE)
        assert [leaf.source] == parse_dataset(settings, WHERE).sources

    def test_groups_of_a_multi_config_are_trees_of_their_own(self, hours, words) -> None:
        settings = {
            "multi_config": True,
            "weights": "auto",
            "audio": {"input_cfg": [hours("a", 1), hours("b", 3)]},
            "text": {"input_cfg": [words("c", 1), words("d", 4)], "weights": None},
        }
        blends = {group.name: blend_module.blend_of(group) for group in parse_dataset(settings, WHERE).groups}
        assert shares(blends["audio"]) == [0.25, 0.75]
        assert shares(blends["text"]) == [0.5, 0.5]  # which does not want them


class TestAuto:
    def test_speech_weighs_its_hours(self, hours) -> None:
        root = blend_of({"weights": "auto", "input_cfg": [hours("a", 1), hours("b", 3)]}, WHERE)
        assert shares(root) == [0.25, 0.75]
        assert [leaf.weight for leaf in root.leaves()] == [1.0, 3.0]
        assert [leaf.size.examples for leaf in root.leaves()] == [1, 3]
        assert root.size.hours == 4.0

    def test_text_weighs_the_tokens_of_both_sides(self, write_lines, tokenizer) -> None:
        def source(name: str, english: str, german: str) -> dict:
            paths = {"source_paths": str(write_lines(f"{name}.en", [english]))}
            paths["target_paths"] = str(write_lines(f"{name}.de", [german]))
            return {"type": "parallel_text", **paths, "source_lang": "en", "target_lang": "de"}

        entries = [source("a", "one two three", "eins"), source("b", "one", "eins")]
        root = blend_of({"weights": "auto", "input_cfg": entries}, WHERE, tokenizer=tokenizer)
        assert [leaf.weight for leaf in root.leaves()] == [4, 2]

    def test_derived_weights_are_tempered(self, hours) -> None:
        entries = [hours("a", 1), hours("b", 9)]
        assert shares(blend_of({"weights": "auto", "reweight_temperature": 0.5, "input_cfg": entries}, WHERE)) == [
            0.25,
            0.75,
        ]

    def test_a_group_weighs_all_that_is_in_it(self, hours) -> None:
        # 1 + 2 hours against 9; inside, 1 against 2
        entries = [group(hours("a", 1), hours("b", 2)), hours("c", 9)]
        assert shares(blend_of({"weights": "auto", "input_cfg": entries}, WHERE)) == [1 / 12, 2 / 12, 9 / 12]

    def test_a_group_may_ask_for_its_members_alone(self, hours) -> None:
        entries = [group(hours("a", 1), hours("b", 3), weights="auto"), hours("c", 9)]
        root = blend_of({"input_cfg": entries}, WHERE)
        assert shares(root) == [0.125, 0.375, 0.5]
        assert [leaf.size is None for leaf in root.leaves()] == [False, False, True]

    def test_given_weights_hold_for_the_groups_that_have_them(self, hours) -> None:
        entries = [group(hours("a", 1), hours("b", 3), weight=1), hours("c", 9, weight=1)]
        assert shares(blend_of({"weights": "auto", "input_cfg": entries}, WHERE)) == [0.125, 0.375, 0.5]

    def test_speech_beside_text_weighs_its_tokens(self, hours, words) -> None:
        # 2 h of 0.08 s are 90,000 tokens; 15,000 words on two sides are 30,000
        entries = [group(hours("a", 2)), group(words("b", 15_000))]
        settings = {"weights": "auto", "token_equivalent_duration": 0.08, "input_cfg": entries}
        assert shares(blend_of(settings, WHERE)) == pytest.approx([0.75, 0.25])

    def test_each_source_has_its_own_token_equivalent(self, hours, words) -> None:
        # 1 h: 45,000 tokens of 0.08 s, or 22,500 of 0.16 s
        entries = [hours("a", 1, token_equivalent_duration=0.16), hours("b", 1), words("c", 11_250)]
        settings = {"weights": "auto", "token_equivalent_duration": 0.08, "input_cfg": entries}
        assert shares(blend_of(settings, WHERE)) == pytest.approx([0.25, 0.5, 0.25])

    def test_without_one_the_key_is_named(self, hours, words) -> None:
        settings = {"weights": "auto", "input_cfg": [hours("a", 1), words("b", 1)]}
        with pytest.raises(ConfigError, match=r"input_cfg\.0\.token_equivalent_duration: missing"):
            blend_of(settings, WHERE)

    def test_without_a_tokenizer_it_says_that_words_are_counted(self, words, monkeypatch) -> None:
        said = []
        monkeypatch.setattr(blend_module.logging, "warning", lambda message, **_: said.append(message))
        root = blend_of({"weights": "auto", "input_cfg": [words("a", 1), words("b", 3)]}, WHERE)
        assert shares(root) == [0.25, 0.75]
        assert said == ["data.train_ds: there is no tokenizer, so text weighs its words rather than its tokens."]

    def test_a_source_that_cannot_be_counted_needs_a_weight(self, hours) -> None:
        entries = [hours("a", 1), {"type": "multimodal_conversation", "manifest_filepath": "c.json"}]
        with pytest.raises(ConfigError, match=r"input_cfg\.1\.weight: missing; what a source of type 'multimodal_con"):
            blend_of({"weights": "auto", "input_cfg": entries}, WHERE)
        for entry in entries:
            entry["weight"] = 1
        assert shares(blend_of({"weights": "auto", "input_cfg": entries}, WHERE)) == [0.5, 0.5]

    def test_a_source_that_holds_nothing_cannot_be_weighed(self, hours) -> None:
        with pytest.raises(DataError, match=r"input_cfg\.1: holds nothing"):
            blend_of({"weights": "auto", "input_cfg": [hours("a", 1), hours("b", 0)]}, WHERE)

    def test_index_dir_of_the_config_is_used(self, hours, tmp_path: Path, monkeypatch) -> None:
        seen = []
        real = blend_module.sizes_of
        monkeypatch.setattr(blend_module, "sizes_of", lambda *args: seen.append(args[2]) or real(*args))
        settings = {"weights": "auto", "index_dir": str(tmp_path / "kept"), "input_cfg": [hours("a", 1), hours("b", 1)]}
        blend_of(settings, WHERE)
        blend_of(settings, WHERE, index_dir="elsewhere")
        assert seen == [str(tmp_path / "kept"), "elsewhere"]


class TestMistakes:
    @pytest.mark.parametrize("auto", [None, "auto"])
    def test_some_members_without_a_weight(self, hours, auto) -> None:
        settings = {"weights": auto, "input_cfg": [hours("a", 1, weight=2), hours("b", 1)]}
        with pytest.raises(ConfigError, match=r"input_cfg\.1\.weight: missing, while others in its group have one"):
            blend_of(settings, WHERE)

    @pytest.mark.parametrize("weight", [0, -1, "heavy", True, float("nan"), float("inf")])
    def test_no_weight(self, hours, weight) -> None:
        settings = {"input_cfg": [hours("a", 1, weight=1), hours("b", 1, weight=weight)]}
        with pytest.raises(ConfigError, match=r"input_cfg\.1\.weight: .* cannot be used; give a number above 0"):
            blend_of(settings, WHERE)

    def test_unknown_weights(self, hours) -> None:
        with pytest.raises(ConfigError, match=r"input_cfg\.0\.weights: 'automatic' cannot be used; give 'auto'"):
            blend_of({"input_cfg": [group(hours("a", 1), weights="automatic")]}, WHERE)

    @pytest.mark.parametrize("temperature", [0.5, "cold", [0.5, "cold"]])
    def test_temperature_of_a_group(self, hours, temperature) -> None:
        settings = {"input_cfg": [group(hours("a", 1), reweight_temperature=temperature)]}
        with pytest.raises(ConfigError, match=r"input_cfg\.0\.reweight_temperature.*: .* cannot be used; give a"):
            blend_of(settings, WHERE)


class TestReport:
    @pytest.fixture
    def settings(self, hours, words) -> dict:
        """Speech: 1 and 3 examples, equal shares. Text: 10 and 30 examples, shares by tokens."""
        return {
            "multi_config": True,
            "sampler_fusion": "zip",
            "audio": {"batch_size": 4, "input_cfg": [hours("a", 1), hours("b", 3)]},
            "text": {
                "use_multimodal_sampling": True,
                "bucket_duration_bins": [5, 10, 20],
                "bucket_batch_size": [20, 12, 4],
                "weights": "auto",
                "input_cfg": [words("c", 10), words("d", 30)],
            },
        }

    @staticmethod
    def printed(recipe: Recipe, width: int = 120, **options) -> str:
        console = Console(width=width)
        with console.capture() as capture:
            print_blend(recipe, console=console, **options)
        return capture.get()

    def row(self, text: str, name: str) -> list[str]:
        (line,) = [line for line in text.splitlines() if name in line]
        return line.split()

    def test_shares_and_epochs_by_hand(self, settings) -> None:
        # A zip step holds 4 of speech and (20 + 12 + 4) / 3 = 12 of text. In 50 steps of 2 processes speech gives 400
        # examples, 200 of each source: 200 and 66.67 epochs; text 1,200, a quarter and three: 30 epochs of both.
        text = self.printed(Recipe(parse_dataset(settings, WHERE), batches_per_step=2), steps=50)
        assert self.row(text, "a.json")[-3:] == ["12.5", "%", "200"]
        assert self.row(text, "b.json")[-3:] == ["12.5", "%", "66.67"]
        assert self.row(text, "c.{en,de}")[-4:] == ["20", "18.8", "%", "30.00"]
        assert self.row(text, "d.{en,de}")[-4:] == ["60", "56.2", "%", "30.00"]
        assert "Expected share of the examples: text 75.0 %, speech 25.0 %." in text
        assert "A step takes one batch of each group (sampler_fusion: zip)." in text
        assert "A batch of text holds 12 examples (mean of bucket_batch_size" in text
        assert "2 times a step of the trainer" in text
        settings["text"] |= {"bucket_duration_bins": [20], "bucket_batch_size": [12]}
        text = self.printed(Recipe(parse_dataset(settings, WHERE)), steps=50)
        assert "A batch of text holds 12 examples (bucket_batch_size)." in text
        assert "Text is measured in words" in text

    @pytest.mark.parametrize(
        ("fusion", "weights", "expected"),
        [
            ("round_robin", None, {"audio": 0.5, "text": 0.5}),
            ("randomized_round_robin", {"audio": 3, "text": 1}, {"audio": 0.75, "text": 0.25}),
            ("randomized_round_robin", None, {"audio": 0.5, "text": 0.5}),
        ],
    )
    def test_batches_of_the_fusions(self, settings, fusion, weights, expected) -> None:
        settings |= {"sampler_fusion": fusion, "sampler_weights": weights}
        streams = streams_of(Recipe(parse_dataset(settings, WHERE)))
        assert {stream.name: stream.batches for stream in streams} == expected
        text = self.printed(Recipe(parse_dataset(settings, WHERE)))
        # 0.5 x 4 of speech to 0.5 x 12 of text, or 0.75 x 4 to 0.25 x 12
        speech = 100 * expected["audio"] * 4 / (expected["audio"] * 4 + expected["text"] * 12)
        assert f"speech {speech:.1f} %" in text
        assert f"(sampler_fusion: {fusion}): audio {100 * expected['audio']:.1f} %" in text

    def test_mux_is_one_stream_with_shares_of_examples(self, hours, words) -> None:
        settings = {
            "multi_config": True,
            "sampler_fusion": "mux",
            "sampler_weights": {"audio": 1, "text": 3},
            "batch_size": 8,
            "audio": {"input_cfg": [hours("a", 1)]},
            "text": {"input_cfg": [words("c", 10)]},
        }
        (stream,) = streams_of(Recipe(parse_dataset(settings, WHERE)))
        assert shares(stream.blend) == [0.25, 0.75]

    def test_batches_limited_by_length(self, hours, words) -> None:
        # 3,600 s a record: 5 in 18,000 s; text of two words, and speech of 7,200 s to the token of 3,600 s: 2 each
        def examples(**settings) -> float | None:
            (stream,) = streams_of(Recipe(parse_dataset(settings, WHERE)))
            return stream.examples

        speech = [hours("a", 1), hours("b", 3)]
        assert examples(input_cfg=speech, batch_duration=18_000) == 5
        assert examples(input_cfg=speech, batch_duration=18_000, batch_size=3) == 3
        in_tokens = {"use_multimodal_sampling": True, "batch_tokens": 30}
        assert examples(input_cfg=[words("c", 5)], **in_tokens) == 15
        both = [hours("d", 1), words("e", 5)]
        assert examples(input_cfg=both, **in_tokens, token_equivalent_duration=900) == 10  # 4 and 2 tokens: 3
        assert examples(input_cfg=both, **in_tokens) is None

    @pytest.mark.parametrize("width", [80, 120])
    def test_it_fits_the_terminal(self, settings, width) -> None:
        deep = group(group(*settings["audio"]["input_cfg"], tags={"domain": "news and talks of all kinds"}))
        settings["audio"]["input_cfg"] = [deep]
        text = self.printed(Recipe(parse_dataset(settings, WHERE)), width=width)
        table, _, _ = text.partition("\n\n")
        lines = table.splitlines()
        assert len(lines) == 10  # headings, the dataset, two groups, two groups inside, four sources
        assert all(len(line) <= width for line in lines)
        assert all(name in table for name in ("a.json", "b.json", "{en,de}"))

    def test_what_cannot_be_counted_is_shown_as_unknown(self, hours) -> None:
        entries = [hours("a", 1), {"type": "multimodal_conversation", "manifest_filepath": "c.json"}]
        text = self.printed(Recipe(parse_dataset({"batch_size": 1, "input_cfg": entries}, WHERE)))
        assert self.row(text, "c.json")[-1] == "?"
        assert "speech 50.0 %, other 50.0 %" in text


class TestCommand:
    @pytest.fixture
    def invoke(self):
        return lambda *arguments: CliRunner().invoke(cli.main, ["blend", *map(str, arguments)])

    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[[object], Path]:
        def write(content: object) -> Path:
            path = tmp_path / "recipe.yaml"
            path.write_text(json.dumps(content))  # JSON is YAML
            return path

        return write

    def test_a_recipe(self, invoke, write, hours) -> None:
        entry = hours("a", 4)
        entry["manifest_filepath"] = entry["manifest_filepath"].replace("a.json", "${name}.json")
        data = {"train_ds": {"batch_size": 2, "input_cfg": [entry]}}
        trainer = {"max_steps": 10, "devices": 3, "num_nodes": 2, "accumulate_grad_batches": 4}
        done = invoke(write({"name": "a", "data": data, "trainer": trainer}))
        assert done.exit_code == 0, done.output
        # 10 steps x 24 batches x 2 examples of 4: 120 passes
        assert "data.train_ds" in done.output
        assert "in 10 steps" in done.output
        assert done.output.count(" 120\n") == 1
        assert "in 20 steps" in invoke(write({"name": "a", "data": data}), "--steps", 20).output

    def test_a_bare_list_and_a_bare_dataset(self, invoke, write, hours) -> None:
        for content in ([hours("a", 4)], {"input_cfg": [hours("a", 4)]}):
            done = invoke(write(content))
            assert done.exit_code == 0, done.output
            assert "a.json" in done.output
            assert "a number of examples that the config does not give" in done.output
            assert "epochs" not in done.output.lower()
        done = invoke(write({"batch_size": 4, "input_cfg": [hours("a", 4)]}))
        assert "Epochs are passes over a source in 1,000 steps" in done.output

    def test_text_is_measured_by_the_tokenizer(self, invoke, write, words, tokenizer) -> None:
        folder = tokenizer.tokenizer.name_or_path
        entries = [words("a", 4)]
        assert "tokens" in invoke(write(entries), "--tokenizer", folder).output
        recipe = {"model": {"pretrained_llm": folder}, "data": {"train_ds": {"input_cfg": entries}}}
        assert "tokens" in invoke(write(recipe)).output
        assert "words" in invoke(write(entries)).output

    @pytest.mark.parametrize(
        ("content", "options", "sentence"),
        [
            ({"data": {"train_ds": {"manifest_filepath": "${gone}"}}}, [], "cannot be resolved"),
            ({"data": {"train_ds": {"manifest_filepath": "???"}}}, [], "cannot be resolved"),
            ({"model": {}}, [], "has no data.train_ds; name the dataset's place in it by --section."),
            ({"defaults": ["base"]}, [], "there is no recipe 'base'"),
            ({"data": {}}, ["--section", "data.train_ds"], "has no section 'data.train_ds'; its sections are data."),
            (
                {"data": {"validation_ds": {"datasets": {"dev": {"manifest_filepath": "a"}}}}},
                ["--section", "data.validation_ds"],
                "choose one of data.validation_ds.datasets.dev.",
            ),
            ([{"type": "nemo", "manifest_filepath": "gone.json"}], [], "there is no file 'gone.json'"),
            ([{"type": "nemo", "manifest_filepath": "a.json"}], ["--tokenizer", "gone"], "--tokenizer: 'gone' is"),
        ],
    )
    def test_mistakes_are_one_sentence(self, invoke, write, content, options, sentence) -> None:
        done = invoke(write(content), *options)
        assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
        assert sentence in done.output

    def test_a_missing_file_is_one_sentence(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(cli.main, ["blend", str(tmp_path / "gone.yaml")])
        assert (done.exit_code, done.output.count("\n")) == (2, 1)
        assert "gone.yaml' cannot be read: there is no such file." in done.output
