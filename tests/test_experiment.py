"""The experiment: its runs hang together, each is run once, and its tables say what the runs' numbers say."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from rich.console import Console

EXAMPLES = Path(__file__).parents[1] / "examples" / "speechlm"


pytestmark = pytest.mark.usefixtures("scripts_importable")


@pytest.fixture
def runs(tmp_path: Path):
    """All runs on both corpora, with the files that the second part's commands are made from."""
    from experiment_runs import all_runs, captions, phrasebook

    folder = tmp_path / "efficiency"
    folder.mkdir()
    bins = {"audio": [[1.5, 8], [3.0, 16]], "text": [[8, 8], [14, 13]]}
    (folder / "bins.json").write_text(json.dumps(dict.fromkeys(("optimal_2d", "optimal_1d", "equal_mass_2d"), bins)))
    profile = {"train_ds": {"audio": {"bucket_batch_size": [40, 17]}, "text": {"bucket_batch_size": [300, 200]}}}
    for name in ("optimal_2d", "optimal_1d", "equal_mass_2d"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(profile))
    return all_runs([phrasebook(Path("data")), captions(Path("data"), Path("multi30k"))], tmp_path)


def recipe_of(command: list[str]):
    """The recipe that a training's command composes; Hydra refuses an override that is none."""
    name = next(word.partition("=")[2] for word in command if word.startswith("--config-name="))
    overrides = [word for word in command[2:] if not word.startswith("--")]
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        return compose(name, overrides=overrides)


def test_every_run_comes_after_those_it_needs_and_has_a_result_of_its_own(runs):
    seen: set[str] = set()
    for run in runs:
        assert seen.issuperset(run.after), run.name
        seen.add(run.name)
    assert len(seen) == len(runs) == len({run.result for run in runs})


def test_every_override_is_a_key_of_its_recipe(runs):
    trainings = [run for run in runs if run.name.endswith("/1")]
    assert len(trainings) == 2 * 2 * 3 + 5
    for run in trainings:
        recipe = recipe_of(run.command())
        assert recipe.seed == recipe.data.train_ds.seed == 1, run.name
        assert recipe.trainer.callbacks[0]._target_ == "nemo_emmett.callbacks.TrainingClock"


def test_the_arms_differ_in_their_data_alone(runs):
    from omegaconf import OmegaConf

    recipes = {
        arm: OmegaConf.to_container(
            recipe_of(next(run for run in runs if run.name == f"phrasebook/salm_gpt/{arm}/2").command()), resolve=False
        )
        for arm in ("nmt", "ast", "joint")
    }
    groups = {arm: {"audio", "text"} & recipe["data"]["train_ds"].keys() for arm, recipe in recipes.items()}
    assert groups == {"nmt": {"text"}, "ast": {"audio"}, "joint": {"audio", "text"}}
    texts = {}
    for arm, recipe in recipes.items():
        recipe["data"]["train_ds"] = {
            key: value for key, value in recipe["data"]["train_ds"].items() if key not in ("audio", "text")
        }
        recipe["data"].pop("validation_ds")  # of text alone where no speech was heard
        recipe["evaluation"].pop("without", None)
        texts[arm] = json.dumps(recipe).replace(f"/{arm}/2", "")
    assert texts["nmt"] == texts["ast"] == texts["joint"]


def test_a_fixed_batch_size_is_the_one_that_fits_every_bucket(runs):
    fixed, calibrated = (
        recipe_of(next(run for run in runs if run.name == f"efficiency/{arm}/1").command()).data.train_ds
        for arm in ("fixed batch size", "reference")
    )
    assert list(fixed.audio.bucket_batch_size) == [17, 17]
    assert list(fixed.text.bucket_batch_size) == [200, 200]
    assert list(calibrated.audio.bucket_batch_size) == [40, 17]
    assert fixed.audio.bucket_duration_bins == calibrated.audio.bucket_duration_bins


