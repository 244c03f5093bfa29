"""Adapters by themselves, and each of them inside NeMo's perception module in a tiny SALM-T5."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nemo.collections.asr.models import ASRModel
from nemo.collections.asr.modules import ConformerEncoder
from nemo.collections.speechlm2.modules.perception import QformerConnector
from nemo.collections.speechlm2.parts.pretrained import setup_speech_encoder
from nemo.core.classes.common import safe_instantiate
from omegaconf import DictConfig, OmegaConf

from nemo_emmett import plugin
from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMT5
from nemo_emmett.modules.modality_adapters import (
    MLPConnector,
    QFormer,
    check_modality_adapter,
    leave_out_collectives,
    stack_frames,
)
from nemo_emmett.oomptimizer.adapters import adapter_for
from nemo_emmett.oomptimizer.buckets import Shape
from nemo_emmett.oomptimizer.fake import fake_model
from tests.conftest import ENCODER_DIM, SAMPLING_RATE
from tests.models.batches import audio_batch

LLM_DIM = 32
QUERIES = 5
NEMO = "nemo.collections.speechlm2.modules.perception"
OURS = "nemo_emmett.modules.modality_adapters"

QFORMER = {
    "prompt_size": QUERIES,
    "target_layer_ids": [0],
    "qformer_num_hidden_layers": 1,
    "encoder_config": {"d_model": ENCODER_DIM, "encoder_attention_heads": 4},
}
CONFORMER = {
    "_target_": "nemo.collections.asr.modules.ConformerEncoder",
    "feat_in": ENCODER_DIM,
    "n_layers": 1,
    "d_model": ENCODER_DIM,
    "subsampling_factor": 1,
    "n_heads": 4,
    "conv_kernel_size": 5,
}
MLP = {"_target_": f"{OURS}.MLPConnector", "input_dim": ENCODER_DIM, "output_dim": None}
ADAPTERS = {
    "identity": {"_target_": f"{NEMO}.IdentityConnector", "d_model": ENCODER_DIM},
    "MLP": MLP,
    "MLP, 4 frames": {**MLP, "subsampling_factor": 4, "hidden_dim": 48, "activation": "silu"},
    "conformer": CONFORMER,
    "Q-Former": {"_target_": f"{OURS}.QFormer", **QFORMER, "output_dim": None},
    "multi-layer projection": {
        "_target_": f"{NEMO}.MultiLayerProjectionConnector",
        "target_layer_ids": [0],
        "input_dim": ENCODER_DIM,
        "output_dim": None,
    },
}
SECONDS = (1.1, 0.4, 0.7)


@pytest.fixture(autouse=True, scope="module")
def registered():
    plugin.register()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recordings() -> tuple[torch.Tensor, torch.Tensor]:
    lens = torch.tensor([round(seconds * SAMPLING_RATE) for seconds in SECONDS])
    return 0.1 * noise(len(lens), int(lens.max())), lens


# By themselves.


def test_stacking_joins_neighbours_and_reads_nothing_beyond_a_recording():
    frames = torch.arange(1.0, 11.0).view(1, 2, 5).repeat(2, 1, 1)  # channels 1..5 and 6..10
    stacked, lens = stack_frames(frames, torch.tensor([5, 3]), 2)
    assert lens.tolist() == [3, 2]
    assert stacked[0].T.tolist() == [[1, 6, 2, 7], [3, 8, 4, 9], [5, 10, 0, 0]]
    assert stacked[1].T.tolist() == [[1, 6, 2, 7], [3, 8, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("factor", [1, 2, 3, 7])
def test_mlp_gives_a_recording_the_same_alone_and_beside_a_longer_one(factor):
    adapter = MLPConnector(8, 16, subsampling_factor=factor)
    frames = noise(2, 8, 13)
    together, lens = adapter(frames, torch.tensor([13, 7]))
    alone, alone_lens = adapter(frames[1:, :, :7], torch.tensor([7]))
    assert alone_lens[0] == lens[1] == alone.shape[2] == -(-7 // factor)
    assert torch.allclose(together[1:, :, : alone.shape[2]], alone, atol=1e-6)


def test_mlp_is_two_linear_layers_with_an_activation_between():
    adapter = MLPConnector(8, 16, hidden_dim=4, activation="relu")
    first, last = (layer for layer in adapter.layers if isinstance(layer, torch.nn.Linear))
    frames = noise(1, 8, 3)
    expected = last(first(frames[0].T).clamp(min=0)).T
    assert torch.allclose(adapter(frames, torch.tensor([3]))[0][0], expected)
    assert (first.out_features, last.out_features) == (4, 16)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"output_dim": None}, r"modality_adapter.output_dim: None cannot be; give a whole number from 1\.$"),
        ({"subsampling_factor": 0}, r"modality_adapter.subsampling_factor: 0 cannot be"),
        ({"activation": "gleu"}, r"modality_adapter.activation: there is no activation 'gleu'; did you mean 'gelu'\?$"),
    ],
)
def test_mlp_refuses_what_cannot_be(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        MLPConnector(**{"input_dim": 8, "output_dim": 16, **wrong})


def qformer(of: type = QFormer, **keys) -> QformerConnector:
    torch.manual_seed(0)
    return of(**{**OmegaConf.create(QFORMER), "llm_config": DictConfig({"hidden_size": 24}), **keys}).eval()


def ask(adapter: QformerConnector, frames: torch.Tensor, lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return adapter([frames, 2 * frames], [torch.tensor(lens)] * 2)


def test_qformer_answers_as_nemos_does_where_nothing_is_padding():
    frames = noise(2, ENCODER_DIM, 9)
    nemos, _ = ask(qformer(QformerConnector), frames, [9, 9])
    ours, lens = ask(qformer(), frames, [9, 9])
    assert torch.allclose(ours, nemos, atol=1e-6)
    assert ours.shape == (2, 24, QUERIES)
    assert lens.tolist() == [QUERIES, QUERIES]


def test_qformer_does_not_read_padding_and_nemos_does():
    frames, padded = noise(1, ENCODER_DIM, 9), noise(1, ENCODER_DIM, 4, seed=1)
    padded = torch.cat([frames, padded], dim=2)
    for of, agree in ((QFormer, True), (QformerConnector, False)):
        alone, _ = ask(qformer(of), frames, [9])
        together, _ = ask(qformer(of), padded, [9])
        assert torch.allclose(alone, together, atol=1e-6) is agree


def test_nemos_qformer_reports_the_language_models_width_as_the_length():
    _, lens = ask(qformer(QformerConnector), noise(1, ENCODER_DIM, 9), [9])
    assert lens.tolist() == [24]


def test_qformer_gives_numbers_for_a_recording_without_frames():
    embeds, _ = ask(qformer(), noise(2, ENCODER_DIM, 9), [9, 0])
    assert embeds.isfinite().all()


def test_qformer_loads_the_weights_of_nemos():
    nemos = qformer(QformerConnector)
    ours = QFormer(**OmegaConf.create(QFORMER), output_dim=24)
    ours.load_state_dict(nemos.state_dict())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"llm_config": None}, r"modality_adapter.output_dim: is missing; give the width of the language model\.$"),
        ({"target_layer_ids": []}, r"modality_adapter.target_layer_ids: is empty"),
        (
            {"encoder_config": DictConfig({"d_model": 32, "encoder_attention_heads": 5})},
            r"encoder_attention_heads: 5 does not divide the width of 32; give a divisor of it\.$",
        ),
    ],
)
def test_qformer_refuses_what_cannot_be(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        qformer(**wrong)


# In a model.


@pytest.fixture(scope="module", params=ADAPTERS.values(), ids=ADAPTERS.keys())
def model(request, tiny_t5, tiny_asr) -> SALMT5:
    torch.manual_seed(0)
    config = {
        "pretrained_llm": str(tiny_t5),
        "pretrained_asr": str(tiny_asr),
        "perception": {"modality_adapter": request.param},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
    }
    model = SALMT5(config)
    model.log = lambda *args, **kwargs: None
    return model


def name_of(model: SALMT5) -> str:
    adapter = model.cfg.perception.modality_adapter
    return next(
        name
        for name, config in ADAPTERS.items()
        if config["_target_"] == adapter._target_
        and config.get("subsampling_factor", 1) == adapter.get("subsampling_factor", 1)
    )


def encode(model: SALMT5, audios: torch.Tensor, lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return model.perception(input_signal=audios, input_signal_length=lens)


def frames_of_encoder(model: SALMT5, audios: torch.Tensor, lens: torch.Tensor) -> list[int]:
    model.eval()
    with torch.no_grad():
        features, lens = model.perception.preprocessor(input_signal=audios, length=lens)
        return model.perception.encoder(audio_signal=features, length=lens)[1].tolist()


def test_embeddings_are_as_wide_as_the_language_model_and_as_many_as_the_adapter_makes(model):
    audios, lens = recordings()
    embeds, numbers = encode(model, audios, lens)
    frames = frames_of_encoder(model, audios, lens)
    assert min(frames) > 4
    expected = {"MLP, 4 frames": [-(-n // 4) for n in frames], "Q-Former": [QUERIES] * 3}.get(name_of(model), frames)
    assert numbers.tolist() == expected
    assert embeds.shape == (3, max(expected), LLM_DIM)


def test_seconds_of_a_position_are_the_encoders_times_the_stacked_frames(model):
    assert model.token_equivalent_duration == pytest.approx(0.32 if name_of(model) == "MLP, 4 frames" else 0.08)


def test_a_recording_gives_the_same_in_a_batch_and_alone(model):
    audios, lens = recordings()
    embeds, numbers = encode(model, audios, lens)
    for audio, n, together, number in zip(audios, lens.tolist(), embeds, numbers.tolist(), strict=True):
        alone, (alone_number,) = encode(model, audio[None, :n], torch.tensor([n]))
        assert alone_number == number
        assert torch.allclose(together[:number], alone[0, :number], atol=2e-5)


def test_the_encoders_pretrained_weights_arrive(model, tiny_asr):
    pretrained = ASRModel.restore_from(str(tiny_asr), map_location="cpu").encoder.state_dict()
    ours = model.perception.encoder.state_dict()
    assert ours.keys() == pretrained.keys()
    assert all(torch.equal(ours[name], pretrained[name]) for name in pretrained)


def test_a_training_step_gives_every_part_of_the_adapter_a_gradient(model):
    model.train()
    model.zero_grad()
    model.training_step({"audio": audio_batch(model, [(1.1, "ein rotes haus"), (0.4, "vier")])}, 0).backward()
    parts = [*model.perception.modality_adapter.named_parameters(), *model.perception.proj.named_parameters()]
    assert parts or name_of(model) == "identity"
    without = [name for name, p in parts if p.requires_grad and (p.grad is None or not p.grad.any())]
    # A key's bias shifts all of a query's scores alike, and the softmax takes that out again.
    assert [name for name in without if not name.endswith(("key.bias", "linear_k.bias"))] == []


def test_a_step_can_be_planned(model):
    model.train()
    adapter = adapter_for(model)
    shape = Shape("audio", seconds=2.0, input_tokens=4, output_tokens=9)
    with fake_model(model), adapter.planning():
        batch = adapter.synthetic_batch(shape, 3, torch.device("cpu"))
        loss = model.training_step(batch, 0)
        loss.backward()
        assert type(loss).__name__ == "FakeTensor"


def test_a_frozen_encoder_stays_in_evaluation_mode_while_the_adapter_trains(model):
    frozen = [p for p in model.perception.encoder.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad = False
    try:
        model.train()
        model._eval_frozen_modules()
        assert not any(part.training for part in model.perception.encoder.modules())
        assert model.perception.modality_adapter.training
    finally:
        for parameter in frozen:
            parameter.requires_grad = True


def test_it_fits_its_neighbours(model):
    check_modality_adapter(model.perception, LLM_DIM)


def test_no_conformer_all_reduces_its_longest_input(model):
    leave_out_collectives(model.perception)
    assert not any(m.sync_max_audio_length for m in model.perception.modules() if isinstance(m, ConformerEncoder))


# What does not fit.


def perception_with(tiny_asr, adapter: dict, llm_dim: int = LLM_DIM):
    """NeMo's perception module, set up by NeMo for a language model of this width."""
    llm = SimpleNamespace(config=SimpleNamespace(hidden_size=llm_dim))
    cfg = {"pretrained_asr": str(tiny_asr), "perception": {"modality_adapter": adapter}}
    holder = SimpleNamespace(cfg=OmegaConf.create(cfg), llm=llm)
    setup_speech_encoder(holder)
    return holder.perception


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ({**ADAPTERS["identity"], "d_model": 48}, r"d_model: 48 is not the width of the speech encoder; write 32\.$"),
        ({**MLP, "input_dim": 48}, r"input_dim: 48 is not the width of the speech encoder; write 32\.$"),
        ({**CONFORMER, "feat_in": 48}, r"feat_in: 48 is not the width of the speech encoder; write 32\.$"),
        (
            {
                **ADAPTERS["Q-Former"],
                "encoder_config": {"d_model": 48, "encoder_attention_heads": 4},
            },
            r"encoder_config.d_model: 48 is not the width of the speech encoder; write 32\.$",
        ),
        (
            {"_target_": f"{OURS}.QFormer", **QFORMER, "llm_config": {"hidden_size": 24}},
            r"its embeddings are 24 wide, but the language model reads 32; write output_dim: 32, or",
        ),
        (
            {"_target_": f"{NEMO}.QformerConnector", **QFORMER, "llm_config": {"hidden_size": 32}},
            r"NeMo's QformerConnector .* use nemo_emmett\..*\.QFormer, which takes the same keys\.$",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_the_key(tiny_asr, adapter, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_modality_adapter(perception_with(tiny_asr, adapter), LLM_DIM)


@pytest.mark.parametrize(
    ("adapter", "width"),
    [(MLP, 48), (ADAPTERS["identity"], 48), ({"_target_": f"{NEMO}.IdentityConnector"}, ENCODER_DIM)],
    ids=["MLP", "identity", "identity without d_model"],
)
def test_an_adapter_for_another_language_model_is_told(tiny_asr, adapter, width):
    perception = perception_with(tiny_asr, adapter, llm_dim=48)
    with pytest.raises(ConfigError, match=rf"its embeddings are {width} wide, but the language model reads 40; write"):
        check_modality_adapter(perception, 40)


def test_nemos_allow_list_admits_both():
    assert isinstance(safe_instantiate(OmegaConf.create({**MLP, "output_dim": 8})), MLPConnector)
    assert isinstance(safe_instantiate(OmegaConf.create({**ADAPTERS["Q-Former"], "output_dim": 8})), QFormer)
