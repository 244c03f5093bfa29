import pytest
import torch

from nemo_emmett.models.step_log import StepLog


def part(examples: int, padded: bool = False) -> dict:
    lens = torch.full((examples,), 3)
    width = 4 if padded else 3
    ids = torch.zeros(examples, width, dtype=torch.long)
    return {"context_ids": ids, "context_lens": lens, "answer_ids": ids, "answer_lens": lens}


def add(log: StepLog, parts: dict, audio: tuple[float, int] = (0.0, 0), text: tuple[float, int] = (0.0, 0)) -> dict:
    log.add(parts, torch.tensor([audio[0], text[0]]), torch.tensor([audio[1], text[1]]))
    return {name: float(value) for name, value in log.values().items()}


def test_means_over_the_window_by_hand():
    log = StepLog(window=2)
    first = add(log, {"text": part(2)}, text=(6.0, 3))
    assert first == {"examples_audio": 0, "examples_text": 2, "tokens_text": 3, "loss_text": 2, "padding_text": 0}
    second = add(log, {"text": part(4, padded=True)}, text=(4.0, 7))
    assert second["examples_text"] == 3
    assert second["loss_text"] == pytest.approx(10 / 10)
    assert second["padding_text"] == pytest.approx(8 / (2 * 6 + 4 * 8))  # of 2 x (3 + 3) and 4 x (4 + 4) cells


def test_alternating_modalities_both_show_at_every_step():
    log = StepLog(window=2)
    for step in range(6):
        if step % 2:
            values = add(log, {"text": part(8)}, text=(8.0, 8))
        else:
            values = add(log, {"audio": part(4)}, audio=(2.0, 4))
        if step:
            assert (values["examples_audio"], values["examples_text"]) == (2.0, 4.0)
            assert (values["loss_audio"], values["loss_text"]) == (0.5, 1.0)


def test_a_modality_that_stops_arriving_falls_to_nothing_within_a_window():
    log = StepLog(window=3)
    add(log, {"audio": part(4), "text": part(4)}, audio=(1.0, 1), text=(1.0, 1))
    for _ in range(3):
        values = add(log, {"audio": part(4)}, audio=(1.0, 1))
    assert values["examples_text"] == 0
    assert "loss_text" not in values
    assert "padding_text" not in values
    assert values["loss_audio"] == 1.0


def test_tokens_are_counted_exactly_under_any_default_type() -> None:
    log = StepLog(window=1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        log.add({}, torch.zeros(2), torch.tensor([1001, 257]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert log._steps[0][:, 1].tolist() == [1001, 257]
