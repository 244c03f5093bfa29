"""The parts of the experiment: their runs compose, and their tables say what the runs say."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from io import StringIO
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.section import plain
from nemo_emmett.evaluation.results import Evaluation, Score, Translation, to_json
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.modules.metrics import corpus_bleu, sacrebleu_metric
from nemo_emmett.training import check_recipe

EXAMPLES = Path(__file__).parents[1] / "examples" / "speechlm"
SEEDS = (1, 2)


pytestmark = pytest.mark.usefixtures("scripts_importable")


@pytest.fixture
def parts(tmp_path: Path, monkeypatch) -> dict[str, Any]:
    """All parts by name, in a folder in which nothing has been run but the division of the captions; with folders of
    the teachers, since a recipe that names none is refused."""
    import experiment_forgetting
    import experiment_mboshi
    import experiment_scarce
    import experiment_settings
    import experiment_zero_shot
    from experiment_runs import captions, phrasebook

    monkeypatch.chdir(tmp_path)
    data, exp, source = Path("data"), Path("exp"), Path("multi30k")
    counts = {"250": 250, "500": 500, "1000": 1000, "2000": 2000, "all": 6159}
    (data / "scarce").mkdir(parents=True)
    (data / "scarce" / "corpus.json").write_text(json.dumps({"recordings": counts}))
    for seed in SEEDS:
        (exp / "scarce" / "start" / str(seed) / "teacher" / "model").mkdir(parents=True)
    corpus = captions(data, source)
    made = [
        experiment_scarce.part(corpus, source, data, exp, SEEDS),
        experiment_settings.part(corpus, source, data, exp, SEEDS),
        experiment_forgetting.part(corpus, source, data, exp, SEEDS),
        experiment_mboshi.part(Path("mboshi"), data, exp, SEEDS),
        experiment_zero_shot.part(phrasebook(data), exp, SEEDS),
    ]
    return {part.name: part for part in made}


def recipe_of(command: list[str]):
    """The recipe that a run's command composes; Hydra refuses an override that is none."""
    return copy.deepcopy(composed(tuple(command)))  # tests resolve it


@functools.cache
def composed(command: tuple[str, ...]):
    name = next(word.partition("=")[2] for word in command if word.startswith("--config-name="))
    overrides = [word for word in command[2:] if not word.startswith("--")]
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        return compose(name, overrides=overrides)


def recipes(part, seed: int = 1) -> dict[str, Any]:
    """The recipes of a seed's trainings, by the names of their runs."""
    commands = {run.name: run.command() for run in part.runs}
    return {
        name: recipe_of(command)
        for name, command in commands.items()
        if name.endswith(f"/{seed}") and any("train_and_evaluate" in word for word in command)
    }


# Runs.


def test_every_run_comes_after_those_it_needs_and_parts_share_what_they_have_in_common(parts):
    runs = list({run.name: run for part in parts.values() for run in part.runs}.values())
    seen: set[str] = set()
    for run in runs:
        assert seen.issuperset(run.after), run.name
        seen.add(run.name)
    assert len(runs) == len({run.result for run in runs})
    scarce = {run.name: run for run in parts["scarce"].runs}
    shared = {name: [run for run in parts[name].runs if run.name in scarce] for name in ("forgetting", "settings")}
    assert {name: len(of_part) for name, of_part in shared.items()} == {"forgetting": 10, "settings": 22}
    for run in (*shared["forgetting"], *shared["settings"]):
        assert (run.command(), run.result) == (scarce[run.name].command(), scarce[run.name].result)


PRETRAININGS = sorted(path.stem for kind in ("t5", "llm") for path in (EXAMPLES / "conf").glob(f"pretrain_{kind}_*"))


@pytest.mark.parametrize("name", PRETRAININGS)
def test_the_language_model_that_is_scored_is_the_one_that_trainings_start_with(name):
    """The script writes the last weights for them; without the key the best checkpoint would be scored."""
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        assert compose(name).export == "last"


