"""How to set up joint training with 1,000 recordings: objectives, ratio and weight, length.

The captions, the starts, and the trainings of the part on scarce speech with as many recordings: speech alone and joint
with the objectives that won, of either length, and joint. The others change one setting of joint training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from experiment_runs import Corpus
from experiment_scarce import ARMS as SCARCE_ARMS
from experiment_scarce import (
    CONSISTENCY,
    DISTILLATION,
    RETENTION,
    STEPS,
    corpus_runs,
    scarce_setting,
    teacher_runs,
)
from experiment_scarce import REFERENCES as SCARCE_REFERENCES
from experiment_seeds import Arm, Part, Results, objective, start_runs, training_run

SIZE = "1000"
"""Recordings; the name of the corpus' folder."""

QUARTER = ("+data.train_ds.text.every_n_steps=4", "model.modality_loss_weights.text=0.5")
"""As fairseq recommends for joint training: text in a quarter of the steps, its loss with half the weight."""

TRANSCRIPTION = ("+data.train_ds.audio.transcription=0.2", objective("transcription", 0.5))
"""A fifth of the recordings is transcribed instead of translated, with half the weight."""

TOGETHER = (DISTILLATION, CONSISTENCY, RETENTION, *TRANSCRIPTION)

SHARED = SCARCE_ARMS
"""Trainings of the part on scarce speech."""

ARMS = (
    Arm("distillation", "joint + distillation", (DISTILLATION,), teaches=("distillation",)),
    Arm("consistency", "joint + consistency", (CONSISTENCY,)),
    Arm("retention", "joint + retention", (RETENTION,), teaches=("retention",)),
    Arm("transcription", "joint + transcription", TRANSCRIPTION),
    Arm("together", "joint + all objectives", TOGETHER, teaches=("distillation", "retention")),
    Arm("quarter", "joint, a quarter of the text", QUARTER),
)
"""Ways of training."""

REFERENCES = {
    **{arm.name: "joint" for arm in ARMS},
    **SCARCE_REFERENCES,
    "best": "joint",
}
"""What each is compared with."""


def part(captions: Corpus, source: Path, data: Path, exp: Path, seeds: Sequence[int]) -> Part:
    """The part of the experiment; arguments as for that on scarce speech."""
    setting = scarce_setting(data, exp)
    runs = [*corpus_runs(captions, source, data), *start_runs(setting, seeds), *teacher_runs(data, exp, seeds)]
    for seed in seeds:
        for arm in (*SHARED, *ARMS):
            folder = _folder(exp, arm.name, seed)
            name = f"scarce/{SIZE}/{arm.name}/{seed}" if arm in SHARED else f"settings/{arm.name}/{seed}"
            runs.append(training_run(setting, data / "scarce" / SIZE, folder, name, arm, seed))
    return Part("settings", runs, lambda: collect(exp, seeds), tables, draw)


def _folder(exp: Path, arm: str, seed: int) -> Path:
    home = exp / "scarce" / SIZE if arm in {one.name for one in SHARED} else exp / "settings"
    return home / arm / str(seed)


def collect(exp: Path, seeds: Sequence[int]) -> Results:
    """Scores of all trainings, and comparisons with joint training, and of that with speech alone."""
    from experiment_compare import collect_arms, speech_into_others

    names = [arm.name for arm in (*SHARED, *ARMS)]
    trainings, comparisons = collect_arms(
        names, seeds, lambda arm, seed: _folder(exp, arm, seed), REFERENCES, speech_into_others
    )
    return {"steps": STEPS, "trainings": trainings, "comparisons": comparisons}


def tables(results: Mapping) -> str:
    """Scores of each arm, and the differences from speech alone."""
    from experiment_compare import COMPARISON, comparison_cells, markdown_table, score_cells

    titles = {arm.name: arm.title for arm in (*SHARED, *ARMS)}
    scores = []
    for arm, title in titles.items():
        runs = [one for one in results["trainings"] if one["arm"] == arm]
        scores.append([title, *score_cells(runs, ("speech", "text", "cpu_seconds"))])
    differences = [
        [titles[one["arm"]], titles[one["reference"]], *comparison_cells(one)] for one in results["comparisons"]
    ]
    return "\n".join(
        [
            "**Settings, 1,000 recordings**: BLEU at the best checkpoint (mean ± deviation over seeds)\n",
            markdown_table(("trained with", "speech", "text", "CPU seconds"), scores),
            "Speech BLEU, differences:\n",
            markdown_table(("", "over", *COMPARISON), differences, names=2),
        ]
    )


def draw(results: Mapping, path: Path) -> None:
    """The differences with their 95 % intervals, and a point for each seed."""
    from matplotlib.figure import Figure

    titles = {arm.name: arm.title for arm in (*SHARED, *ARMS)}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(results["comparisons"]):
        axes.plot([one["low"], one["high"]], [place, place], color="C0", linewidth=2)
        axes.plot(one["differences"], [place] * len(one["differences"]), "k.", markersize=4)
        axes.plot(fmean(one["differences"]), place, "o", color="C0")
    labels = [f"{titles[one['arm']]}\nover {titles[one['reference']]}" for one in results["comparisons"]]
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0.0, color="grey", linewidth=1)
    axes.set_title("Captions, 1,000 recordings: difference in speech BLEU, test set", fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path)
