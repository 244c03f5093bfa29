"""The gradients of speech and text in a step, compared block by block, and their conflict projected away
(``model.gradient_conflict``).

The forward passes of speech and text in a step have nothing in common but parameters. So their losses have a backward
pass each, which together take no more than one backward pass of the sum. Each modality's gradient is added up over the
micro-steps of a step and averaged over the ranks, before the two are compared: the products are those of one process
on the joined batch. Steps that are not compared are Lightning's own.

Shapes: K blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nemo_emmett.config import check_keys
from nemo_emmett.errors import ConfigError
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.head import output_layer
from nemo_emmett.models.learning_rates import OPTIMIZER_PARTS
from nemo_emmett.models.transformer_blocks import transformer_blocks
from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.modules.gradient_projection import (
    add_scaled,
    cosine_and_norms,
    named_values,
    products,
    projection_factors,
)
from nemo_emmett.modules.loss import world_size
from nemo_emmett.typed_config import PositiveWhole, parse_section

KEY = "model.gradient_conflict"

_BUCKET_BYTES = 25 * 2**20  # of gradients that are averaged over the ranks at once, as in DDP


@dataclass(frozen=True)
class ConflictOptions:
    """The value of ``model.gradient_conflict``."""

    mode: Literal["monitor", "harmonise"]  # log the conflict; or project it away as well, in every step
    every_n_steps: PositiveWhole = 100  # interval in which cosines and norms are logged

    @classmethod
    def of(cls, config: ModelConfig) -> ConflictOptions | None:
        """Those of a recipe; None: gradients are not compared.

        Raises:
            ConfigError: for a wrong value, or a model in which speech and text have nothing to disagree on.
        """
        value = config.gradient_conflict
        if value is None:
            return None
        section = {"mode": value} if isinstance(value, str) else value
        for unknown in check_keys(section, ("mode", "every_n_steps"), KEY):
            raise ConfigError(f"{KEY}.{unknown}: there is no such key; use mode, every_n_steps.")
        if "mode" not in section:
            raise ConfigError(f"{KEY}.mode is missing: write monitor or harmonise.")
        options = parse_section(cls, section, KEY)
        if config.perception is None:
            raise ConfigError(
                f"{KEY}: a model that reads text only has one gradient; add model.perception, or leave {KEY} out."
            )
        if config.lora_modality == "audio":
            raise ConfigError(
                f"{KEY}: with model.lora_modality: audio text has no gradient to compare; leave either out."
            )
        return options


class GradientConflict:
    """Keeps the gradients of speech and text apart until the optimizer's step.

    Args:
        options: of the recipe.

    Attributes:
        always: compare in every step, whatever the interval: OOMptimizer measures the largest step.
    """

    def __init__(self, options: ConflictOptions) -> None:
        self.options = options
        self.always = False
        self._kept: dict[str, dict[Parameter, Tensor]] = {modality: {} for modality in MODALITIES}
        self._current: str | None = None  # the modality whose gradient is in ``grad``, not in ``_kept``

    def is_apart(self, step: int) -> bool:
        """Whether the gradients of a step (counted from 0) are kept apart: the same on all ranks."""
        return self.always or self.options.mode == "harmonise" or self.is_logged(step)

    def is_logged(self, step: int) -> bool:
        """Whether a step's values are logged; as Lightning, which logs after so many steps."""
        return (step + 1) % self.options.every_n_steps == 0

    def clear(self) -> None:
        """Drop what is kept."""
        for kept in self._kept.values():
            kept.clear()
        self._current = None

    def hold(self, model: nn.Module) -> None:
        """Keep gradients of zero, as in the middle of a step of several micro-steps."""
        self._select(None, model)
        for name, block in parameter_blocks(model).items():
            for parameter in block:
                parameter.grad = None
                for modality in ("audio",) if name in ("encoder", "adapter") else MODALITIES:
                    self._kept[modality].setdefault(parameter, torch.zeros_like(parameter))

    def kept_gradients(self) -> list[Tensor]:
        """The gradients that are not in ``grad``."""
        return [gradient for kept in self._kept.values() for gradient in kept.values()]

    def prepare(self, terms: Mapping[str, Tensor], model: nn.Module) -> None:
        """Between forward and backward pass: where one modality has a gradient, ``grad`` is that modality's so far.

        Then the backward pass adds to it as in any training, and OOMptimizer can redo the pass in parts.
        """
        modalities = [modality for modality, term in terms.items() if term.requires_grad]
        self._select(modalities[0] if len(modalities) == 1 else None, model)

    def backward(self, loss: Tensor, terms: Mapping[str, Tensor], model: nn.Module) -> None:
        """The backward pass of each modality; if one fails, all gradients are what they were.

        Args:
            loss: of the step, scaled.
            terms: modality -> its part of the loss, not scaled.
            model: after :meth:`prepare`.
        """
        active = {modality: term for modality, term in terms.items() if term.requires_grad}
        if not active:
            return
        # The factor that accumulation, loss scaling and microbatches give to each; this runs through no forward pass.
        factors = torch.autograd.grad(loss, list(active.values()), retain_graph=True)
        if len(active) == 1:
            ((modality, term),) = active.items()
            if self._current != modality:  # the gradients were dropped since
                self._current = modality
            term.backward(factors[0])
            return
        found: dict[str, dict[Parameter, Tensor]] = {}
        try:
            for (modality, term), factor in zip(active.items(), factors, strict=True):
                term.backward(factor)
                found[modality] = _take_gradients(model)
        except BaseException:
            _take_gradients(model)
            raise
        for modality, gradients in found.items():
            kept = self._kept[modality]
            for parameter, gradient in gradients.items():
                if parameter in kept:
                    kept[parameter].add_(gradient)
                else:
                    kept[parameter] = gradient

    def combine(self, model: LightningModule, is_logged: bool, scale: float) -> dict[str, float]:
        """Make one gradient of the two. Every rank must call it.

        Args:
            model: whose parameters get it.
            is_logged: whether to return the values.
            scale: of the loss.

        Returns:
            What to log, empty if no rank had both modalities.
        """
        self._select(None, model)
        blocks = parameter_blocks(model)
        parameters = [parameter for block in blocks.values() for parameter in block]
        if world_size() > 1:
            self._average(parameters, model.device)
        audio, text = (self._kept[modality] for modality in MODALITIES)
        shared = [name for name, block in blocks.items() if all(any(p in of for p in block) for of in (audio, text))]
        harmonises = self.options.mode == "harmonise"
        factors: dict[str, Tensor] = {}
        values: dict[str, float] = {}
        if shared and (harmonises or is_logged):
            of_blocks = [
                products([audio.get(p) for p in blocks[name]], [text.get(p) for p in blocks[name]], model.device)
                for name in shared
            ]
            products_K3 = torch.stack(of_blocks)
            if harmonises:
                factors = dict(zip(shared, projection_factors(products_K3), strict=True))
            if is_logged:
                whole = torch.cat([products_K3.sum(0, keepdim=True), products_K3]) / scale**2
                values = dict(named_values(cosine_and_norms(whole), ["", *shared]))
                if 0.0 in (values["gradient_norm_audio"], values["gradient_norm_text"]):
                    values = {}  # no rank had the modality
        for name, block in blocks.items():
            gradients = add_scaled([audio.get(p) for p in block], [text.get(p) for p in block], factors.get(name))
            for parameter, gradient in zip(block, gradients, strict=True):
                parameter.grad = gradient
        self.clear()
        return values

    def _select(self, modality: str | None, model: nn.Module) -> None:
        if self._current == modality:
            return
        if self._current is not None:
            self._kept[self._current] = _take_gradients(model)
        if modality is not None:
            kept = self._kept[modality]
            for parameter in _trained(model):
                parameter.grad = kept.get(parameter)
            self._kept[modality] = {}
        self._current = modality

    def _average(self, parameters: Sequence[Parameter], device: torch.device) -> None:
        """The mean of each modality's gradient over the ranks; a rank that has none contributes zeros."""
        has_MP = torch.tensor([[p in self._kept[m] for p in parameters] for m in MODALITIES], device=device).float()
        dist.all_reduce(has_MP, dist.ReduceOp.MAX)
        for modality, has_P in zip(MODALITIES, has_MP.tolist(), strict=True):
            kept = self._kept[modality]
            used = [parameter for parameter, has in zip(parameters, has_P, strict=True) if has]
            for bucket in _buckets(used):
                gradients = [kept[p] if p in kept else torch.zeros_like(p) for p in bucket]
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                dist.all_reduce(flat)
                flat /= world_size()
                for parameter, gradient, mean in zip(
                    bucket, gradients, flat.split([p.numel() for p in bucket]), strict=True
                ):
                    kept[parameter] = gradient.copy_(mean.view_as(gradient))


