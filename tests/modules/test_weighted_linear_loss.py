from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_emmett.modules import linear_cross_entropy as chunking
from nemo_emmett.modules import weighted_linear_loss as module
from nemo_emmett.modules.linear_cross_entropy import linear_cross_entropy
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.modules.weighted_linear_loss import (
    LinearTeacher,
    LogitsTeacher,
    RowWeights,
    weighted_linear_loss,
    weighted_logit_loss,
)
from nemo_emmett.oomptimizer.meter import TensorMeter

CPU = torch.device("cpu")
N, V, H, H_TEACHER = 23, 17, 6, 9
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "soft cap": {"softcap": 2.0},
    "label smoothing": {"label_smoothing": 0.2},
    "temperature": {"temperature": 2.5},
    "all": {"bias": True, "softcap": 1.5, "label_smoothing": 0.1, "temperature": 0.7},
    "fewer columns": {"columns": 13, "temperature": 2.0},
    "more columns": {"columns": 21},
}


@pytest.fixture(params=[(1, 1), (4, 3), (6, 50), (100, 2)], ids=lambda sizes: f"{sizes[0]} rows, blocks of {sizes[1]}")
def chunks(request, monkeypatch) -> None:
    """Rows of a chunk (with a teacher half of them), and of a block."""
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(chunking, "MIN_CHUNK_ROWS", request.param[0])
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", request.param[1] * V)


class Problem:
    """Student, teacher, targets and weights, in float64; some rows are ignored, some have no weight."""

    def __init__(self, bias=False, softcap=None, label_smoothing=0.0, temperature=1.0, columns=V) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.weight, self.bias = draw(N, H), draw(V, H), draw(V) if bias else None
        self.teacher = LinearTeacher(
            draw(N, H_TEACHER), draw(columns, H_TEACHER), draw(columns) if bias else None, softcap
        )
        self.targets = torch.randint(V, (N,), generator=generator)
        self.targets[[2, 7, N - 1]] = IGNORE_INDEX
        self.weights = RowWeights(draw(N).abs(), draw(N).abs(), temperature)
        self.weights.cross_entropy_N[[0, 5]] = 0
        self.weights.divergence_N[[0, 9]] = 0
        self.softcap, self.label_smoothing, self.temperature = softcap, label_smoothing, temperature

    def leaves(self) -> list[Tensor | None]:
        return [None if t is None else t.clone().requires_grad_() for t in (self.hidden, self.weight, self.bias)]

    def fused(self, hidden, weight, bias, teacher=True, **options) -> tuple[Tensor, Tensor, Tensor]:
        return weighted_linear_loss(
            hidden,
            weight,
            self.targets,
            self.weights,
            bias_V=bias,
            softcap=self.softcap,
            label_smoothing=self.label_smoothing,
            teacher=self.teacher if teacher else None,
        )

    def logits(self, hidden, weight, bias) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def taught(self) -> Tensor:
        """The teacher's distribution over the student's columns."""
        teacher = self.teacher
        logits = self.logits(teacher.hidden_NH, teacher.weight_WH, teacher.bias_W)[:, :V] / self.temperature
        return F.pad(logits.softmax(1), (0, V - logits.shape[1]))

    def naive(self, hidden, weight, bias, teacher=True) -> tuple[Tensor, Tensor, Tensor]:
        """By torch's own functions on all logits, row by row."""
        logits, there = self.logits(hidden, weight, bias), self.targets != IGNORE_INDEX
        losses = F.cross_entropy(logits, self.targets, reduction="none", label_smoothing=self.label_smoothing)
        log_q, p = (logits / self.temperature).log_softmax(1), self.taught()
        kl = self.temperature**2 * F.kl_div(log_q, p, reduction="none").sum(1)
        kl = torch.where(there & (self.weights.divergence_N != 0), kl, 0)
        loss = (self.weights.cross_entropy_N * losses).sum()
        return loss + (self.weights.divergence_N * kl).sum() if teacher else loss, losses, kl if teacher else 0 * kl


def compared(problem: Problem, teacher: bool, scale: float = 3.0) -> None:
    ours, theirs = problem.leaves(), problem.leaves()
    found, expected = problem.fused(*ours, teacher=teacher), problem.naive(*theirs, teacher=teacher)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-11, atol=1e-12)
    assert [t.requires_grad for t in found] == [True, False, False]
    (scale * found[0]).backward()
    (scale * expected[0]).backward()
    for one, other in zip(ours, theirs, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_are_those_of_all_logits(chunks, options):
    compared(Problem(**options), teacher=True)
    compared(Problem(**options), teacher=False)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_that_are_there_give_the_same(options):
    problem = Problem(**options)
    leaves, others = problem.leaves(), problem.leaves()
    taught = LogitsTeacher(problem.teacher.logits(slice(None)))
    found = weighted_logit_loss(
        problem.logits(*leaves),
        problem.targets,
        problem.weights,
        label_smoothing=problem.label_smoothing,
        teacher=taught,
    )
    expected = problem.fused(*others)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-11, atol=1e-12, check_dtype=False)
    found[0].backward()
    expected[0].backward()
    for one, other in zip(leaves, others, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-12)


