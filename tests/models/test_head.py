"""Losses of the output layer equal those computed from the language model's own logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from nemo_emmett.models import head
from nemo_emmett.models.head import LLMInputs, answer_logits, answer_loss, answer_scores, has_linear_head, output_layer
from nemo_emmett.modules.loss import IGNORE_INDEX

from .backbones import DECODER_ONLY, ENCODER_DECODERS, backbone

B, S, A = 3, 9, 4


@pytest.fixture(params=["number of targets known", "unknown"])
def asked(read, request):
    """A language model, what it reads, and its own logits (B, A, V) at the answers' positions."""
    llm, inputs, own_logits = read
    number = int((inputs.targets_BA != IGNORE_INDEX).sum()) if request.param != "unknown" else None
    return llm, replace(inputs, num_targets=number), own_logits


@pytest.fixture(scope="module", params=[*ENCODER_DECODERS, *DECODER_ONLY])
def read(request, folder):
    is_encoder_decoder = request.param in ENCODER_DECODERS
    auto_class = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    llm = auto_class.from_pretrained(backbone(request.param, folder)).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (B, S), generator=generator)
    targets = torch.randint(5, 60, (B, A), generator=generator)
    targets[0, 2:] = IGNORE_INDEX
    targets[2] = IGNORE_INDEX
    if is_encoder_decoder:
        kwargs = {"input_ids": ids, "decoder_input_ids": torch.randint(5, 60, (B, A), generator=generator)}
        return llm, LLMInputs(kwargs, targets), lambda: llm(**kwargs).logits
    positions = torch.tensor([[2, 3, 0, 0], [4, 5, 6, 7], [0, 0, 0, 0]])
    kwargs = {"input_ids": ids}
    rows = torch.arange(B)[:, None]
    return llm, LLMInputs(kwargs, targets, positions), lambda: llm(**kwargs).logits[rows, positions]


def naive(logits_BAV, targets_BA, **options):
    return F.cross_entropy(logits_BAV.flatten(0, 1), targets_BA.flatten(), ignore_index=IGNORE_INDEX, **options)


def test_logits_are_the_models_own_at_the_answers(asked):
    llm, inputs, own_logits = asked
    torch.testing.assert_close(answer_logits(llm, inputs), own_logits())


def test_the_output_layer_computes_no_padding_where_the_number_of_targets_is_known(asked):
    llm, inputs, _ = asked
    rows = []
    hook = output_layer(llm).register_forward_hook(lambda _layer, args, _output: rows.append(len(args[0])))
    answer_loss(llm, inputs, 0.0, "chunked")
    answer_scores(llm, inputs)
    hook.remove()
    assert rows == [inputs.num_targets or B * A] * 2


def test_a_batch_without_targets_has_a_loss_of_0_and_a_gradient(asked):
    llm, inputs, _ = asked
    none = torch.full_like(inputs.targets_BA, IGNORE_INDEX)
    loss = answer_loss(llm, replace(inputs, targets_BA=none, num_targets=inputs.num_targets and 0), 0.0, "chunked")
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in llm.parameters())
    llm.zero_grad()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_and_every_gradient_are_those_of_the_models_own_logits(asked, smoothing):
    llm, inputs, own_logits = asked
    expected = naive(own_logits(), inputs.targets_BA, reduction="sum", label_smoothing=smoothing)
    llm.zero_grad()
    expected.backward()
    gradients = {name: p.grad for name, p in llm.named_parameters()}
    for implementation in ("chunked", "naive"):
        llm.zero_grad()
        loss = answer_loss(llm, inputs, smoothing, implementation)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        loss.backward()
        for name, parameter in llm.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_scores_tell_each_tokens_loss_and_whether_it_is_the_likeliest(asked):
    llm, inputs, own_logits = asked
    losses, is_likeliest = answer_scores(llm, inputs)
    logits, has_target = own_logits(), inputs.targets_BA != IGNORE_INDEX
    expected = naive(logits, inputs.targets_BA, reduction="none").view(B, A)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert is_likeliest[has_target].equal((logits.argmax(-1) == inputs.targets_BA)[has_target])


def test_nothing_is_left_changed_behind(asked):
    llm, inputs, own_logits = asked
    before = own_logits()
    answer_loss(llm, inputs, 0.0, "chunked")
    assert own_logits().equal(before)
    layer = llm.get_output_embeddings()
    assert "forward" not in vars(layer)
    assert not layer._forward_pre_hooks


def test_a_failing_step_leaves_nothing_changed_either(asked, monkeypatch):
    llm, inputs, own_logits = asked
    before = own_logits()
    monkeypatch.setattr(head, "linear_cross_entropy", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer_loss(llm, inputs, 0.0, "chunked")
    assert own_logits().equal(before)


def test_a_family_that_is_not_known_gives_the_same_by_its_own_logits(asked, monkeypatch):
    llm, inputs, own_logits = asked
    assert has_linear_head(llm)
    monkeypatch.setattr(head, "LINEAR_HEADS", frozenset())
    assert not has_linear_head(llm)
    expected = naive(own_logits(), inputs.targets_BA, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(answer_loss(llm, inputs, 0.1, "auto"), expected, rtol=1e-5, atol=1e-5)
    losses, _ = answer_scores(llm, inputs)
    torch.testing.assert_close(losses, naive(own_logits(), inputs.targets_BA, reduction="none").view(B, A))
