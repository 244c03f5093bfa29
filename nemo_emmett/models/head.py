"""The language model's output layer, which returns losses instead of logits.

Vocabularies of 32 k to 256 k tokens make the logits the largest tensor of a training step. So the layer's ``forward``
is replaced for one pass of the language model, by one that computes losses from the hidden states at the answers'
positions; padding among the answers is left out where the number of targets is known.

Shapes: B examples, L rows of the language model's output (B, or fewer into which examples are packed), S positions of
one, A answer tokens, P = B x A places of targets, N targets, or P where their number is not known, V vocabulary, H
hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from nemo_emmett.models.causal import unwrap_peft
from nemo_emmett.modules.gated_lora import gated
from nemo_emmett.modules.linear_cross_entropy import linear_cross_entropy, token_scores
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.modules.vocabulary import VocabularyParallelLinear, local_head
from nemo_emmett.modules.weighted_linear_loss import (
    LinearTeacher,
    LogitsTeacher,
    RowWeights,
    Teacher,
    weighted_linear_loss,
    weighted_logit_loss,
)

LINEAR_HEADS = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"),
        *("m2m_100", "mbart", "mt5", "t5", "umt5"),
    }
)
"""Model types of transformers whose logits are ``softcap * tanh((hidden @ weight.T + bias) / softcap)``, where bias and
soft cap may be absent. Any other type computes its logits, at the answers' positions."""


_LINEAR_FORWARDS = nn.Linear.forward, VocabularyParallelLinear.forward


@dataclass(frozen=True)
class LLMInputs:
    """The inputs of a language model for a batch, and its targets.

    Args:
        kwargs: arguments of its forward pass.
        targets_BA: (B, A) int64, ``IGNORE_INDEX`` where there is none.
        positions_BA: (B, A) int64, the position in its row of the output that predicts each target; None: all of them
            in order.
        speech_L: (L,) bool, the rows of the input with speech; False: none of them. LoRA that acts on speech alone
            needs it.
        num_targets: how many targets there are; None: the host does not know, and padding costs as much as they do.
        row_B: (B,) int64, the row of each example, where several are packed into one; None: each is a row of its own.
        around: a context in which the language model reads them.
    """

    kwargs: Mapping[str, Any]
    targets_BA: Tensor
    positions_BA: Tensor | None = None
    speech_L: Tensor | bool | None = None
    num_targets: int | None = None
    row_B: Tensor | None = None
    around: Callable[[], AbstractContextManager] = nullcontext

    @cached_property
    def target_places(self) -> Tensor:
        """(N,) int64 places of the targets among all B * A, ascending; of all of these where their number is not
        known, or 0."""
        targets_P = self.targets_BA.flatten()
        if not self.num_targets:
            return torch.arange(len(targets_P), device=targets_P.device)
        # Of a given size, so that the host need not wait for the device.
        return (targets_P != IGNORE_INDEX).nonzero_static(size=self.num_targets).flatten()


def answer_logits(llm: PreTrainedModel, inputs: LLMInputs) -> Tensor:
    """(B, A, V) logits at the answers' positions."""
    return _run(llm, replace(inputs, num_targets=None)).view(*inputs.targets_BA.shape, -1)


def answer_loss(llm: PreTrainedModel, inputs: LLMInputs, label_smoothing: float, implementation: str) -> Tensor:
    """Sum of the cross-entropies of all answer tokens, nats, a float32 scalar.

    Args:
        llm: a Hugging Face model with an output layer.
        inputs: of its forward pass.
        label_smoothing: share of a target's probability that goes to all tokens alike.
        implementation: of :func:`~nemo_emmett.modules.linear_cross_entropy.linear_cross_entropy`.
    """
    targets_N = inputs.targets_BA.flatten().take(inputs.target_places)
    if not has_linear_head(llm):
        options = {"ignore_index": IGNORE_INDEX, "label_smoothing": label_smoothing, "reduction": "sum"}
        return F.cross_entropy(_run(llm, inputs).float(), targets_N, **options)

    options = {"targets_N": targets_N, "label_smoothing": label_smoothing, "implementation": implementation}
    return _run(llm, inputs, partial(linear_cross_entropy, **options))


