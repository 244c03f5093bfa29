"""The log of a training step, by modality and objective: means over the steps since the logger last wrote.

A step may hold one modality only, and a logger that writes every tenth step of an alternating training would get the
same one each time; so the values are of a moving window, as long as the logger's interval.

Shapes: M modalities, L terms: the modalities, then the step's objectives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from nemo_emmett.models.microbatches import modality_tokens
from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.objectives.objective import Objective
from nemo_emmett.objectives.registry import OBJECTIVES

_MAY_BE_ABSENT = {f"{metric}_{modality}" for metric in ("loss", "padding") for modality in MODALITIES}
_MAY_BE_ABSENT |= {f"loss_{objective}" for objective in OBJECTIVES}
_COLUMNS = ("tokens", "examples", "padding", "cells")


class StepLog:
    """The last steps' losses, tokens, examples, padding and cells by modality; cells are samples of speech, or
    tokens of text.

    Args:
        window: steps; the interval of the trainer's logger.
    """

    def __init__(self, window: int) -> None:
        self._steps: deque[Tensor] = deque(maxlen=max(1, window))
        self._terms: deque[dict[str, Tensor]] = deque(maxlen=max(1, window))  # term -> (2,) summed losses, units
        self._means: dict[str, Tensor] = {}  # the last mean loss of each term
        self._with_targets: deque[frozenset[str]] = deque(maxlen=max(1, window))  # modalities; known without the device
        self._arrived: set[str] = set()
        self._total: Tensor | None = None  # (M, columns) float64, of all steps

    def add(
        self,
        parts: Mapping[str, Mapping],
        loss_sums_L: Tensor,
        counts_L: Tensor,
        objectives: Sequence[Objective] = (),
    ) -> None:
        """Count one step; nothing is read from the device but for a batch of earlier turns without any answer.

        Args:
            parts: the step's one-modality batches.
            loss_sums_L: (L,) summed losses, nats.
            counts_L: (L,) units, such as target tokens.
            objectives: of the step.
        """
        # float32, since Lightning's `bf16-true` changes the default type to one that cannot count to 257.
        step = torch.zeros(len(MODALITIES), len(_COLUMNS), device=loss_sums_L.device, dtype=torch.float32)
        step[:, 0] = modality_tokens(counts_L, objectives)
        terms_L2 = torch.stack([loss_sums_L.detach().float(), counts_L.float()], 1)
        there = [*MODALITIES, *(one.name if one.modality in parts else None for one in objectives)]
        self._terms.append({name: terms_L2[row] for row, name in enumerate(there) if name is not None})
        for row, modality in enumerate(MODALITIES):
            if (part := parts.get(modality)) is not None:
                self._arrived.add(modality)
                if part.get("audios") is not None:
                    cells, used = part["audios"].numel(), part["audio_lens"].sum()
                else:
                    cells = part["context_ids"].numel() + part["answer_ids"].numel()
                    used = part["context_lens"].sum() + part["answer_lens"].sum()
                step[row, 1], step[row, 2], step[row, 3] = len(part["context_lens"]), cells - used, cells
        self._steps.append(step)
        # float64 counts exactly to 2^53; MPS has none.
        step = step.double() if step.device.type != "mps" else step
        self._total = step if self._total is None else self._total + step
        self._with_targets.append(frozenset(name for name, part in parts.items() if _has_targets(part)))

    def totals(self) -> Tensor:
        """(M, 2) target tokens and examples of all steps so far, on this rank."""
        if self._total is None:
            return torch.zeros(len(MODALITIES), 2, dtype=torch.float64)
        return self._total[:, :2]

    def values(self) -> dict[str, Tensor]:
        """The values to log.

        ``examples_<modality>`` and ``tokens_<modality>`` are means per step: 0 shows that a modality no longer arrives.
        ``loss_<modality>`` (nats per token) and ``padding_<modality>`` (a share) are there where the window holds
        tokens to predict, ``loss_<objective>`` (nats per unit) where it holds the objective's modality. Where none of
        these is a unit of the term, it is the last one; NaN before the first.
        """
        total = torch.stack(list(self._steps)).sum(0)
        names = dict.fromkeys(name for step in self._terms for name in step)
        terms = {name: torch.stack([step[name] for step in self._terms if name in step]).sum(0) for name in names}
        logged = {}
        for row, modality in enumerate(MODALITIES):
            tokens, examples, padding, cells = total[row]
            logged[f"examples_{modality}"] = examples / len(self._steps)
            if modality in self._arrived:
                logged[f"tokens_{modality}"] = tokens / len(self._steps)
            if any(modality in step for step in self._with_targets):
                logged[f"loss_{modality}"] = self._mean(modality, terms)
                logged[f"padding_{modality}"] = padding / cells
        logged |= {f"loss_{name}": self._mean(name, terms) for name in terms if name in OBJECTIVES}
        return logged

    def _mean(self, term: str, terms: Mapping[str, Tensor]) -> Tensor:
        loss_sum, units = terms[term]
        mean = loss_sum / units  # NaN of nothing
        if (last := self._means.get(term)) is not None:
            mean = torch.where(units > 0, mean, last)
        self._means[term] = mean
        return mean


def forget_logged(trainer: Trainer, names: Collection[str]) -> None:
    """Reset the metrics that this step has no value for: Lightning keeps the last value of a metric and would write it
    again for this step. A progress bar keeps the last value by itself.

    Args:
        trainer: in a training step.
        names: of the metrics that this step has logged.
    """
    results = trainer._results  # private: what `self.log` writes to; there is no public access
    for item in (results or {}).values():
        if item.meta.name in _MAY_BE_ABSENT and item.meta.name not in names:
            item.reset()


def _has_targets(part: Mapping) -> bool:
    if part["answer_ids"].shape[1]:
        return True
    targets = part.get("context_targets")
    return targets is not None and bool(targets.any())
