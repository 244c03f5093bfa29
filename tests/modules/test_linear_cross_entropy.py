"""The loss without the logits, compared with float64 logits that are all there at once."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_emmett.errors import ConfigError
from nemo_emmett.modules import linear_cross_entropy as module
from nemo_emmett.modules.linear_cross_entropy import check_implementation, linear_cross_entropy, token_scores
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.oomptimizer.meter import TensorMeter

CPU = torch.device("cpu")
OPTIONS = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.1},
    "soft cap": {"softcap": 2.0},
    "both": {"softcap": 2.0, "label_smoothing": 0.3},
}


@pytest.fixture(params=[1, 3, 100], ids=lambda rows: f"{rows} rows a chunk")
def rows_of_a_chunk(request, monkeypatch) -> int:
    """A few rows of logits at a time, whatever the vocabulary."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", request.param)
    return request.param


def problem(N: int, V: int, H: int, dtype: torch.dtype = torch.float32, masked: int = 0) -> tuple[Tensor, ...]:
    """Hidden states, weight, bias and targets, some of them masked; logits of a standard deviation of 2."""
    generator = torch.Generator().manual_seed(N + V + H)
    hidden = torch.randn(N, H, generator=generator)
    weight = 2 * torch.randn(V, H, generator=generator) / H**0.5
    bias = torch.randn(V, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[:masked]] = IGNORE_INDEX
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap=None, label_smoothing=0.0):
    """The loss by definition: of each row with a target, the cross-entropy with the smoothed distribution."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
    rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
    wanted = torch.full_like(log_probabilities, label_smoothing / logits.shape[1])
    wanted[rows, targets[rows]] += 1 - label_smoothing
    return -(wanted * log_probabilities)[rows].sum()


def gradients(compute: Callable[..., Tensor], *tensors: Tensor | None, scale: float = 1.0) -> list[Tensor | None]:
    """The loss, and its gradients by the tensors, ``scale`` times."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    loss = compute(*leaves)
    (scale * loss).backward()
    return [loss.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def chunked(targets: Tensor, implementation: str = "chunked", **options) -> Callable[..., Tensor]:
    return lambda hidden, weight, bias: linear_cross_entropy(
        hidden, weight, targets, bias_V=bias, implementation=implementation, **options
    )


def exact(targets: Tensor, **options) -> Callable[..., Tensor]:
    return lambda hidden, weight, bias: reference(hidden, weight, bias, targets, **options)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("N", "V", "H"), [(1, 7, 5), (10, 33, 8), (31, 101, 17)])
