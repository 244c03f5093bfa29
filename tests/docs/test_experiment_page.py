"""Every number of docs/experiment.md, and of README's results: in a table made from the kept results, in a sentence
computed from them, or of the set-up as the code has it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
KEPT = json.loads((ROOT / "benchmarks" / "results" / "experiment.json").read_text())
PARTS = ("scarce", "settings", "forgetting", "mboshi", "zero_shot")

pytestmark = pytest.mark.usefixtures("scripts_importable")


def tables() -> Iterator[str]:
    """All tables of the kept results, as the experiment writes them."""
    import importlib

    from experiment_results import tables as of_first_part

    yield of_first_part(KEPT)
    for part in PARTS:
        if part in KEPT:
            yield importlib.import_module(f"experiment_{part}").tables(KEPT[part])


def test_the_page_has_the_tables_of_the_kept_results():
    for text in tables():
        for table in text.split("\n\n"):
            assert table.strip() in PAGE


def words(text: str) -> str:
    """A text in one line, so that a sentence is found however its lines are broken."""
    return " ".join(text.split())


# Sentences.


def interval(one: Mapping[str, Any]) -> str:
    return f"{one['difference']:+.1f} (95 % interval {one['low']:+.1f} to {one['high']:+.1f}, p = {one['p']:.3f})"


def joint_claims() -> Iterator[str]:
    """Of the first part: text alone, speech alone, joint, on the phrasebook and on the captions."""
    from experiment_results import differences, mean_and_deviation

    def score(corpus: str, model: str, arm: str, modality: str) -> float:
        chosen = [
            one[modality]
            for one in KEPT["trainings"]
            if (one["corpus"], one["model"], one["arm"]) == (corpus, model, arm)
        ]
        return fmean(chosen)

    models, corpora = ("salm_t5", "salm_gpt"), ("phrasebook", "captions")
    starts = {(one["corpus"], one["model"]): one["text"] for one in KEPT["starts"]}
    kept = [score(c, m, "joint", "text") - score(c, m, "nmt", "text") for c in corpora for m in models]
    assert max(map(abs, kept)) < 1
    single = [abs(d) for c in corpora for m in models for d in differences(KEPT, c, m)["text"]]
    assert max(single) < 2
    assert (len(kept), len(single)) == (4, 12)  # "in all four rows", "in each of the twelve runs"
    lost = {key: starts[key] - score(*key, "ast", "text") for key in starts}
    of_t5, of_gpt = (
        f"{lost['phrasebook', model]:.1f} and {lost['captions', model]:.1f}" for model in ("salm_t5", "salm_gpt")
    )
    yield f"SALM-T5 {of_t5} points against its start, on the phrasebook and on the captions, SALM-GPT {of_gpt}"
    yield f"where speech alone loses {min(lost.values()):.0f} to {max(lost.values()):.0f} points"
    of_speech = {(c, m): mean_and_deviation(differences(KEPT, c, m)["speech"], "+.1f") for c in corpora for m in models}
    gained = {key: fmean(differences(KEPT, *key)["speech"]) for key in of_speech}
    assert all(abs(gain) < 1 for (corpus, _), gain in gained.items() if corpus == "phrasebook")
    yield f"speech gains less than a point, or loses up to {-min(gained.values()):.1f} BLEU"
    yield f"({of_speech['phrasebook', 'salm_t5']} and {of_speech['phrasebook', 'salm_gpt']})"
    yield f"{of_speech['captions', 'salm_t5'][1:]} and {of_speech['captions', 'salm_gpt'][1:]} BLEU on the captions"
    seconds = [
        fmean(o["cpu_seconds"] for o in KEPT["trainings"] if (o["corpus"], o["model"], o["arm"]) == (c, m, "joint"))
        / fmean(o["cpu_seconds"] for o in KEPT["trainings"] if (o["corpus"], o["model"], o["arm"]) == (c, m, "ast"))
        for c in corpora
        for m in models
    ]
    yield f"A joint step costs {100 * min(seconds) - 100:.0f} to {100 * max(seconds) - 100:.0f} % more"


def efficiency_claims() -> Iterator[str]:
    """Of the part on balanced sampling, batch sizes and buckets."""
    from experiment_results import common_target, mean_and_deviation, seconds_to

    runs = KEPT["efficiency"]
    target = common_target(runs)

    def values(arm: str, key: str) -> list[float]:
        return [one[key] for one in runs if one["arm"] == arm]

    def to_target(arm: str) -> tuple[float, float]:
        reached = [seconds_to(one["curve"], target) for one in runs if one["arm"] == arm]
        return fmean(steps for steps, _ in reached), fmean(seconds for _, seconds in reached)

    reference, fixed, by_size, one_dimension = "reference", "fixed batch size", "blend by size", "1D buckets"
    yield (
        f"translated at {fmean(values(by_size, 'speech_from_fr')):.1f} BLEU; in equal shares at "
        f"{fmean(values(reference, 'speech_from_fr')):.1f}"
    )
    averages = [mean_and_deviation(values(arm, "speech")) for arm in (reference, by_size)]
    yield f"({averages[0]} and {averages[1]})"
    # The mean of four languages is kept, and that of French.
    others = [(4 * fmean(values(a, "speech")) - fmean(values(a, "speech_from_fr"))) / 3 for a in (reference, by_size)]
    yield f"gains and the other three lose ({others[0]:.1f} and {others[1]:.1f})"
    examples = [fmean(values(arm, "examples")) for arm in (reference, fixed)]
    yield f"hold {examples[0]:.0f} recordings on average where one fixed size holds {examples[1]:.0f}"
    (steps, seconds), (fixed_steps, fixed_seconds) = to_target(reference), to_target(fixed)
    yield f"({steps:.0f} against {fixed_steps:.0f})"
    yield f"reaches it in less time ({fixed_seconds:.0f} s against {seconds:.0f} s)"
    yield f"is behind by {fmean(values(reference, 'speech')) - fmean(values(fixed, 'speech')):.0f} BLEU"
    padding = [100 * fmean(values(arm, "padding")) for arm in (reference, one_dimension)]
    yield f"pad speech by {padding[0]:.0f} %"
    (_, of_one_dimension), needed = to_target(one_dimension), f"where the reference needs {seconds:.0f} s"
    yield f"one dimension by {padding[1]:.0f} %, and those need {of_one_dimension:.0f} s {needed}"


def scarce_claims() -> Iterator[str]:
    """Of the part on scarce speech."""
    part = KEPT["scarce"]
    compared = {(one["size"], one["arm"]): one for one in part["comparisons"]}

    def mean(size: str, arm: str, key: str) -> float:
        return fmean(one[key] for one in part["trainings"] if (one["size"], one["arm"]) == (size, arm))

    best, joint, more_speech, longer = (
        compared["1000", arm] for arm in ("best", "joint", "speech_longer", "best_longer")
    )
    start, teacher = (fmean(one["text"] for one in part[key]) for key in ("starts", "teachers"))

    yield f"{longer['difference']:+.1f} BLEU with 1,000 recordings"
    yield (
        f"With 1,000 recordings, joint training with distillation and consistency translates speech at "
        f"{mean('1000', 'best', 'speech'):.1f} BLEU, speech alone at {mean('1000', 'speech', 'speech'):.1f}: "
        f"{interval(best)}"
    )
    yield (
        f"{mean('1000', 'best_longer', 'speech'):.1f} against {mean('1000', 'speech_longer', 'speech'):.1f} BLEU, "
        f"{interval(longer)}"
    )
    yield f"speech alone gains {more_speech['difference']:+.1f} (p = {more_speech['p']:.3f}) by them"
    yield f"Joint training without objectives gives {joint['difference']:+.1f} (p = {joint['p']:.3f})"
    yield (
        f"Text is then translated at {mean('1000', 'best_longer', 'text'):.1f} BLEU, where the start has {start:.1f}, "
        f"speech alone leaves {mean('1000', 'speech_longer', 'text'):.1f}, and the teacher has {teacher:.1f}"
    )
    others = [size for size in part["recordings"] if size != "1000"]
    yield ", ".join(f"{compared[size, 'best']['difference']:+.1f} with {part['recordings'][size]:,}" for size in others)
    seconds = mean("1000", "best", "cpu_seconds") / mean("1000", "speech", "cpu_seconds")
    yield f"takes {seconds:.1f} times the CPU seconds of one on speech alone"
    yield f"the teacher's training {fmean(one['cpu_seconds'] for one in part['teachers']):.0f} CPU seconds"
    by_seconds = [fmean(one["dev_at_equal_seconds"]) for one in (best, longer)]
    yield f"{by_seconds[0]:+.1f} and {by_seconds[1]:+.1f} BLEU on the development set"
    yield f"{part['text']:,} pairs of sentences"
    yield f"the {part['start_text']:,} pairs that are not spoken"
    hours = [KEPT[name]["seconds"] / 3600 for name in ("scarce", "settings", "forgetting")]
    yield f"{hours[0]:.1f} hours of one core, that on settings {hours[1]:.1f} and that on forgetting {hours[2]:.1f}"
    first, mboshi, zero_shot = (one["seconds"] / 3600 for one in (KEPT, KEPT["mboshi"], KEPT["zero_shot"]))
    yield f"{zero_shot:.1f} hours of one core, Mboshi {mboshi:.1f} and the first part {first:.1f}"
    yield f"All together: {sum(hours) + first + mboshi + zero_shot:.1f} hours of one core"


def by_arm(part: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[str, str], float]]:
    """The comparison of each arm of a part, and a function that gives an arm's mean of a value."""

    def mean(arm: str, key: str) -> float:
        return fmean(one[key] for one in part["trainings"] if one["arm"] == arm)

    return {one["arm"]: one for one in part["comparisons"]}, mean


