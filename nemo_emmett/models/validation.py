"""What validation gathers: summed losses, token counts, and translations beside their references."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_emmett.modules.bleu import corpus_bleu
from nemo_emmett.modules.loss import world_size


@dataclass
class Tally:
    """Sums over one modality of one validation set, on one rank; adding up the ranks' tallies gives the set's."""

    loss_sum: float = 0.0  # nats
    num_tokens: int = 0
    num_correct: int = 0  # tokens whose most likely prediction is the target
    # (source language, target language) -> [(hypothesis, reference), ...]
    translations: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))

    def add_tokens(self, loss_sum: Tensor, num_tokens: Tensor, num_correct: Tensor) -> None:
        """Count one batch's target tokens."""
        self.loss_sum += float(loss_sum)
        self.num_tokens += int(num_tokens)
        self.num_correct += int(num_correct)

    def add_translations(self, examples: list[dict], hypotheses: list[str]) -> None:
        """Keep the hypotheses whose examples have a reference."""
        for example, hypothesis in zip(examples, hypotheses, strict=True):
            if example.get("target_text") is not None:
                direction = (str(example.get("source_lang")), str(example.get("target_lang")))
                self.translations[direction].append((hypothesis, example["target_text"]))

    def update(self, other: Tally) -> None:
        """Add another rank's tally."""
        self.loss_sum += other.loss_sum
        self.num_tokens += other.num_tokens
        self.num_correct += other.num_correct
        for direction, pairs in other.translations.items():
            self.translations[direction].extend(pairs)

    def bleu(self) -> dict[tuple[str, str], float]:
        """Corpus BLEU of each direction."""
        return {
            direction: corpus_bleu([hyp for hyp, _ in pairs], [ref for _, ref in pairs])
            for direction, pairs in sorted(self.translations.items())
        }


Tallies = dict[tuple[str, str], Tally]
"""(validation set, modality) -> tally."""


def gather_tallies(tallies: Tallies) -> Tallies:
    """The sum of all ranks' tallies, on every rank. A collective: every rank must call it."""
    if world_size() == 1:
        return tallies
    per_rank: list[Tallies | None] = [None] * world_size()
    dist.all_gather_object(per_rank, tallies)
    total: Tallies = {}
    for rank_tallies in per_rank:
        for key, tally in rank_tallies.items():
            total.setdefault(key, Tally()).update(tally)
    return total


def validation_metrics(tallies: Tallies) -> dict[str, float]:
    """Names and values to log.

    For each validation set ``val_loss_<set>``, ``val_acc_<set>`` (NeMo's names), ``val_bleu_<set>`` (mean over
    directions) and ``val_bleu_<set>_<source>-<target>``; a set that holds both modalities counts as two,
    ``<set>_audio`` and ``<set>_text``. Then the means over sets: ``val_loss``, ``val_acc``, ``val_bleu``.
    """
    modalities_of = defaultdict(set)
    for dataset, modality in tallies:
        modalities_of[dataset].add(modality)

    metrics: dict[str, float] = {}
    means: dict[str, list[float]] = defaultdict(list)
    for (dataset, modality), tally in sorted(tallies.items()):
        name = f"{dataset}_{modality}" if len(modalities_of[dataset]) > 1 else dataset
        of_set = {}
        if tally.num_tokens:
            of_set["val_loss"] = tally.loss_sum / tally.num_tokens
            of_set["val_acc"] = tally.num_correct / tally.num_tokens
        if bleu := tally.bleu():
            of_set["val_bleu"] = sum(bleu.values()) / len(bleu)
            metrics |= {f"val_bleu_{name}_{src}-{tgt}": score for (src, tgt), score in bleu.items()}
        for metric, value in of_set.items():
            metrics[f"{metric}_{name}"] = value
            means[metric].append(value)
    return metrics | {metric: float(torch.tensor(values).mean()) for metric, values in means.items()}
