"""Each dataset, language and modality holds its share in every window of the training, not only on average."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
import pytest

from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.dataset import recordings_of

from .corpora import SPEECH_SIZES, TEXT_SIZES, Corpus, dataset_of

BATCHES = 2000
WINDOW = 200
POINTS = 0.02

# Buckets in tokens (a frame of speech is one), as a blend of both modalities measures; for speech alone in seconds.
TOKEN_BUCKETS = {"bucket_duration_bins": [8, 14, 20, 40], "bucket_batch_size": [10, 8, 6, 4]}
SECOND_BUCKETS = {"bucket_duration_bins": [0.3, 0.6, 1.2], "bucket_batch_size": [9, 7, 5]}


class Ids(SpeechTextDataset):
    """Examples to their ids and modality; no audio is read."""

    def __getitem__(self, examples) -> dict:
        return {"examples": [(str(_id_of(e)), "audio" if recordings_of(e) else "text") for e in examples]}


def _id_of(example) -> str:
    return getattr(example, "id", None) or example.custom["id"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, dict]:
    corpus = Corpus(tmp_path_factory.mktemp("corpus"), seconds=(0.1, 1.1), words=(1, 16))
    return {name: corpus.source(name, size) for name, size in {**SPEECH_SIZES, **TEXT_SIZES}.items()}


@pytest.fixture
def batches(tokenizer):
    """So many batches of all ranks together, step by step: each as its examples' (dataset, modality)."""

    def read(config: dict, world_size: int) -> Iterator[list[tuple[str, str]]]:
        settings = {"prompt_format": "emmett_t5", "audio_locator_tag": "<|audio|>", "token_equivalent_duration": 0.08}
        settings |= {"seed": 3, "shard_seed": 3, "shuffle": True, "sampling": "emmett"}
        loaders = [
            get_multimodal_dataloader({**settings, **config}, rank, world_size, Ids(tokenizer), tokenizer)
            for rank in range(world_size)
        ]
        steps = zip(*loaders, strict=True)
        for batch in islice((batch for step in steps for batch in step), BATCHES):
            yield [(dataset_of(example_id), modality) for example_id, modality in batch["examples"]]

    return read


def group(weight: float, *members: dict) -> dict:
    return {"type": "group", "weight": weight, "input_cfg": list(members)}


def weighted(sources: Mapping[str, dict], weights: Mapping[str, float]) -> list[dict]:
    return [{**sources[name], "weight": weight} for name, weight in weights.items()]


def nested_blend(sources: Mapping[str, dict]) -> tuple[dict, dict, dict[str, float]]:
    """Groups in groups with weights that do not sum to one; the shares of the datasets, worked out by hand.

    Speech has 3 of 10 parts; of these German half, the rest is shared 4 to 1. Text has 7 parts: 60 % German.
    """
    speech = [
        {**sources["speech_de"], "weight": 50},
        group(50, *weighted(sources, {"speech_es": 4, "speech_fr": 1})),
    ]
    text = [
        group(0.4, *weighted(sources, {"text_es": 0.75, "text_fr": 0.25})),
        {**sources["text_de"], "weight": 0.6},
    ]
    shares = {"speech_de": 0.15, "speech_es": 0.12, "speech_fr": 0.03}
    shares |= {"text_de": 0.42, "text_es": 0.21, "text_fr": 0.07}
    return {"input_cfg": speech}, {"input_cfg": text}, shares


def tempered_blend(sources: Mapping[str, dict]) -> tuple[dict, dict, dict[str, float]]:
    """Weights are the sizes; a temperature of a half takes their square roots (9.5 to 5.6 to 2.6 for speech).

    Modalities keep 3 to 7, for the blend by a weight at the temperature 1, for the fusion by the batches' weights.
    """
    speech = {"input_cfg": weighted(sources, SPEECH_SIZES), "reweight_temperature": [0.5]}
    text = {"input_cfg": weighted(sources, TEXT_SIZES), "reweight_temperature": [0.5]}
    shares = {}
    for weight, sizes in ((0.3, SPEECH_SIZES), (0.7, TEXT_SIZES)):
        roots = {name: size**0.5 for name, size in sizes.items()}
        shares |= {name: weight * root / sum(roots.values()) for name, root in roots.items()}
    return speech, text, shares