@pytest.mark.parametrize(
    ("name", "trainings"), [("scarce", 13), ("settings", 11), ("forgetting", 10), ("mboshi", 5), ("zero_shot", 4)]
)
def test_every_training_has_a_recipe_without_a_mistake(name, trainings, parts):
    found = recipes(parts[name])
    assert len(found) == trainings
    for run, recipe in found.items():
        OmegaConf.resolve(recipe)
        check_recipe(recipe)
        ModelConfig.from_section(plain(recipe.model), "salm_t5")
        assert set(recipe.model) <= {"_target_", *ModelConfig.__dataclass_fields__}, run
        assert parse_dataset(plain(recipe.data.train_ds), "data.train_ds").unknown_keys == (), run
        assert recipe.seed == recipe.data.train_ds.seed == 1
        assert recipe.exp_manager.checkpoint_callback_params.monitor == "val_bleu_dev_speech"
        assert "dev_speech" in recipe.data.validation_ds.datasets
        assert recipe.trainer.max_steps == 5 * recipe.trainer.limit_train_batches
        assert recipe.evaluation.best is True
        assert Path(recipe.export_dir) == Path(recipe.exp_dir) / "model"


@pytest.mark.parametrize("name", ["scarce", "forgetting", "mboshi", "zero_shot"])
def test_seeds_have_pretrained_parts_of_their_own(name, parts):
    starts = [run for run in parts[name].runs if "/start/" in run.name]
    parts_of_start = ("encoder", "t5", "random_encoder", "teacher")
    seeds: dict[str, set[int]] = {part: set() for part in parts_of_start}
    for run in starts:
        recipe = recipe_of(run.command())
        *_, seed, part = run.name.removesuffix("/score").split("/")
        if not run.name.endswith("/score"):
            data = recipe.data.train_ds if part in ("t5", "teacher") else recipe.model.train_ds
            assert recipe.seed == data.seed == data.shard_seed == int(seed)
            seeds[part].add(int(seed))
            assert (recipe.trainer.max_steps == 0) is (part == "random_encoder")
    without, those = set(), set(SEEDS)
    untrained, taught = (those if name == part else without for part in ("mboshi", "scarce"))
    assert [seeds[part] for part in parts_of_start] == [those, those, untrained, taught]
    folder = next(run.result for run in starts).parents[2]
    for run in parts[name].runs:
        if run.name.endswith(tuple(f"/{seed}" for seed in SEEDS)):  # a training
            home = folder / run.name.split("/")[-1]
            weights = ("init", "random_encoder") if "from_nothing" in run.name else ("t5", "encoder")
            assert f"model.pretrained_llm={home}/t5/{weights[0]}" in run.command()
            assert f"model.pretrained_asr={home}/{weights[1]}/encoder.nemo" in run.command()


def test_the_arms_of_scarce_speech_are_those_of_the_question(parts):
    found = recipes(parts["scarce"])
    speech, joint, best = (found[f"scarce/1000/{arm}/1"] for arm in ("speech", "joint", "best"))
    quarter, together = (recipes(parts["settings"])[f"settings/{arm}/1"] for arm in ("quarter", "together"))
    assert "text" not in speech.data.train_ds
    longer = found["scarce/1000/best_longer/1"]
    assert (longer.trainer.max_steps, longer.model.objectives) == (2 * best.trainer.max_steps, best.model.objectives)
    assert quarter.data.train_ds.text.every_n_steps == 4
    assert dict(quarter.model.modality_loss_weights) == {"audio": 1.0, "text": 0.5}
    assert "objectives" not in joint.model
    assert "every_n_steps" not in joint.data.train_ds.text
    assert set(best.model.objectives) == {"distillation", "consistency"}
    assert {recipe.data.train_ds.audio.batch_size for recipe in found.values()} == {16}
    assert set(together.model.objectives) == {"distillation", "consistency", "retention", "transcription"}
    assert together.data.train_ds.audio.transcription == 0.2
    assert {name.split("/")[1] for name in found} == {"250", "500", "1000", "2000", "all"}
    for name, recipe in found.items():
        assert recipe.corpus == f"data/scarce/{name.split('/')[1]}"
        assert "data/captions" not in OmegaConf.to_yaml(recipe, resolve=True)


