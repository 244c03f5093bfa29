"""The experiment's results, read from its runs: numbers, tables and curves.

Scores are BLEU on the test sets, the mean over the directions between different languages. ``±`` is the standard
deviation over seeds (of the sample, n - 1).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiment_runs import ARMS, EFFICIENCY, MEMORY_BUDGET, MODELS, Corpus, all_runs
from experiment_seeds import DEV_SPEECH, Part
from rich.console import Console
from rich.markdown import Markdown
from stages import noted_seconds

from nemo_emmett.evaluation import average, columns, from_json, read_curves

MODEL_TITLES = {"salm_t5": "SALM-T5", "salm_gpt": "SALM-GPT"}
ARM_TITLES = {"nmt": "text alone (NMT)", "ast": "speech alone (AST)", "joint": "both (joint)"}
DEV_TEXT = "val_bleu_dev_text"

Results = Mapping[str, Any]


def collect(corpora: Sequence[Corpus], exp: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Read the results of all runs."""
    starts, trainings, efficiency = [], [], []
    for corpus in corpora:
        home = exp / corpus.name
        for model, llm in MODELS.items():
            starts.append({"corpus": corpus.name, "model": model, **scores_of(home / llm)})
            for arm in ARMS:
                for seed in seeds:
                    run = {"corpus": corpus.name, "model": model, "arm": arm, "seed": seed, "steps": corpus.steps}
                    trainings.append(run | training_scores(home / model / arm / str(seed)))
    for arm in EFFICIENCY:
        for seed in seeds:
            folder = exp / "efficiency" / arm.replace(" ", "_") / str(seed)
            efficiency.append({"arm": arm, "seed": seed, **training_scores(folder)})
    bins = json.loads((exp / "efficiency" / "bins.json").read_text())
    buckets = {arm: len(bins[kind]["audio"]) for arm, (kind, _, _) in EFFICIENCY.items()}
    parts = {"starts": starts, "trainings": trainings, "efficiency": efficiency, "buckets": buckets}
    logs = (exp / "logs" / f"{run.name}.log" for run in all_runs(corpora, exp, seeds))
    return {"machine": _machine(), **parts, "seconds": sum(map(noted_seconds, logs))}


def report(results: Results, exp: Path, console: Console) -> None:
    """Print the tables, and write them with the numbers and the curves."""
    text = tables(results)
    console.print(Markdown(text))
    write_results(exp, results)
    (exp / "tables.md").write_text(text)
    draw_curves(results, exp)
    console.print(f"Numbers, tables and curves: {exp / 'results.json'}, tables.md, *.svg", highlight=False)


def report_parts(parts: Sequence[Part], exp: Path, console: Console) -> None:
    """The same of parts; their results are added to the others under their names, with the seconds of all runs."""
    for part in parts:
        seconds = sum(noted_seconds(exp / "logs" / f"{run.name}.log") for run in part.runs)
        results = {**part.collect(), "seconds": seconds}
        text = part.tables(results)
        console.print(Markdown(text))
        write_results(exp, {"machine": _machine(), part.name: results})
        (exp / f"tables_{part.name}.md").write_text(text)
        part.draw(results, exp / f"{part.name}.svg")
    names = ", ".join(f"tables_{part.name}.md, {part.name}.svg" for part in parts)
    console.print(f"Numbers, tables and plots: {exp / 'results.json'}, {names}", highlight=False)


def write_results(exp: Path, results: Results) -> None:
    """Add to the results of the folder; those of the same names are replaced."""
    file = exp / "results.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**kept, **results}, indent=1) + "\n")


def tables(results: Results) -> str:
    """The tables, as Markdown."""
    parts = [_joint_table(results, corpus) for corpus in dict.fromkeys(one["corpus"] for one in results["starts"])]
    return "\n".join([*parts, _efficiency_table(results["efficiency"], results["buckets"])])


def differences(results: Results, corpus: str, model: str) -> dict[str, list[float]]:
    """Differences by joint training, per seed: text BLEU over NMT alone, speech BLEU over AST alone."""
    runs = {
        (one["arm"], one["seed"]): one
        for one in results["trainings"]
        if (one["corpus"], one["model"]) == (corpus, model)
    }
    seeds = sorted({seed for _, seed in runs})
    return {
        "text": [runs["joint", seed]["text"] - runs["nmt", seed]["text"] for seed in seeds],
        "speech": [runs["joint", seed]["speech"] - runs["ast", seed]["speech"] for seed in seeds],
    }