def settings_claims() -> Iterator[str]:
    """Of the part on settings."""
    compared, mean = by_arm(KEPT["settings"])
    distillation, retention, together, quarter = (
        compared[arm] for arm in ("distillation", "retention", "together", "quarter")
    )
    yield f"distillation: {distillation['difference']:+.1f} BLEU over joint training with 1,000 recordings"
    yield (
        f"{interval(distillation)} over joint training, {mean('distillation', 'speech'):.1f} BLEU where speech alone "
        f"has {mean('speech', 'speech'):.1f}"
    )
    yield f"gives {interval(compared['consistency'])} alone"
    yield f"({mean('best', 'speech'):.1f} BLEU with both)"
    yield f"Retention keeps {mean('retention', 'text') - mean('joint', 'text'):+.1f} BLEU of text"
    yield f"gives speech {retention['difference']:+.1f}"
    yield f"costs {interval(compared['transcription'])}"
    yield f"all objectives together {together['difference']:+.1f} (p = {together['p']:.3f})"
    yield f"as good for speech ({quarter['difference']:+.1f}, p = {quarter['p']:.3f})"
    saved = 1 - mean("quarter", "cpu_seconds") / mean("joint", "cpu_seconds")
    yield f"saves {100 * saved:.0f} % of the CPU seconds"
    yield f"leaves text at {mean('quarter', 'text'):.1f} instead of {mean('joint', 'text'):.1f} BLEU"
    yield f"the best of the part before {mean('best_longer', 'speech') - mean('best', 'speech'):+.1f}"