@dataclass(frozen=True)
class TeacherAnswers:
    """What a teacher's output layer computes the logits of the answers from, or these.

    Args:
        states_NX: (N, H) hidden states at the answers' positions; where ``layer`` is None, (N, V) logits.
        layer: a linear output layer.
        bias_V: (V,) that the language model adds.
        softcap: of the logits.
    """

    states_NX: Tensor
    layer: nn.Module | None = None
    bias_V: Tensor | None = None
    softcap: float | None = None

    @contextmanager
    def ready(self, student_layer: nn.Module) -> Iterator[Teacher]:
        """Within it the teacher's logits can be computed. Entered in the call of the student's output layer: FSDP2
        gathers that one's weight then; the teacher's is gathered here."""
        if self.layer is None:
            yield LogitsTeacher(self.states_NX)
            return
        is_sharded = isinstance(self.layer, FSDPModule) and self.layer is not student_layer
        if is_sharded:
            self.layer.unshard()
        try:
            bias_V = self.layer.bias if self.bias_V is None else self.bias_V
            head = local_head(self.states_NX, self.layer.weight, bias_V)
            yield LinearTeacher(*head[:3], self.softcap, head[3])
        finally:
            if is_sharded:
                self.layer.reshard()


@torch.no_grad()
def teacher_answers(llm: PreTrainedModel, inputs: LLMInputs) -> TeacherAnswers:
    """A teacher's forward pass; its logits are computed where they are compared (:func:`weighted_answer_loss`)."""
    if not has_linear_head(llm):
        return TeacherAnswers(_run(llm, inputs))
    with _without_bias_and_softcap(unwrap_peft(llm)) as (bias_V, softcap):
        pass
    return TeacherAnswers(_run(llm, inputs, lambda hidden_NH, *_, **__: hidden_NH), output_layer(llm), bias_V, softcap)


