"""NeMo's ASR models, which hold their data in their own config: calibrated, and trained with what was found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.oomptimizer.profile import Profile
from tests.conftest import write_tone
from tests.oomptimizer.fits import trainer_with
from tests.oomptimizer.models import tiny_ctc, tiny_multitask

# Each record gives Canary's task.
TASK = {"source_lang": "en", "target_lang": "de", "taskname": "translate", "pnc": "no", "lang": "de"}


def manifest(folder: Path) -> Path:
    records = []
    for index in range(12):
        seconds = 0.5 + 0.1 * index
        audio = write_tone(folder / "audio" / f"{index}.wav", seconds)
        records.append({"audio_filepath": str(audio), "duration": seconds, "text": "eins zwei", **TASK})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class BatchesSeen(Callback):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.sizes.append(len(batch.audio if hasattr(batch, "audio") else batch[0]))


@pytest.mark.parametrize("build", [tiny_ctc, tiny_multitask])
def test_batch_sizes_are_found_and_the_models_loader_is_built_again(build, tmp_path: Path) -> None:
    train_ds = {
        "use_lhotse": True,
        "manifest_filepath": str(manifest(tmp_path)),
        "sample_rate": 16000,
        "batch_size": 1,  # which the model's constructor demands
        "use_bucketing": True,
        "bucket_duration_bins": [[0.8, 12], [1.2, 12], [2.0, 30]],
        "bucket_buffer_size": 100,
        "shuffle": False,
        "num_workers": 0,
    }
    profile, seen = tmp_path / "profile.yaml", BatchesSeen()
    model = build(tmp_path, train_ds=train_ds)
    trainer = trainer_with(
        tmp_path, OOMptimizer(profile=profile, memory_budget="6MiB"), seen, max_steps=6, max_epochs=-1
    )
    trainer.fit(model)
    found = Profile.read(profile).groups[""].bucket_batch_size
    assert list(model.cfg.train_ds.bucket_batch_size) == list(found)
    assert found[0] > found[2] > 1
    assert trainer.global_step == 6
    assert 1 < max(seen.sizes) <= found[0]