def test_loss_and_gradients_are_those_of_all_logits_at_once(rows_of_a_chunk, N, V, H, with_bias, options):
    *tensors, bias, targets = problem(N, V, H, masked=N // 4)
    tensors.append(bias if with_bias else None)
    found = gradients(chunked(targets, **options), *tensors, scale=3.0)
    expected = gradients(exact(targets, **options), *(None if t is None else t.double() for t in tensors), scale=3.0)
    naive = gradients(chunked(targets, "naive", **options), *tensors, scale=3.0)
    for ours, theirs, true in zip(found, naive, expected, strict=True):
        torch.testing.assert_close(ours, None if true is None else true.float(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float64_is_computed_in_float64(rows_of_a_chunk, options):
    *tensors, targets = problem(5, 6, 4, torch.float64, masked=1)
    found = gradients(chunked(targets, **options), *tensors)
    for ours, true in zip(found, gradients(exact(targets, **options), *tensors), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("N", "sizes"), [(0, []), (1, [1]), (100, [100]), (101, [100, 1]), (250, [100, 100, 50])])
def test_all_chunks_but_the_last_are_of_one_size(monkeypatch, N, sizes):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7 * 100)
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 3)
    inputs = module.LinearInputs(*problem(N, 7, 2))
    assert [len(inputs.of(rows).hidden_NH) for rows in inputs.chunks()] == sizes
    assert sum(sizes) == N


def test_all_implementations_agree_on_a_loss_told_by_hand():
    hidden, weight = torch.zeros(3, 8), torch.zeros(100, 8)
    targets = torch.tensor([7, 99, IGNORE_INDEX])
    for implementation in ("auto", "chunked", "naive"):
        loss = linear_cross_entropy(hidden, weight, targets, implementation=implementation)
        assert loss.item() == pytest.approx(2 * 4.605170, rel=1e-6)


@pytest.mark.parametrize("implementation", ["chunked", "naive"])
@pytest.mark.parametrize("N", [0, 5])
def test_without_a_target_there_is_no_loss_and_no_gradient(rows_of_a_chunk, N, implementation):
    *tensors, targets = problem(N, 9, 4, masked=N)
    assert (targets == IGNORE_INDEX).all()
    found = gradients(chunked(targets, implementation, label_smoothing=0.1), *tensors)
    for value, shape in zip(found, [(), (N, 4), (9, 4), (9,)], strict=True):
        assert value.shape == shape
        assert not value.any()


def test_large_logits_do_not_overflow():
    hidden, weight = torch.tensor([[1000.0], [-1000.0]]), torch.tensor([[1.0], [-1.0]])
    found = gradients(chunked(torch.tensor([1, 1])), hidden, weight, None)
    assert found[0] == 2000
    assert found[1].tolist() == [[2.0], [0.0]]  # dlogits [1, -1] times the weight; certain and right: none
    assert found[2].tolist() == [[1000.0], [-1000.0]]


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    *tensors, targets = problem(6, 11, 4)
    expected = dict(zip(("hidden", "weight", "bias"), gradients(exact(targets), *tensors)[1:], strict=True))
    leaves = {name: t.requires_grad_(name not in frozen) for name, t in zip(expected, tensors, strict=True)}
    chunked(targets)(*leaves.values()).backward()
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-5, atol=2e-6)


def test_a_second_backward_pass_is_refused():
    *tensors, targets = problem(4, 9, 3)
    loss = chunked(targets)(*(t.requires_grad_() for t in tensors))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="returned by the first"):
        loss.backward()


@pytest.mark.parametrize("implementation", ["chunked", "naive"])
@pytest.mark.parametrize("target", [9, 1000, -1])
def test_a_target_outside_of_the_vocabulary_is_refused(target, implementation):
    *tensors, targets = problem(4, 9, 3)
    targets[2] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        chunked(targets, implementation)(*tensors)


# 16-bit types. One rounding is 2**-9 = 0.2 %, and a gradient is a sum of terms of either sign, some of which cancel:
# single elements may be far off, those of the naive loss as well; a tensor as a whole must not be.


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("implementation", ["chunked", "naive"])
def test_bfloat16_is_near_the_exact_one(rows_of_a_chunk, implementation, options):
    *tensors, targets = problem(31, 101, 64, torch.bfloat16, masked=5)
    found = gradients(chunked(targets, implementation, **options), *tensors)
    expected = gradients(exact(targets, **options), *(t.double() for t in tensors))
    assert [t.dtype for t in found] == [torch.float32] + 3 * [torch.bfloat16]
    assert max(map(relative_error, found, expected)) < 1e-2


@pytest.mark.parametrize("implementation", ["chunked", "naive"])
def test_autocast_computes_in_its_type_and_returns_gradients_in_the_parameters_own(rows_of_a_chunk, implementation):
    *tensors, targets = problem(31, 101, 64, masked=5)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(chunked(targets, implementation), *tensors)
    expected = gradients(exact(targets), *(t.double() for t in tensors))
    assert {t.dtype for t in found} == {torch.float32}
    errors = list(map(relative_error, found, expected))
    assert max(errors) < 1e-2
    assert min(errors[1:]) > 1e-4  # it was in bfloat16