def forgetting_claims() -> Iterator[str]:
    """Of the part on forgetting."""
    part = KEPT["forgetting"]
    compared, mean = by_arm(part)

    def speech(arm: str) -> str:
        return f"{compared[arm]['difference']:+.1f}"

    lost = {arm: mean(arm, "text_lost") for arm in ("speech", "gated_lora", "frozen", "retention_1", "replay_1_8")}
    kept = [one for one in part["trainings"] if one["arm"] in ("gated_lora", "frozen")]
    assert {one["text_lost"] for one in kept} == {0.0}  # "in every seed"
    assert lost["retention_1"] < 0  # "loses nothing"
    yield f"| {lost['speech']:.1f} BLEU after {part['steps']} steps on speech alone"
    kept_for = f"({speech('gated_lora')} BLEU of speech), nor with retention ({speech('retention_1')})"
    yield f"LoRA that acts on speech alone {kept_for}"
    yield f"Speech alone loses {lost['speech']:.1f} BLEU of text"
    yield f"a frozen language model lose {lost['gated_lora']:.1f}"
    paid = [f"{-compared[arm]['difference']:.1f}" for arm in ("gated_lora", "frozen")]
    yield f"pay {paid[0]} and {paid[1]} BLEU of speech"
    yield f"({lost['retention_1']:+.1f}) for a difference in speech of {interval(compared['retention_1'])}"
    yield f"costs more speech ({speech('retention_4')})"
    eighth = compared["replay_1_8"]
    yield f"({lost['replay_1_8']:+.1f} of text, {speech('replay_1_8')} of speech, p = {eighth['p']:.3f})"
    yield f"up to {mean('replay_1', 'text'):.1f} BLEU"
    yield f"{speech('replay_1_4')} with a quarter, {speech('replay_1')} with as much text as speech"
    assert (
        compared["replay_1"]["difference"]
        < compared["alternating"]["difference"]
        < compared["replay_1_4"]["difference"]
    )
    seconds = mean("alternating", "cpu_seconds") / mean("speech", "cpu_seconds")
    yield f"{seconds:.1f} times the CPU seconds of speech alone"
    assert compared["replay_retention"]["difference"] < min(
        compared[arm]["difference"] for arm in ("replay_1_4", "retention_1")
    )
    yield f"worse than either for speech ({speech('replay_retention')})"


