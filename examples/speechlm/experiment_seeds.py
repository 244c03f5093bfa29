"""What the experiment's parts share: pretrained starts for each seed, and trainings that stop where the development
set says so.

A seed is one of everything: of the pretraining of speech encoder and language model, of the order of the data, of
dropout and SpecAugment. A training validates five times; the checkpoint with the best speech BLEU on the development
set is scored on the test sets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment_runs import Run
from stages import script

VALIDATIONS = 5
"""Of a training, at equal intervals."""

DEV_SPEECH = "val_bleu_dev_speech"
"""The score by which checkpoints are chosen, in all arms: that of speech, which is what the parts compare."""

RANDOM_ENCODER = "random_encoder"
"""A speech encoder that was not trained."""

TEACHER = "teacher"
"""A seed's language model after training on all text that joint training has."""

Results = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str  # in run names and results
    title: str  # in tables
    overrides: tuple[str, ...]
    from_nothing: bool = False  # speech encoder and language model with random weights
    alternates: bool = False  # a step holds one modality, so that there are two of them for each step of speech
    teaches: tuple[str, ...] = ()  # objectives whose teacher is the language model trained on all text


@dataclass(frozen=True)
class Setting:
    """A corpus, its recipes, and the trainings on it."""

    part: str  # begins the names of its runs
    recipe: str  # suffix of the recipes' names: salm_t5_captions
    start_corpus: Path  # that encoder and language model are pretrained on
    exp: Path  # folder of the part
    starts: Path  # folder of the pretrained parts, which two parts may share
    after: str  # the run that writes the corpus
    steps: int  # of speech
    from_nothing: bool = False  # some arms start from random weights
    encoder: tuple[str, ...] = ()  # overrides of the encoder's pretraining
    overrides: tuple[str, ...] = ()  # of all trainings


@dataclass(frozen=True)
class Part:
    """A part of the experiment."""

    name: str
    runs: Sequence[Run]
    collect: Callable[[], Results]  # reads the runs' results; imports NeMo
    tables: Callable[[Mapping], str]
    draw: Callable[[Mapping, Path], None]  # results, file


def start_runs(setting: Setting, seeds: Sequence[int]) -> list[Run]:
    """Speech encoder and language model of each seed; the language model is scored.

    The language model with random weights is a file of the pretraining.
    """
    runs = []
    for seed in seeds:
        home = setting.starts / str(seed)
        parts = [
            ("encoder", "encoder", home / "encoder" / "encoder.nemo", setting.encoder),
            ("t5", "t5", home / "t5" / "t5" / "config.json", ()),
        ]
        if setting.from_nothing:
            random = home / RANDOM_ENCODER / "encoder.nemo"
            parts.append((RANDOM_ENCODER, "encoder", random, ("trainer.max_steps=0",)))
        for part, kind, result, overrides in parts:
            data = "model.train_ds" if kind == "encoder" else "data.train_ds"
            command = script(
                f"pretrain_{kind}.py",
                f"--config-name=pretrain_{kind}_{setting.recipe}",
                f"corpus={setting.start_corpus}",
                f"exp_dir={home / part}",
                f"seed={seed}",
                f"{data}.seed={seed}",
                f"{data}.shard_seed={seed}",
                "num_threads=1",
                *overrides,
            )
            runs.append(Run(_start(setting, part, seed), lambda c=command: c, result, (setting.after,)))
        output = home / "t5" / "evaluation"
        scoring = script(
            "evaluate.py",
            f"--config-name=evaluate_{setting.recipe}",
            f"model={home / 't5' / 'model'}",
            f"corpus={setting.start_corpus}",
            f"output={output}",
            "~test_ds.datasets.test_speech",
        )
        name = f"{_start(setting, 't5', seed)}/score"
        runs.append(Run(name, lambda c=scoring: c, output / "report.html", (_start(setting, "t5", seed),)))
    return runs


def teacher_run(setting: Setting, corpus: Path, steps: int, seed: int) -> Run:
    """The seed's language model trained on all text of a corpus, without speech, and scored."""
    folder, needed = teacher_folder(setting, seed), (_start(setting, "t5", seed),)
    command = [
        *_training(setting, corpus, folder, Arm(TEACHER, "text alone", ()), seed, steps),
        "model.pretrained_asr=null",
        "model.perception=null",
        "~data.train_ds.audio",
        "~data.validation_ds.datasets.dev_speech",
        "+evaluation.without=[test_speech]",
    ]
    return Run(_start(setting, TEACHER, seed), lambda: command, _report(folder), needed, unfinished=folder)


def teacher_folder(setting: Setting, seed: int) -> Path:
    """The folder of :func:`teacher_run`."""
    return setting.starts / str(seed) / TEACHER


def training_run(setting: Setting, corpus: Path, folder: Path, name: str, arm: Arm, seed: int) -> Run:
    """SALM-T5 trained in one of the ways from its seed's start, and scored on the test sets."""
    steps = setting.steps * (2 if arm.alternates else 1)
    command = [
        *_training(setting, corpus, folder, arm, seed, steps),
        f"exp_manager.checkpoint_callback_params.monitor={DEV_SPEECH}",
        *arm.overrides,
        *(f"+model.objectives.{one}.teacher={teacher_folder(setting, seed) / 'model'}" for one in arm.teaches),
    ]
    return Run(name, lambda: command, _report(folder), _needed(setting, arm, seed), unfinished=folder)


def _training(setting: Setting, corpus: Path, folder: Path, arm: Arm, seed: int, steps: int) -> list[str]:
    """The command of a training and its scoring, with the overrides that all have."""
    home = setting.starts / str(seed)
    return script(
        "train_and_evaluate.py",
        f"--config-name=salm_t5_{setting.recipe}",
        f"corpus={corpus}",
        f"model.pretrained_llm={home / 't5' / ('init' if arm.from_nothing else 't5')}",
        f"model.pretrained_asr={home / _encoder(arm) / 'encoder.nemo'}",
        f"exp_dir={folder}",
        f"seed={seed}",
        f"data.train_ds.seed={seed}",
        f"data.train_ds.shard_seed={seed}",
        f"trainer.max_steps={steps}",
        f"trainer.limit_train_batches={steps // VALIDATIONS}",
        "num_threads=1",
        "+trainer.callbacks=[{_target_: nemo_emmett.callbacks.TrainingClock}]",
        "exp_manager.resume_if_exists=false",
        f"+evaluation.recipe=evaluate_{setting.recipe}",
        f"+evaluation.output={folder / 'evaluation'}",
        "+evaluation.best=true",
        *setting.overrides,
    )


def _report(folder: Path) -> Path:
    """The last file of a run."""
    return folder / "evaluation" / "report.html"


def _needed(setting: Setting, arm: Arm, seed: int) -> tuple[str, ...]:
    parts = (_encoder(arm), "t5", *([TEACHER] if arm.teaches else []))
    return tuple(_start(setting, part, seed) for part in parts)


def _encoder(arm: Arm) -> str:
    return RANDOM_ENCODER if arm.from_nothing else "encoder"


def _start(setting: Setting, part: str, seed: int) -> str:
    """The name of a start's run: that of its folder, so that parts that share starts share the runs."""
    return f"{setting.starts.parent.name}/start/{seed}/{part}"


SPEECH_ALONE = "~data.train_ds.text"
"""Without text in training."""


def objective(name: str, weight: float) -> str:
    """An override that adds an objective to the loss."""
    return f"+model.objectives.{name}.weight={weight}"
