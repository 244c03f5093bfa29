"""SALM-GPT and BESTOW-GPT in a fit: batch sizes that are found, and steps that run out of memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from nemo_emmett.models import SALMGPT, BestowGPT
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.modules import linear_cross_entropy
from nemo_emmett.oomptimizer.adapters.speech_text import SpeechTextAdapter
from nemo_emmett.oomptimizer.buckets import Bucket, Group, Shape
from nemo_emmett.oomptimizer.guard import Guard

from ..models.backbones import model_config
from .adapters.test_decoder_only import flat, several_recordings
from .injected import Blind, Bomb, Charges, Guarded, fit, weights
from .models import encoder, preprocessor
from .rows import text_group
from .test_calibration import MIB, assert_largest, calibrated, steps_at_fit_start

SPEECH_BINS = [[seconds, tokens] for seconds, tokens in product((1, 4, 10), (6, 40))]
TEXT_BINS = [[context, tokens] for context, tokens in product((8, 60), (10, 90))]
TEXT_DS = {"use_multimodal_sampling": True, "input_cfg": [{"type": "parallel_text"}]}


@pytest.fixture(scope="session")
def build(tmp_path_factory) -> Callable[..., SpeechTextModel]:
    """Builds a model without dropout and dither, with layer norm; always the same."""
    folder = tmp_path_factory.getbasetemp() / "backbones"
    connector = "nemo.collections.speechlm2.modules.perception.IdentityConnector"
    perception = {
        "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
        "output_dim": 32,
        "preprocessor": preprocessor(),
        "encoder": encoder(16, 1),
        "modality_adapter": {"_target_": connector, "d_model": 16},
    }

    def built(kind: type[SpeechTextModel]) -> SpeechTextModel:
        torch.manual_seed(0)
        return kind(model_config("llama", folder, perception=perception, pretrained_weights=False))

    return built


@pytest.mark.parametrize(
    ("kind", "train_ds", "rows_of_a_chunk"),
    [
        pytest.param(SALMGPT, {"bucket_duration_bins": SPEECH_BINS}, 2048, id="SALMGPT, speech"),
        pytest.param(BestowGPT, {"bucket_duration_bins": SPEECH_BINS}, 2048, id="BestowGPT, speech"),
        # Half of what a small step takes is the logits of a chunk; larger batches take no larger one.
        pytest.param(SALMGPT, {"bucket_duration_bins": TEXT_BINS, **TEXT_DS}, 256, id="SALMGPT, text in chunks"),
    ],
)
def test_every_batch_size_is_the_largest_that_fits(
    kind, train_ds: dict, rows_of_a_chunk: int, build, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(linear_cross_entropy, "MIN_CHUNK_ROWS", rows_of_a_chunk)
    budget = 24 * MIB
    profile, results = calibrated(tmp_path, build(kind), train_ds, memory_budget=budget)
    sizes = profile.groups[""].bucket_batch_size

    def compare(buckets: list[Bucket], peak: Callable) -> None:
        for bucket, size in zip(buckets, sizes, strict=True):
            assert_largest(size, lambda n, bucket=bucket: peak((bucket, n)) <= budget)

    steps_at_fit_start(tmp_path, build(kind), train_ds, compare)
    assert sum(result.probes for result in results) <= 5 * len(sizes)


TEXT = text_group((64.0, 64.0))
AUDIO = Group("audio", TEXT.config, (Bucket("audio", 0, 4.0, Shape("audio", 4.0, 0, 64)),))


def speech_and_text(model: SpeechTextModel) -> dict:
    text = SpeechTextAdapter(model).synthetic_batch(Shape("text", 0.0, 5, 6), 4, torch.device("cpu"))
    return {"audio": several_recordings(model), **text}


@pytest.mark.parametrize(("make", "phase"), [(speech_and_text, "forward"), (flat, "backward")])
@pytest.mark.parametrize("kind", [SALMGPT, BestowGPT])
def test_a_step_that_runs_out_of_memory_is_redone(kind, make, phase: str, build, tmp_path: Path) -> None:
    """No step is lost, and the weights are those of a training in which nothing happened."""
    model = build(kind)
    beginning = weights(model)
    fit(model, [make(model)] * 3, tmp_path)
    expected = weights(model)
    assert (expected - beginning).abs().max() > 1e-3, "it has learned"

    model = build(kind)
    bomb, events = Bomb(model.llm.model), []
    sizes = {TEXT.buckets[0]: 4, AUDIO.buckets[0]: 4}
    guard = Guard(SpeechTextAdapter(model), [TEXT, AUDIO], sizes, Blind(), 1, lambda _, found: events.extend(found))
    trainer = fit(model, [make(model)] * 3, tmp_path, [Guarded(guard), Charges(bomb, {0: phase})])
    assert (bomb.fired, trainer.global_step) == (1, 3)
    torch.testing.assert_close(weights(model), expected, rtol=1e-4, atol=1e-6)
    assert "audio: bucket 1 4" in {event.bucket for event in events}