def test_the_teacher_is_the_start_of_its_seed_trained_on_all_text(parts):
    runs = {run.name: run for run in parts["scarce"].runs}
    teacher = recipe_of(runs["scarce/start/2/teacher"].command())
    check_recipe(teacher)
    assert "audio" not in teacher.data.train_ds
    assert list(teacher.data.validation_ds.datasets) == ["dev_text"]
    assert (teacher.model.perception, teacher.evaluation.without) == (None, ["test_speech"])
    best = recipe_of(runs["scarce/250/best/2"].command())
    assert (teacher.model.pretrained_llm, teacher.seed) == (best.model.pretrained_llm, best.seed)
    assert teacher.data.train_ds.text == recipe_of(runs["scarce/all/best/2"].command()).data.train_ds.text
    assert best.model.objectives.distillation.teacher == teacher.export_dir.replace("${exp_dir}", teacher.exp_dir)
    assert "scarce/start/2/teacher" in runs["scarce/250/best/2"].after
    assert "scarce/start/2/teacher" not in runs["scarce/250/speech/2"].after
    mboshi = recipes(parts["mboshi"])["mboshi/best/1"].model.objectives
    assert "teacher" not in mboshi.distillation  # there it is the start


def test_text_that_is_kept_is_that_of_the_pretraining(parts):
    pretrained = "data/scarce/all/../start/text/train.en"
    for name, recipe in recipes(parts["forgetting"]).items():
        if "text" in recipe.data.train_ds:
            assert [one.paths.en for one in recipe.data.train_ds.text.input_cfg] == [pretrained], name


def test_alternating_steps_are_twice_as_many(parts):
    found = recipes(parts["forgetting"])
    assert found["forgetting/alternating/1"].trainer.max_steps == 2 * found["forgetting/speech/1"].trainer.max_steps
    assert found["forgetting/alternating/1"].data.train_ds.sampler_fusion == "round_robin"


def test_what_leaves_text_alone_trains_on_no_text(parts):
    found = recipes(parts["forgetting"])
    for arm in ("gated_lora", "frozen"):
        assert "text" not in found[f"forgetting/{arm}/1"].data.train_ds
    assert found["forgetting/gated_lora/1"].model.lora_modality == "audio"
    assert found["forgetting/frozen/1"].model.freeze == ["llm"]


def test_no_speech_is_translated_into_another_language_than_english_but_in_the_supervised_arm(parts):
    for name, recipe in recipes(parts["zero_shot"]).items():
        OmegaConf.resolve(recipe)
        trained = recipe.data.train_ds.audio.input_cfg
        validated = recipe.data.validation_ds.datasets.dev_speech.input_cfg
        assert list(recipe.data.validation_ds.datasets) == ["dev_speech"]
        for split, sources in (("train", trained), ("dev", validated)):
            if "supervised" not in name or split == "dev":
                files = [f"data/phrasebook/speech/{split}.{lang}.jsonl" for lang in ("de", "es", "fr")]
                assert [one.manifest_filepath for one in sources] == files
                assert {one.target_lang for one in sources} == {"en"}
    control = recipes(parts["zero_shot"])["zero_shot/control/1"].data.train_ds.text.input_cfg
    assert [(one.source_lang, one.target_lang) for one in control] == [
        (lang, lang) for lang in ("en", "de", "es", "fr")
    ]


# Results.

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write_evaluation(folder: Path, wrong: int, directions: Sequence[tuple[str, str]], wrong_text: int = 0) -> None:
    """Five sentences of speech and text in each direction; the last words of each are wrong."""
    translations = []
    for modality, errors in (("audio", wrong), ("text", wrong_text)):
        for source, target in directions:
            for n in range(5):
                reference = WORDS[n:] + WORDS[:n]
                hypothesis = " ".join(reference[: 10 - errors] + ["x"] * errors)
                audio = f"{source}/{n}.wav" if modality == "audio" else None
                where = (f"test_{modality}", f"{source}{n}-{target}", modality, source, target)
                translations.append(Translation(*where, "source", " ".join(reference), hypothesis, audio_path=audio))
    scores = []
    for key in dict.fromkeys(one.key for one in translations):
        ours = [[one.hypothesis, one.reference] for one in translations if one.key == key]
        hypotheses, references = zip(*ours, strict=True)
        chrf = sacrebleu_metric("chrF++").corpus_score(list(hypotheses), [list(references)]).score
        metrics = {"BLEU": corpus_bleu(hypotheses, references), "chrF++": chrf}
        scores.append(Score(*key, sentences=5, metrics=metrics))
    evaluation = Evaluation("m", "m", "2025", scores, translations, {}, {}, {}, {}, "evaluate.py", {})
    (folder / "evaluation").mkdir(parents=True)
    to_json(evaluation, folder / "evaluation" / "evaluation.json")