def test_a_divergence_worked_out_by_hand():
    """Of (1/2, 1/2) from (1/4, 3/4): (log 2 - log 3 / 2) nats; by a temperature of 2, from (1, sqrt 3) / (1 + sqrt 3).

    The gradient by the student's logits is q - p, and T (q - p).
    """
    teacher = LogitsTeacher(torch.zeros(1, 2))
    student = torch.log(torch.tensor([[0.25, 0.75]])).requires_grad_()
    for temperature in (1.0, 2.0):
        student.grad = None
        weights = RowWeights(torch.zeros(1), torch.ones(1), temperature)
        loss, _, kl = weighted_linear_loss(student, torch.eye(2), torch.zeros(1).long(), weights, teacher=teacher)
        q = 0.25 if temperature == 1.0 else 1 / (1 + math.sqrt(3))
        by_hand = temperature**2 * 0.5 * (math.log(0.5 / q) + math.log(0.5 / (1 - q)))
        assert loss.item() == pytest.approx(by_hand, rel=1e-6)
        assert kl.tolist() == pytest.approx([by_hand], rel=1e-6)
        loss.backward()
        assert student.grad[0].tolist() == pytest.approx([temperature * (q - 0.5), temperature * (0.5 - q)], rel=1e-5)
    assert math.log(2) - math.log(3) / 2 == pytest.approx(0.5 * (math.log(0.5 / 0.25) + math.log(0.5 / 0.75)))


def test_weights_of_one_are_the_plain_loss(chunks):
    """To the last bits: both sum the same rows in another order of factors."""
    problem = Problem(label_smoothing=0.1)
    ones = RowWeights(torch.ones(N, dtype=torch.float64))
    leaves, others = problem.leaves(), problem.leaves()
    loss, *_ = weighted_linear_loss(leaves[0], leaves[1], problem.targets, ones, label_smoothing=0.1)
    plain = linear_cross_entropy(others[0], others[1], problem.targets, label_smoothing=0.1, implementation="chunked")
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    loss.backward()
    plain.backward()
    assert torch.equal(leaves[1].grad, others[1].grad)


def test_what_a_teacher_says_of_rows_without_weight_does_not_matter(chunks):
    """Not even if it is no number: such rows are examples without a transcript."""
    problem = Problem()
    unused = (problem.weights.divergence_N == 0) | (problem.targets == IGNORE_INDEX)
    expected = problem.fused(*problem.leaves())
    problem.teacher.hidden_NH[unused] = torch.nan
    leaves = problem.leaves()
    found = problem.fused(*leaves)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    found[0].backward()
    assert leaves[0].grad.isfinite().all()
    assert leaves[1].grad.isfinite().all()


def test_nothing_is_computed_twice_or_kept(chunks):
    problem = Problem()
    leaves = problem.leaves()
    loss, *_ = problem.fused(*leaves)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass through one loss"):
        loss.backward()
    with torch.no_grad():
        assert not problem.fused(*leaves)[0].requires_grad
    frozen = [problem.hidden, leaves[1], None]
    problem.fused(*frozen)[0].backward()
    assert leaves[1].grad is not None
    assert problem.hidden.grad is None


def test_under_autocast_logits_are_of_its_type_and_sums_float32():
    problem = Problem(bias=True)
    tensors = [t.float() for t in (problem.hidden, problem.weight, problem.bias)]
    teacher = LinearTeacher(*(t.float() for t in (problem.teacher.hidden_NH, problem.teacher.weight_WH)))
    weights = RowWeights(problem.weights.cross_entropy_N.float(), problem.weights.divergence_N.float())
    arguments = (*tensors[:2], problem.targets, weights)
    exact = weighted_linear_loss(*arguments, bias_V=tensors[2], teacher=teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = weighted_linear_loss(*arguments, bias_V=tensors[2], teacher=teacher)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert 1e-5 < ((one - other).norm() / other.norm()).item() < 2e-2


def test_at_256_thousand_tokens_the_peak_is_within_a_third_of_the_plain_losss():
    """Besides weights, their gradients, and the teacher's weights and hidden states."""
    rows, vocabulary, width = 1024, 256_000, 64
    peaks = {}
    for with_teacher in (False, True):
        with FakeTensorMode():
            hidden, weight = (torch.empty(*shape, requires_grad=True) for shape in ((rows, width), (vocabulary, width)))
            taught = LinearTeacher(torch.empty(rows, width), torch.empty(vocabulary, width))
            targets, ones = torch.zeros(rows, dtype=torch.long), torch.ones(rows)
            meter = TensorMeter(CPU)
            meter.track([hidden, weight, taught.hidden_NH, taught.weight_WH, targets, ones])
            resident = meter.alive
            with meter.measuring():
                if with_teacher:
                    loss, *_ = weighted_linear_loss(hidden, weight, targets, RowWeights(ones, ones), teacher=taught)
                else:
                    loss = linear_cross_entropy(hidden, weight, targets, implementation="chunked")
                loss.backward()
            peaks[with_teacher] = meter.peak - resident - hidden.nbytes - weight.nbytes
    assert peaks[False] > 4 * 256 * vocabulary  # a chunk of logits
    assert peaks[True] < 1.3 * peaks[False]
