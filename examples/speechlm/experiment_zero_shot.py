"""Speech translation in directions without a recording: does text carry it over?

The phrasebook's recordings in German, Spanish and French are translated into English in training, and its text in all
12 directions. Scored are the six directions of speech between German, Spanish and French, of which no recording was
trained; and those from English, of which the model was trained on no recording at all. Arms: speech alone; joint;
joint with text that is only repeated in its own language, which teaches what the language tag means and no
translation (control); joint with recordings in all directions (supervised), the most that could be reached. The
language model of the start was pretrained on the text of all 12 directions, the speech encoder to transcribe all four
languages.

It took 1.5 hours of one core (docs/experiment.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiment_runs import Corpus, corpus_runs
from experiment_seeds import SPEECH_ALONE, Arm, Part, Results, Setting, start_runs, training_run

if TYPE_CHECKING:
    from nemo_emmett.evaluation import Translation

STEPS = 200
"""Of a training; each has 32 recordings."""

SPOKEN, TARGET = ("de", "es", "fr"), "en"
"""Languages that are heard in training, and the one that they are translated into."""

LANGUAGES = (TARGET, *SPOKEN)


def _speech(split: str) -> str:
    """Recordings of the three languages, into English."""
    return _sources(
        f'{{type: nemo, manifest_filepath: "${{corpus}}/speech/{split}.{lang}.jsonl", target_lang: {TARGET}}}'
        for lang in SPOKEN
    )


def _repeated(lang: str) -> str:
    path = f'"${{corpus}}/text/train.{lang}"'
    keys = f"source_paths: {path}, target_paths: {path}, source_lang: {lang}, target_lang: {lang}"
    return f"{{type: parallel_text, {keys}}}"


def _sources(sources: Iterable[str]) -> str:
    return f"[{', '.join(sources)}]"


DEV = (
    "~data.validation_ds.datasets.dev_text",
    f"data.validation_ds.datasets.dev_speech.input_cfg={_speech('dev')}",
)
"""Checkpoints are chosen by the directions that are trained, in all arms."""

INTO_ENGLISH = (f"data.train_ds.audio.input_cfg={_speech('train')}", *DEV)

ARMS = (
    Arm("speech", "speech alone", (*INTO_ENGLISH, SPEECH_ALONE)),
    Arm("joint", "joint", INTO_ENGLISH),
    Arm(
        "control",
        "joint, text repeated (control)",
        (*INTO_ENGLISH, f"data.train_ds.text.input_cfg={_sources(map(_repeated, LANGUAGES))}"),
    ),
    Arm("supervised", "speech in all directions (supervised)", DEV),
)
"""Ways of training."""

REFERENCES = {"joint": "speech", "control": "speech", "supervised": "joint"}
"""What each is compared with."""


def part(phrasebook: Corpus, exp: Path, seeds: Sequence[int]) -> Part:
    """The part of the experiment.

    Args:
        phrasebook: the corpus.
        exp: folder of the experiment.
        seeds: of pretraining and training.
    """
    home = exp / "zero_shot"
    setting = Setting("zero_shot", "phrasebook", phrasebook.folder, home, home / "start", "phrasebook/leaks", STEPS)
    runs = [*corpus_runs(phrasebook), *start_runs(setting, seeds)]
    for seed in seeds:
        for arm in ARMS:
            folder, name = home / arm.name / str(seed), f"zero_shot/{arm.name}/{seed}"
            runs.append(training_run(setting, phrasebook.folder, folder, name, arm, seed))
    return Part("zero_shot", runs, lambda: collect(home, seeds), tables, draw)


def never_trained(one: Translation) -> bool:
    """Speech of a language that was heard, into one that speech was not translated into."""
    return one.modality == "audio" and one.source_lang in SPOKEN and one.target_lang in {*SPOKEN} - {one.source_lang}


GROUPS = {
    "trained": "into English (trained)",
    "zero_shot": "between de, es, fr (never trained)",
    "unheard": "from English (never heard)",
}
"""Groups of speech directions, and their titles."""


def group_of(source_lang: str, target_lang: str) -> str | None:
    """The group of a direction of speech; None: it is transcription."""
    if source_lang == target_lang:
        return None
    if source_lang == TARGET:
        return "unheard"
    return "trained" if target_lang == TARGET else "zero_shot"


def collect(home: Path, seeds: Sequence[int]) -> Results:
    """Speech BLEU of each group of directions, and comparisons on the directions never trained."""
    from experiment_compare import collect_arms, mean_scores, start_scores

    def folder(arm: str, seed: int) -> Path:
        return home / arm / str(seed)

    def item(one: Translation) -> str:
        """The sentence, in all of its directions: recordings of one have the same file name in every language."""
        return Path(one.audio_path or one.id).stem

    names = [arm.name for arm in ARMS]
    trainings, comparisons = collect_arms(names, seeds, folder, REFERENCES, never_trained, item_of=item)
    for one in trainings:
        one.update(mean_scores(folder(one["arm"], one["seed"]), "audio", group_of))
    starts = [{"seed": seed, **start_scores(home / "start" / str(seed))} for seed in seeds]
    return {"steps": STEPS, "starts": starts, "trainings": trainings, "comparisons": comparisons}


def tables(results: Mapping) -> str:
    """Speech BLEU of each arm in each group of directions, and the differences where nothing was trained."""
    from experiment_compare import COMPARISON, comparison_cells, markdown_table, score_cells

    titles = {arm.name: arm.title for arm in ARMS}
    scores = []
    for arm, title in titles.items():
        runs = [one for one in results["trainings"] if one["arm"] == arm]
        scores.append([title, *score_cells(runs, (*GROUPS, "text", "cpu_seconds"))])
    differences = [
        [titles[one["arm"]], titles[one["reference"]], *comparison_cells(one)] for one in results["comparisons"]
    ]
    return "\n".join(
        [
            "**Directions without recordings**: speech BLEU at the best checkpoint (mean ± deviation over seeds)\n",
            markdown_table(("trained on", *GROUPS.values(), "text", "CPU seconds"), scores),
            "Between German, Spanish and French, differences (development set: into English):\n",
            markdown_table(("", "over", *COMPARISON), differences, names=2),
        ]
    )


def draw(results: Mapping, path: Path) -> None:
    """Speech BLEU of each group of directions, arm by arm."""
    from statistics import fmean

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(ARMS)
    for number, arm in enumerate(ARMS):
        runs = [one for one in results["trainings"] if one["arm"] == arm.name]
        places = [group + (number - (len(ARMS) - 1) / 2) * width for group in range(len(GROUPS))]
        axes.bar(places, [fmean(one[key] for one in runs) for key in GROUPS], width * 0.9, label=arm.title)
        for place, key in zip(places, GROUPS, strict=True):
            axes.plot([place] * len(runs), [one[key] for one in runs], "k.", markersize=4)
    axes.set_xticks(range(len(GROUPS)), GROUPS.values(), fontsize=8)
    axes.set_title("Phrasebook: speech BLEU by direction, test set", fontsize=10)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    figure.savefig(path)