def zero_shot_claims() -> Iterator[str]:
    """Of the part on directions without recordings."""
    part = KEPT["zero_shot"]
    compared, mean = by_arm(part)
    groups = ("trained", "zero_shot", "unheard")
    joint, speech, control, supervised = (
        {group: mean(arm, group) for group in groups} for arm in ("joint", "speech", "control", "supervised")
    )
    share, of_speech = (100 * one["zero_shot"] / supervised["zero_shot"] for one in (joint, speech))
    assert share >= 50
    assert joint["trained"] > speech["trained"] - 0.5  # "lose nothing by it"
    yield f"yes, {share:.0f} % of the score with recordings in them; speech alone {of_speech:.0f} %"
    yield (
        f"reaches {joint['zero_shot']:.1f} BLEU, {share:.0f} % of what recordings in these directions give "
        f"({supervised['zero_shot']:.1f})"
    )
    by_seed = sorted(one["zero_shot"] for one in part["trainings"] if one["arm"] == "speech")
    yield f"Speech alone has {speech['zero_shot']:.1f}, and from {by_seed[0]:.1f} to {by_seed[-1]:.1f} by the seed"
    yield f"the difference is {interval(compared['joint'])}"
    yield f"without a translation in it, gives {control['zero_shot']:.1f}"
    yield f"({joint['trained']:.1f} BLEU, speech alone {speech['trained']:.1f})"
    yield f"{joint['unheard']:.1f} BLEU where recordings give {supervised['unheard']:.1f}"


def mboshi_claims() -> Iterator[str]:
    """Of the part on real speech."""
    part = KEPT["mboshi"]
    _, mean = by_arm(part)
    arms = {one["arm"] for one in part["trainings"]}
    best = max(mean(arm, "speech") for arm in arms)
    assert best < 1  # "too little for any of these models"
    yield f"no model translates speech at more than {best:.1f} BLEU"
    yield f"which translate it at {best:.1f} BLEU or less"
    start = fmean(one["text"] for one in part["starts"])
    joint, speech = mean("joint", "text"), mean("speech", "text")
    yield f"translated at {start:.1f} BLEU by the start and at {joint:.1f} after joint training"
    yield f"speech alone leaves {speech:.1f}"


def rows_of_models_page() -> Iterator[str]:
    """The table of docs/models.md on how to train, by the number of recordings."""
    part = KEPT["scarce"]
    for size, count in part["recordings"].items():
        arms = (("speech", "best"), ("speech_longer", "best_longer")) if size == "1000" else (("speech", "best"),)
        for reference, arm in arms:
            speech, best = (
                fmean(one["speech"] for one in part["trainings"] if (one["size"], one["arm"]) == (size, name))
                for name in (reference, arm)
            )
            (found,) = [one for one in part["comparisons"] if (one["size"], one["arm"]) == (size, arm)]
            steps = f"{part['steps'] * (1 + arm.endswith('longer')):,}"
            yield f"| {count:,} | {steps} | {speech:.1f} | {best:.1f} | {found['difference']:+.1f} |"


def settings_of_models_page() -> Iterator[str]:
    """What the same page says of objectives and ratio."""
    part = KEPT["settings"]
    over = {one["arm"]: f"{one['difference']:+.1f}" for one in part["comparisons"] if one["reference"] == "joint"}
    titles = {"best": "distillation + consistency", "together": "all together"}
    order = ("distillation", "best", "together", "retention", "consistency", "transcription")
    yield "over joint training: " + ", ".join(f"{titles.get(arm, arm)} {over[arm]}" for arm in order)
    found = {
        (arm, key): fmean(one[key] for one in part["trainings"] if one["arm"] == arm)
        for arm in ("joint", "quarter")
        for key in ("text", "cpu_seconds")
    }
    saved = 1 - found["quarter", "cpu_seconds"] / found["joint", "cpu_seconds"]
    text = f"text {found['quarter', 'text']:.1f} instead of {found['joint', 'text']:.1f}"
    yield f"speech {over['quarter']}, {text}, {100 * saved:.0f} % fewer CPU seconds"
    paid = {one["arm"]: f"{one['difference']:+.1f}" for one in KEPT["forgetting"]["comparisons"]}
    yield f"loses nothing of it, for {paid['gated_lora']} BLEU of speech; retention nothing for {paid['retention_1']}"
    yield f"an eighth as much text as speech nothing for {paid['replay_1_8']}"


def test_the_page_on_models_has_the_measured_numbers():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for row in (*rows_of_models_page(), *settings_of_models_page()):
        assert row in page


