"""The second part of the experiment: manifests of unequal size, and the bins to be compared.

Usage:
    python examples/speechlm/experiment_bins.py corpus=data/phrasebook exp_dir=exp/experiment/efficiency ...

Writes ``{speech}/{language}.jsonl`` and ``{exp_dir}/bins.json``: for optimal_2d, optimal_1d and equal_mass_2d the bins
of each group of data, of equal number.
"""

import json
from pathlib import Path

from experiment_runs import SPOKEN_SENTENCES

from nemo_emmett.runner import recipe_runner


@recipe_runner(config_path="conf", config_name="experiment_efficiency")
def main(cfg) -> None:
    """Write the manifests, measure their lengths and find the bins."""
    for language, count in SPOKEN_SENTENCES.items():
        shorten(Path(cfg.corpus, "speech", f"train.{language}.jsonl"), Path(cfg.speech, f"{language}.jsonl"), count)

    from nemo_emmett.data.bucketing.length_stats import measure, solve
    from nemo_emmett.data.bucketing.padding import equal_mass_bins_2d
    from nemo_emmett.data.config.dataset_config import GroupConfig, parse_dataset
    from nemo_emmett.data.readers.examples import ExampleKind
    from nemo_emmett.training import build_training

    training = build_training(cfg)
    found = {"optimal_2d": {}, "optimal_1d": {}, "equal_mass_2d": {}}
    for group in parse_dataset(training.datamodule.cfg.train_ds, "data.train_ds").groups:

        def lengths(two_dimensional: bool, group: GroupConfig = group):
            tokenizer, kind = training.model.tokenizer, ExampleKind.TRANSLATION
            return measure(group, tokenizer, kind, two_dimensional=two_dimensional)

        buckets, sub_buckets = group.num_buckets, group.num_sub_buckets
        found["optimal_2d"][group.name] = solve(lengths(True), buckets, sub_buckets)
        found["optimal_1d"][group.name] = solve(lengths(False), buckets * sub_buckets)
        found["equal_mass_2d"][group.name] = equal_mass_bins_2d(*lengths(True).sides, buckets, sub_buckets)
    Path(cfg.exp_dir, "bins.json").write_text(json.dumps(found, indent=1) + "\n")


def shorten(manifest: Path, out: Path, count: int) -> None:
    """Write the first recordings of a manifest to another one, with absolute paths."""
    records = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()[:count]]
    for record in records:
        record["audio_filepath"] = str((manifest.parent / record["audio_filepath"]).resolve())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
