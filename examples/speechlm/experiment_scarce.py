"""Where joint training helps: speech translation from 250 to 6,159 recordings.

Multi30k's captions of at most 12 words, in one synthetic voice, English to French. The models are trained on the first
250, 500, 1,000, 2,000 or all recordings with translations. The speech encoder is pretrained on all of them with their
transcripts, since there is more transcribed than translated speech everywhere; the language model on the pairs of
sentences that are not spoken, which are longer. The text of joint training is all pairs, and the teacher of
distillation is the language model trained on them without speech. No training sentence is in the development or test
set, in either language.

Speech alone, and joint training with the objectives that won, are trained with every number of recordings; joint
training without objectives, and either of the first two for twice the steps, with 1,000. The part on settings
(``--settings``) has other objectives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiment_corpora import SIZES, SUMMARY
from experiment_runs import Corpus, Run, leaks_run
from experiment_runs import corpus_runs as captions_runs
from experiment_seeds import (
    SPEECH_ALONE,
    VALIDATIONS,
    Arm,
    Part,
    Results,
    Setting,
    objective,
    start_runs,
    teacher_run,
    training_run,
)
from stages import script

STEPS = 600
"""Of a training."""

LONGER = (f"trainer.max_steps={2 * STEPS}", f"trainer.limit_train_batches={2 * STEPS // VALIDATIONS}")
"""Twice the steps."""

BATCH = ("data.train_ds.audio.batch_size=16", "data.train_ds.text.batch_size=16")
"""Half of the captions' recipe, which has fewer steps."""

COMMON = (*BATCH, "~data.validation_ds.datasets.dev_text")
"""Overrides of all trainings."""

ENCODER = ("trainer.max_steps=1800",)
"""Pretraining of the speech encoder: twice the steps of the captions' recipe."""

TEACHER_STEPS = 1200
"""Training of the language model on all text."""

DISTILLATION, CONSISTENCY, RETENTION = (objective(name, 1.0) for name in ("distillation", "consistency", "retention"))

BEST = (DISTILLATION, CONSISTENCY)
"""The objectives that won."""

ARMS = (
    Arm("speech", "speech alone", (SPEECH_ALONE,)),
    Arm("joint", "joint", ()),
    Arm("best", "joint + distillation + consistency", BEST, teaches=("distillation",)),
    Arm("speech_longer", "speech alone, twice the steps", (SPEECH_ALONE, *LONGER)),
    Arm(
        "best_longer",
        "joint + distillation + consistency, twice the steps",
        (*BEST, *LONGER),
        teaches=("distillation",),
    ),
)
"""Ways of training."""

REFERENCES = {"joint": "speech", "best": "speech", "speech_longer": "speech", "best_longer": "speech_longer"}
"""What each is compared with."""

AT_EVERY_SIZE = ("speech", "best")
"""The others are trained with ``MAIN_SIZE`` recordings alone."""

MAIN_SIZE = "1000"


def arms_of(size: str) -> tuple[Arm, ...]:
    """The arms that are trained with so many recordings."""
    return tuple(arm for arm in ARMS if size == MAIN_SIZE or arm.name in AT_EVERY_SIZE)


def part(captions: Corpus, source: Path, data: Path, exp: Path, seeds: Sequence[int]) -> Part:
    """The part of the experiment.

    Args:
        captions: the corpus that is divided.
        source: Multi30k's raw text.
        data: folder of the corpora.
        exp: folder of the experiment.
        seeds: of pretraining and training.
    """
    home = exp / "scarce"
    setting = scarce_setting(data, exp)
    runs = [*corpus_runs(captions, source, data), *start_runs(setting, seeds), *teacher_runs(data, exp, seeds)]
    for seed in seeds:
        for size in SIZES:
            for arm in arms_of(size):
                folder, name = home / size / arm.name / str(seed), f"scarce/{size}/{arm.name}/{seed}"
                runs.append(training_run(setting, data / "scarce" / size, folder, name, arm, seed))
    return Part("scarce", runs, lambda: collect(data, home, seeds), tables, draw)


