"""From a recipe to the logged losses: transcripts reach the objectives without a key in the data."""

from __future__ import annotations

import pytest
from lightning.pytorch import Callback, Trainer
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset
from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMT5
from nemo_emmett.training import check_objectives


class Seen(Callback):
    """Keeps the last logged values, and the speech of each training batch."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.speech: list[dict] = []

    def on_train_batch_end(self, trainer: Trainer, module, outputs, batch, batch_idx) -> None:
        self.logged |= {name: float(value) for name, value in trainer.logged_metrics.items()}
        self.speech.append(batch["audio"])


def test_a_share_is_transcribed_and_every_objective_is_logged(recipe) -> None:
    data = OmegaConf.create(recipe["data"])
    del data.validation_ds
    data.train_ds.audio.transcription = 0.5
    section = {key: value for key, value in recipe["model"].items() if key != "_target_"}
    model = SALMT5({**section, "objectives": {"consistency": {}, "transcription": {"weight": 0.5}}})
    seen, quiet = Seen(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", max_steps=4, log_every_n_steps=1, callbacks=[seen], enable_model_summary=False, **quiet
    )
    dataset = SpeechTextDataset(model.tokenizer)
    trainer.fit(model, MultimodalDataModule(data, model.tokenizer, dataset, defaults=model.data_defaults))

    kinds = [kind for part in seen.speech for kind in part["is_transcription"].tolist()]
    assert len(kinds) == 16
    assert abs(sum(kinds) - 8) <= 2
    for part in seen.speech:
        assert (part["transcript_lens"] > 0).all()
        for example, kind in zip(part["examples"], part["is_transcription"].tolist(), strict=True):
            assert kind == (example["target_text"] == example["source_text"])
    assert 0 < seen.logged["loss_consistency"] < 2
    assert seen.logged["loss_transcription"] > 0


@pytest.mark.parametrize(
    ("objective", "group", "sentence"),
    [
        ("retention", "text", "model.objectives.retention: reads text, and data.train_ds holds speech alone"),
        ("distillation", "audio", "model.objectives.distillation: reads speech, and data.train_ds holds text alone"),
    ],
)
def test_an_objective_of_a_modality_that_is_not_there_is_refused(recipe, objective, group, sentence) -> None:
    recipe["model"]["objectives"] = {objective: {}}
    cfg = OmegaConf.create(recipe)
    check_objectives(cfg)
    del cfg.data.train_ds[group]
    with pytest.raises(ConfigError) as refused:
        check_objectives(cfg)
    assert str(refused.value).startswith(sentence)


def test_transcription_where_no_source_is_transcribed_is_warned_of(recipe, monkeypatch) -> None:
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, **_: warnings.append(message))
    recipe["model"]["objectives"] = {"transcription": {}}
    cfg = OmegaConf.create(recipe)
    check_objectives(cfg)
    assert len(warnings) == 1
    assert "no source of data.train_ds has the key transcription" in warnings[0]
    cfg.data.train_ds.audio.transcription = 0.2
    check_objectives(cfg)
    assert len(warnings) == 1