def bleu(wrong: int) -> float:
    """Of sentences whose last words are wrong."""
    references = [" ".join(WORDS[n:] + WORDS[:n]) for n in range(5)]
    return corpus_bleu([" ".join(one.split()[: 10 - wrong] + ["x"] * wrong) for one in references], references)


@pytest.fixture
def collected(tmp_path, monkeypatch, parts) -> Callable[..., tuple[dict, str]]:
    """Writes made-up evaluations of a part's runs, collects them, and gives results and tables; the plot is drawn."""
    import experiment_compare

    def training_scores(folder: Path) -> dict:
        """Every training takes 100 CPU seconds, those of 'joint' and its kind 200, and reaches 30 BLEU halfway."""
        seconds = 100.0 if "speech" in folder.parent.name else 200.0
        curve = [[100, seconds / 2, 30.0], [200, seconds, 20.0]]
        scores = experiment_compare.scores_of(folder)
        return {**scores, "cpu_seconds": seconds, "seconds": seconds, "curve": curve}

    monkeypatch.setattr(experiment_compare, "training_scores", training_scores)

    def collect(name: str, wrong: Callable[[str], int], directions: Sequence[tuple[str, str]], **text: int):
        for run in parts[name].runs:
            if run.result.name == "report.html" and "/start/" not in run.name:
                write_evaluation(
                    run.result.parents[1], wrong(run.name), directions, text.get(run.name.split("/")[-2], 2)
                )
            elif run.name.endswith(("/score", "/teacher")):
                write_evaluation(run.result.parents[1], 9, directions, 0)
        results = json.loads(json.dumps(parts[name].collect()))
        parts[name].draw(results, tmp_path / "plot.svg")
        assert (tmp_path / "plot.svg").stat().st_size > 1000
        return results, parts[name].tables(results)

    return collect


def test_scarce_speech_is_compared_size_by_size(collected):
    results, text = collected("scarce", lambda name: 4 if "/speech/" in name else 2, [("en", "fr")])
    joint = next(one for one in results["comparisons"] if (one["size"], one["arm"]) == ("250", "best"))
    assert joint["difference"] == pytest.approx(bleu(2) - bleu(4))
    assert joint["differences"] == pytest.approx([bleu(2) - bleu(4)] * 2)
    # After 100 s speech alone has reached 30, and so has joint, at its best checkpoint.
    assert joint["dev_at_equal_seconds"] == [0.0, 0.0]
    assert {one["best_step"] for one in results["trainings"]} == {100}
    assert f"| 250 | speech alone | {bleu(4):.1f} ± 0.0 | {bleu(2):.1f} ± 0.0 | 100 ± 0 |" in text
    assert f"| 1,000 | joint | speech alone | {bleu(2) - bleu(4):+.1f} ± 0.0 |" in text
    longer = next(one for one in results["comparisons"] if one["arm"] == "best_longer")
    assert longer["reference"] == "speech_longer"
    assert "| – | nothing yet (the start) | – | 100.0 ± 0.0 | – |" in text
    assert "| – | text alone (the teacher) | – | 100.0 ± 0.0 | 200 ± 0 |" in text
    assert {one["size"] for one in results["comparisons"] if one["arm"] == "joint"} == {"1000"}


def test_text_lost_is_what_the_start_had(collected):
    results, text = collected("forgetting", lambda _: 3, [("en", "fr")], gated_lora=0, speech=4)
    lost = {one["arm"]: one["text_lost"] for one in results["trainings"]}
    assert lost["gated_lora"] == 0.0
    assert lost["speech"] == pytest.approx(100 - bleu(4))
    assert f"| LoRA on speech alone | {bleu(3):.1f} ± 0.0 | 100.0 ± 0.0 | 0.0 ± 0.0 |" in text
    gated = next(one for one in results["comparisons"] if one["arm"] == "gated_lora")
    assert gated["text"]["difference"] == pytest.approx(100 - bleu(4))
    assert (gated["difference"], gated["p"]) == (0.0, 1.0)


