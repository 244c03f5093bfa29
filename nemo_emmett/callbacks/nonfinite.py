"""Skips and reports training steps whose loss or gradients are not finite, and ends a training with many of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.classes.common import Serialization
from nemo.utils import logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from nemo_emmett.errors import NonFiniteError
from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.modules.loss import world_size
from nemo_emmett.modules.tensors import local_values, nonfinite_weight
from nemo_emmett.typed_config import PositiveWhole, parse_value

_MAX_NAMED = 64
"""Examples of a batch that a message names at most."""


@dataclass(frozen=True)
class _MicroStep:
    """One forward pass of a step; tensors are on the device, and read only if a value is not finite."""

    examples: Mapping[str, Sequence[Mapping] | None]  # modality -> examples of the batch
    loss: Tensor
    modality_losses: Mapping[str, Tensor]


class SkipNonFiniteSteps(Callback, Serialization):
    """Skips training steps whose loss or gradient norm is not finite, and ends a training with too many of them.

    A skipped step changes neither the weights, nor the optimizer, nor the running statistics of batch norms; it counts
    as a step of the schedule. An error message names the step, the modality and the examples. With several ranks (DDP,
    FSDP2) all skip the step if one has to. Weights that are not finite are never saved: a checkpoint raises
    :class:`~nemo_emmett.errors.NonFiniteError` instead, and earlier ones are kept.

    Under ``16-mixed`` infinite gradients are a part of the loss scaling, which skips their steps; there only the loss
    is checked. An optimizer step takes one pass over the gradients and one read of the device, after the backward
    pass; with several ranks also the reduction of one number.

    Our models add the callback; recipes of other models name it.

    Args:
        max_steps: the training ends when so many steps were skipped within ``window`` steps
            (:class:`~nemo_emmett.errors.NonFiniteError`, exit code 70 of our commands), or when more of its steps were
            skipped than made. None: it never ends for this reason.
        window: steps, of the schedule.

    Example:
        In a recipe::

            trainer:
              callbacks:
                - _target_: nemo_emmett.callbacks.SkipNonFiniteSteps
                  max_steps: 3
    """

    def __init__(self, max_steps: int | None = 10, window: int = 100) -> None:
        self._max_steps = parse_value(PositiveWhole | None, max_steps, "SkipNonFiniteSteps.max_steps")
        self._window = parse_value(PositiveWhole, window, "SkipNonFiniteSteps.window")
        self._skipped: deque[int] = deque(maxlen=self._max_steps or 1)  # the last skipped steps, for the window
        self._steps_made = self._steps_skipped = 0  # of this run
        self._in_batch = False  # OOMptimizer's probes are not counted
        self._examples: Mapping[str, Sequence[Mapping] | None] = {}
        self._micro_steps: list[_MicroStep] = []  # since the last optimizer step
        self._statistics: list[Tensor] = []
        self._saved_statistics: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """The skipped steps that the window may still contain."""
        return {"skipped": list(self._skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the skipped steps of a checkpoint."""
        self._skipped.extend(state_dict["skipped"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the running statistics, which a forward pass changes before its loss is known."""
        norms = [module for module in pl_module.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._saved_statistics = [buffer.clone() for buffer in self._statistics]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save what may have to be restored, and the batch's examples."""
        if not self._micro_steps and self._statistics:
            torch._foreach_copy_(self._saved_statistics, self._statistics)
        self._in_batch, self._examples = True, _examples_of(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss, on the device."""
        if self._in_batch:
            losses = getattr(pl_module, "modality_losses", {})
            self._micro_steps.append(_MicroStep(self._examples, loss.detach(), dict(losses)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Skip the step if its loss or gradient norm is not finite. A collective, if there are several ranks.

        Raises:
            NonFiniteError: if too many steps were skipped.
        """
        if not self._in_batch or _has_scaler(trainer):
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = _norm([local_values(p.grad) for p in parameters], pl_module.device) if parameters else None
        self._decide(trainer, pl_module, [micro.loss for micro in self._micro_steps], norm, parameters)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """With a loss scaler, check the loss here; the one before the backward pass is scaled.

        Raises:
            NonFiniteError: if too many steps were skipped.
        """
        self._in_batch = False
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if _has_scaler(trainer) and isinstance(loss, Tensor):
            self._decide(trainer, pl_module, [loss], None, [])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that was trained on fewer steps than were skipped.

        Raises:
            NonFiniteError: if more steps were skipped than made.
        """
        if self._max_steps is not None and self._steps_skipped > self._steps_made:
            raise NonFiniteError(
                f"{self._steps_skipped} of {self._steps_skipped + self._steps_made} steps of this run had no finite "
                f"loss or gradient norm and were skipped: the model is not trained. {_REMEDY}"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite. A collective, if there are several ranks.

        Raises:
            NonFiniteError: naming a parameter.
        """
        name = nonfinite_weight(pl_module.named_parameters(), pl_module.named_buffers())
        if not _any_rank(torch.tensor(float(name is not None), device=pl_module.device)):
            return
        for callback in trainer.checkpoint_callbacks:
            # NeMo has marked the file to be written as unfinished; there may be a complete one of this name.
            if isinstance(callback, NeMoModelCheckpoint) and callback.dirpath and trainer.is_global_zero:
                for marker in Path(callback.dirpath).glob(f"*{NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX}"):
                    marker.unlink(missing_ok=True)
        raise NonFiniteError(
            f"step {trainer.global_step}: the weights are not finite ({name or 'on another rank'}), so no checkpoint "
            f"is written; earlier ones are kept. {_REMEDY}"
        )

    def _decide(
        self,
        trainer: Trainer,
        module: LightningModule,
        losses: Sequence[Tensor],
        norm: Tensor | None,
        parameters: Sequence[torch.nn.Parameter],
    ) -> None:
        """Decide with all ranks whether a step is skipped, and skip it."""
        sums = [loss.float().to(module.device).sum() for loss in losses] + ([] if norm is None else [norm])
        is_bad = ~torch.stack(sums).isfinite().all() if sums else torch.zeros((), device=module.device)
        micro_steps, self._micro_steps = self._micro_steps, []
        if not _any_rank(is_bad.float()):
            self._steps_made += 1
            return
        for parameter in parameters:
            parameter.grad = None  # every optimizer skips parameters without a gradient
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._saved_statistics)
        self._steps_skipped += 1
        self._skipped.append(trainer.global_step)
        self._report(trainer, micro_steps, losses, norm)
        is_full = self._max_steps is not None and len(self._skipped) == self._max_steps
        if is_full and self._skipped[-1] - self._skipped[0] < self._window:
            raise NonFiniteError(
                f"step {trainer.global_step}: {self._max_steps} of the last {self._window} steps had no finite loss or "
                f"gradient norm, so the training ends; the weights are those of the last good step. {_REMEDY}"
            )

    def _report(
        self, trainer: Trainer, micro_steps: Sequence[_MicroStep], losses: Sequence[Tensor], norm: Tensor | None
    ) -> None:
        values = [float(loss) for loss in losses]
        bad = [step for step, value in zip(micro_steps, values, strict=False) if not math.isfinite(value)]
        norm_text = "" if norm is None else f", gradient norm {float(norm):g}"
        text = f"loss {', '.join(f'{v * trainer.accumulate_grad_batches:g}' for v in values)}{norm_text}; "
        text += "; ".join(filter(None, (_named(step) for step in bad or micro_steps)))
        texts: list[Any] = [text]
        if world_size() > 1:
            texts = [None] * world_size()
            dist.all_gather_object(texts, text)
            texts = [f"rank {rank}: {text}" for rank, text in enumerate(texts)]
        logging.error(
            f"Step {trainer.global_step} is skipped, since its loss or gradient norm is not finite: "
            f"{' | '.join(texts)}."
        )


_REMEDY = (
    "Look at the examples named in the log, lower model.optimizer.lr, or set trainer.gradient_clip_val; to allow more "
    "such steps, set max_steps of the callback nemo_emmett.callbacks.SkipNonFiniteSteps."
)


def _norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The Euclidean norm of all gradients; in float32 at least, since a norm overflows before its values."""
    dtype = reduce(torch.promote_types, {gradient.dtype for gradient in gradients}, torch.float32)
    return torch.stack([one.to(device) for one in torch._foreach_norm(list(gradients), 2, dtype)]).norm()


def _any_rank(flag: Tensor) -> bool:
    """Whether a number is above zero on any rank; reads the device."""
    if world_size() > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def _has_scaler(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _examples_of(batch: Any) -> dict[str, Sequence[Mapping] | None]:
    """Modality -> the examples of a batch; docs/architecture.md, "The batch"."""
    if not isinstance(batch, Mapping):
        return {}
    parts = {modality: batch[modality] for modality in MODALITIES if isinstance(batch.get(modality), Mapping)}
    if not parts and batch.get("audios") is not None:
        parts = {"audio": batch}
    return {modality: part.get("examples") for modality, part in (parts or {"text": batch}).items()}


def _named(step: _MicroStep) -> str:
    """The modalities whose loss is not finite, or all if none is known, and their examples."""
    bad = [name for name, loss in step.modality_losses.items() if not math.isfinite(loss)]
    return "; ".join(
        f"{modality}: {_listed(examples)}" for modality, examples in step.examples.items() if modality in bad or not bad
    )


def _listed(examples: Sequence[Mapping] | None) -> str:
    if not examples:
        return "examples unknown, since the batch does not name them"
    shown = []
    for example in examples[:_MAX_NAMED]:
        path, start = example.get("audio_path"), example.get("audio_start")
        place = "" if path is None else f" ({path}{f' from {start:g} s' if start else ''})"
        shown.append(f"{example.get('id')}{place}")
    more = f" and {len(examples) - _MAX_NAMED} more" if len(examples) > _MAX_NAMED else ""
    return f"examples {', '.join(shown)}{more}"
