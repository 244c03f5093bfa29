"""The runs of the experiment: which model is trained on which data from which pretrained parts, and their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from demo import PHRASEBOOK
from stages import RECIPES, installed, script

SEEDS = (1, 2, 3)
MODELS = {"salm_t5": "t5", "salm_gpt": "llm"}
"""The models, and which language model each starts from."""

ARMS = {
    "nmt": [
        "~data.train_ds.audio",
        "~data.validation_ds.datasets.dev_speech",
        "+evaluation.without=[test_speech]",  # it was not trained on speech
    ],
    "ast": ["~data.train_ds.text"],
    "joint": [],
}
"""Text translation alone, speech translation alone, both: the same recipe without one of its groups of data."""

SPOKEN_SENTENCES = {"en": 1600, "de": 800, "es": 400, "fr": 200}
"""Recordings of each language in the second part: a corpus as unequal as they are."""

EFFICIENCY = {
    "reference": ("optimal_2d", "calibrated", 0.0),
    "1D buckets": ("optimal_1d", "calibrated", 0.0),
    "equal-mass bins": ("equal_mass_2d", "calibrated", 0.0),
    "fixed batch size": ("optimal_2d", "fixed", 0.0),
    "blend by size": ("optimal_2d", "calibrated", 1.0),
}
"""The second part: bins, batch sizes, temperature of the languages' weights. Each differs from the first in one."""

CAPTIONS = ["--max-words", "12", "--variants", "m3", "--speed", "200", "200", "--pitch", "50", "50"]
"""Short captions in one voice: as much as these models learn in minutes."""

CAPTION_FILES = [f"{split}.{language}" for split in ("train", "val") for language in ("en", "de", "fr")]
"""Files of the folder with the captions; German serves to choose those that are short in all languages."""

MAX_PADDING = 0.2
"""Of the bins in the second part, the mean of inputs and outputs: of each kind there are as many as that needs."""

MEMORY_BUDGET, MODALITY_SHARE = "400MiB", "0.8"
"""Memory of a step in the second part, and speech's share of it: batches of some thirty recordings."""


LEAKS = "leaks.json"
"""Written where no test sentence is in a corpus' training data."""


@dataclass(frozen=True)
class Corpus:
    """A corpus, and how long the models are trained on it."""

    name: str  # suffix of its recipes' names: salm_t5_phrasebook
    folder: Path
    prepare: list[str]
    summary: str  # the file that ``prepare`` writes last
    steps: int


@dataclass(frozen=True)
class Run:
    """One command."""

    name: str  # such as phrasebook/salm_t5/joint/1
    command: Callable[[], list[str]]  # made when it starts, since it depends on results of earlier runs
    result: Path  # exists when it has finished
    after: tuple[str, ...] = ()
    unfinished: Path | None = None  # folder of an interrupted attempt, removed before the next


def phrasebook(data: Path) -> Corpus:
    """The demo's phrasebook."""
    folder = data / "phrasebook"
    command = [installed("nemo-emmett"), "prepare", "phrasebook", str(folder), *PHRASEBOOK]
    return Corpus("phrasebook", folder, command, "phrasebook.json", steps=200)


def captions(data: Path, source: Path) -> Corpus:
    """Multi30k's captions, spoken."""
    folder = data / "captions"
    command = [installed("nemo-emmett"), "prepare", "captions", str(source), str(folder), *CAPTIONS]
    return Corpus("captions", folder, command, "captions.json", steps=200)


