"""Losses of a vocabulary that is split over ranks: those of a whole one, with its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nemo_emmett.errors import ConfigError
from nemo_emmett.modules import linear_cross_entropy as lce
from nemo_emmett.modules.linear_cross_entropy import linear_cross_entropy, token_scores
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.modules.vocabulary import (
    ShardedVocabulary,
    VocabularyParallelEmbedding,
    VocabularyParallelLinear,
    local_head,
)
from nemo_emmett.modules.weighted_linear_loss import LinearTeacher, RowWeights, weighted_linear_loss

from ..models.two_ranks import run_on_two_ranks

RANKS, N, V, H = 3, 11, 16, 5  # of the three ranks, two have six tokens, and one has four
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "soft cap": {"softcap": 1.5},
    "soft cap, smoothed": {"softcap": 1.5, "label_smoothing": 0.2},
}
TEACHERS = {"the same": V, "fewer tokens": 9, "more tokens": 20}
"""Which -> columns of its logits."""


def problem() -> dict[str, Tensor]:
    """The same on all ranks, with rows that have no target, and a target on each rank."""
    made = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(N, H, generator=made, dtype=torch.float64),
        "weight": torch.randn(V, H, generator=made, dtype=torch.float64),
        "bias": torch.randn(V, generator=made, dtype=torch.float64),
        "targets": torch.randint(0, V, (N,), generator=made),
        "teacher": torch.randn(max(TEACHERS.values()), H, generator=made, dtype=torch.float64),
        "weights": torch.rand(N, generator=made, dtype=torch.float64),
        "kl_weights": torch.rand(N, generator=made, dtype=torch.float64),
    }
    tensors["targets"][:4] = torch.tensor([IGNORE_INDEX, 0, 7, V - 1])
    return tensors


def on_rank(rank: int, folder: Path) -> None:
    """Everything, split over the ranks; what rank 0 has gathered."""
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    lce.CHUNK_ELEMENTS, lce.MIN_CHUNK_ROWS = 4 * V, 1  # several chunks
    mesh, found, given = init_device_mesh("cpu", (RANKS,)), {}, problem()

    def leaves() -> tuple[Tensor, DTensor, DTensor]:
        hidden = given["hidden"].clone().requires_grad_()
        return hidden, *(distribute_tensor(given[n], mesh, [Shard(0)]).requires_grad_() for n in ("weight", "bias"))

    def gradients(*tensors: Tensor) -> list[Tensor]:
        return [t.grad.full_tensor() if isinstance(t.grad, DTensor) else t.grad for t in tensors]

    for name, options in OPTIONS.items():
        layer = leaves()
        hidden, weight, bias, vocabulary = local_head(*layer)
        split = {"bias_V": bias, "vocabulary": vocabulary}
        loss = linear_cross_entropy(hidden, weight, given["targets"], **split, **options)
        loss.backward()
        found[name] = [loss.detach(), *gradients(*layer)]
        scored = {key: value for key, value in options.items() if key == "softcap"}
        found[f"{name}, scores"] = list(token_scores(hidden, weight, given["targets"], **split, **scored))
    for name, columns in TEACHERS.items():
        layer = leaves()
        hidden, weight, bias, vocabulary = local_head(*layer)
        teacher = LinearTeacher(given["hidden"], given["teacher"][:columns])
        if columns == V:  # one that is split as well
            split = local_head(given["hidden"], distribute_tensor(given["teacher"][:V], mesh, [Shard(0)]), None)
            teacher = LinearTeacher(*split[:3], vocabulary=split[3])
        weights = RowWeights(given["weights"], given["kl_weights"], temperature=2.0)
        loss, *values = weighted_linear_loss(
            hidden, weight, given["targets"], weights, bias_V=bias, teacher=teacher, vocabulary=vocabulary
        )
        loss.backward()
        found[name] = [loss.detach(), *values, *gradients(*layer)]

    head = nn.Linear(H, V, dtype=torch.float64)
    table = nn.Embedding(V, H, padding_idx=7, dtype=torch.float64)
    for module, kind in ((head, VocabularyParallelLinear), (table, VocabularyParallelEmbedding)):
        for key, tensor in (("weight", given["weight"]), ("bias", given["bias"])):
            if hasattr(module, key):
                setattr(module, key, nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])))
        module.__class__ = kind
    hidden = given["hidden"].clone().requires_grad_()
    logits, embeddings = head(hidden), table(given["targets"].clamp(min=0)[None])
    (logits.square().sum() + embeddings.square().sum()).backward()
    made = (logits.detach(), embeddings.detach(), hidden.grad, table.weight.grad.full_tensor())
    found["layers"] = [*made, head.weight.grad.full_tensor()]
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, list[Tensor]]]:
    folder = tmp_path_factory.mktemp("vocabulary")
    run_on_two_ranks(on_rank, folder, folder, ranks=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def assert_on_all(ranks: list[dict[str, list[Tensor]]], name: str, expected: list[Tensor]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank[name], expected, rtol=1e-10, atol=1e-12)


def whole() -> tuple[dict[str, Tensor], list[Tensor]]:
    given = problem()
    return given, [given[name].requires_grad_() for name in ("hidden", "weight", "bias")]


@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy_is_torchs(ranks, name):
    given, layer = whole()
    logits = F.linear(*layer)
    if (cap := OPTIONS[name].get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    loss = F.cross_entropy(
        logits, given["targets"], label_smoothing=OPTIONS[name].get("label_smoothing", 0.0), reduction="sum"
    )
    assert_on_all(ranks, name, [loss.detach(), *torch.autograd.grad(loss, layer)])
    losses = F.cross_entropy(logits, given["targets"], reduction="none").detach()
    assert_on_all(ranks, f"{name}, scores", [losses, logits.argmax(1) == given["targets"]])


@pytest.mark.parametrize("name", TEACHERS)
def test_the_divergence_is_that_of_a_whole_vocabulary(ranks, name):
    """Of the sum over tokens, written out; tokens that only one of the two has count as the whole one's does."""
    given, layer = whole()
    logits, columns = F.linear(*layer), min(V, TEACHERS[name])
    taught = (given["hidden"].detach() @ given["teacher"][:columns].T / 2).log_softmax(1)
    student = (logits / 2).log_softmax(1)[:, :columns]
    divergences = 4 * (taught.exp() * (taught - student)).sum(1) * (given["targets"] != IGNORE_INDEX)
    losses = F.cross_entropy(logits, given["targets"], reduction="none")
    loss = (given["weights"] * losses + given["kl_weights"] * divergences).sum()
    expected = [loss.detach(), losses.detach(), divergences.detach(), *torch.autograd.grad(loss, layer)]
    assert_on_all(ranks, name, expected)


def test_layers_give_whole_logits_and_embeddings(ranks):
    given, (hidden, weight, bias) = whole()
    logits = F.linear(hidden, weight, bias)
    table = given["weight"].detach().clone().requires_grad_()
    embeddings = F.embedding(given["targets"].clamp(min=0)[None], table, padding_idx=7)
    loss = logits.square().sum() + embeddings.square().sum()
    of_hidden, of_table, of_weight = torch.autograd.grad(loss, [hidden, table, weight])
    assert not of_table[7].any(), "the padding's row is not trained"
    assert_on_all(ranks, "layers", [logits.detach(), embeddings.detach(), of_hidden, of_table, of_weight])


@pytest.mark.parametrize("implementation", ["naive", "liger"])
def test_an_implementation_that_cannot_be_split_is_refused(implementation):
    split = ShardedVocabulary(group=None, first=0, here=4, total=8)
    tensors = torch.ones(3, H), torch.ones(4, H), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ConfigError, match=f"^model.loss_implementation: {implementation} cannot read a vocabulary"):
        linear_cross_entropy(*tensors, implementation=implementation, vocabulary=split)
