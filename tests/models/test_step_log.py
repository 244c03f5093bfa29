import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from nemo_emmett.models import SALMT5
from nemo_emmett.models.step_log import StepLog

from .backbones import model_config
from .memorising import MODES, items


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
    assert log._steps[0][:, 0].tolist() == [1001, 257]


# In a training.


class Recorder(Logger):
    """A logger that keeps its metrics."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        self.points: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *_, **__) -> None:
        pass

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self.points.setdefault(step, {}).update(metrics)


class Bar(Callback):
    """What a progress bar shows after each step."""

    def __init__(self) -> None:
        self.shown: list[dict] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.shown.append(dict(trainer.progress_bar_metrics))


@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_bar_and_logger_hold_no_value_of_a_modality_that_did_not_come(every_n_steps, folder, tiny_asr, tmp_path):
    model = SALMT5(model_config("t5", folder, tiny_asr))
    speech, text = items(model, MODES["speech"]), items(model, MODES["text"])
    recorder, bar = Recorder(), Bar()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=6,
        logger=recorder,
        callbacks=[bar],
        log_every_n_steps=every_n_steps,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    batches = [text, text, speech, text, speech, speech]
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    seen = [{name for part in batches[max(0, i + 1 - every_n_steps) : i + 1] for name in part} for i in range(6)]

    assert sorted(recorder.points) == list(range(every_n_steps - 1, 6, every_n_steps))
    for step, metrics in recorder.points.items():
        for modality in ("audio", "text"):
            for metric in ("loss", "padding"):
                assert (f"{metric}_{modality}" in metrics) == (modality in seen[step]), (step, metrics)
            assert f"examples_{modality}" in metrics
        assert all(math.isfinite(value) for value in metrics.values())

    last: dict[str, float] = {}
    for step, shown in enumerate(bar.shown):
        assert all(math.isfinite(value) for value in shown.values())
        for modality in ("audio", "text"):
            name = f"loss_{modality}"
            if modality not in seen[step]:
                assert shown.get(name) == last.get(name)  # the last known value, or none yet
        last = shown
    assert "loss_audio" not in bar.shown[1]
    assert {"loss_audio", "loss_text"} <= set(bar.shown[-1])