def all_runs(corpora: Sequence[Corpus], exp: Path, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Every run, in the order to start them in: first those that others need, then one seed after another."""
    starts = [run for corpus in corpora for run in start_runs(corpus, exp / corpus.name)]
    efficiency = efficiency_starts(corpora[0], exp)
    trainings = []
    for seed in seeds:
        for corpus in corpora:
            trainings += [training_run(corpus, exp / corpus.name, model, arm, seed) for model in MODELS for arm in ARMS]
        trainings += [efficiency_run(corpora[0], exp, arm, seed) for arm in EFFICIENCY]
    return starts + efficiency + trainings


def corpus_runs(corpus: Corpus) -> list[Run]:
    """The corpus, and the search for test sentences in its training data."""
    spoken = Run(f"{corpus.name}/corpus", lambda: corpus.prepare, corpus.folder / corpus.summary)
    return [spoken, leaks_run(corpus.name, corpus.folder)]


def leaks_run(name: str, folder: Path) -> Run:
    """The search for test sentences in the training data of a corpus; fails if there is one."""
    command = script("experiment_corpora.py", "leaks", "--out", str(folder))
    return Run(f"{name}/leaks", lambda: command, folder / LEAKS, (f"{name}/corpus",))


def start_runs(corpus: Corpus, exp: Path) -> list[Run]:
    """The corpus, and the pretrained parts that all trainings on it start from; the language models are scored."""

    def pretraining(part: str, script_name: str, result: Path) -> Run:
        command = script(
            script_name,
            f"--config-name=pretrain_{part}_{corpus.name}",
            f"corpus={corpus.folder}",
            f"exp_dir={exp / part}",
            "num_threads=1",
        )
        return Run(f"{corpus.name}/{part}", lambda: command, result, after=(f"{corpus.name}/leaks",))

    def scoring(part: str) -> Run:
        output = exp / part / "evaluation"
        command = script(
            "evaluate.py",
            f"--config-name=evaluate_{corpus.name}",
            f"model={exp / part / 'model'}",
            f"corpus={corpus.folder}",
            f"output={output}",
            "~test_ds.datasets.test_speech",
        )
        return Run(f"{corpus.name}/{part}/start", lambda: command, output / "report.html", (f"{corpus.name}/{part}",))

    return [
        *corpus_runs(corpus),
        pretraining("encoder", "pretrain_encoder.py", exp / "encoder" / "encoder.nemo"),
        pretraining("t5", "pretrain_t5.py", exp / "t5" / "t5" / "config.json"),
        pretraining("llm", "pretrain_llm.py", exp / "llm" / "llm" / "config.json"),
        scoring("t5"),
        scoring("llm"),
    ]


def training_run(corpus: Corpus, exp: Path, model: str, arm: str, seed: int) -> Run:
    """One model trained on one arm's data from the corpus' start, and scored on both test sets."""
    folder = exp / model / arm / str(seed)
    steps = [f"trainer.max_steps={corpus.steps}", f"trainer.limit_train_batches={corpus.steps // 4}"]
    clock = "+trainer.callbacks=[{_target_: nemo_emmett.callbacks.TrainingClock}]"
    checkpoints = ["exp_manager.resume_if_exists=false", "exp_manager.create_checkpoint_callback=false"]
    command = _training(f"{model}_{corpus.name}", corpus, exp, model, folder, seed)
    command += [*steps, clock, *checkpoints, *ARMS[arm]]
    after = (f"{corpus.name}/encoder", f"{corpus.name}/{MODELS[model]}")
    return Run(f"{corpus.name}/{model}/{arm}/{seed}", lambda: command, _report(folder), after, unfinished=folder)


def efficiency_starts(corpus: Corpus, exp: Path) -> list[Run]:
    """The unequal corpus with its bins, and the batch sizes that fit the memory budget in each of them."""
    folder, start = exp / "efficiency", exp / corpus.name
    bins_file = folder / "bins.json"
    prepare = script("experiment_bins.py", *_of_efficiency(corpus, start, folder))
    after = (f"{corpus.name}/encoder", f"{corpus.name}/t5")
    runs = [Run("efficiency/bins", lambda: prepare, bins_file, after)]
    for bins in sorted({bins for bins, _, _ in EFFICIENCY.values()}):
        profile = folder / f"{bins}.yaml"

        def calibrate(bins: str = bins, profile: Path = profile) -> list[str]:
            overrides = [*_of_efficiency(corpus, start, folder), *bins_overrides(bins_file, bins)]
            limits = ["--memory-budget", MEMORY_BUDGET, "--modality-share", MODALITY_SHARE]
            command = [installed("nemo-emmett"), "oomptimize", str(RECIPES / "experiment_efficiency.yaml"), *overrides]
            return [*command, "--profile", str(profile), *limits]

        runs.append(Run(f"efficiency/{bins}", calibrate, profile, ("efficiency/bins",)))
    return runs


def efficiency_run(corpus: Corpus, exp: Path, arm: str, seed: int) -> Run:
    """Joint training of SALM-T5 on the unequal corpus with one of the arms' bins, batch sizes and blend."""
    bins, batch_sizes, temperature = EFFICIENCY[arm]
    home = exp / "efficiency"
    folder = home / arm.replace(" ", "_") / str(seed)

    def command() -> list[str]:
        return [
            *_training("experiment_efficiency", corpus, exp / corpus.name, "salm_t5", folder, seed),
            f"speech={home / 'speech'}",
            "~data.validation_ds.datasets.dev_text",
            f"data.train_ds.audio.reweight_temperature={temperature}",
            *bins_overrides(home / "bins.json", bins),
            *batch_size_overrides(home / f"{bins}.yaml", fixed=batch_sizes == "fixed"),
        ]

    return Run(f"efficiency/{arm}/{seed}", command, _report(folder), (f"efficiency/{bins}",), unfinished=folder)


def bins_overrides(bins_file: Path, name: str) -> list[str]:
    """A set of bins that ``experiment_bins.py`` found, as overrides."""
    groups = yaml.safe_load(bins_file.read_text())[name]
    overrides = []
    for group, bins in groups.items():
        overrides.append(f"data.train_ds.{group}.bucket_duration_bins={bins}")
        overrides.append(f"data.train_ds.{group}.num_buckets={len(bins)}")
        overrides.append(f"data.train_ds.{group}.num_sub_buckets=null")
    return overrides


def batch_size_overrides(profile: Path, fixed: bool) -> list[str]:
    """The batch sizes of a profile as overrides; ``fixed``: the one that fits every bucket, in all of them."""
    overrides = []
    for group, settings in yaml.safe_load(profile.read_text())["train_ds"].items():
        sizes = settings["bucket_batch_size"]
        chosen = [min(sizes)] * len(sizes) if fixed else sizes
        overrides.append(f"+data.train_ds.{group}.bucket_batch_size={chosen}")
    return overrides


def _training(recipe: str, corpus: Corpus, start: Path, model: str, folder: Path, seed: int) -> list[str]:
    """The command of a training, with the overrides that all have: pretrained parts, folder of the results, seed."""
    return script(
        "train_and_evaluate.py",
        f"--config-name={recipe}",
        *_parts(corpus, start, model),
        f"exp_dir={folder}",
        "export_dir=null",
        f"seed={seed}",
        f"data.train_ds.seed={seed}",
        f"data.train_ds.shard_seed={seed}",
        f"+evaluation.recipe=evaluate_{corpus.name}",
        f"+evaluation.output={folder / 'evaluation'}",
    )


def _of_efficiency(corpus: Corpus, start: Path, folder: Path) -> list[str]:
    return [*_parts(corpus, start, "salm_t5"), f"exp_dir={folder}", f"speech={folder / 'speech'}"]


def _parts(corpus: Corpus, start: Path, model: str) -> list[str]:
    """One thread each: two runs side by side are faster than one on two cores."""
    llm = MODELS[model]
    return [
        f"corpus={corpus.folder}",
        f"model.pretrained_llm={start / llm / llm}",
        f"model.pretrained_asr={start / 'encoder' / 'encoder.nemo'}",
        "num_threads=1",
    ]


def _report(folder: Path) -> Path:
    return folder / "evaluation" / "report.html"