def test_the_weights_gradient_is_summed_in_float32(monkeypatch):
    # 4,096 rows of one contribution each: in bfloat16 a sum stops growing at 256 times the summand.
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 1)
    N = 4096
    hidden, weight = torch.ones(N, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    _, _, gradient, _ = gradients(chunked(torch.zeros(N, dtype=torch.long)), hidden, weight, None)
    assert gradient.tolist() == [[-N / 2], [N / 2]]


# Memory.


def peak_and_resident(N: int, V: int, H: int, implementation: str, frozen: str = "") -> tuple[int, int]:
    """Bytes at the worst moment of forward and backward pass, and those of hidden states, weight and targets."""
    with FakeTensorMode():
        hidden = torch.empty(N, H, requires_grad=frozen != "hidden")
        weight = torch.empty(V, H, requires_grad=frozen != "weight")
        targets = torch.zeros(N, dtype=torch.long)
        meter = TensorMeter(CPU)
        meter.track([hidden, weight, targets])
        resident = meter.alive
        with meter.measuring():
            linear_cross_entropy(hidden, weight, targets, implementation=implementation).backward()
        return meter.peak, resident


@pytest.mark.parametrize("implementation", ["auto", "chunked", "liger", "cut_cross_entropy"])
def test_at_256_thousand_tokens_the_peak_is_a_quarter_of_the_naive_ones_at_most(implementation):
    N, V, H = 8192, 256_000, 1024
    peak, resident = peak_and_resident(N, V, H, implementation)
    naive_peak, _ = peak_and_resident(N, V, H, "naive")
    assert naive_peak > 3 * 4 * N * V  # the logits' exponentials and two gradients
    assert peak <= naive_peak / 4
    # Gradients are as large as what they are of; and there is one chunk's logits, 256 MiB.
    assert peak <= 2 * resident + 2**28


@pytest.mark.parametrize(("frozen", "V", "H"), [("weight", 50_000, 1024), ("hidden", 100, 50_000)])
def test_what_is_frozen_takes_no_memory_for_a_gradient(frozen, V, H):
    N = 64
    peak, resident = peak_and_resident(N, V, H, "chunked", frozen)
    others_gradient = 4 * H * (N if frozen == "weight" else V)
    assert peak - resident < 1.1 * 4 * N * V + 2 * others_gradient
    assert peak - resident > 4 * N * V + others_gradient


def test_gradients_are_handed_over_without_a_copy():
    with FakeTensorMode():
        hidden, weight = torch.empty(256, 64, requires_grad=True), torch.empty(5000, 64, requires_grad=True)
        meter = TensorMeter(CPU)
        meter.track([hidden, weight])
        with meter.measuring():
            loss = linear_cross_entropy(hidden, weight, torch.zeros(256, dtype=torch.long))
        held = meter.alive
        with meter.measuring():
            loss.backward()
        assert meter.peak - held < 100  # scalars
        assert weight.grad.shape == (5000, 64)


def test_scores_hold_one_chunk_of_logits_at_a_time():
    with FakeTensorMode():
        hidden, weight = torch.empty(8192, 8), torch.empty(256_000, 8)
        meter = TensorMeter(CPU)
        with meter.measuring():
            token_scores(hidden, weight, torch.zeros(8192, dtype=torch.long))
        assert meter.peak < 1.1 * 2**28


def test_without_gradients_there_is_the_loss_alone(rows_of_a_chunk):
    *tensors, targets = problem(10, 33, 8)
    expected = reference(*tensors, targets)
    weight = tensors[1].requires_grad_()
    with torch.no_grad():
        loss = chunked(targets)(*tensors)
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad
    weight.requires_grad_(False)
    assert not chunked(targets)(*tensors).requires_grad


# Scores.


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_scores_are_each_rows_loss_and_whether_its_likeliest_is_the_target(rows_of_a_chunk, softcap):
    hidden, weight, bias, targets = problem(20, 11, 6, masked=4)
    likeliest = (hidden.double() @ weight.double().T + bias.double()).argmax(1)
    targets = torch.where((targets != IGNORE_INDEX) & (torch.arange(20) % 2 == 0), likeliest, targets)
    losses, is_correct = token_scores(hidden.requires_grad_(), weight, targets, bias_V=bias, softcap=softcap)
    rows = [slice(row, row + 1) for row in range(20)]
    expected = torch.stack([reference(hidden[row], weight, bias, targets[row], softcap) for row in rows])
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    assert (losses[targets == IGNORE_INDEX] == 0).all()
    assert is_correct.tolist() == (likeliest == targets).tolist()
    assert 0 < is_correct.sum() < 20
    assert not losses.requires_grad


def test_token_scores_under_autocast_and_of_nothing():
    *tensors, targets = problem(20, 11, 6)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = token_scores(*tensors[:2], targets)
    exact_losses, _ = token_scores(*tensors[:2], targets)
    assert losses.dtype == torch.float32
    assert 1e-5 < relative_error(losses, exact_losses.double()) < 1e-2
    losses, is_correct = token_scores(tensors[0][:0], tensors[1], targets[:0])
    assert losses.shape == is_correct.shape == (0,)


# Which implementation: kernels that note how they are called, on a CPU that passes for a GPU.


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    monkeypatch.setattr(module, "_device_type", lambda _: "cuda")


@pytest.fixture
def calls(monkeypatch):
    """The calls of kernels, which are not installed unless the test installs them."""
    module._kernel.cache_clear()
    for name in ("liger_kernel", "liger_kernel.transformers", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, name, None)
    yield []
    module._kernel.cache_clear()


@pytest.fixture
def liger(monkeypatch, calls) -> None:
    class Loss(nn.Module):
        def __init__(self, ignore_index, label_smoothing, reduction, softcap):
            super().__init__()
            self.options = {"softcap": softcap, "label_smoothing": label_smoothing}
            assert (ignore_index, reduction) == (IGNORE_INDEX, "sum")

        def forward(self, weight, hidden, targets, bias):
            calls.append(("liger", hidden.requires_grad, hidden.dtype))
            return reference(hidden, weight, bias, targets, **self.options)

    fake_module = ModuleType("liger_kernel.transformers")
    fake_module.LigerFusedLinearCrossEntropyLoss = Loss
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake_module)


