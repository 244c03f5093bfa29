"""Positions of recordings are those that NeMo's perception module itself gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nemo.collections.speechlm2.modules.perception import AudioPerceptionModule
from nemo.collections.speechlm2.parts.encoder_chunking import encode_audio_with_optional_chunking
from omegaconf import OmegaConf

from nemo_emmett.errors import ModelError
from nemo_emmett.modules.perception_lengths import PerceptionLengths

ASR = "nemo.collections.asr.modules"
CONNECTORS = "nemo.collections.speechlm2.modules.perception"
OURS = "nemo_emmett.modules.modality_adapters"
ENCODER = {
    "_target_": f"{ASR}.ConformerEncoder",
    "feat_in": 16,
    "n_layers": 1,
    "d_model": 16,
    "subsampling": "dw_striding",
    "subsampling_factor": 8,
    "subsampling_conv_channels": 8,
    "n_heads": 2,
    "conv_kernel_size": 5,
}
MLP = {"_target_": f"{OURS}.MLPConnector", "input_dim": 16, "output_dim": 16}
IDENTITY = {"_target_": f"{CONNECTORS}.IdentityConnector", "d_model": 16}
QUERIES = {
    "_target_": f"{OURS}.QFormer",
    "prompt_size": 3,
    "target_layer_ids": [0],
    "qformer_num_hidden_layers": 1,
    "encoder_config": {"d_model": 16, "encoder_attention_heads": 2},
    "output_dim": 16,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "identity": ({}, IDENTITY, {}),
    "mlp": ({}, MLP, {}),
    "mlp of 3 frames": ({}, MLP | {"subsampling_factor": 3}, {}),
    "queries": ({}, QUERIES, {}),
    "striding by 4": ({"subsampling": "striding", "subsampling_factor": 4}, MLP | {"subsampling_factor": 2}, {}),
    "causal": ({"causal_downsampling": True}, IDENTITY, {}),
    "no subsampling": ({"subsampling_factor": 1}, IDENTITY, {}),
    "pooling": ({"reduction": "pooling", "reduction_position": -1, "reduction_factor": 2}, IDENTITY, {}),
    "more striding": ({"reduction": "striding", "reduction_position": -1, "reduction_factor": 2}, IDENTITY, {}),
    "conformer": ({}, ENCODER | {"subsampling": "striding", "subsampling_factor": 2}, {}),
    "exact pad": ({}, IDENTITY, {"exact_pad": True}),
    "other window": ({}, IDENTITY, {"window_size": 0.02, "window_stride": 0.0125}),
}


def perception_of(encoder: dict, adapter: dict, preprocessor: dict) -> AudioPerceptionModule:
    section = {
        "preprocessor": {
            "_target_": f"{ASR}.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000,
            "features": 16,
            "dither": 0.0,
            "pad_to": 0,
            **preprocessor,
        },
        "encoder": ENCODER | encoder,
        "modality_adapter": adapter,
        "output_dim": 16,
    }
    return AudioPerceptionModule(OmegaConf.create(section)).eval()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_lengths_are_those_of_the_embeddings(case):
    perception = perception_of(*CASES[case])
    count = PerceptionLengths(perception)
    lens = torch.randint(count.shortest, 16000, (40,), generator=torch.Generator().manual_seed(0))
    lens[0] = count.shortest
    signals = torch.zeros(len(lens), int(lens.max()))
    _, expected = perception(input_signal=signals, input_signal_length=lens)
    assert count(lens.tolist()) == expected.tolist()
    assert len(set(expected.tolist())) > 1 or case == "queries"


@torch.no_grad()
def test_lengths_of_recordings_that_are_encoded_in_chunks():
    perception = perception_of({}, MLP | {"subsampling_factor": 2}, {})
    for lens in ([8000, 24000, 47999], [16000, 16001, 16300, 32100]):
        padded = torch.zeros(len(lens), max(lens))
        rows = encode_audio_with_optional_chunking(
            perception, padded, torch.tensor(lens), chunk_size_seconds=0.5, sampling_rate=16000
        )
        assert PerceptionLengths(perception, 0.5)(lens) == [len(row) for row in rows]


def test_the_most_samples_of_a_number_of_positions():
    count = PerceptionLengths(perception_of({}, MLP | {"subsampling_factor": 2}, {}))
    most = count.most_samples(10)
    assert count([most, most + 1]) == [10, 11]
    assert count.most_samples(0) == 0


def test_lengths_that_depend_on_the_batch_are_refused():
    with pytest.raises(ModelError, match="StackingSubsampling"):
        PerceptionLengths(perception_of({"subsampling": "stacking", "subsampling_factor": 4}, IDENTITY, {}))