def weighted_answer_loss(
    llm: PreTrainedModel,
    inputs: LLMInputs,
    weights: RowWeights,
    label_smoothing: float,
    teacher: TeacherAnswers | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of the answer tokens' cross-entropies and divergences from a teacher.

    Args:
        llm: a Hugging Face model with an output layer.
        inputs: of its forward pass.
        weights: of the places of ``inputs.targets_BA.flatten()``.
        label_smoothing: of the cross-entropy.
        teacher: its answers are at the same places of ``targets_BA``.

    Returns:
        The scalar; (B, A) cross-entropies, 0 where there is no target; (B, A) divergences, 0 where their weight is.
    """
    layer, places_N = output_layer(llm), inputs.target_places
    targets_N = inputs.targets_BA.flatten().take(places_N)
    weights = weights.of(places_N)

    def compute(loss: Callable[..., tuple[Tensor, Tensor, Tensor]], *args: Tensor, **head: Any) -> Tensor:
        with nullcontext() if teacher is None else teacher.ready(layer) as ready:
            found = loss(*args, targets_N, weights, label_smoothing=label_smoothing, teacher=ready, **head)
        # As one tensor, since transformers hands on what its output layer returns as it does with logits.
        return torch.cat([found[0][None], *found[1:]])

    if has_linear_head(llm):
        packed = _run(llm, inputs, partial(compute, weighted_linear_loss))
    else:
        packed = compute(weighted_logit_loss, _run(llm, inputs))
    losses_BA, divergences_BA = (_in_place(one, inputs, places_N) for one in packed[1:].detach().view(2, -1))
    return packed[0], losses_BA, divergences_BA


@torch.no_grad()
def answer_scores(llm: PreTrainedModel, inputs: LLMInputs) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each answer token, (B, A) float32 nats, 0 where there is none; and whether it is the most likely
    one, (B, A) bool."""
    places_N = inputs.target_places
    targets_N = inputs.targets_BA.flatten().take(places_N)
    if has_linear_head(llm):
        # As one tensor, since transformers hands on what its output layer returns as it does with logits.
        losses_N, correct_N = _run(
            llm, inputs, lambda *args, **head: torch.stack(token_scores(*args, targets_N, **head))
        )
    else:
        logits_NV = _run(llm, inputs).float()
        losses_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")
        correct_N = logits_NV.argmax(-1) == targets_N
    return _in_place(losses_N, inputs, places_N), _in_place(correct_N, inputs, places_N).bool()


def _in_place(values_N: Tensor, inputs: LLMInputs, places_N: Tensor) -> Tensor:
    """(B, A) the values of targets where these are, 0 elsewhere."""
    values_P = values_N.new_zeros(inputs.targets_BA.numel()).index_copy_(0, places_N, values_N)
    return values_P.view_as(inputs.targets_BA)


def has_linear_head(llm: PreTrainedModel) -> bool:
    """Whether the logits are those of a linear layer, bias and soft cap; with LoRA in the output layer they are not."""
    layer = output_layer(llm)
    # FSDP2 gives a module a subclass of its class, which inherits the forward.
    is_linear = isinstance(layer, nn.Linear) and type(layer).forward in _LINEAR_FORWARDS
    return is_linear and llm.config.model_type in LINEAR_HEADS


def output_layer(llm: PreTrainedModel) -> nn.Module:
    """The layer that computes logits; transformers does not find it once the token embeddings are detached."""
    owner = unwrap_peft(llm)
    return owner.lm_head if hasattr(owner, "lm_head") else owner.get_output_embeddings()


def _run(llm: PreTrainedModel, inputs: LLMInputs, answer: Callable[..., Tensor] | None = None) -> Tensor:
    """The language model's forward pass, in which its output layer gets the positions of targets only, (N, H), and is
    replaced by ``answer(hidden_NH, weight_VH, bias_V=, softcap=, vocabulary=)``, if given."""
    layer = output_layer(llm)

    def select(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (hidden_LSH,) = args
        hidden_XH = hidden_LSH.flatten(0, 1)
        places_N, (L, S, _H) = inputs.target_places, hidden_LSH.shape
        if inputs.positions_BA is not None:
            row_B = torch.arange(L, device=hidden_LSH.device) if inputs.row_B is None else inputs.row_B
            places_N = (row_B[:, None] * S + inputs.positions_BA).take(places_N)
        if (gate := getattr(llm, "speech_gate", None)) is not None:
            gate.row_N = places_N // S
        return (hidden_XH.index_select(0, places_N),)

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(select).remove)
        if answer is not None:
            bias_V, softcap = stack.enter_context(_without_bias_and_softcap(unwrap_peft(llm)))

            def forward(hidden_NH: Tensor) -> Tensor:
                # The loss is computed within the layer's own call, not before or after it: FSDP2 gathers the weight in
                # a hook of this call, and hooks of FSDP2 and DDP receive its gradient. So the weight is read only here.
                bias = layer.bias if bias_V is None else bias_V
                hidden_NH, weight, bias, vocabulary = local_head(hidden_NH, layer.weight, bias)
                return answer(hidden_NH, weight, bias_V=bias, softcap=softcap, vocabulary=vocabulary)

            layer.forward = forward
            stack.callback(delattr, layer, "forward")  # the class's own is used again
        stack.enter_context(gated(llm, inputs.speech_L))
        stack.enter_context(inputs.around())
        return llm(**inputs.kwargs, use_cache=False).logits


@contextmanager
def _without_bias_and_softcap(llm: PreTrainedModel) -> Iterator[tuple[Tensor | None, float | None]]:
    """Within it the model does not apply its bias and soft cap to the output layer's result, which is a loss; yields
    both."""
    softcap = getattr(llm.config, "final_logit_softcapping", None)
    bias_1V = llm._buffers.get("final_logits_bias")  # mBART's
    try:
        if softcap is not None:
            llm.config.final_logit_softcapping = None
        if bias_1V is not None:
            llm._buffers["final_logits_bias"] = bias_1V.new_zeros(())
        yield (None if bias_1V is None else bias_1V[0]), softcap
    finally:
        if softcap is not None:
            llm.config.final_logit_softcapping = softcap
        if bias_1V is not None:
            llm._buffers["final_logits_bias"] = bias_1V
