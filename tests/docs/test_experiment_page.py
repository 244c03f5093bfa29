"""Every number of docs/experiment.md, and of README's results: in a table made from the kept results, in a sentence
computed from them, or of the set-up as the code has it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean, stdev
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
    yield f"within one point of that of training on text alone, in all {len(kept)} rows"
    yield f"within two in each of the {len(single)} runs"
    lost = {key: starts[key] - score(*key, "ast", "text") for key in starts}
    yield (
        f"SALM-T5 {lost['phrasebook', 'salm_t5']:.1f} and {lost['captions', 'salm_t5']:.1f} points against its start, on the "
        f"phrasebook and on the captions, SALM-GPT {lost['phrasebook', 'salm_gpt']:.1f} and "
        f"{lost['captions', 'salm_gpt']:.1f}"
    )
    of_speech = {
        (c, m): mean_and_deviation(differences(KEPT, c, m)["speech"], "+.1f") for c in corpora for m in models
    }
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
    yield f"one dimension by {padding[1]:.0f} %, and those need {to_target(one_dimension)[1]:.0f} s"