class GradientConflictSteps:
    """Mixin of a ``LightningModule``: its hooks, by which gradients are kept apart in some steps."""

    gradient_conflict: GradientConflict | None = None
    modality_terms: Mapping[str, Tensor] | None = None  # of the last forward pass, only where gradients are kept apart

    def on_fit_start(self) -> None:
        """Check that this training can compare gradients.

        Raises:
            ConfigError: if it cannot.
        """
        super().on_fit_start()
        if self.gradient_conflict is not None:
            _check_training(self, self.trainer)

    def keeps_gradients_apart(self) -> bool:
        """Whether the step that begins compares gradients."""
        if self.gradient_conflict is None or self._trainer is None or not torch.is_grad_enabled():
            return False
        return self.gradient_conflict.is_apart(self.trainer.global_step)

    def keep_gradients_apart(self, terms: Mapping[str, Tensor]) -> None:
        """After the forward pass of a step that compares gradients.

        Args:
            terms: modality -> scalar, on which the loss depends through it alone.
        """
        self.modality_terms = terms
        self.gradient_conflict.prepare(terms, self)
        if isinstance(model := self.trainer.strategy.model, DistributedDataParallel):
            # Before DDP's own forward pass ends, after which it waits for gradients.
            model.require_backward_grad_sync = False

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's, or a backward pass of each modality."""
        terms, self.modality_terms = self.modality_terms, None
        if terms is None:
            super().backward(loss, *args, **kwargs)
        else:
            self.gradient_conflict.backward(loss, terms, self)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Drop all gradients."""
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        if self.gradient_conflict is not None:
            self.gradient_conflict.clear()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Lightning's; gradients are combined after the last pass, before they are unscaled, checked and clipped."""
        closure = optimizer_closure
        if closure is not None and self.keeps_gradients_apart():

            def closure() -> Any:
                result = optimizer_closure()
                self._combine_gradients()
                return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _combine_gradients(self) -> None:
        trainer = self.trainer
        is_logged = self.gradient_conflict.is_logged(trainer.global_step)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        values = self.gradient_conflict.combine(self, is_logged, scale)
        if isinstance(model := trainer.strategy.model, DistributedDataParallel):
            model.require_backward_grad_sync = model.require_forward_param_sync = True
        if values:
            # As Lightning's LearningRateMonitor: written in this step, whatever the interval of other metrics.
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})


