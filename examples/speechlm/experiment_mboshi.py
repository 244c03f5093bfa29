"""Joint training on real speech: a subset of the Mboshi-French corpus, some 1,190 utterances of three speakers, an
hour.

Each way of training starts from a speech encoder and a language model that were pretrained on the same utterances
(transcription; translation of the transcripts), and speech alone and joint from random weights too. Training
utterances that equal one of the development or test set in either language are left out. Text is the transcripts and
their translations: there is no other text in Mboshi.

It took 2.8 hours of one core (docs/experiment.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiment_corpora import SUMMARY
from experiment_runs import Run, leaks_run
from experiment_scarce import ARMS as SCARCE_ARMS
from experiment_seeds import Part, Results, Setting, start_runs, training_run
from stages import script

STEPS = 300
"""Of a training; each has 32 recordings."""

_WAYS = {arm.name: arm for arm in SCARCE_ARMS}

ARMS = (
    replace(_WAYS["speech"], name="speech_from_nothing", title="speech alone, from nothing", from_nothing=True),
    replace(_WAYS["joint"], name="joint_from_nothing", title="joint, from nothing", from_nothing=True),
    *(_WAYS[name] for name in ("speech", "joint")),
    replace(_WAYS["best"], teaches=()),  # the start is the teacher: there is no other text
)
"""Ways of training."""

REFERENCES = {
    "joint_from_nothing": "speech_from_nothing",
    "joint": "speech",
    "best": "speech",
}
"""What each is compared with: speech alone from the same start."""

FILES = tuple(f"{split}.jsonl" for split in ("train", "dev", "test"))
"""Manifests of the source."""


def part(source: Path, data: Path, exp: Path, seeds: Sequence[int]) -> Part:
    """The part of the experiment.

    Args:
        source: folder of the manifests.
        data: folder of the corpora.
        exp: folder of the experiment.
        seeds: of pretraining and training.
    """
    corpus, home = data / "mboshi", exp / "mboshi"
    setting = Setting("mboshi", "mboshi", corpus, home, home / "start", "mboshi/leaks", STEPS, True)
    prepare = script("experiment_corpora.py", "mboshi", "--source", str(source), "--out", str(corpus))
    made = Run("mboshi/corpus", lambda: prepare, corpus / SUMMARY)
    runs = [made, leaks_run("mboshi", corpus), *start_runs(setting, seeds)]
    for seed in seeds:
        for arm in ARMS:
            name = f"mboshi/{arm.name}/{seed}"
            runs.append(training_run(setting, corpus, home / arm.name / str(seed), name, arm, seed))
    return Part("mboshi", runs, lambda: collect(home, seeds), tables, draw)


def collect(home: Path, seeds: Sequence[int]) -> Results:
    """Scores of all trainings, in BLEU and chrF++, and each arm compared with speech alone from its start."""
    from experiment_compare import collect_arms, scores_in, speech_into_others, start_scores

    names = [arm.name for arm in ARMS]

    def folder(arm: str, seed: int) -> Path:
        return home / arm / str(seed)

    metrics = ("BLEU", "chrF++")
    trainings, comparisons = collect_arms(names, seeds, folder, REFERENCES, speech_into_others, metrics=metrics)
    for one in trainings:
        one["speech_chrf"] = scores_in(folder(one["arm"], one["seed"]), "audio", "chrF++")
    starts = [{"seed": seed, **start_scores(home / "start" / str(seed))} for seed in seeds]
    return {"steps": STEPS, "starts": starts, "trainings": trainings, "comparisons": comparisons}


def tables(results: Mapping) -> str:
    """Scores of each arm, and the differences from speech alone."""
    from experiment_compare import COMPARISON, comparison_cells, markdown_table, mean_and_deviation, score_cells

    titles = {arm.name: arm.title for arm in ARMS}
    starts = mean_and_deviation(one["text"] for one in results["starts"])
    scores = [["nothing yet (the pretrained start)", "–", "–", starts, "–"]]
    for arm, title in titles.items():
        runs = [one for one in results["trainings"] if one["arm"] == arm]
        scores.append([title, *score_cells(runs, ("speech", "speech_chrf", "text", "cpu_seconds"))])
    differences = [[titles[one["arm"]], one["metric"], *comparison_cells(one)] for one in results["comparisons"]]
    return "\n".join(
        [
            "**Mboshi to French**: scores at the best checkpoint (mean ± deviation over seeds)\n",
            markdown_table(("trained on", "speech BLEU", "chrF++", "text BLEU", "CPU seconds"), scores),
            "Speech, difference from speech alone from the same start:\n",
            markdown_table(("", "metric", *COMPARISON), differences, names=2),
            "At equal CPU seconds the difference is one of BLEU on the development set.\n",
        ]
    )


def draw(results: Mapping, path: Path) -> None:
    """Speech BLEU on the development set over steps, for each arm."""
    from experiment_results import draw_lines
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(ARMS):
        runs = [one for one in results["trainings"] if one["arm"] == arm.name]
        draw_lines(axes, [[(step, bleu) for step, _, bleu in one["curve"]] for one in runs], f"C{number}", arm.title)
    axes.set_xlabel("training steps")
    axes.set_title("Mboshi to French: speech BLEU, development set", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