def seconds_to(curve: Sequence[Sequence[float]], target: float) -> tuple[float, float] | None:
    """Steps and CPU seconds until a curve first reaches a score, by linear interpolation; None if it never does.

    Args:
        curve: (step, CPU seconds, BLEU) of each validation; before the first, training begins at (0, 0, 0).
        target: BLEU.

    Example:
        >>> seconds_to([(10, 100.0, 20.0), (20, 200.0, 40.0)], 30.0)
        (15.0, 150.0)
    """
    before = (0.0, 0.0, 0.0)
    for point in curve:
        if point[2] >= target:
            share = (target - before[2]) / (point[2] - before[2]) if point[2] > before[2] else 1.0
            return before[0] + share * (point[0] - before[0]), before[1] + share * (point[1] - before[1])
        before = tuple(point)
    return None


def common_target(runs: Iterable[Mapping]) -> float:
    """The best score that every run reaches."""
    return min(max(bleu for _, _, bleu in run["curve"]) for run in runs)


def draw_curves(results: Results, folder: Path) -> None:
    """BLEU on the development sets: over steps for each corpus and model, over CPU seconds for the second part."""
    for corpus in dict.fromkeys(one["corpus"] for one in results["starts"]):
        _draw_trainings([one for one in results["trainings"] if one["corpus"] == corpus], folder / f"{corpus}.svg")
    _draw_efficiency(results["efficiency"], folder / "efficiency.svg")


def _joint_table(results: Results, corpus: str) -> str:
    rows = []
    for model in MODELS:
        title = MODEL_TITLES[model]
        start = next(one for one in results["starts"] if (one["corpus"], one["model"]) == (corpus, model))
        rows.append([title, "nothing yet (the start)", f"{start['text']:.1f}", "–", "–"])
        for arm in ARMS:
            runs = [
                one for one in results["trainings"] if (one["corpus"], one["model"], one["arm"]) == (corpus, model, arm)
            ]
            speech = "–" if arm == "nmt" else mean_and_deviation(one["speech"] for one in runs)
            cells = [
                mean_and_deviation(one["text"] for one in runs),
                speech,
                mean_and_deviation((one["cpu_seconds"] for one in runs), ".0f"),
            ]
            rows.append([title, ARM_TITLES[arm], *cells])
    lines = [
        f"**{corpus}**: BLEU after training on each kind of data (mean ± deviation over seeds)\n",
        markdown_table(("model", "trained on", "text", "speech", "CPU seconds"), rows, names=2),
        "Joint training, difference seed by seed:\n",
    ]
    for model in MODELS:
        changed = differences(results, corpus, model)
        text, speech = (mean_and_deviation(changed[modality], "+.1f") for modality in ("text", "speech"))
        lines.append(f"- {MODEL_TITLES[model]}: text {text} over text alone, speech {speech} over speech alone")
    return "\n".join([*lines, ""])


def _efficiency_table(runs: Sequence[Mapping], buckets: Mapping[str, int]) -> str:
    target = common_target(runs)
    to_target = (f"steps to {target:.1f}", "CPU seconds to it")
    heads = ("", "buckets", "examples a step", "padding", *to_target, "test BLEU", "from fr")
    rows = []
    for arm in EFFICIENCY:
        of_arm = [run for run in runs if run["arm"] == arm]
        reached = [seconds_to(run["curve"], target) for run in of_arm]
        cells = [
            str(buckets[arm]),
            mean_and_deviation((run["examples"] for run in of_arm), ".0f"),
            mean_and_deviation((100 * run["padding"] for run in of_arm), ".1f") + " %",
            mean_and_deviation((steps for steps, _ in reached), ".0f"),
            mean_and_deviation((seconds for _, seconds in reached), ".0f"),
            mean_and_deviation(run["speech"] for run in of_arm),
            mean_and_deviation(run["speech_from_fr"] for run in of_arm),
        ]
        rows.append([arm, *cells])
    title = f"**Efficiency**: speech BLEU on the development set, steps of at most {MEMORY_BUDGET} (mean ± deviation)\n"
    return "\n".join([title, markdown_table(heads, rows)])


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """A table whose first columns, so many as ``names``, are left-aligned; the others are numbers."""
    line = "---|" * names + "---:|" * (len(heads) - names)
    return "\n".join([f"| {' | '.join(heads)} |", f"|{line}", *(f"| {' | '.join(row)} |" for row in rows), ""])


