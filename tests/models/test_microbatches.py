"""A training step in microbatches: the same loss, gradient and log as the whole batch's."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist

from nemo_emmett.models import SALMT5
from nemo_emmett.models.microbatches import cut_batch, term_counts

from .batches import audio_batch, text_batch

PAIRS = [("one red house", "ein rotes haus"), ("four old doors", "vier alte türen"), ("six", "sechs"), ("two", "zwei")]
SPEECH = [(0.8, "ein rotes haus"), (0.5, "vier"), (0.6, "zwei blaue")]
PAD, LOCATOR = 0, 9


@pytest.fixture
def model(salm_t5_config) -> SALMT5:
    torch.manual_seed(0)
    model = SALMT5(salm_t5_config).eval()
    model.logged = []
    model.log = lambda name, value, **kwargs: model.logged.append((name, float(value)))
    return model


def both(model: SALMT5) -> dict:
    return {"audio": audio_batch(model, SPEECH), "text": text_batch(model, PAIRS)}


def gradient(model: SALMT5) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def in_microbatches(model: SALMT5, batch: Mapping, number: int) -> tuple[float, list[Mapping]]:
    cut = model.split_batch(batch, number)
    total = 0.0
    with model.one_step(batch):
        for microbatch in cut:
            loss = model.training_step(microbatch, 0) * model.loss_weight(microbatch, batch)
            loss.backward()
            total += loss.item()
    return total, cut


# Cutting


def part(context_ids: list[list[int]], audio_lens: list[int] | None = None) -> dict:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in context_ids], batch_first=True)
    lens = torch.tensor([len(row) for row in context_ids])
    batch = {"context_ids": ids, "context_lens": lens, "answer_ids": ids + 1, "answer_lens": lens}
    if audio_lens is not None:
        audios = torch.zeros(len(audio_lens), max(audio_lens))
        for row, length in enumerate(audio_lens):
            audios[row, :length] = row + 1
        batch |= {"audios": audios, "audio_lens": torch.tensor(audio_lens)}
    return batch | {"examples": [{"id": str(row)} for row in range(len(context_ids))]}


def test_recordings_follow_their_locators_and_padding_shrinks() -> None:
    """Two recordings in the first example, none in the second, one in each of the others."""
    batch = part([[5, LOCATOR, LOCATOR], [5, 6], [LOCATOR], [LOCATOR]], [7, 3, 4, 2])
    microbatches = cut_batch({"audio": batch}, 4, PAD, LOCATOR)
    assert [list(microbatch) for microbatch in microbatches] == [["audio"]] * 4
    microbatches = [microbatch["audio"] for microbatch in microbatches]
    assert [microbatch["context_ids"].tolist() for microbatch in microbatches] == [[[5, 9, 9]], [[5, 6]], [[9]], [[9]]]
    assert microbatches[0]["audios"].shape == (2, 7)
    assert "audios" not in microbatches[1]
    assert microbatches[2]["audios"].tolist() == [[3.0] * 4]
    assert microbatches[3]["audio_lens"].tolist() == [2]
    assert [microbatch["examples"] for microbatch in microbatches] == [[{"id": str(row)}] for row in range(4)]


def test_a_locator_in_the_padding_stands_for_nothing() -> None:
    batch = part([[LOCATOR, 5], [LOCATOR, 5]], [3, 2])
    batch["context_ids"] = torch.tensor([[LOCATOR, 5, LOCATOR], [LOCATOR, 5, LOCATOR]])
    first, second = (microbatch["audio"] for microbatch in cut_batch({"audio": batch}, 2, PAD, LOCATOR))
    assert (first["audio_lens"].tolist(), second["audio_lens"].tolist()) == ([3], [2])


def test_targets_in_the_context_are_cut_with_it_and_counted() -> None:
    """Answers of 3 and 1 tokens; before them, 2 tokens of earlier answers in the first conversation."""
    batch = part([[5, 6, 7], [5]]) | {"context_targets": torch.tensor([[False, True, True], [False] * 3])}
    microbatches = [microbatch["text"] for microbatch in cut_batch({"text": batch}, 2, PAD, LOCATOR)]
    assert [microbatch["context_targets"].tolist() for microbatch in microbatches] == [[[False, True, True]], [[False]]]
    cpu = torch.device("cpu")
    assert term_counts({"text": batch}, cpu).tolist() == [0, 6]
    assert [term_counts({"text": microbatch}, cpu).tolist() for microbatch in microbatches] == [[0, 5], [0, 1]]


@pytest.mark.parametrize(
    ("microbatches", "expected"),
    [
        (1, ["audio+text 3+5"]),
        (2, ["audio 3", "text 5"]),
        (3, ["audio 3", "text 5"]),
        (4, ["audio 1", "audio 2", "text 2", "text 3"]),
        (99, ["audio 1"] * 3 + ["text 1"] * 5),
    ],
)
def test_microbatches_have_one_modality_each_and_speech_comes_first(microbatches, expected) -> None:
    batch = {"text": part([[5]] * 5), "audio": part([[LOCATOR]] * 3, [4, 4, 4])}
    cut = cut_batch(batch, microbatches, PAD, LOCATOR)
    sizes = ["+".join(str(len(microbatch[m]["context_lens"])) for m in sorted(microbatch)) for microbatch in cut]
    assert [f"{'+'.join(sorted(microbatch))} {size}" for microbatch, size in zip(cut, sizes, strict=True)] == expected


def test_one_modality_and_nemos_flat_batch_are_cut_too(model) -> None:
    text = text_batch(model, PAIRS)
    assert [len(microbatch["text"]["context_lens"]) for microbatch in model.split_batch(text, 2)] == [2, 2]
    ids = torch.tensor([[PAD, 5, model.audio_locator_id, 7], [5, model.audio_locator_id, 7, 8]])
    flat = {"input_ids": ids, "loss_mask": ids == ids[:, -1:], "audios": torch.ones(2, 9)}
    flat["audio_lens"] = torch.tensor([9, 5])
    first, second = (microbatch["audio"] for microbatch in model.split_batch(flat, 2))
    assert (first["context_ids"].tolist(), first["answer_ids"].tolist()) == ([[5, model.audio_locator_id]], [[7]])
    assert second["audios"].shape == (1, 5)


# The step


@pytest.mark.parametrize("microbatches", [2, 4, 99])
@pytest.mark.parametrize("kind", ["both", "audio", "text"])
def test_losses_and_gradients_of_microbatches_add_up_to_the_whole_batchs(model, kind, microbatches) -> None:
    batch = both(model) if kind == "both" else {kind: both(model)[kind]}
    whole = model.training_step(batch, 0)
    whole.backward()
    expected = gradient(model)
    total, cut = in_microbatches(model, batch, microbatches)
    assert len(cut) > 1
    assert total == pytest.approx(whole.item(), rel=1e-5)
    found = gradient(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_microbatches_are_logged_as_one_step(model) -> None:
    batch = both(model)
    model.training_step(batch, 0)
    expected, model.logged = dict(model.logged), []
    model._step_log = None
    other = both(model)
    in_microbatches(model, other, 4)
    assert len(model.logged) == len(expected), "once"
    assert dict(model.logged) == pytest.approx(expected, rel=1e-5)


def test_a_step_that_was_logged_whole_is_not_logged_again_in_microbatches(model) -> None:
    """The forward pass was done when the backward pass ran out of memory."""
    batch = both(model)
    model.training_step(batch, 0)
    model.logged = []
    in_microbatches(model, batch, 2)
    assert model.logged == []
    model.training_step(batch, 1)
    assert dict(model.logged)["examples_text"] == 4


def test_a_microbatch_that_is_added_twice_does_not_raise_the_logged_loss(model) -> None:
    batch = {"text": text_batch(model, PAIRS[:1] * 4)}
    model.training_step(batch, 0)
    expected, model.logged = dict(model.logged)["loss"], []
    again = {"text": text_batch(model, PAIRS[:1] * 4)}
    with model.one_step(again):
        for microbatch in [*model.split_batch(again, 2), model.split_batch(again, 2)[0]]:
            model.training_step(microbatch, 0)
    assert dict(model.logged)["loss"] == pytest.approx(expected, rel=1e-5)


def test_microbatches_that_fail_are_not_logged(model) -> None:
    with pytest.raises(torch.OutOfMemoryError), model.one_step(both(model)):
        raise torch.OutOfMemoryError
    assert model.logged == []
    model.training_step(both(model), 0)
    assert dict(model.logged)["examples_text"] == 4


# Several ranks


@pytest.fixture
def reduced(monkeypatch, tmp_path):
    """One rank of a world whose other rank always has five tokens more of each modality; how often it was asked."""
    calls = []

    def all_reduce(tensor: torch.Tensor, *args, **kwargs) -> None:
        calls.append(tensor.tolist())
        tensor += 5

    monkeypatch.setattr("nemo_emmett.modules.loss.world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return calls


def test_counts_are_added_over_ranks_once_in_a_step_and_before_the_forward_pass(model, reduced) -> None:
    batch = both(model)
    counts = [int(batch[m]["answer_lens"].sum()) for m in ("audio", "text")]
    whole = model.training_step(batch, 0).item()
    assert reduced == [counts]
    total, _ = in_microbatches(model, batch, 4)  # after the whole batch has failed
    assert reduced == [counts]
    assert total == pytest.approx(whole, rel=1e-5)
    total, _ = in_microbatches(model, both(model), 4)  # in microbatches from the start
    assert reduced == [counts, counts]
    assert total == pytest.approx(whole, rel=1e-5)

    def fail(*args) -> None:
        raise torch.OutOfMemoryError

    model.llm_inputs = fail
    with pytest.raises(torch.OutOfMemoryError):
        model.training_step(both(model), 1)
    assert len(reduced) == 3
