"""``nemo-emmett``: commands, and mistakes in one sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from nemo_emmett import __version__, cli
from nemo_emmett.corpora.registry import CORPORA
from nemo_emmett.errors import DataError, ModelError

from .conftest import write_tone


def test_version_and_commands(invoke) -> None:
    assert invoke("--version").output == f"nemo-emmett, version {__version__}\n"
    of_data = {"prepare", "index", "blend", "bins", "plan", "oomptimize"}
    assert set(cli.main.commands) == of_data | {"init", "train", "export", "evaluate", "translate", "serve", "doctor"}


def test_the_version_is_the_one_that_the_changelog_describes() -> None:
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    number, unreleased = re.search(r"^## ([\d.]+)( \(unreleased\))?$", changelog, re.MULTILINE).groups()
    assert __version__ == number + (".dev0" if unreleased else "")


def test_the_installed_command_starts_without_heavy_imports() -> None:
    code = "import sys; from nemo_emmett.cli import main; main(['--help'], standalone_mode=False); "
    code += "sys.exit('torch' in sys.modules or 'nemo' in sys.modules or 'hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def commands_below(command: click.Command, context: click.Context) -> Iterator[tuple[click.Context, click.Command]]:
    """A command, and those of its groups."""
    yield context, command
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        below = command.get_command(context, name)
        yield from commands_below(below, click.Context(below, info_name=name, parent=context))


COMMANDS = [*commands_below(cli.main, click.Context(cli.main, info_name="nemo-emmett"))]


@pytest.mark.parametrize(("context", "command"), COMMANDS, ids=[context.command_path for context, _ in COMMANDS])
class TestHelp:
    def test_lists_of_commands_are_whole(self, context: click.Context, command: click.Command) -> None:
        text = " ".join(command.get_help(context).split())
        assert "..." not in re.sub(r"\[?[A-Z=,\]]+\.\.\.|, \.\.\.|/\.\.\.", "", text)
        for name in command.list_commands(context) if isinstance(command, click.Group) else ():
            line = command.get_command(context, name).get_short_help_str(1000)
            if name.replace("-", "_") not in CORPORA:
                assert re.search(rf" {name} {re.escape(line)}", text), name

    def test_options_have_help_and_say_their_default(self, context: click.Context, command: click.Command) -> None:
        for option in command.params:
            if not isinstance(option, click.Option):
                continue
            assert option.help, option.opts
            default = option.to_info_dict()["default"]
            is_optional = not (option.required or option.multiple or option.is_flag or "required" in option.help)
            if is_optional and default in (None, ()):
                assert "[default: " in option.help, option.opts


def test_defaults_of_the_phrasebook_are_those_of_its_config() -> None:
    from nemo_emmett.corpora.phrasebook import PhrasebookConfig

    config = PhrasebookConfig()
    options = {option.name: option.help for option in cli.main.commands["prepare"].commands["phrasebook"].params[1:]}
    for name in ("languages", "types", "train_items", "dev_items", "test_items", "renditions", "max_number"):
        value = getattr(config, name)
        assert f"[default: {','.join(value) if isinstance(value, tuple) else value}]" in options[name]
    assert (config.accents, config.spoken_train_items, len(config.variants)) == (True, None, 11)


EMPTY_PATHS = [
    ["export", "", "out"],
    ["export", "a.ckpt", ""],
    ["export", "a.ckpt", "out", "--config", ""],
    ["evaluate", "", "recipe.yaml"],
    ["evaluate", "model", ""],
    *(["evaluate", "model", "r.yaml", option, ""] for option in ("--output", "--log-dir", "--baseline")),
    *(["translate", "a", "--to", "de", "--model", "m", option, ""] for option in ("--output", "--tsv", "--manifest")),
    ["translate", "a", "--to", "de", "--model", ""],
    *([command, ""] for command in ("train", "index", "blend", "bins", "plan", "oomptimize")),
    *(["bins", "salm_t5", option, ""] for option in ("--output", "--tokenizer")),
    ["index", "salm_t5", "--index-dir", ""],
    *(["plan", "salm_t5", "--memory", "H100", option, ""] for option in ("--output", "--profile")),
    ["prepare", "phrasebook", ""],
    ["prepare", "captions", "", "out"],
    ["prepare", "captions", "source", ""],
    ["prepare", "fleurs", "", "out"],
    ["prepare", "fleurs", "source", "out", "--flores", ""],
    ["prepare", "leaks", "a", "--held-out", ""],
    ["doctor", "--output", ""],
]


@pytest.mark.parametrize("arguments", EMPTY_PATHS, ids=" ".join)
def test_an_empty_path_is_refused(invoke, arguments: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "is empty; name a " in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


class TestTranslate:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        """A folder that looks like that of a model that was trained to translate to German and French."""
        folder = tmp_path / "model"
        folder.mkdir()
        directions = {"text": [["en", "de"]], "audio": [["en", "fr"]]}
        (folder / "config.json").write_text(json.dumps({"training": {"directions": directions}}))
        (folder / "model.safetensors").touch()
        return folder

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list:
        """A model that translates into upper case and keeps what it was asked."""
        import nemo_emmett.models

        calls = []

        class Upper:
            def __init__(self, folder: Path) -> None:
                self.folder = folder

            def to(self, device: str) -> Upper:
                self.device = device
                return self

            def translate(self, inputs, source_lang: list, target_lang: list, **options) -> list[str]:
                codes = (each[0] if len(set(each)) == 1 else each for each in (target_lang, source_lang))
                calls.append((self.folder, inputs, *codes, *([options] if options else [])))
                if "bad" in inputs:
                    raise DataError("the text cannot be translated.")
                return [Path(getattr(item, "path", item)).name.upper() for item in inputs]

        monkeypatch.setitem(vars(nemo_emmett.models), "load", Upper)
        return calls

    def test_texts_and_recordings_one_per_line(self, invoke, calls, model: Path, tmp_path: Path) -> None:
        recording = tmp_path / "a.WAV"
        recording.touch()
        done = invoke("translate", "good day", recording, "--to", "de", "--from", "en", "--model", model)
        assert (done.exit_code, done.stdout) == (0, "GOOD DAY\nA.WAV\n")
        assert calls == [(model, ["good day", str(recording)], "de", "en")]

    def test_the_model_may_come_from_the_environment(self, invoke, calls, model, monkeypatch) -> None:
        monkeypatch.setenv("NEMO_EMMETT_MODEL", str(model))
        assert invoke("translate", "good day", "--to", "de").exit_code == 0
        assert calls == [(model, ["good day"], "de", "en")]

    def test_a_missing_recording_is_one_sentence(self, invoke, calls) -> None:
        done = invoke("translate", "gone.wav", "--to", "de", "--model", "m")
        assert done.exit_code == 2
        assert done.output == "Error: audio file 'gone.wav' does not exist.\n"
        assert calls == []

    def test_a_model_that_cannot_be_loaded_is_one_sentence(self, invoke, model, monkeypatch) -> None:
        import nemo_emmett.models

        def load(folder: Path) -> None:
            raise ModelError(f"{folder}: is no saved model.")

        monkeypatch.setitem(vars(nemo_emmett.models), "load", load)
        done = invoke("translate", "good day", "--to", "de", "--model", model)
        assert (done.exit_code, done.stderr.splitlines()[1:]) == (2, [f"Error: {model}: is no saved model."])
        assert "Loading NeMo" in done.stderr

    def test_lines_of_standard_input_and_options(self, model, calls) -> None:
        options = ["--num-beams", "4", "--batch-size", "2", "--max-new-tokens", "9", "--device", "cpu"]
        command = ["translate", "--to", "de", "--model", str(model), *options]
        done = CliRunner().invoke(cli.main, command, input="one\ntwo\n\nthree\n")
        assert (done.exit_code, done.stdout) == (0, "ONE\nTWO\n\nTHREE\n")
        given = {"num_beams": 4, "batch_size": 2, "max_new_tokens": 9}
        assert calls == [(model, ["one", "two"], "de", "en", given), (model, ["three"], "de", "en", given)]

    def test_a_record_at_fault_is_reported_and_the_rest_is_translated(self, invoke, model, calls, tmp_path) -> None:
        table, output = tmp_path / "t.tsv", tmp_path / "out.jsonl"
        table.write_text("id\tsource\ttarget_lang\na\tone\tde\nb\tbad\tde\nc\tthree\tfr\nd\t\tfr\n")
        command = ["translate", "--model", model, "--tsv", table, "--output", output]
        done = invoke(*command)
        assert done.exit_code == 1
        assert done.stdout == ""
        assert "Not translated: b: the text cannot be translated.\n" in done.stderr
        assert f"Not translated: d: '{table}', line 5: the column 'source' is empty.\n" in done.stderr
        assert done.stderr.endswith(f"2 of 4 could not be translated.\nTranslations: {output}\n")
        records = [json.loads(line) for line in output.read_text().splitlines()]
        assert [(one["id"], one["translation"], one["target_lang"]) for one in records] == [
            ("a", "ONE", "de"),
            ("b", None, "de"),
            ("c", "THREE", "fr"),
            ("d", None, "fr"),
        ]
        assert [one.get("error") for one in records][:2] == [None, "the text cannot be translated"]
        again = invoke(*command)
        assert again.exit_code == 2
        assert f"--output: '{output}' exists already; name another file, or add --overwrite." in again.output
        assert invoke(*command, "--overwrite", "--format", "lines").exit_code == 1
        assert output.read_text() == "ONE\n\nTHREE\n\n"

    def test_a_long_recording_is_translated_in_parts(self, invoke, model, calls, tmp_path) -> None:
        recording, output = write_tone(tmp_path / "a.wav", 3.0), tmp_path / "out.jsonl"
        command = ["translate", recording, "--to", "de", "--model", model, "--output", output]
        done = invoke(*command, "--chunk-seconds", "2")
        assert (done.exit_code, done.stderr.splitlines()[-1]) == (0, f"Translations: {output}")
        (record,) = map(json.loads, output.read_text().splitlines())
        first, second = record["chunks"]
        assert (first["start"], first["end"], second["end"]) == (0.0, second["start"], 3.0)
        assert 1.0 <= first["end"] <= 2.0
        assert [len(inputs) for _, inputs, *_ in calls] == [2]
        (model / "config.json").write_text(json.dumps({"training": {"max_duration": 1.1}}))
        assert invoke(*command, "--overwrite").exit_code == 0
        assert len(json.loads(output.read_text())["chunks"]) == 3
        done = invoke(*command, "--overwrite", "--chunk-seconds", "0.5")
        assert done.exit_code == 2
        assert "--chunk-seconds" in done.stderr

    def test_a_language_that_the_model_never_saw_is_named(self, invoke, model, calls) -> None:
        said = "Warning: --to: the model was not trained to translate to es, but to de, fr; expect translations"
        assert said in invoke("translate", "good day", "--to", "es", "--model", model).stderr
        assert "Warning" not in invoke("translate", "good day", "--to", "fr", "--model", model).stderr

    def test_the_only_source_language_of_a_target_is_taken(self, invoke, model, calls, tmp_path: Path) -> None:
        directions = {"text": [["en", "de"], ["en", "fr"], ["de", "fr"], [None, "es"]], "audio": [["en", "de"]]}
        (model / "config.json").write_text(json.dumps({"training": {"directions": directions}}))
        table, output = tmp_path / "t.tsv", tmp_path / "out.jsonl"
        rows = [("one", "", "de"), ("two", "", "de"), ("three", "fr", "de"), ("four", "", "fr"), ("five", "", "es")]
        table.write_text("\n".join(map("\t".join, [("source", "source_lang", "target_lang"), *rows])))
        done = invoke("translate", "--model", model, "--tsv", table, "--output", output)
        assert done.exit_code == 0
        assert done.stderr.count("Source language: ") == 1
        assert "Source language: en, the only one that the model was trained on for de.\n" in done.stderr
        records = [json.loads(line) for line in output.read_text().splitlines()]
        assert [record["source_lang"] for record in records] == ["en", "en", "fr", None, None]
        done = invoke("translate", "good day", "--to", "de", "--from", "es", "--model", model)
        assert "Source language" not in done.stderr
        assert calls[-1] == (model, ["good day"], "de", "es")

    def test_what_is_no_exported_model_is_said_with_the_remedy(self, invoke, calls, tmp_path: Path) -> None:
        (tmp_path / "exp" / "checkpoints").mkdir(parents=True)
        checkpoint = tmp_path / "exp" / "checkpoints" / "a=1.ckpt"
        checkpoint.touch()
        export = f"such as by `nemo-emmett export {checkpoint} FOLDER`"
        for given, why, remedy in (
            (checkpoint, "has no config.json", export),
            (checkpoint.parent, "has no config.json", export),
            (tmp_path / "exp", "has no config.json", export),
            (tmp_path / "gone", "there is no such folder", "that `nemo-emmett train` (key export_dir) or"),
            (tmp_path, "has no config.json", "or `nemo-emmett export` has written."),
            ("org/some-model", "there is no such folder", "by `hf download org/some-model --local-dir FOLDER`."),
        ):
            done = invoke("translate", "good day", "--to", "de", "--model", given)
            assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
            assert done.stderr.startswith(f"Error: '{given}' is not an exported model: ")
            assert why in done.stderr, done.stderr
            assert remedy in done.stderr, done.stderr

    @pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:99"])
    def test_a_device_that_is_not_there_is_one_sentence(self, invoke, model, calls, device: str) -> None:
        done = invoke("translate", "good day", "--to", "de", "--model", model, "--device", device)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1].startswith("Error: --device: ")


class TestPrepare:
    def test_options_reach_the_corpus_and_what_was_made_is_told(self, invoke, monkeypatch, tmp_path: Path) -> None:
        from nemo_emmett.corpora import phrasebook

        calls = []

        def prepare_phrasebook(out: Path, config: phrasebook.PhrasebookConfig, num_jobs: int | None) -> SimpleNamespace:
            calls.append((out, config, num_jobs))
            return SimpleNamespace(
                made_now=True,
                items={"train": 12, "test": 4},
                recordings={"train": {"en": 12, "de": 12}, "test": {"en": 4, "de": 4}},
                hours={"train": {"en": 0.25, "de": 0.5}, "test": {"en": 0.01, "de": 0.02}},
            )

        monkeypatch.setattr(phrasebook, "prepare_phrasebook", prepare_phrasebook)
        options = ["--seed", 3, "--languages", "en,de", "--types", "number", "--train-items", 12, "--jobs", 2]
        done = invoke("prepare", "phrasebook", tmp_path, *options)
        expected = phrasebook.PhrasebookConfig(languages=("en", "de"), types=("number",), train_items=12, seed=3)
        assert calls == [(tmp_path, expected, 2)]
        assert "train: 12 items, 24 recordings, 0.75 hours (written)" in done.output
        assert "test: 4 items, 8 recordings, 0.03 hours (written)" in done.output

    def test_corpora_are_named_as_their_commands(self, invoke) -> None:
        for name, said in (("nothing", "europarl-st, fleurs, mtedx, must-c."), ("must_d", "did you mean 'must-c'?")):
            sentence = invoke("prepare", name).stderr.splitlines()[0]
            assert sentence.startswith(f"Error: '{name}' is no corpus that can be prepared; ")
            assert sentence.endswith(said)

    def test_an_unknown_language_is_one_sentence(self, invoke, tmp_path: Path) -> None:
        done = invoke("prepare", "phrasebook", tmp_path, "--languages", "en,xx")
        assert done.exit_code == 2
        assert done.output.startswith("Error: phrasebook.languages: there is no 'xx'")
        assert done.output.count("\n") == 1


def test_evaluate_hands_its_options_on(invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nemo_emmett.evaluation
    from nemo_emmett.evaluation import recipe

    checked, calls = [], []
    record = lambda *args, **kwargs: calls.append((args, kwargs))  # noqa: E731
    monkeypatch.setitem(vars(nemo_emmett.evaluation), "evaluate_recipe", record)
    monkeypatch.setattr(recipe, "check_evaluation", lambda *args: checked.append(args))
    done = invoke(
        "evaluate",
        "model",
        "recipe.yaml",
        "--output",
        tmp_path,
        "--num-beams",
        4,
        "--baseline",
        "b.json",
        "--baseline",
        "c",
        "--metrics",
        "TER,chrF++",
    )
    assert done.exit_code == 0, done.output
    options = {"output": tmp_path, "num_beams": 4, "metrics": ("TER", "chrF++")}
    options["baselines"] = (Path("b.json"), Path("c"))
    others = dict.fromkeys(("name", "max_new_tokens", "log_dir", "examples", "update_card"))  # left to the recipe
    assert calls == [((Path("recipe.yaml"), Path("model")), options | others)]
    assert checked == [(Path("recipe.yaml"), Path("model"), options | others)]


def test_a_missing_recording_is_told_before_the_model_is_loaded(invoke, tmp_path: Path) -> None:
    done = invoke("translate", "--model", str(tmp_path), "--to", "de", "Read v1.2 of it.", str(tmp_path / "b.flac"))
    assert done.exit_code == 2
    assert "b.flac' does not exist" in done.output


@pytest.mark.parametrize("command", ["index", "blend", "bins"])
def test_a_misspelt_key_of_the_data_is_told(invoke, tmp_path, command) -> None:
    (tmp_path / "data.json").write_text("{}\n")
    config = tmp_path / "data.yaml"
    config.write_text(f"manifest_filepath: {tmp_path}/data.json\nwieghts: auto\nbatch_size: 4\n")
    result = invoke(command, str(config))
    assert result.exit_code == 2
    assert "data.wieghts: there is no such key; did you mean 'weights'?" in result.output + result.stderr


class TestReportsOnData:
    """``index``, ``blend`` and ``bins`` take what ``plan`` and ``train`` take."""

    @pytest.mark.parametrize("command", ["index", "blend", "bins"])
    def test_shipped_recipes_and_overrides(self, invoke, command: str, tmp_path: Path) -> None:
        done = invoke(command, "salm_t5", f"corpus={tmp_path}")
        assert done.exit_code == 2
        (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
        # The first file that is no pattern of shards, before the model's tokenizer is read.
        assert line.startswith("Error: data.train_ds.text.input_cfg.0.paths.en: there is no file '")
        assert f"{tmp_path}/text/train.en-de.en" in line

    def test_a_list_of_sources_takes_no_overrides(self, invoke, tmp_path: Path) -> None:
        (tmp_path / "list.yaml").write_text("- {type: nemo, manifest_filepath: a.json}\n")
        done = invoke("blend", tmp_path / "list.yaml", "batch_size=4")
        assert done.exit_code == 2
        assert "batch_size=4: '" in done.output
        assert "is a list of sources, which has no keys to override." in done.output

    def test_an_index_is_built_once_and_described(self, invoke, tmp_path: Path, monkeypatch) -> None:
        from nemo_emmett.data.io.sidecar import HIDDEN_FOLDER

        record = {"audio_filepath": "a.wav", "duration": 1800, "text": "one", "lang": "en", "target_lang": "de"}
        lines = [json.dumps({**record, **more}) for more in ({}, {}, {"text": ""}, {"duration": -1}, {"text": " "})]
        (tmp_path / "a.json").write_text("\n".join(lines))
        (tmp_path / "a.en").write_text("one two\n\nthree\n")
        (tmp_path / "a.de").write_text("eins\nzwei\ndrei vier fünf\n")
        text = {"type": "parallel_text", "source_paths": "a.en", "target_paths": "a.de", "target_lang": "de"}
        text = {key: f"{tmp_path}/{value}" if key.endswith("_paths") else value for key, value in text.items()}
        tarred = {"type": "txt", "paths": f"{tmp_path}/a.en", "language": "en"}
        speech = {"type": "nemo", "manifest_filepath": f"{tmp_path}/a.json"}
        config = {"input_cfg": [speech, text, tarred], "batch_size": 2, "prompt_format": "emmett_t5"}
        (tmp_path / "data.yaml").write_text(json.dumps(config))
        outputs = []
        monkeypatch.setenv("COLUMNS", "160")
        for _ in range(2):
            done = invoke("index", tmp_path / "data.yaml")
            assert done.exit_code == 0, done.output
            outputs.append(done.output.split())
        words = " ".join(outputs[0])
        assert f"Files are in {tmp_path}." in done.output.replace("\n", "")
        assert re.search(r"a\.json 5 2 1\.00 [\d.]+ kB [\d,]+ records/s", words), words
        assert "skipped: empty text (line 3, line 5) 2 skipped: invalid duration (line 4) 1" in words
        assert re.search(r"a\.\{en,de\} 3 2 7 [\d.]+ kB [\d,]+ records/s skipped: empty text \(line 2\) 1", words), (
            words
        )
        assert "a.en none it is streamed" in words
        assert outputs[1].count("already") == 2
        assert len(list((tmp_path / HIDDEN_FOLDER).glob("*.lengths"))) == 2
        (tmp_path / "a.json").unlink()
        done = invoke("index", tmp_path / "data.yaml")
        assert done.exit_code == 2
        assert f"input_cfg.0.manifest_filepath: there is no file '{tmp_path}/a.json'" in done.output.replace("\n", "")

    def test_the_models_defaults_are_filled_in(self, invoke, recipe, tmp_path: Path, monkeypatch) -> None:
        from omegaconf import OmegaConf

        from nemo_emmett.planning import bins_report

        seen = []
        monkeypatch.setattr(bins_report, "bins_of_dataset", lambda *given, **_: seen.append(given) or [])
        OmegaConf.save(OmegaConf.create(recipe), tmp_path / "recipe.yaml")
        done = invoke("bins", tmp_path / "recipe.yaml", "data.train_ds.audio.batch_size=7")
        assert done.exit_code == 0, done.output
        ((dataset, tokenizer),) = seen
        assert dataset.place == "data.train_ds"
        groups = {group.name: group for group in dataset.groups}
        # FastConformer: a frame of 10 ms, eight of them a position.
        known = {"prompt_format": "emmett_t5", "audio_locator_tag": "<|audio|>", "token_equivalent_duration": 0.08}
        for group in groups.values():
            assert {key: getattr(group, key) for key in known} == known
            assert group.keys["sample_rate"] == 16000
        assert groups["audio"].batch_size == 7
        assert tokenizer.token_to_id("<|audio|>") is not None
