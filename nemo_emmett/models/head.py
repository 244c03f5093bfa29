"""The language model's output layer, which returns losses instead of logits.

Vocabularies of 32 k to 256 k tokens make the logits the largest tensor of a training step. So the layer's ``forward``
is replaced for one pass of the language model, by one that computes losses from the hidden states at the answers'
positions.

Shapes: B examples, S positions of the language model's output, A answer tokens, N = B x A, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_emmett.models.causal import unwrap_peft
from nemo_emmett.modules.gated_lora import gated
from nemo_emmett.modules.linear_cross_entropy import linear_cross_entropy, token_scores
from nemo_emmett.modules.loss import IGNORE_INDEX

LINEAR_HEADS = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"),
        *("m2m_100", "mbart", "mt5", "t5", "umt5"),
    }
)
"""Model types of transformers whose logits are ``softcap * tanh((hidden @ weight.T + bias) / softcap)``, where bias and
soft cap may be absent. Any other type computes its logits, at the answers' positions."""


@dataclass(frozen=True)
class LLMInputs:
    """The inputs of a language model for a batch, and its targets.

    Args:
        kwargs: arguments of its forward pass.
        targets_BA: (B, A) int64, ``IGNORE_INDEX`` where there is none.
        positions_BA: (B, A) int64, the position of its output that predicts each target; None: all of them in order.
        speech_B: (B,) bool, the examples with speech; False: none of them. LoRA that acts on speech alone needs it.
    """

    kwargs: Mapping[str, Tensor | None]
    targets_BA: Tensor
    positions_BA: Tensor | None = None
    speech_B: Tensor | bool | None = None


def answer_logits(llm: PreTrainedModel, inputs: LLMInputs) -> Tensor:
    """(B, A, V) logits at the answers' positions."""
    return _run(llm, inputs).view(*inputs.targets_BA.shape, -1)


def answer_loss(llm: PreTrainedModel, inputs: LLMInputs, label_smoothing: float, implementation: str) -> Tensor:
    """Sum of the cross-entropies of all answer tokens, nats, a float32 scalar.

    Args:
        llm: a Hugging Face model with an output layer.
        inputs: of its forward pass.
        label_smoothing: share of a target's probability that goes to all tokens alike.
        implementation: of :func:`~nemo_emmett.modules.linear_cross_entropy.linear_cross_entropy`.
    """
    targets_N = inputs.targets_BA.flatten()
    if not has_linear_head(llm):
        options = {"ignore_index": IGNORE_INDEX, "label_smoothing": label_smoothing, "reduction": "sum"}
        return F.cross_entropy(_run(llm, inputs).float(), targets_N, **options)

    options = {"targets_N": targets_N, "label_smoothing": label_smoothing, "implementation": implementation}
    return _run(llm, inputs, partial(linear_cross_entropy, **options))


@torch.no_grad()
def answer_scores(llm: PreTrainedModel, inputs: LLMInputs) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each answer token, (B, A) float32 nats, 0 where there is none; and whether it is the most likely
    one, (B, A) bool."""
    targets_BA = inputs.targets_BA
    if not has_linear_head(llm):
        logits_NV, targets_N = _run(llm, inputs).float(), targets_BA.flatten()
        losses_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")
        return losses_N.view_as(targets_BA), (logits_NV.argmax(-1) == targets_N).view_as(targets_BA)
    # As one tensor, since transformers hands on what its output layer returns as it does with logits.
    scores_2N = _run(llm, inputs, lambda *args, **head: torch.stack(token_scores(*args, targets_BA.flatten(), **head)))
    return scores_2N[0].view_as(targets_BA), scores_2N[1].bool().view_as(targets_BA)


def has_linear_head(llm: PreTrainedModel) -> bool:
    """Whether the logits are those of a linear layer, bias and soft cap; with LoRA in the output layer they are not."""
    layer = output_layer(llm)
    # FSDP2 gives a module a subclass of its class, which inherits the forward.
    is_linear = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return is_linear and llm.config.model_type in LINEAR_HEADS


def output_layer(llm: PreTrainedModel) -> nn.Module:
    """The layer that computes logits; transformers does not find it once the token embeddings are detached."""
    owner = unwrap_peft(llm)
    return owner.lm_head if hasattr(owner, "lm_head") else owner.get_output_embeddings()


def _run(llm: PreTrainedModel, inputs: LLMInputs, answer: Callable[..., Tensor] | None = None) -> Tensor:
    """The language model's forward pass, in which its output layer gets the answers' positions only, (N, H), and is
    replaced by ``answer(hidden_NH, weight_VH, bias_V=, softcap=)``, if given."""
    layer = output_layer(llm)

    def select(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (hidden_BSH,) = args
        hidden_XH = hidden_BSH.flatten(0, 1)
        if inputs.positions_BA is None:
            return (hidden_XH,)
        B, S, _H = hidden_BSH.shape
        row_B1 = torch.arange(B, device=hidden_BSH.device)[:, None] * S
        return (hidden_XH.index_select(0, (row_B1 + inputs.positions_BA).flatten()),)

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(select).remove)
        if answer is not None:
            bias_V, softcap = stack.enter_context(_without_bias_and_softcap(unwrap_peft(llm)))

            def forward(hidden_NH: Tensor) -> Tensor:
                # The loss is computed within the layer's own call, not before or after it: FSDP2 gathers the weight in
                # a hook of this call, and hooks of FSDP2 and DDP receive its gradient. So the weight is read only here.
                bias = layer.bias if bias_V is None else bias_V
                return answer(hidden_NH, layer.weight, bias_V=bias, softcap=softcap)

            layer.forward = forward
            stack.callback(delattr, layer, "forward")  # the class's own is used again
        stack.enter_context(gated(llm, inputs.speech_B))
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
