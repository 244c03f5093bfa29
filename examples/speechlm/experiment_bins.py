"""The second part of the experiment: manifests of unequal size, and the bins to be compared.

Usage:
    python examples/speechlm/experiment_bins.py corpus=data/phrasebook exp_dir=exp/experiment/efficiency ...

Writes ``{speech}/{language}.jsonl`` and ``{exp_dir}/bins.json``: for optimal_2d, optimal_1d and equal_mass_2d the bins
of each group of data. Of every kind they are the fewest that keep padding within ``MAX_PADDING``.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from experiment_runs import MAX_PADDING, SPOKEN_SENTENCES

from nemo_emmett.runner import recipe_runner

MAX_BUCKETS = 64


@recipe_runner(config_path="conf", config_name="experiment_efficiency")
def main(cfg) -> None:
    """Write the manifests, measure their lengths and find the bins."""
    for language, count in SPOKEN_SENTENCES.items():
        shorten(Path(cfg.corpus, "speech", f"train.{language}.jsonl"), Path(cfg.speech, f"{language}.jsonl"), count)

    from nemo_emmett.data.bucketing.bins import optimal_bins, optimal_bins_2d
    from nemo_emmett.data.bucketing.length_stats import measure
    from nemo_emmett.data.bucketing.padding import equal_mass_bins_2d
    from nemo_emmett.data.config.dataset_config import parse_dataset
    from nemo_emmett.data.readers.examples import ExampleKind
    from nemo_emmett.training import build_training

    training = build_training(cfg)
    found = {"optimal_2d": {}, "optimal_1d": {}, "equal_mass_2d": {}}
    for group in parse_dataset(training.datamodule.cfg.train_ds, "data.train_ds").groups:
        lengths = measure(group, training.model.tokenizer, ExampleKind.TRANSLATION, two_dimensional=True)
        inputs, outputs = lengths.sides

        def two_dimensional(count: int, rule: Callable, inputs=inputs, outputs=outputs) -> Iterator[list]:
            for strips in (strips for strips in range(1, count + 1) if count % strips == 0):
                yield rule(inputs, outputs, strips, count // strips)

        makers = {
            "optimal_2d": lambda count, two=two_dimensional: two(count, optimal_bins_2d),
            "optimal_1d": lambda count, inputs=inputs: iter([optimal_bins(inputs, count)]),
            "equal_mass_2d": lambda count, two=two_dimensional: two(count, equal_mass_bins_2d),
        }
        for kind, make in makers.items():
            found[kind][group.name] = fewest(make, inputs, outputs)
    Path(cfg.exp_dir, "bins.json").write_text(json.dumps(found, indent=1) + "\n")


def fewest(make: Callable[[int], Iterator[list]], inputs: np.ndarray, outputs: np.ndarray) -> list:
    """Of all bins that leave at most ``MAX_PADDING``, the fewest; of equally many, those of the least padding.

    Args:
        make: number of buckets -> the bins to choose from.
        inputs: (N,) seconds or tokens.
        outputs: (N,) tokens.
    """
    for count in range(1, MAX_BUCKETS + 1):
        best = min(make(count), key=lambda bins: padding(bins, inputs, outputs))
        if padding(best, inputs, outputs) <= MAX_PADDING:
            return best
    raise SystemExit(f"{MAX_BUCKETS} buckets leave more than {MAX_PADDING:.0%} of padding.")


def padding(bins: Sequence, inputs: np.ndarray, outputs: np.ndarray) -> float:
    """Share of padding in batches, the mean of inputs and outputs, from 0 to 1.

    Bins of one dimension do not divide outputs, which are padded to the longest in their bucket.
    """
    from nemo_emmett.data.bucketing.padding import bucket_of, padding_of

    if not isinstance(bins[0], Sequence):
        bucket = bucket_of(bins, inputs)
        bins = [[cap, max(outputs[bucket == place], default=0.0)] for place, cap in enumerate(bins)]
    return fmean(padding_of(bins, inputs, outputs).share_of_sides)


def shorten(manifest: Path, out: Path, count: int) -> None:
    """Write the first recordings of a manifest to another one, with absolute paths."""
    records = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()[:count]]
    for record in records:
        record["audio_filepath"] = str((manifest.parent / record["audio_filepath"]).resolve())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
