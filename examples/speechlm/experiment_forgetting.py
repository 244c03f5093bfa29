"""What becomes of text translation while a model learns speech: text lost against speech gained.

The captions and starts of the part on scarce speech, with all of its recordings. Ways of keeping text: shares of text
in a step (replay), the incoming model's answers to it (retention), LoRA that acts on speech alone, steps of one
modality in turn, a frozen language model. The text is what the language model was pretrained on. Text lost is the BLEU
of the start minus that of the best checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiment_runs import Corpus
from experiment_scarce import RETENTION, corpus_runs, scarce_setting
from experiment_seeds import SPEECH_ALONE, Arm, Part, Results, objective, start_runs, training_run

STEPS = 400
"""Of a training."""

LORA = "+model.lora={r: 16, lora_alpha: 32, target_modules: [q, k, v, o, wi_0, wi_1, wo]}"
"""Low-rank updates of all linear layers of T5's blocks."""


PRETRAINED = (
    'data.train_ds.text.input_cfg=[{type: parallel_text, directions: [en-fr], paths: {en: "${corpus}/../start/text/'
    'train.en", fr: "${corpus}/../start/text/train.fr"}}]'
)
"""Text is that of the language model's pretraining."""


def _replay(share: float) -> tuple[str, ...]:
    """So much text for each recording, and its loss with as much less weight: every token of text counts equally."""
    return (PRETRAINED, f"+data.train_ds.text.batch_ratio={share}", f"model.modality_loss_weights.text={share}")


RETAINED_TEXT = "+data.train_ds.text.every_n_steps=4"
"""Retention reads text in a quarter of the steps."""


def _retention(weight: float) -> tuple[str, ...]:
    """The incoming model's answers in place of the references."""
    return (PRETRAINED, RETAINED_TEXT, "model.modality_loss_weights.text=0.0", objective("retention", weight))


ARMS = (
    Arm("speech", "speech alone", (SPEECH_ALONE,)),
    Arm("replay_1_8", "replay 1/8", _replay(0.125)),
    Arm("replay_1_4", "replay 1/4", _replay(0.25)),
    Arm("replay_1", "replay 1", _replay(1.0)),
    Arm("retention_1", "retention 1", _retention(1.0)),
    Arm("retention_4", "retention 4", _retention(4.0)),
    Arm("replay_retention", "replay 1/4 + retention 1", (*_replay(0.25), RETENTION)),
    Arm("gated_lora", "LoRA on speech alone", (SPEECH_ALONE, LORA, "+model.lora_modality=audio")),
    Arm("alternating", "alternating steps", (PRETRAINED, "data.train_ds.sampler_fusion=round_robin"), alternates=True),
    Arm("frozen", "frozen language model", (SPEECH_ALONE, "+model.freeze=[llm]")),
)
"""Ways of training; the first is what the others are compared with."""

FAMILIES = {
    "replay": ("replay_1_8", "replay_1_4", "replay_1"),
    "retention": ("retention_1", "retention_4"),
}
"""Arms that differ in one number; joined by a line in the plot."""


def part(captions: Corpus, source: Path, data: Path, exp: Path, seeds: Sequence[int]) -> Part:
    """The part of the experiment; arguments as for that on scarce speech."""
    home, setting = exp / "forgetting", replace(scarce_setting(data, exp), steps=STEPS)
    runs = corpus_runs(captions, source, data) + start_runs(setting, seeds)
    for seed in seeds:
        for arm in ARMS:
            folder, name = home / arm.name / str(seed), f"forgetting/{arm.name}/{seed}"
            runs.append(training_run(setting, data / "scarce" / "all", folder, name, arm, seed))
    return Part("forgetting", runs, lambda: collect(home, setting.starts, seeds), tables, draw)


def collect(home: Path, starts: Path, seeds: Sequence[int]) -> Results:
    """Scores of all trainings, text lost, and each arm compared with speech alone in speech and in text."""
    from experiment_compare import collect_arms, compared, speech_into_others, start_scores, text

    names = [arm.name for arm in ARMS]

    def folder(arm: str, seed: int) -> Path:
        return home / arm / str(seed)

    references = dict.fromkeys(names[1:], names[0])
    trainings, comparisons = collect_arms(names, seeds, folder, references, speech_into_others)
    before = {seed: start_scores(starts / str(seed))["text"] for seed in seeds}
    for one in trainings:
        one["text_lost"] = before[one["seed"]] - one["text"]
    for one in comparisons:
        ours, theirs = ([folder(arm, seed) for seed in seeds] for arm in (one["arm"], one["reference"]))
        of_text = compared(ours, theirs, text)
        one["text"] = {key: of_text[key] for key in ("differences", "difference", "low", "high", "p")}
    found = [{"seed": seed, "text": score} for seed, score in before.items()]
    return {"steps": STEPS, "starts": found, "trainings": trainings, "comparisons": comparisons}


def tables(results: Mapping) -> str:
    """Speech gained and text lost by each arm, and the differences from speech alone."""
    from experiment_compare import COMPARISON, comparison_cells, markdown_table, mean_and_deviation, score_cells

    titles = {arm.name: arm.title for arm in ARMS}
    starts = mean_and_deviation(one["text"] for one in results["starts"])
    scores, differences = [], []
    for arm, title in titles.items():
        runs = [one for one in results["trainings"] if one["arm"] == arm]
        scores.append([title, *score_cells(runs, ("speech", "text", "text_lost", "cpu_seconds"))])
    for one in results["comparisons"]:
        of_text = [mean_and_deviation(one["text"]["differences"], "+.1f"), f"{one['text']['p']:.3f}"]
        differences.append([titles[one["arm"]], *comparison_cells(one), *of_text])
    return "\n".join(
        [
            f"**Forgetting**: BLEU at the best checkpoint (mean ± deviation over seeds); text before: {starts}\n",
            markdown_table(("trained on", "speech", "text", "text lost", "CPU seconds"), scores),
            "Difference from speech alone: speech, and text after as many steps:\n",
            markdown_table(("", *COMPARISON, "text, equal steps, test", "p"), differences),
        ]
    )


def draw(results: Mapping, path: Path) -> None:
    """Text lost over speech gained: a point for each seed, the mean of each arm, families joined."""
    from statistics import fmean

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    families = {name: family for family, names in FAMILIES.items() for name in names}
    alone = [arm.name for arm in ARMS if arm.name not in families]
    colours = {name: f"C{number}" for number, name in enumerate([*FAMILIES, *alone])}
    means = {}
    for arm in ARMS:
        runs = [one for one in results["trainings"] if one["arm"] == arm.name]
        colour = colours[families.get(arm.name, arm.name)]
        for one in runs:
            axes.plot(one["speech"], one["text_lost"], marker=".", color=colour, alpha=0.4, markersize=4)
        means[arm.name] = fmean(one["speech"] for one in runs), fmean(one["text_lost"] for one in runs)
        axes.plot(*means[arm.name], marker="o", color=colour)
    for arm in ARMS:
        is_below = families.get(arm.name) == "replay" or arm.name in ("frozen", "speech")
        place = {"xytext": (0, -13 if is_below else 7), "ha": "right" if arm.name == "retention_4" else "center"}
        axes.annotate(arm.title, means[arm.name], textcoords="offset points", fontsize=8, **place)
    axes.margins(0.09)
    for family, names in FAMILIES.items():
        axes.plot(*zip(*(means[name] for name in names), strict=True), color=colours[family], linewidth=1)
    axes.set_xlabel("speech BLEU, test set")
    axes.set_ylabel("text BLEU lost, test set")
    axes.set_title("Captions: text lost against speech gained", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(path)