def parameter_blocks(model: Any) -> dict[str, list[Parameter]]:
    """The trained parameters of a model by block: its Transformer blocks by their path in the language model,
    ``embeddings``, ``output_layer`` (unless it shares the embeddings), ``other`` of the language model, ``encoder`` and
    ``adapter``. Each is in one of them."""
    names = {id(module): name for name, module in model.llm.named_modules()}
    owners: dict[int, str] = {}

    def claim(module: nn.Module, block: str) -> None:
        for parameter in module.parameters():
            owners.setdefault(id(parameter), block)

    claim(model.token_embedding, "embeddings")
    for block in transformer_blocks(model.llm):
        claim(block, names[id(block)].removeprefix("base_model.model."))
    claim(output_layer(model.llm), "output_layer")
    claim(model.llm, "other")
    blocks: dict[str, list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part in ("encoder", "adapter") if _matches(part, name)), "other")
            blocks.setdefault(owners.get(id(parameter), part), []).append(parameter)
    return blocks


def _matches(part: str, name: str) -> bool:
    return re.match(OPTIMIZER_PARTS[part], name) is not None


def _trained(model: nn.Module) -> Iterator[Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def _take_gradients(model: nn.Module) -> dict[Parameter, Tensor]:
    """The gradients of the trained parameters, which have none afterwards."""
    taken = {}
    for parameter in _trained(model):
        if parameter.grad is not None:
            taken[parameter], parameter.grad = parameter.grad, None
    return taken


def _buckets(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Parameters of one type that follow one another, and whose gradients are not too large together."""
    bucket: list[Parameter] = []
    for parameter in parameters:
        size = sum(p.nbytes for p in bucket) + parameter.nbytes
        if bucket and (size > _BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _check_training(model: LightningModule, trainer: Trainer) -> None:
    strategy = trainer.strategy
    if not model.automatic_optimization:
        raise ConfigError(
            f"{KEY}: {type(model).__name__} optimizes by itself (automatic_optimization is false), so its gradients "
            f"cannot be compared; leave {KEY} out."
        )
    if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        raise ConfigError(
            f"{KEY}: {type(strategy).__name__} has no whole gradients to compare; write trainer.strategy: ddp, or "
            f"leave {KEY} out."
        )
    if isinstance(strategy.model, DistributedDataParallel) and strategy.model.static_graph:
        raise ConfigError(
            f"trainer.strategy.static_graph: true is not possible with {KEY}, whose steps differ; leave either out."
        )
    if not any(p.requires_grad for name, p in model.named_parameters() if _matches("llm", name)):
        raise ConfigError(
            f"{KEY}: nothing of the language model is trained, so speech and text have no gradient in common; "
            f"leave {KEY} out."
        )