CLAIMS = {
    "": (joint_claims, efficiency_claims),
    "scarce": (scarce_claims,),
    "settings": (settings_claims,),
    "forgetting": (forgetting_claims,),
    "zero_shot": (zero_shot_claims,),
    "mboshi": (mboshi_claims,),
}
"""Sentences by the part that they are about; the first one has no name."""


def claims() -> Iterator[str]:
    for part, of_part in CLAIMS.items():
        if not part or part in KEPT:
            for found in of_part:
                yield from found()


def test_the_page_says_what_the_kept_results_say():
    page = words(PAGE)
    for claim in claims():
        assert claim in page


def set_up() -> dict[str, str]:
    """Numbers of the page that are none of a result, with what they are."""
    from demo import PHRASEBOOK
    from experiment_corpora import DEV, SIZES
    from experiment_runs import CAPTIONS, MAX_PADDING, MEMORY_BUDGET, SEEDS, SPOKEN_SENTENCES, captions, phrasebook
    from experiment_scarce import BATCH, STEPS, TEACHER_STEPS

    test_items = int(PHRASEBOOK[PHRASEBOOK.index("--test-items") + 1])
    return {
        CAPTIONS[CAPTIONS.index("--max-words") + 1]: "words of a caption; directions between four languages",
        **{f"{int(size):,}": "recordings" for size in SIZES if size.isdigit()},
        f"{KEPT.get('scarce', {}).get('recordings', {}).get('all', 6159):,}": "all recordings for translation",
        **{f"{count:,}": "recordings of a language" for count in SPOKEN_SENTENCES.values()},
        f"{STEPS}": "steps where speech is scarce",
        BATCH[0].partition("=")[2]: "recordings of a step there",
        f"{TEACHER_STEPS:,}": "steps of the teacher",
        f"{DEV}": "recordings that are moved to the development set",
        f"{test_items}": "items of the phrasebook's test set",
        f"{12 * test_items:,}": "their translations into each other's languages",
        f"{captions(Path(), Path()).steps}": "steps of the first part",
        f"{phrasebook(Path()).steps}": "steps of the first part",
        f"{MEMORY_BUDGET.removesuffix('MiB')}": "MiB of a step in the part on efficiency",
        f"{100 * MAX_PADDING:.0f}": "per cent of padding in the part on efficiency",
        f"{len(SEEDS)}": "seeds",
        "6,462": "captions that are spoken, as `prepare captions` counts them",
        "399": "captions of at most so many words in Multi30k's validation set, as counted there",
        "100": "captions in the development set; steps in the part on efficiency",
        "32": "recordings, and pairs of sentences, of a step in the first part",
        "4": "layers of the encoder and of Llama; buckets of inputs",
        "2": "layers of T5's encoder and decoder; buckets of outputs; BLEU that Tang et al. gain",
        "128": "their width",
        "11.8": "BLEU that Dinh gains over direct training",
        "3.9": "BLEU that Dinh gains over training from a pretrained encoder",
        "95": "per cent of an interval",
        "1": "point",
        "10": "points",
        "1,189": "utterances of Mboshi for training, as its corpus.json counts them",
        "300": "steps of the part on Mboshi; recordings that are moved to the captions' development set",
        "3.5": "BLEU that Bansal et al. have on Mboshi",
        "7.1": "BLEU that they have with an encoder that was pretrained on other languages",
        f"{KEPT.get('forgetting', {}).get('steps', 400)}": "steps of the part on forgetting",
    }


NUMBER = re.compile(r"(?<![\w.,-])[+-]?\d[\d,]*(?:\.\d+)?(?![\w])")


def test_no_number_on_the_page_is_from_nowhere():
    page = re.sub(r"```.*?```|<!--.*?-->", " ", PAGE, flags=re.DOTALL)
    for text in tables():
        for table in text.split("\n\n"):
            page = page.replace(table.strip(), " ")
    page = re.sub(r"\]\([^)]*\)|`[^`]*`|arXiv \d{4}\.\d{5}|\[\d{4}\.\d{5}", " ", page)
    page = words(page)
    for claim in sorted(claims(), key=len, reverse=True):
        page = page.replace(words(re.sub("`[^`]*`", " ", claim)), " ")
    known = set_up()
    unknown = [number for number in NUMBER.findall(page) if number.rstrip(",") not in known]
    assert not unknown


def test_the_readmes_results_are_those_of_the_page():
    section = README.partition("## Results")[2].partition("\nCompared with stock NeMo")[0]
    for number in NUMBER.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", " ", section)):
        assert number in PAGE, number
