"""The training step: the losses of a batch's modalities and objectives, whole or in microbatches.

Shapes: B examples, T tokens, A answer tokens, M modalities, L terms: the modalities, then the objectives that are
active in the step (nemo_emmett/objectives/objective.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from nemo.collections.speechlm2.parts.optim_setup import is_frozen
from nemo.utils import logging
from torch import Tensor

from nemo_emmett.models.dummy_batch import dummy_batch
from nemo_emmett.models.gradient_conflict import ConflictOptions, GradientConflict, GradientConflictSteps
from nemo_emmett.models.head import answer_loss, weighted_answer_loss
from nemo_emmett.models.learning_rates import check_resumed_groups, learning_rates
from nemo_emmett.models.microbatches import MicrobatchLoss, TermCounts, cut_batch, modality_tokens, term_counts
from nemo_emmett.models.sharding import absent_modalities
from nemo_emmett.models.step_log import StepLog, forget_logged
from nemo_emmett.modules.batch import MODALITIES, length_mask, split_modalities
from nemo_emmett.modules.encoder_cache import CachedPerception
from nemo_emmett.modules.evaluation_mode import evaluation_mode
from nemo_emmett.modules.loss import step_loss, world_size
from nemo_emmett.modules.weighted_linear_loss import RowWeights
from nemo_emmett.objectives.objective import (
    CrossEntropyObjective,
    EncodedSpeech,
    Objective,
    SpeechObjective,
    TokenObjective,
)
from nemo_emmett.objectives.teaching import TeachingObjective


class TrainingStep(GradientConflictSteps):
    """Mixin of :class:`~nemo_emmett.models.base.SpeechTextModel`."""

    all_objectives_active: bool = False
    """Every objective has its whole weight, whatever the step: OOMptimizer measures the largest step."""

    def _init_training_step(self, objectives: Sequence[Objective]) -> None:
        self.register_buffer("_loss_weights", torch.tensor(self.options.loss_weights()), persistent=False)
        self.objectives = tuple(objectives)
        conflict = ConflictOptions.of(self.options)
        self.gradient_conflict = None if conflict is None else GradientConflict(conflict)
        self._encoded: list[tuple[Tensor, Tensor]] | None = None  # what `encode_speech` returned, if it is kept
        self._step_log: StepLog | None = None
        self.modality_losses: dict[str, Tensor] = {}  # of the last step's batch, summed, nats
        self._counts: TermCounts | None = None  # of the last step's batch
        self._microbatches: MicrobatchLoss | None = None  # only while a batch is trained on in microbatches
        self._warned_of_text = False

    def on_train_start(self) -> None:
        """Start a new log."""
        self._step_log = StepLog(self.trainer.log_every_n_steps)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the optimizer's state fits, before it is loaded."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self.trainer.training:
            check_resumed_groups(self.options.optim_param_groups is not None, checkpoint)

    def trained_totals(self) -> Tensor | None:
        """(M, 2) target tokens and examples of each modality that this rank has trained on in this run."""
        return None if self._step_log is None else self._step_log.totals()

    def training_step(self, batch: Mapping, batch_idx: int) -> Tensor:
        """The weighted sum of the losses of modalities and objectives, in nats per unit; logs each apart.

        A rank whose batch is empty (all its examples were skipped) takes part in the step with a loss of zero.
        """
        self._eval_frozen_modules()
        parts = self._parts(batch)
        if "text" in parts and self.options.lora_modality == "audio" and not self._warned_of_text:
            self._warned_of_text = True
            logging.warning(
                "model.lora_modality: audio: text trains nothing, its loss is only logged; leave it out with "
                "'~data.train_ds.text', and keep it in validation_ds to see that it stays the same."
            )
        if self._microbatches is None:
            self._counts = TermCounts(batch, parts, self.device, self.active_objectives())
        # The only collective of a forward pass comes before any large allocation: see modules/loss.py.
        totals_L = self._counts.over_all_ranks()
        objectives = self._counts.objectives
        strategy_model = None if self._trainer is None else self.trainer.strategy.model
        tokens_M = modality_tokens(totals_L, objectives)
        absent = absent_modalities(parts, tokens_M, self.is_sharded, strategy_model, self._modality_of_all_parts)
        if objectives:
            losses, loss_sums_L = self._losses_with_objectives(parts, absent)
            loss = torch.stack([losses[modality] for modality in MODALITIES]).sum() * world_size()
        else:
            losses = self._loss_sums(parts, absent)
            loss_sums_L = torch.stack([losses[modality] for modality in MODALITIES])
            loss = step_loss(loss_sums_L, totals_L, self._loss_weights)
        self.modality_losses = self._by_modality(loss_sums_L.detach(), objectives)
        if not loss.requires_grad and torch.is_grad_enabled():
            # No trainable parameter is used: the batch is empty, or text, and only the speech encoder is trainable.
            losses[self._modality_of_all_parts] = zero = self._zero_loss(self._modality_of_all_parts)
            loss = loss + zero
        if self.keeps_gradients_apart():
            self.keep_gradients_apart(losses)
        if self._microbatches is None:
            self._log_step(parts, loss_sums_L, loss)
        else:
            self._microbatches.add(loss_sums_L, term_counts(parts, self.device, objectives))
        return loss

    def active_objectives(self) -> tuple[Objective, ...]:
        """The objectives that are computed in this step, the same on all ranks."""
        return tuple(objective for objective in self.objectives if self._weight_of(objective) > 0)

    def _weight_of(self, objective: Objective) -> float:
        if self.all_objectives_active:
            return objective.weight
        return objective.weight_at(0 if self._trainer is None else self.trainer.global_step)

    def _weights(self, objectives: Sequence[Objective]) -> Tensor:
        """(L,) float32 weights of the terms in this step, whatever the type of the model."""
        weights = [self._weight_of(objective) for objective in objectives]
        return torch.cat([self._loss_weights.float(), torch.tensor(weights, dtype=torch.float32, device=self.device)])

    @staticmethod
    def _by_modality(loss_sums_L: Tensor, objectives: Sequence[Objective]) -> dict[str, Tensor]:
        """Summed losses of each modality, with those of its objectives."""
        sums = dict(zip(MODALITIES, loss_sums_L, strict=False))
        for row, objective in enumerate(objectives, start=len(MODALITIES)):
            sums[objective.modality] = sums[objective.modality] + loss_sums_L[row]
        return sums

    @property
    def _modality_of_all_parts(self) -> str:
        """The modality whose batches pass through every part of the model."""
        return "text" if self.perception is None else "audio"

    def _parts(self, batch: Mapping) -> dict[str, Mapping]:
        parts = split_modalities(batch, self.pad_id) if batch else {}
        if not self.is_encoder_decoder:
            return parts
        # The decoder predicts the answer alone, not targets of the context; without answer tokens it cannot run.
        return {
            modality: {key: value for key, value in part.items() if key != "context_targets"}
            for modality, part in parts.items()
            if part["answer_ids"].shape[1]
        }

    def _loss_sums(self, parts: Mapping[str, Mapping], absent: list[str]) -> dict[str, Tensor]:
        """Modality -> summed cross-entropy of its batch, nats; 0 where it is absent."""
        sums = {}
        for modality in MODALITIES:
            if modality in parts:
                sums[modality] = self._loss_sum(parts[modality])
            elif modality in absent:
                sums[modality] = self._zero_loss(modality)
            else:
                sums[modality] = torch.zeros((), device=self.device)
        return sums

    def _losses_with_objectives(
        self, parts: Mapping[str, Mapping], absent: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Each modality's loss with those of its objectives, weighted and divided by the units on all ranks, but not
        multiplied by the number of ranks; and the (L,) summed losses of the terms, detached."""
        objectives = self._counts.objectives
        names = [*MODALITIES, *(objective.name for objective in objectives)]
        factors_L = self._weights(objectives) / self._counts.over_all_ranks().clamp(min=1)
        factors = dict(zip(names, factors_L, strict=True))
        zero = torch.zeros((), dtype=torch.float32, device=self.device)
        losses, sums = dict.fromkeys(MODALITIES, zero), dict.fromkeys(names, zero)
        for modality in MODALITIES:
            own = [objective for objective in objectives if objective.modality == modality]
            if modality in parts:
                losses[modality], found = self._modality_loss(modality, parts[modality], own, factors)
                sums |= found
            elif modality in absent:
                losses[modality] = self._zero_loss(modality)
        return losses, torch.stack([sums[name].detach().float() for name in names])

    def _modality_loss(
        self, modality: str, part: Mapping, objectives: Sequence[Objective], factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a one-modality batch, each term multiplied by its factor; and the terms' summed losses."""
        of_tokens = [objective for objective in objectives if isinstance(objective, TokenObjective)]
        of_speech = [objective for objective in objectives if isinstance(objective, SpeechObjective)]
        with self._keeping_encoded_speech() if of_speech else nullcontext([]) as encoded:
            if of_tokens:
                loss, sums = self._token_losses(modality, part, of_tokens, factors)
            else:
                sums = {modality: self._loss_sum(part)}
                loss = factors[modality] * sums[modality]
        for objective in of_speech if encoded else ():
            speech = EncodedSpeech(*encoded[0], self._recordings(part), self.embed)
            sums[objective.name] = objective.loss_sum(part, speech)
            loss = loss + factors[objective.name] * sums[objective.name]
        return loss, sums

    def _token_losses(
        self, modality: str, part: Mapping, objectives: Sequence[TokenObjective], factors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`_modality_loss`, of objectives that the output layer computes together with the cross-entropy."""
        own_B = torch.ones_like(part["answer_lens"], dtype=torch.bool)
        weights_B, examples = torch.zeros_like(own_B, dtype=torch.float32), {}
        teaching: TeachingObjective | None = None
        for objective in objectives:
            examples[objective.name] = applies_B = objective.examples(part)
            if isinstance(objective, CrossEntropyObjective):
                own_B = own_B & ~applies_B
                weights_B = torch.where(applies_B, factors[objective.name], weights_B)
            elif isinstance(objective, TeachingObjective):
                assert teaching is None, "one teacher to a modality"
                teaching = objective
        weights_B = torch.where(own_B, factors[modality], weights_B)
        teacher = None if teaching is None else self.teachers.answers(self, teaching, part)

        inputs = self.llm_inputs(part)
        A = inputs.targets_BA.shape[1]
        divergence_B = None if teaching is None else examples[teaching.name] * factors[teaching.name]
        weights = RowWeights(
            *(None if one is None else one[:, None].expand(-1, A).flatten() for one in (weights_B, divergence_B)),
            temperature=1.0 if teaching is None else teaching.temperature,
        )
        options = self.options
        loss, losses_BA, divergences_BA = weighted_answer_loss(
            self.llm, inputs, weights, options.label_smoothing, teacher
        )
        sums = {modality: (losses_BA.sum(1) * own_B).sum()}
        for objective in objectives:
            found_BA = divergences_BA if objective is teaching else losses_BA
            sums[objective.name] = (found_BA.sum(1) * examples[objective.name]).sum()
        return loss, sums

    @contextmanager
    def _keeping_encoded_speech(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Within it what :meth:`encode_speech` returns is kept, for the objectives of the step."""
        self._encoded = kept = []
        try:
            yield kept
        finally:
            self._encoded = None

    def _recordings(self, part: Mapping) -> Tensor:
        """(B,) int64 recordings of each example."""
        ids_BT = part["context_ids"]
        is_locator_BT = (ids_BT == self.audio_locator_id) & length_mask(part["context_lens"], ids_BT.shape[1])
        return is_locator_BT.sum(1)

    def _zero_loss(self, modality: str) -> Tensor:
        """Zero, with a gradient of zero for all parameters that a batch of the modality passes through."""
        objectives = [] if self._counts is None else self._counts.objectives
        own = [objective for objective in objectives if objective.modality == modality]
        with self._dummy_batch(modality) as batch:
            if not own:
                return 0.0 * self._loss_sum(batch)
            one = torch.ones((), device=self.device)
            names = [modality, *(objective.name for objective in own)]
            return 0.0 * self._modality_loss(modality, batch, own, dict.fromkeys(names, one))[0]

    @contextmanager
    def _dummy_batch(self, modality: str) -> Iterator[dict[str, Tensor]]:
        rate = self.sampling_rate if modality == "audio" else None
        # The statistics of batch norms must not move with it.
        with nullcontext() if self.perception is None else evaluation_mode(self.perception):
            yield dummy_batch(modality, self.device, self.audio_locator_id, rate)

    def _loss_sum(self, part: Mapping) -> Tensor:
        options = self.options
        return answer_loss(self.llm, self.llm_inputs(part), options.label_smoothing, options.loss_implementation)

    def _eval_frozen_modules(self) -> None:
        """Keep frozen parts in evaluation mode, as NeMo's SALM does: no dropout, no update of batch norm."""
        parts = [self.llm]
        if self.perception is not None:
            parts += [self.perception.preprocessor, self.perception.encoder]
        for part in parts:
            if is_frozen(part):
                part.eval()

    def _log_step(self, parts: Mapping[str, Mapping], loss_sums_L: Tensor, loss: Tensor) -> None:
        if self._step_log is None:  # a step outside of `fit`
            self._step_log = StepLog(window=1)
        self._step_log.add(parts, loss_sums_L, self._counts.here_L, self._counts.objectives)
        rates = {"learning_rate": 0.0} if self._trainer is None else learning_rates(self.trainer.optimizers[0])
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        for name, rate in rates.items():
            self.log(name, rate, batch_size=1)
        values = self._step_log.values()
        for name, value in values.items():
            self.log(name, value, prog_bar=name.startswith(("loss", "examples")), batch_size=1)
        for objective in self.objectives:
            if objective.has_schedule:
                self.log(f"weight_{objective.name}", self._weight_of(objective), batch_size=1)
        if isinstance(self.perception, CachedPerception) and (share := self.perception.cache.take_share()) is not None:
            self.log("encoder_cache_found", share, batch_size=1)
        if self._trainer is not None:
            forget_logged(self.trainer, values)
        self._counts.logged = True

    # Training steps in microbatches.

    def split_batch(self, batch: Mapping, number: int) -> list[Mapping]:
        """Cut a batch into at most ``number`` microbatches, each of one modality; see :func:`cut_batch`."""
        return cut_batch(batch, number, self.pad_id, self.audio_locator_id)

    def loss_weight(self, microbatch: Mapping, whole: Mapping) -> float:
        """The factor of a microbatch's loss in the whole batch's: 1, since within :meth:`one_step` its sum is divided
        by the tokens of the whole batch."""
        return 1.0

    @contextmanager
    def one_step(self, batch: Mapping) -> Iterator[None]:
        """Around the training steps of a batch's microbatches: their losses add up to the batch's, and they are logged
        as one step at the end, unless the whole batch's forward pass was logged before its backward pass failed.
        """
        parts = self._parts(batch)
        if self._counts is None or not self._counts.are_of(batch):
            self._counts = TermCounts(batch, parts, self.device, self.active_objectives())
        self._microbatches = MicrobatchLoss(self._counts)
        try:
            yield
            if not self._counts.logged:
                loss_sums_L, counts = self._microbatches.loss_sums(), self._counts
                weights_L = self._weights(counts.objectives)
                self._log_step(parts, loss_sums_L, step_loss(loss_sums_L, counts.over_all_ranks(), weights_L))
        finally:
            self._microbatches = None
