"""The counts of validation: summed losses, tokens, and translations with their references.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from nemo_emmett.modules.loss import world_size
from nemo_emmett.modules.metrics import corpus_bleu


class Part(NamedTuple):
    """One tally's subject: a modality of a validation set, in one direction."""

    dataset: str
    modality: str
    direction: str | None  # source-target; None where the batch has no languages
    target_lang: str | None = None


@dataclass
class Tally:
    """Sums over the examples of one part, on one rank; adding up the ranks' tallies gives the part's."""

    loss_sum: float = 0.0  # nats
    num_tokens: int = 0
    num_correct: int = 0  # tokens whose most likely prediction is the target
    translations: list[tuple[str, str]] = field(default_factory=list)  # (hypothesis, reference)

    def __iadd__(self, other: Tally) -> Tally:
        self.loss_sum += other.loss_sum
        self.num_tokens += other.num_tokens
        self.num_correct += other.num_correct
        self.translations += other.translations
        return self

    def metrics(self, target_lang: str | None = None) -> dict[str, float]:
        """``val_loss``, ``val_acc``, and ``val_bleu`` where there are references; NeMo's names.

        Args:
            target_lang: of the translations, for BLEU's tokeniser; None takes ``13a``.
        """
        found = {}
        if self.num_tokens:
            found["val_loss"] = self.loss_sum / self.num_tokens
            found["val_acc"] = self.num_correct / self.num_tokens
        if self.translations:
            found["val_bleu"] = corpus_bleu(*zip(*self.translations, strict=True), target_lang)
        return found


Tallies = dict[Part, Tally]


def count_batch(
    tallies: Tallies,
    dataset: str,
    modality: str,
    examples: list[Mapping] | None,
    losses_B: Tensor,
    tokens_B: Tensor,
    correct_B: Tensor,
    hypotheses: list[str] | None,
) -> None:
    """Add one batch to the tallies of its directions.

    Args:
        tallies: added to in place.
        dataset: name of the validation set.
        modality: of the batch.
        examples: the batch's metadata (docs/architecture.md); None where it has none.
        losses_B: (B,) summed cross-entropy of each example, nats.
        tokens_B: (B,) target tokens of each example.
        correct_B: (B,) target tokens that were predicted.
        hypotheses: the B translations, None if none were made.
    """
    columns = zip(losses_B.tolist(), tokens_B.tolist(), correct_B.tolist(), strict=True)
    for row, (loss, num_tokens, num_correct) in enumerate(columns):
        example = examples[row] if examples else {}
        languages = example.get("source_lang"), example.get("target_lang")
        direction = "-".join(map(str, languages)) if languages[1] is not None else None
        tally = Tally(loss, num_tokens, num_correct)
        if hypotheses is not None and example.get("target_text") is not None:
            tally.translations.append((hypotheses[row], example["target_text"]))
        part = Part(dataset, modality, direction, languages[1])
        tallies[part] = tallies.get(part, Tally())
        tallies[part] += tally


def gather_tallies(tallies: Tallies) -> Tallies:
    """The sum of all ranks' tallies, on every rank. A collective: every rank must call it."""
    if world_size() == 1:
        return tallies
    per_rank: list[Tallies | None] = [None] * world_size()
    dist.all_gather_object(per_rank, tallies)
    return _summed((part, tally) for of_rank in per_rank for part, tally in of_rank.items())


def validation_metrics(tallies: Tallies) -> dict[str, float]:
    """Names and values to log.

    For each validation set ``val_loss_<set>``, ``val_acc_<set>`` and ``val_bleu_<set>`` (BLEU: the mean over its
    directions), and the same of each direction, ``val_loss_<set>_<source>-<target>``, ...; a set that holds both
    modalities counts as two, ``<set>_audio`` and ``<set>_text``. Then the means over sets: ``val_loss``, ``val_acc``,
    ``val_bleu``.
    """
    modalities_of = defaultdict(set)
    for part in tallies:
        modalities_of[part.dataset].add(part.modality)

    logged: dict[str, float] = {}
    means: dict[str, list[float]] = defaultdict(list)
    sets = _summed((part._replace(direction=None, target_lang=None), tally) for part, tally in tallies.items())
    for whole, tally in sorted(sets.items()):
        name = f"{whole.dataset}_{whole.modality}" if len(modalities_of[whole.dataset]) > 1 else whole.dataset
        of_directions = {
            part.direction: tallies[part].metrics(target_lang=part.target_lang)
            for part in sorted(tallies, key=str)
            if part.direction is not None and part[:2] == whole[:2]
        }
        of_set = tally.metrics()
        if scores := [metrics["val_bleu"] for metrics in of_directions.values() if "val_bleu" in metrics]:
            of_set["val_bleu"] = fmean(scores)
        for direction, metrics in of_directions.items():
            logged |= {f"{metric}_{name}_{direction}": value for metric, value in metrics.items()}
        for metric, value in of_set.items():
            logged[f"{metric}_{name}"] = value
            means[metric].append(value)
    return logged | {metric: fmean(values) for metric, values in means.items()}


def _summed(pairs: Iterable[tuple[Part, Tally]]) -> Tallies:
    total: Tallies = {}
    for part, tally in pairs:
        total[part] = total.get(part, Tally())
        total[part] += tally
    return total