def mean_and_deviation(values: Iterable[float], form: str = ".1f") -> str:
    """``12.3 ± 0.4``; the mean alone where there is one value."""
    values = list(values)
    mean = f"{fmean(values):{form}}"
    return f"{mean} ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else mean


def training_scores(folder: Path) -> dict[str, Any]:
    """Scores, seconds and curves of one training."""
    return {**scores_of(folder), **training_curves(folder)}


def training_curves(folder: Path) -> dict[str, Any]:
    """Seconds of one training, and its curves."""
    curves = read_curves(folder)
    seconds = dict(zip(curves["train_cpu_seconds"].steps, curves["train_cpu_seconds"].values, strict=True))
    found = {"cpu_seconds": max(seconds.values()), "seconds": max(curves["train_seconds"].values)}
    if DEV_SPEECH in curves:
        speech = zip(curves[DEV_SPEECH].steps, curves[DEV_SPEECH].values, strict=True)
        found["curve"] = [[step, seconds[step], bleu] for step, bleu in speech]
    if DEV_TEXT in curves:
        found["text_curve"] = [
            list(point) for point in zip(curves[DEV_TEXT].steps, curves[DEV_TEXT].values, strict=True)
        ]
    if "padding_audio" in curves:
        found["padding"] = fmean(curves["padding_audio"].values)
        found["examples"] = fmean(curves["examples_audio"].values)
    return found


def scores_of(folder: Path) -> dict[str, float | None]:
    """Mean BLEU by modality, from the evaluation in a run's folder, and of French speech."""
    evaluation = from_json(folder / "evaluation" / "evaluation.json")
    means = {found.modality: found.bleu for column in columns(evaluation.scores) if (found := average(column))}
    french = [
        one.bleu
        for one in evaluation.scores
        if one.modality == "audio" and one.source_lang == "fr" and one.target_lang != "fr"
    ]
    return {
        "text": means.get("text"),
        "speech": means.get("audio"),
        "speech_from_fr": fmean(french) if french else None,
    }


def _machine() -> dict[str, str]:
    packages = ("nemo_emmett", "nemo_toolkit", "torch", "transformers", "lightning", "sacrebleu")
    return {"cpu": _cpu_name(), **{package: version(package) for package in packages}}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _draw_trainings(runs: Sequence[Mapping], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, len(MODELS), sharex=True, squeeze=False)
    for column, model in enumerate(MODELS):
        for row, (title, key) in enumerate((("text", "text_curve"), ("speech", "curve"))):
            axes = panels[row][column]
            for colour, arm in zip(("C0", "C1", "C2"), ARMS, strict=True):
                if (arm, title) == ("nmt", "speech"):
                    continue
                lines = [
                    [(point[0], point[-1]) for point in run[key]]
                    for run in runs
                    if (run["model"], run["arm"]) == (model, arm)
                ]
                draw_lines(axes, lines, colour, ARM_TITLES[arm])
            axes.set_title(f"{MODEL_TITLES[model]}: {title} BLEU, development set", fontsize=10)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
            if row:
                axes.set_xlabel("training steps")
    figure.savefig(path)


def _draw_efficiency(runs: Sequence[Mapping], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(EFFICIENCY):
        lines = [[(0.0, 0.0), *((s, bleu) for _, s, bleu in run["curve"])] for run in runs if run["arm"] == arm]
        draw_lines(axes, lines, f"C{number}", arm)
    axes.set_xlabel("CPU seconds of training")
    axes.set_title("Speech BLEU, development set", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def draw_lines(axes: Any, lines: Sequence[Sequence[tuple[float, float]]], colour: str, label: str) -> None:
    """One thin line for each seed, and their mean in bold."""
    for line in lines:
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=0.8, alpha=0.4)
    mean = [tuple(fmean(values) for values in zip(*points, strict=True)) for points in zip(*lines, strict=True)]
    axes.plot(*zip(*mean, strict=True), color=colour, linewidth=2, label=label)
