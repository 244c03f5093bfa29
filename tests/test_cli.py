"""``nemo-emmett``: commands, and mistakes in one sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console

from nemo_emmett import __version__, cli, doctor, plugin
from nemo_emmett.errors import ModelError


@pytest.fixture
def invoke():
    return lambda *arguments: CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_version_and_commands(invoke) -> None:
    assert invoke("--version").output == f"nemo-emmett, version {__version__}\n"
    of_data = {"init", "prepare", "index", "blend", "bins", "plan", "oomptimize"}
    assert set(cli.main.commands) == of_data | {"train", "export", "evaluate", "translate", "doctor"}


def test_the_version_is_the_one_that_the_changelog_describes() -> None:
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    number, unreleased = re.search(r"^## ([\d.]+)( \(unreleased\))?$", changelog, re.MULTILINE).groups()
    assert __version__ == number + (".dev0" if unreleased else "")


def test_the_installed_command_starts_without_heavy_imports() -> None:
    code = "import sys; from nemo_emmett.cli import main; main(['--help'], standalone_mode=False); "
    code += "sys.exit('torch' in sys.modules or 'nemo' in sys.modules or 'hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


class TestTranslate:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list:
        """A model that translates into upper case and keeps what it was asked."""
        import nemo_emmett.models

        calls = []

        def load(folder: Path) -> SimpleNamespace:
            def translate(inputs: list, target_lang: str, source_lang: str | None = None) -> list[str]:
                calls.append((folder, inputs, target_lang, source_lang))
                return [str(Path(item).name).upper() for item in inputs]

            return SimpleNamespace(translate=translate)

        monkeypatch.setitem(vars(nemo_emmett.models), "load", load)
        return calls

    def test_texts_and_recordings_one_per_line(self, invoke, calls, tmp_path: Path) -> None:
        recording = tmp_path / "a.WAV"
        recording.touch()
        done = invoke("translate", "good day", recording, "--to", "de", "--from", "en", "--model", "exp/model")
        assert (done.exit_code, done.output) == (0, "GOOD DAY\nA.WAV\n")
        assert calls == [(Path("exp/model"), ["good day", str(recording)], "de", "en")]

    def test_the_model_may_come_from_the_environment(self, invoke, calls, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NEMO_EMMETT_MODEL", "from/environment")
        assert invoke("translate", "good day", "--to", "de").exit_code == 0
        assert calls == [(Path("from/environment"), ["good day"], "de", None)]

    def test_a_missing_recording_is_one_sentence(self, invoke, calls) -> None:
        done = invoke("translate", "gone.wav", "--to", "de", "--model", "m")
        assert done.exit_code == 2
        assert done.output == "Error: audio file 'gone.wav' does not exist.\n"
        assert calls == []

    def test_a_model_that_cannot_be_loaded_is_one_sentence(self, invoke, monkeypatch: pytest.MonkeyPatch) -> None:
        import nemo_emmett.models

        def load(folder: Path) -> None:
            raise ModelError(f"{folder}: is no saved model.")

        monkeypatch.setitem(vars(nemo_emmett.models), "load", load)
        done = invoke("translate", "good day", "--to", "de", "--model", "nowhere")
        assert (done.exit_code, done.output) == (2, "Error: nowhere: is no saved model.\n")


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

    def test_an_unknown_language_is_one_sentence(self, invoke, tmp_path: Path) -> None:
        done = invoke("prepare", "phrasebook", tmp_path, "--languages", "en,xx")
        assert done.exit_code == 2
        assert done.output.startswith("Error: phrasebook.languages: there is no 'xx'")
        assert done.output.count("\n") == 1


def test_evaluate_hands_its_options_on(invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nemo_emmett.evaluation

    calls = []
    record = lambda *args, **kwargs: calls.append((args, kwargs))  # noqa: E731
    monkeypatch.setitem(vars(nemo_emmett.evaluation), "evaluate_recipe", record)
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
    others = {"name": None, "max_new_tokens": None, "log_dir": None, "examples": None}  # left to the recipe
    assert calls == [((Path("recipe.yaml"), Path("model")), options | others)]


class TestBatchSizes:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list:
        """The commands' functions, which note what they are called with."""
        import nemo_emmett.planning

        calls = []
        for name in ("oomptimize", "plan"):
            note = lambda cfg, build, name=name, **options: calls.append((name, cfg, build, options))  # noqa: E731
            monkeypatch.setitem(vars(nemo_emmett.planning), name, note)
        return calls

    def test_oomptimize_hands_the_composed_recipe_and_its_options_on(self, invoke, calls, tmp_path: Path) -> None:
        from nemo_emmett.training import build_training

        options = ["--memory-budget", "70GiB", "--modality-share", "auto", "--predict-epoch", "--output", "p.png"]
        done = invoke("oomptimize", "salm_t5", "trainer.max_steps=7", *options)
        assert done.exit_code == 0, done.output
        ((name, cfg, build, options),) = calls
        assert (name, cfg.trainer.max_steps, build) == ("oomptimize", 7, build_training)
        assert options == {
            "profile": Path("profile.yaml"),
            "memory_fraction": 0.9,
            "memory_budget": "70GiB",
            "safety_margin": 0.03,
            "modality_share": "auto",
            "predict_epoch": True,
            "limit": None,
            "output": Path("p.png"),
        }

    def test_plan_does_so_too(self, invoke, calls) -> None:
        options = ["--memory", "H100", "--optimise-bins", "--num-buckets", 10, "--num-sub-buckets", 2]
        done = invoke("plan", "salm_t5", *options, "--profile", "mine.yaml", "--limit", 1000)
        assert done.exit_code == 0, done.output
        ((name, _, _, options),) = calls
        assert name == "plan"
        assert options == {
            "profile": Path("mine.yaml"),
            "memory": "H100",
            "memory_fraction": 0.9,
            "safety_margin": 0.03,
            "modality_share": 0.5,
            "optimise_bins": True,
            "num_buckets": 10,
            "num_sub_buckets": 2,
            "limit": 1000,
            "output": None,
        }

    @pytest.mark.parametrize("share", ["0", "1.5", "half"])
    def test_a_share_that_is_none_is_refused(self, invoke, calls, share: str) -> None:
        assert invoke("oomptimize", "salm_t5", "--modality-share", share).exit_code == 2
        assert calls == []

    @pytest.mark.parametrize("command", ["oomptimize", "plan"])
    def test_mistakes_are_one_sentence(self, invoke, command: str) -> None:
        done = invoke(command, "gone.yaml", "--profile", "p.yaml")
        assert (done.exit_code, done.output.count("\n")) == (2, 1)
        assert done.output == "Error: The recipe 'gone.yaml' cannot be read: there is no such file.\n"

    def test_a_plan_needs_the_memory(self, invoke) -> None:
        done = invoke("plan", "salm_t5")
        assert done.exit_code == 2
        assert (
            "Error: --memory: is missing; name the device to plan for (H100), or its memory (80GiB).\n" in done.output
        )