def test_each_setting_is_compared_with_joint_training_and_that_with_speech_alone(collected):
    results, text = collected("settings", lambda name: 3 if "/speech" in name else 2, [("en", "fr")])
    over = {one["arm"]: one["reference"] for one in results["comparisons"]}
    assert over.pop("joint") == over.pop("speech_longer") == "speech"
    assert over.pop("best_longer") == "speech_longer"
    assert set(over.values()) == {"joint"}
    assert f"| joint | speech alone | {bleu(2) - bleu(3):+.1f} ± 0.0 |" in text
    assert f"| speech alone, twice the steps | {bleu(3):.1f} ± 0.0 |" in text


def test_mboshi_is_scored_in_both_metrics_against_its_own_start(collected):
    results, text = collected("mboshi", lambda name: 5 if "nothing" in name else 3, [("mdw", "fr")])
    assert [(one["arm"], one["reference"], one["metric"]) for one in results["comparisons"]][:4] == [
        ("joint_from_nothing", "speech_from_nothing", "BLEU"),
        ("joint_from_nothing", "speech_from_nothing", "chrF++"),
        ("joint", "speech", "BLEU"),
        ("joint", "speech", "chrF++"),
    ]
    assert all(one["difference"] == 0 for one in results["comparisons"])
    references = [" ".join(WORDS[n:] + WORDS[:n]) for n in range(5)]
    hypotheses = [" ".join(one.split()[:7] + ["x"] * 3) for one in references]
    chrf = sacrebleu_metric("chrF++").corpus_score(hypotheses, [references]).score
    assert f"| joint | {bleu(3):.1f} ± 0.0 | {chrf:.1f} ± 0.0 |" in text


def test_directions_without_recordings_are_scored_apart(collected, tmp_path, monkeypatch):
    import experiment_zero_shot

    directions = list(permutations(("en", "de", "es", "fr"), 2))
    results, text = collected("zero_shot", lambda name: 3 if "joint" in name else 6, directions)
    groups = {pair: experiment_zero_shot.group_of(*pair) for pair in directions}
    assert [sum(group == name for group in groups.values()) for name in experiment_zero_shot.GROUPS] == [3, 6, 3]
    joint = next(one for one in results["comparisons"] if one["arm"] == "joint")
    assert joint["difference"] == pytest.approx(bleu(3) - bleu(6))
    assert f"| joint | {bleu(3):.1f} ± 0.0 | {bleu(3):.1f} ± 0.0 | {bleu(3):.1f} ± 0.0 |" in text


def test_the_score_within_a_budget_is_the_best_until_then():
    from experiment_compare import best_within

    curve = [(25, 100.0, 20.0), (50, 200.0, 40.0), (75, 300.0, 10.0)]
    assert best_within(curve, 50.0) == 10.0
    assert best_within(curve, 150.0) == 30.0
    assert best_within(curve, 200.0) == 40.0
    assert best_within(curve, 250.0) == 40.0  # 25 there, but training could have stopped before
    assert best_within(curve, 900.0) == 40.0


def test_a_part_is_reported_with_the_seconds_of_all_its_runs(tmp_path):
    from experiment_results import report_parts
    from experiment_runs import Run
    from experiment_seeds import Part
    from rich.console import Console
    from stages import note_seconds

    (tmp_path / "logs").mkdir()
    runs = [Run(name, list, tmp_path / name) for name in ("a", "b")]
    for run, seconds in zip(runs, (12.4, 30.0), strict=True):
        note_seconds(tmp_path / "logs" / f"{run.name}.log", seconds)
    part = Part("scarce", runs, lambda: {"steps": 2}, lambda _: "the table", lambda _, path: path.write_text("drawn"))
    report_parts([part], tmp_path, Console(file=StringIO()))
    assert json.loads((tmp_path / "results.json").read_text())["scarce"] == {"steps": 2, "seconds": 42.0}
    assert (tmp_path / "tables_scarce.md").read_text() == "the table"
    assert (tmp_path / "scarce.svg").exists()


def test_results_of_parts_are_kept_together(tmp_path):
    from experiment_results import write_results

    write_results(tmp_path, {"trainings": [1], "machine": "a"})
    write_results(tmp_path, {"scarce": {"steps": 2}, "machine": "b"})
    write_results(tmp_path, {"scarce": {"steps": 3}})
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "trainings": [1],
        "machine": "b",
        "scarce": {"steps": 3},
    }