def scarce_setting(data: Path, exp: Path) -> Setting:
    """The divided captions and the starts, which the part on forgetting has too."""
    scarce = data / "scarce"
    starts = exp / "scarce" / "start"
    corpus = scarce / "start"
    return Setting(
        "scarce",
        "captions",
        corpus,
        exp / "scarce",
        starts,
        "scarce/leaks",
        STEPS,
        encoder=ENCODER,
        overrides=COMMON,
    )


def teacher_runs(data: Path, exp: Path, seeds: Sequence[int]) -> list[Run]:
    """The language model of each seed, trained on all text."""
    setting = replace(scarce_setting(data, exp), overrides=BATCH)
    return [teacher_run(setting, data / "scarce" / "all", TEACHER_STEPS, seed) for seed in seeds]


def corpus_runs(captions: Corpus, source: Path, data: Path) -> list[Run]:
    """The captions, spoken, and their division."""
    out = data / "scarce"
    options = ["--captions", str(captions.folder), "--source", str(source), "--out", str(out)]
    command = script("experiment_corpora.py", "scarce", *options)
    divided = Run("scarce/corpus", lambda: command, out / SUMMARY, ("captions/corpus",))
    return [*captions_runs(captions), divided, leaks_run("scarce", out)]


def collect(data: Path, home: Path, seeds: Sequence[int]) -> Results:
    """Scores of all trainings, and each arm compared with speech alone of its size and length."""
    from experiment_compare import collect_arms, speech_into_others, start_scores, teacher_scores

    trainings, comparisons = [], []
    for size in SIZES:
        arms = [arm.name for arm in arms_of(size)]
        of_size, differences = collect_arms(
            arms,
            seeds,
            lambda arm, seed, size=size: home / size / arm / str(seed),
            REFERENCES,
            speech_into_others,
        )
        trainings += [{"size": size, **one} for one in of_size]
        comparisons += [{"size": size, **one} for one in differences]
    starts = [{"seed": seed, **start_scores(home / "start" / str(seed))} for seed in seeds]
    teachers = [{"seed": seed, **teacher_scores(home / "start" / str(seed))} for seed in seeds]
    corpus = json.loads((data / "scarce" / SUMMARY).read_text())
    found = {"starts": starts, "teachers": teachers, "trainings": trainings, "comparisons": comparisons}
    return {"steps": STEPS, **corpus, **found}


def tables(results: Mapping) -> str:
    """Speech and text BLEU of each size and arm, and the differences from speech alone."""
    from experiment_compare import COMPARISON, comparison_cells, markdown_table, score_cells

    scores = []
    starts, teachers = results["starts"], results["teachers"]
    scores.append(["–", "nothing yet (the start)", "–", *score_cells(starts, ("text",)), "–"])
    scores.append(["–", "text alone (the teacher)", "–", *score_cells(teachers, ("text", "cpu_seconds"))])
    for size in SIZES:
        for arm in arms_of(size):
            runs = [one for one in results["trainings"] if (one["size"], one["arm"]) == (size, arm.name)]
            if runs:
                cells = score_cells(runs, ("speech", "text", "cpu_seconds"))
                scores.append([f"{results['recordings'][size]:,}", arm.title, *cells])
    titles = {arm.name: arm.title for arm in ARMS}
    differences = [
        [
            f"{results['recordings'][one['size']]:,}",
            titles[one["arm"]],
            titles[one["reference"]],
            *comparison_cells(one),
        ]
        for one in results["comparisons"]
    ]
    return "\n".join(
        [
            "**Scarce speech**: BLEU at the best checkpoint (mean ± deviation over seeds)\n",
            markdown_table(("recordings", "trained on", "speech", "text", "CPU seconds"), scores, names=2),
            "Speech BLEU, differences:\n",
            markdown_table(("recordings", "", "over", *COMPARISON), differences, names=3),
        ]
    )


def draw(results: Mapping, path: Path) -> None:
    """Speech BLEU over the number of recordings, for each arm."""
    from experiment_compare import draw_means
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    counts = results["recordings"]
    for number, arm in enumerate(ARMS):
        points = [(counts[one["size"]], one["speech"]) for one in results["trainings"] if one["arm"] == arm.name]
        draw_means(axes, points, f"C{number}", arm.title, line=arm.name in AT_EVERY_SIZE)
    axes.set_xscale("log", base=2)
    ticks = sorted(counts.values())
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("recordings with translations")
    axes.set_title("Captions: speech BLEU, test set", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
