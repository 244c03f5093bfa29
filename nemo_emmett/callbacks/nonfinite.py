"""Training steps whose loss or gradients are not finite: skipped, reported, and the end of a training that has many."""

from __future__ import annotations

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
"""Examples of a batch that a message names."""


@dataclass(frozen=True)
class _MicroStep:
    """One forward pass of a step; tensors are on the device, and read only where something is wrong."""

    examples: Mapping[str, Sequence[Mapping] | None]  # modality -> examples of the batch
    loss: Tensor
    modality_losses: Mapping[str, Tensor]


class SkipNonFiniteSteps(Callback, Serialization):
    """Skips training steps whose loss or gradient norm is not finite, and ends a training in which they pile up.

    A skipped step changes neither the weights, nor the optimizer, nor the running statistics of batch norms; it counts
    as a step of the schedule. An error message names the step, the modality and the examples at once. With several
    ranks (DDP, FSDP2) all skip the step if one has to. Weights that are not finite are never saved: a checkpoint
    raises :class:`~nemo_emmett.errors.NonFiniteError` instead, and the ones before it stay as they are.

    Under ``16-mixed`` infinite gradients are a part of the loss scaling, which skips their steps; there only the loss
    is looked at. An optimizer step costs one pass over the gradients and one read of the device, after the backward
    pass; with several ranks also the reduction of one number.

    Our models bring the callback along; other models name it.

    Args:
        max_steps: the training ends when so many steps were skipped within ``window`` steps
            (:class:`~nemo_emmett.errors.NonFiniteError`, exit code 70 of our commands); it also ends in this way when
            more of its steps were skipped than made. None: it never ends for this.
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
        self._in_batch = False  # OOMptimizer's probing steps are none of ours
        self._examples: Mapping[str, Sequence[Mapping] | None] = {}
        self._micro_steps: list[_MicroStep] = []  # since the last optimizer step
        self._statistics: list[Tensor] = []
        self._remembered: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """The steps that were skipped, as far back as the window may reach."""
        return {"skipped": list(self._skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's."""
        self._skipped.extend(state_dict["skipped"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the running statistics, which a forward pass changes before its loss is known."""
        norms = [module for module in pl_module.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._remembered = [buffer.clone() for buffer in self._statistics]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what may have to be restored, and what the batch holds."""
        if not self._micro_steps and self._statistics:
            torch._foreach_copy_(self._remembered, self._statistics)
        self._in_batch, self._examples = True, _examples_of(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss, on the device."""
        if self._in_batch:
            losses = getattr(pl_module, "modality_losses", {})
            self._micro_steps.append(_MicroStep(self._examples, loss.detach(), dict(losses)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Skip the step if its loss or gradient norm is not finite. A collective, where there are several ranks.

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
        """With a loss scaler, look at the loss; the one before the backward pass is scaled.

        Raises:
            NonFiniteError: if too many steps were skipped.
        """
        self._in_batch = False
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if _has_scaler(trainer) and isinstance(loss, Tensor):
            self._decide(trainer, pl_module, [loss], None, [])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that was hardly trained.

        Raises:
            NonFiniteError: if more steps were skipped than made.
        """
        if self._max_steps is not None and self._steps_skipped > self._steps_made:
            raise NonFiniteError(
                f"{self._steps_skipped} of {self._steps_skipped + self._steps_made} steps of this run had no finite "
                f"loss or gradient norm and were skipped: this is no trained model. {_REMEDY}"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite. A collective, where there are several ranks.

        Raises:
            NonFiniteError: naming a parameter.
        """
        name = nonfinite_weight(pl_module.named_parameters(), pl_module.named_buffers())
        if not _any_rank(torch.tensor(float(name is not None), device=pl_module.device)):
            return
        for callback in trainer.checkpoint_callbacks:
            # NeMo has marked the file to be written as unfinished; there may be a good one of this name.
            if isinstance(callback, NeMoModelCheckpoint) and callback.dirpath and trainer.is_global_zero:
                for marker in Path(callback.dirpath).glob(f"*{NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX}"):
                    marker.unlink(missing_ok=True)
        raise NonFiniteError(
            f"step {trainer.global_step}: the weights are not finite ({name or 'on another rank'}), so no checkpoint "
            f"is written; earlier ones stay as they are. {_REMEDY}"
        )

    def _decide(
        self,
        trainer: Trainer,
        module: LightningModule,
        losses: Sequence[Tensor],
        norm: Tensor | None,
        parameters: Sequence[torch.nn.Parameter],
    ) -> None:
        """Decide whether a step is skipped, on all ranks together, and skip it."""
        sums = [loss.float().to(module.device).sum() for loss in losses] + ([] if norm is None else [norm])
        is_bad = ~torch.stack(sums).isfinite().all() if sums else torch.zeros((), device=module.device)
        micro_steps, self._micro_steps = self._micro_steps, []
        if not _any_rank(is_bad.float()):
            self._steps_made += 1
            return
        for parameter in parameters:
            parameter.grad = None  # which every optimizer passes over
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._remembered)
        self._steps_skipped += 1
        self._skipped.append(trainer.global_step)
        self._report(trainer, micro_steps, losses, norm)
        self._stop_past_limit(trainer)

    def _report(
        self, trainer: Trainer, micro_steps: Sequence[_MicroStep], losses: Sequence[Tensor], norm: Tensor | None
    ) -> None:
        values = [float(loss) for loss in losses]
        bad = [step for step, value in zip(micro_steps, values, strict=False) if not _is_finite(value)]
        of_norm = "" if norm is None else f", gradient norm {float(norm):g}"
        text = f"loss {', '.join(f'{v * trainer.accumulate_grad_batches:g}' for v in values)}{of_norm}; "
        text += "; ".join(filter(None, (_named(step) for step in bad or micro_steps)))
        of_ranks: list[Any] = [text]
        if world_size() > 1:
            of_ranks = [None] * world_size()
            dist.all_gather_object(of_ranks, text)
            of_ranks = [f"rank {rank}: {one}" for rank, one in enumerate(of_ranks)]
        logging.error(
            f"Step {trainer.global_step} is skipped, since its loss or gradient norm is not finite: "
            f"{' | '.join(of_ranks)}."
        )

    def _stop_past_limit(self, trainer: Trainer) -> None:
        if self._max_steps is None or len(self._skipped) < self._max_steps:
            return
        if self._skipped[-1] - self._skipped[0] < self._window:
            raise NonFiniteError(
                f"step {trainer.global_step}: {self._max_steps} of the last {self._window} steps had no finite loss or "
                f"gradient norm, so the training ends; the weights are those of the last good step. {_REMEDY}"
            )


_REMEDY = (
    "Look at the examples named in the log, lower model.optimizer.lr, or set trainer.gradient_clip_val; to allow more "
    "such steps, set max_steps of the callback nemo_emmett.callbacks.SkipNonFiniteSteps."
)


def _norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Of all gradients together, the Euclidean norm; in float32 at least, since a norm overflows before its values."""
    dtype = reduce(torch.promote_types, {gradient.dtype for gradient in gradients}, torch.float32)
    return torch.stack([one.to(device) for one in torch._foreach_norm(list(gradients), 2, dtype)]).norm()


def _any_rank(flag: Tensor) -> bool:
    """Whether a number is above zero on any rank; reads the device."""
    if world_size() > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def _has_scaler(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _is_finite(value: float) -> bool:
    return value - value == 0.0


def _examples_of(batch: Any) -> dict[str, Sequence[Mapping] | None]:
    """Modality -> what a batch says of its examples; docs/architecture.md, "The batch"."""
    if not isinstance(batch, Mapping):
        return {}
    parts = {modality: batch[modality] for modality in MODALITIES if isinstance(batch.get(modality), Mapping)}
    if not parts and batch.get("audios") is not None:
        parts = {"audio": batch}
    return {modality: part.get("examples") for modality, part in (parts or {"text": batch}).items()}


def _named(step: _MicroStep) -> str:
    """The modalities whose loss is not finite, all where none is known to be, and their examples."""
    bad = [name for name, loss in step.modality_losses.items() if not _is_finite(float(loss))]
    return "; ".join(
        f"{modality}: {_listed(examples)}" for modality, examples in step.examples.items() if modality in bad or not bad
    )


def _listed(examples: Sequence[Mapping] | None) -> str:
    if not examples:
        return "examples unknown, since the batch does not name them"
    shown = [_name(example) for example in examples[:_MAX_NAMED]]
    more = f" and {len(examples) - _MAX_NAMED} more" if len(examples) > _MAX_NAMED else ""
    return f"examples {', '.join(shown)}{more}"


def _name(example: Mapping) -> str:
    path, start = example.get("audio_path"), example.get("audio_start")
    place = "" if path is None else f" ({path}{f' from {start:g} s' if start else ''})"
    return f"{example.get('id')}{place}"