def mux_config(speech: dict, text: dict) -> dict:
    """One blend of both modalities."""
    blend = {"input_cfg": [group(0.3, *speech["input_cfg"]), group(0.7, *text["input_cfg"])]}
    if "reweight_temperature" in speech:
        blend["reweight_temperature"] = [1.0, *speech["reweight_temperature"]]
    return {**blend, "use_multimodal_sampling": True, **TOKEN_BUCKETS}


def fused_config(speech: dict, text: dict) -> dict:
    """A sampler for each modality, one of them drawn for each batch."""
    return {
        "multi_config": True,
        "sampler_fusion": "randomized_round_robin",
        "sampler_weights": {"speech": 3, "text": 7},
        "speech": {**speech, **SECOND_BUCKETS},
        "text": {**text, "use_multimodal_sampling": True, **TOKEN_BUCKETS},
    }


def shares_of_examples(window: list[list[tuple[str, str]]]) -> dict[str, float]:
    """The share of each dataset, language and modality among all examples of a blend."""
    counts = Counter(key for batch in window for name, modality in batch for key in (name, name[-2:], modality))
    examples = sum(len(batch) for batch in window)
    return {key: count / examples for key, count in counts.items()}


def shares_of_batches(window: list[list[tuple[str, str]]]) -> dict[str, float]:
    """The same for a fusion, which counts a modality in batches, and datasets among the examples of their modality."""
    of_modality = defaultdict(list)
    for batch in window:
        ((modality),) = {modality for _, modality in batch}
        of_modality[modality] += [name for name, _ in batch]
    batches = Counter(batch[0][1] for batch in window)
    shares: Counter[str] = Counter()
    for modality, names in of_modality.items():
        of_batches = batches[modality] / len(window)
        shares[modality] = of_batches
        for name, count in Counter(names).items():
            shares[name] += of_batches * count / len(names)
            shares[name[-2:]] += of_batches * count / len(names)
    return dict(shares)


@pytest.mark.parametrize(
    ("configure", "count", "blend", "world_size"),
    [  # of a way to combine, a blend and a number of ranks, any two meet
        pytest.param(mux_config, shares_of_examples, nested_blend, 2, id="mux, nested, 2 ranks"),
        pytest.param(mux_config, shares_of_examples, tempered_blend, 1, id="mux, tempered, 1 rank"),
        pytest.param(fused_config, shares_of_batches, nested_blend, 1, id="fused, nested, 1 rank"),
        pytest.param(fused_config, shares_of_batches, tempered_blend, 2, id="fused, tempered, 2 ranks"),
    ],
)
def test_every_window_holds_the_shares(sources, batches, configure, count, blend, world_size) -> None:
    speech, text, expected = blend(sources)
    expected |= {
        "audio": sum(share for name, share in expected.items() if name.startswith("speech")),
        "text": sum(share for name, share in expected.items() if name.startswith("text")),
    } | {lang: expected[f"speech_{lang}"] + expected[f"text_{lang}"] for lang in ("de", "es", "fr")}
    assert expected["audio"] == pytest.approx(0.3)
    assert expected["text"] == pytest.approx(0.7)

    drawn = list(batches(configure(speech, text), world_size))
    assert len(drawn) == BATCHES
    assert len({len(batch) for batch in drawn}) >= 3, "batches come from buckets of several sizes"
    strays = {}
    for start in range(0, BATCHES, WINDOW):
        shares = count(drawn[start : start + WINDOW])
        for key, share in expected.items():
            if abs(shares.get(key, 0.0) - share) > POINTS:
                strays[start, key] = (round(shares.get(key, 0.0), 3), round(share, 3))
    assert not strays


def test_independent_draws_would_fail_this_test(sources) -> None:
    """The bar is not one that chance passes: of 1,600 independent draws, shares stray by 2 points and more."""
    *_, expected = nested_blend(sources)
    shares = list(expected.values())
    windows = np.random.default_rng(0).multinomial(8 * WINDOW, shares, size=100) / (8 * WINDOW)
    assert (np.abs(windows - shares).max(axis=1) > POINTS).mean() > 0.1