@pytest.fixture
def cut_cross_entropy(monkeypatch, calls) -> None:
    def compute(e, c, targets, bias=None, ignore_index=0, softcap=None, reduction="mean"):
        assert (ignore_index, reduction) == (IGNORE_INDEX, "sum")
        calls.append(("cut_cross_entropy", e.requires_grad, e.dtype))
        assert {t.dtype for t in (e, c, bias) if t is not None} == {e.dtype}
        return reference(e, c, bias, targets, softcap)

    fake_module = ModuleType("cut_cross_entropy")
    fake_module.linear_cross_entropy = compute
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", fake_module)


def kernels_called(calls: list, implementation: str, dtype: torch.dtype = torch.bfloat16, N: int = 6, **options):
    *tensors, targets = problem(N, 11, 4, dtype, masked=N // 3)
    found = gradients(chunked(targets, implementation, **options), *tensors)
    expected = gradients(exact(targets, **options), *(t.double() for t in tensors))
    for value, true in zip(found, expected, strict=True):
        if true.any():
            assert relative_error(value, true) < 3e-2
    assert found[0].dtype == torch.float32
    return [name for name, *_ in calls]


def test_auto_on_a_gpu_takes_liger_before_cut_cross_entropy(on_gpu, calls, liger, cut_cross_entropy):
    assert kernels_called(calls, "auto", softcap=3.0) == ["liger"]
    assert kernels_called(calls, "cut_cross_entropy", softcap=3.0) == ["liger", "cut_cross_entropy"]
    assert kernels_called(calls, "auto", label_smoothing=0.1) == ["liger", "cut_cross_entropy", "liger"]


def test_auto_on_a_gpu_takes_cut_cross_entropy_where_it_is_able(on_gpu, calls, cut_cross_entropy):
    assert kernels_called(calls, "auto", label_smoothing=0.1) == []
    assert kernels_called(calls, "auto", torch.float32) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels_called(calls, "auto", torch.float32) == ["cut_cross_entropy"]
    assert calls[0][-1] == torch.bfloat16


def test_auto_is_chunked_without_a_kernel_or_without_a_gpu(monkeypatch, calls):
    def refuse(*_):
        raise AssertionError("not chunked")

    monkeypatch.setitem(module._COMPUTE, "naive", refuse)
    monkeypatch.setitem(module._COMPUTE, "liger", refuse)
    assert kernels_called(calls, "auto") == []
    monkeypatch.setattr(module, "_device_type", lambda _: "cuda")
    assert kernels_called(calls, "auto") == []


def test_kernels_are_asked_neither_for_fake_tensors_nor_for_nothing(on_gpu, calls, liger, cut_cross_entropy):
    peak_and_resident(8, 100, 4, "auto")
    peak_and_resident(8, 100, 4, "liger")
    for implementation in ("auto", "liger", "cut_cross_entropy"):
        assert kernels_called(calls, implementation, N=0) == []


def test_liger_gives_the_weights_gradient_of_frozen_hidden_states(on_gpu, calls, liger):
    hidden, weight, _, targets = problem(6, 11, 4)
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), targets, implementation="liger")
    loss.backward()
    assert calls == [("liger", True, torch.float32)]
    assert not hidden.requires_grad
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets, implementation="liger")
    assert not calls[-1][1]