class TestDoctor:
    def test_a_sound_installation_is_fit_for_use(self, invoke) -> None:
        done = invoke("doctor")
        assert done.exit_code == 0, done.output
        for found in ("nemo_toolkit", "models: salm_t5", "NeMo: data types", "CPU", "extras", "ready for use"):
            assert found in done.output

    def test_a_failed_registration_makes_it_unfit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        failed = plugin.Registration("data types", "json", print, state="failed", error="AttributeError: moved")
        monkeypatch.setattr(plugin, "REGISTRATIONS", (failed,))
        console = Console(record=True, width=200)
        assert doctor.report(console) == 1
        text = console.export_text()
        assert "failed AttributeError: moved" in text
        assert "NeMo: data types: use the NeMo version of constraints.txt" in text

    def test_a_broken_entry_point_names_its_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @dataclass
        class Broken:
            value = "gone:Model"
            dist = SimpleNamespace(name="third-party")

            def load(self) -> None:
                raise ImportError("no module named gone")

        monkeypatch.setattr(plugin, "entry_points", lambda kind: {"theirs": Broken()})
        (finding, *_) = doctor._entry_points()
        assert finding.fatal
        assert "no module named gone" in finding.value
        assert finding.remedy == "the entry point of package third-party is broken"

    def test_missing_extras_are_told_but_not_fatal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "EXTRAS", {"demo": ("yaml", "surely_not_installed")})
        (finding,) = doctor._extras()
        assert (finding.value, finding.fatal) == ("missing: surely_not_installed", False)
        assert "nemo_emmett[demo]" in finding.remedy
        console = Console(record=True, width=200)
        doctor.report(console)
        assert finding.remedy in console.export_text(), "brackets are text, not markup"


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
        assert line.startswith("Error: data.train_ds.audio.input_cfg.0.manifest_filepath: there is no file '")
        assert f"{tmp_path}/speech/en/manifest_0.json" in line

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
        assert "skipped: empty text 2 skipped: invalid duration 1" in words
        assert re.search(r"a\.\{en,de\} 3 2 7 [\d.]+ kB [\d,]+ records/s skipped: empty text 1", words), words
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