class TestBins:
    """The bins of the second part: the fewest that keep padding within a fifth, the mean of inputs and outputs."""

    def fewest(self, inputs: list[float], outputs: list[float]) -> list:
        from experiment_bins import fewest

        from nemo_emmett.data.bucketing.bins import optimal_bins_2d

        sides = np.array(inputs, dtype=float), np.array(outputs, dtype=float)

        def every(count: int):
            return (optimal_bins_2d(*sides, n, count // n) for n in range(1, count + 1) if count % n == 0)

        return fewest(every, *sides)

    def test_one_bucket_is_enough_where_only_one_side_is_padded_a_little(self):
        assert self.fewest([2, 2, 2, 2], [1, 1, 4, 4]) == [[2, 4]]  # no input and 6/16 of the outputs: 18.75 %

    def test_as_many_as_it_takes_and_divided_where_that_pads_least(self):
        assert self.fewest([2, 2, 2, 2], [1, 1, 8, 8]) == [[2, 1], [2, 8]]  # one: 14/32 of the outputs, 21.9 %
        assert self.fewest([1, 1, 8, 8], [2, 2, 2, 2]) == [[1, 2], [8, 2]]

    def test_in_one_dimension_outputs_are_padded_to_the_longest_of_their_bucket(self):
        from experiment_bins import padding

        inputs, outputs = np.array([1.0, 2.0, 4.0]), np.array([3.0, 1.0, 5.0])
        assert padding([2.0, 4.0], inputs, outputs) == pytest.approx((1 / 8 + 2 / 11) / 2)


class TestRunning:
    """``run_all`` on commands that write a file."""

    def run(self, folder: Path, fails: bool = False):
        import experiment
        from experiment_runs import Run

        def writes(name: str, code: str, after: tuple[str, ...] = ()) -> Run:
            return Run(name, lambda: [sys.executable, "-c", code, str(folder / name)], folder / name, after)

        write = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text('x' + (p.parent / '{}').read_text())"
        first = writes("a", "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('a')")
        second = writes("b", write.format("a"), ("a",))
        third = writes("c", "import sys; sys.exit('no')" if fails else write.format("b"), ("b",))
        experiment.run_all([third, second, first], folder / "logs", 2, Console(file=StringIO()))

    def test_each_run_waits_for_those_it_needs(self, tmp_path: Path):
        self.run(tmp_path)
        assert (tmp_path / "c").read_text() == "xxa"

    def test_a_log_begins_with_the_command_and_ends_with_its_seconds(self, tmp_path: Path):
        from stages import noted_seconds

        self.run(tmp_path)
        log = tmp_path / "logs" / "b.log"
        assert log.read_text().startswith(f"$ {sys.executable} -c ")
        assert 0 <= noted_seconds(log) < 60

    def test_what_has_finished_is_not_run_again(self, tmp_path: Path):
        (tmp_path / "a").write_text("earlier")
        self.run(tmp_path)
        assert (tmp_path / "c").read_text() == "xxearlier"

    def test_a_failure_names_the_run_and_its_log_and_the_next_attempt_goes_on(self, tmp_path: Path):
        with pytest.raises(SystemExit, match=rf"'c' failed \(exit code 1\): no See {tmp_path}/logs/c.log"):
            self.run(tmp_path, fails=True)
        (tmp_path / "a").write_text("earlier")
        self.run(tmp_path)
        assert (tmp_path / "c").read_text() == "xxa"  # b was there

    def test_after_a_failure_everything_goes_on_that_does_not_depend_on_it(self, tmp_path: Path):
        import experiment
        from experiment_runs import Run

        def run(name: str, code: str, after: tuple[str, ...] = ()) -> Run:
            return Run(name, lambda: [sys.executable, "-c", code, str(tmp_path / name)], tmp_path / name, after)

        write = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('x')"
        runs = [run("bad", "raise SystemExit('why')"), run("lost", write, ("bad",)), run("good", write)]
        runs.append(run("better", write, ("good",)))
        with pytest.raises(
            SystemExit, match=r"'bad' failed \(exit code 1\): why .*\n1 runs that need it were left out"
        ):
            experiment.run_all(runs, tmp_path / "logs", 1, Console(file=StringIO()))
        assert (tmp_path / "better").exists()
        assert not (tmp_path / "lost").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captions", "nowhere"], "there is no nowhere/train.en; give a folder with Multi30k's raw text"),
        (["--jobs", "0"], "--jobs 0: must be 1 or more"),
        (["--seeds", "1", "2", "1"], "--seeds 1 2 1: each must be given once"),
        (["--scarce"], "--scarce needs --captions; give a folder with Multi30k's raw text"),
        (["--zero-shot", "--forgetting"], "--forgetting needs --captions"),
        (["--mboshi", "nowhere"], "there is no nowhere/train.jsonl; give the folder of the Mboshi manifests"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(arguments, message, monkeypatch, capsys):
    import experiment

    monkeypatch.setattr(sys, "argv", ["experiment.py", *arguments])
    monkeypatch.setattr(experiment, "run_all", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        experiment.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--scarce", "--settings", "--forgetting"], ["scarce", "settings", "forgetting"]),
        (["--zero-shot"], ["zero_shot"]),
        (["--mboshi", "mboshi"], ["mboshi"]),
    ],
)
def test_options_choose_parts_which_are_run_alone_and_shared_runs_once(arguments, parts, tmp_path, monkeypatch):
    import experiment
    import experiment_results

    done = {}
    for name in (*experiment.CAPTION_FILES, "mboshi/train.jsonl", "mboshi/dev.jsonl", "mboshi/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["experiment.py", *arguments, "--captions", "."])
    monkeypatch.setattr(experiment, "run_all", lambda runs, *_: done.update(runs=[run.name for run in runs]))
    monkeypatch.setattr(experiment_results, "report_parts", lambda parts, *_: done.update(parts=parts))
    experiment.main()
    assert [part.name for part in done["parts"]] == parts
    assert len(set(done["runs"])) == len(done["runs"])
    assert set(done["runs"]) == {run.name for part in done["parts"] for run in part.runs}
    assert not any(name.startswith("efficiency") for name in done["runs"])


@pytest.mark.parametrize(
    ("log", "steps"),
    [
        (
            "Epoch 0:  40%|#### | 4/10 [00:01<00:01, 5.1it/s]\rEpoch 0:  50%|##### | 5/10 [00:01<00:01, 5.2it/s]",
            (5, 10),
        ),
        (
            "step 44/120 (37%)  loss audio 3.9\nstep 1,060/12,000 (9%)  validation: val_bleu 0\nWarning: 3/4\n",
            (1060, 12000),
        ),
        ("model           SALMT5\nlog          a/1/2.log\n", None),
    ],
)
def test_the_progress_of_a_run_is_read_from_its_log(log, steps):
    import experiment

    assert experiment._steps(log) == steps


def results() -> dict:
    """Two seeds: joint training keeps 90 of 91 in text and brings 50 and 60 in speech, where speech alone has 45."""

    def run(arm: str, seed: int, text: float, speech: float) -> dict:
        return {"corpus": "c", "model": "salm_t5", "arm": arm, "seed": seed, "text": text, "speech": speech}

    return {
        "trainings": [
            *(run("nmt", seed, 91.0, 0.0) for seed in (1, 2)),
            *(run("ast", seed, 10.0, 45.0) for seed in (1, 2)),
            run("joint", 1, 90.0, 50.0),
            run("joint", 2, 90.0, 60.0),
        ]
    }


def test_joint_training_is_compared_seed_by_seed():
    from experiment_results import differences

    assert differences(results(), "c", "salm_t5") == {"text": [-1.0, -1.0], "speech": [5.0, 15.0]}


def test_the_time_to_a_score_is_interpolated_between_validations():
    from experiment_results import seconds_to

    curve = [(20, 100.0, 10.0), (40, 240.0, 30.0), (60, 400.0, 25.0)]
    assert seconds_to(curve, 5.0) == (10.0, 50.0)
    assert seconds_to(curve, 25.0) == (35.0, 205.0)
    assert seconds_to(curve, 31.0) is None


def test_the_common_target_is_reached_by_every_run():
    from experiment_results import common_target

    runs = [{"curve": [(1, 1.0, 7.0), (2, 2.0, 6.0)]}, {"curve": [(1, 1.0, 3.0), (2, 2.0, 9.0)]}]
    assert common_target(runs) == 7.0


def test_a_mean_has_the_deviation_of_a_sample_beside_it():
    from experiment_results import mean_and_deviation

    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert mean_and_deviation([-1.0, -2.0, -3.0], "+.1f") == "-2.0 ± 1.0"
    assert mean_and_deviation([4.0]) == "4.0"