@pytest.mark.parametrize(
    ("name", "hint"), [("chunkd", "did you mean 'chunked'?"), ("triton", "there are auto, chunked")]
)
def test_an_unknown_implementation_is_named_with_those_that_there_are(name, hint):
    *tensors, targets = problem(2, 5, 3)
    with pytest.raises(ConfigError, match=r"^model\.loss_implementation: there is no implementation") as error:
        chunked(targets, name)(*tensors)
    assert hint in str(error.value)


def test_what_a_kernel_cannot_do_is_told_in_a_sentence(monkeypatch, calls, cut_cross_entropy):
    *tensors, targets = problem(2, 5, 3)
    where = r"^model\.loss_implementation: "
    with pytest.raises(ConfigError, match=where + "liger runs on CUDA alone, but the model is on cpu"):
        chunked(targets, "liger")(*tensors)
    with pytest.raises(ConfigError, match=where + "cut_cross_entropy has no label smoothing"):
        check_implementation("cut_cross_entropy", label_smoothing=0.1)
    with pytest.raises(ConfigError, match=r"^model\.label_smoothing: 1\.5 is not a share"):
        chunked(targets, label_smoothing=1.5)(*tensors)
    monkeypatch.setattr(module, "_device_type", lambda _: "cuda")
    with pytest.raises(ConfigError, match=where + "liger is not installed; install liger-kernel, or choose auto"):
        chunked(targets, "liger")(*tensors)
    with pytest.raises(ConfigError, match=where + "cut_cross_entropy computes in 16 bits, not in float32"):
        chunked(targets, "cut_cross_entropy")(*tensors)


def test_a_loss_worked_out_by_hand():
    """Logits are handed in as hidden states, by a weight that changes nothing."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    targets = torch.tensor([0, 1, IGNORE_INDEX])
    by_hand = [-math.log(0.5), -math.log(0.8), 0.0]
    losses, is_correct = token_scores(logits, torch.eye(3), targets)
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-6)
    assert is_correct.tolist() == [True, True, False]
    assert linear_cross_entropy(logits, torch.eye(3), targets).item() == pytest.approx(sum(by_hand), rel=1e-6)
