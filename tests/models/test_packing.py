"""Several examples in a row: losses, gradients and scores are those of padded rows, and no example sees another."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.errors import DataError, ModelError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.models.head import answer_logits, answer_scores
from nemo_emmett.modules.loss import IGNORE_INDEX

from .backbones import DECODER_ONLY, ENCODER_DECODERS, livelier, model_config, seeded
from .batches import packed, prompted_batch, rows, with_recordings

MODELS = {
    **dict.fromkeys(ENCODER_DECODERS, SALMT5),
    **dict.fromkeys(DECODER_ONLY, SALMGPT),
    **{f"bestow_{name}": BestowGPT for name in ("llama", "qwen3", "gemma3")},
}
MESSAGES = ["one red house", "two", "five new keys six big dogs", "two blue cars", "one"]
ANSWERS = ["ein rotes haus", "zwei blaue autos sechs", "fünf", "zwei blaue", "eins"]
SECONDS = [0.9, 0.4, 1.3, 0.6, 0.5]
ROWS = [0, 0, 0, 1, 1]


@pytest.fixture(scope="module", params=MODELS)
def make(request, folder, tiny_asr):
    """Makes the model of a family with further keys in its section; the same random weights each time."""
    name = request.param.removeprefix("bestow_")
    return lambda **keys: seeded(MODELS[request.param], model_config(name, folder, tiny_asr, **keys))


@pytest.fixture
def t5(folder, tiny_asr) -> SALMT5:
    return seeded(SALMT5, model_config("t5", folder, tiny_asr))


def batch_of(model, modality: str) -> dict:
    if modality == "text":
        return prompted_batch(model, MESSAGES, ANSWERS)
    locator = model.options.audio_locator_tag
    return with_recordings(model, prompted_batch(model, [locator] * len(ANSWERS), ANSWERS), SECONDS)


def both(model, pack: bool) -> dict:
    batch = {modality: batch_of(model, modality) for modality in ("audio", "text")}
    return {modality: packed(part, ROWS) for modality, part in batch.items()} if pack else batch


def loss_and_gradient(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    found = model.training_step(batch, 0)
    loss = found["loss"] if isinstance(found, dict) else found
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradient


def assert_equal_gradients(ours: dict, theirs: dict, rtol: float = 1e-5) -> None:
    """Equal by the size of the whole of each: a sum of cancelling terms is no more exact than its terms."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=rtol * max(scale, 1e-2), msg=f"{name}")


@pytest.mark.parametrize("modality", ["text", "audio", "both"])
def test_loss_and_gradient_are_those_of_padded_rows(make, modality):
    model = make()
    of = both if modality == "both" else lambda model, pack: both(model, pack)[modality]
    loss, gradient = loss_and_gradient(model, of(model, True))
    expected, expected_gradient = loss_and_gradient(model, of(model, False))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_equal_gradients(gradient, expected_gradient)


@torch.no_grad()
def test_each_answer_has_the_logits_that_it_has_alone(make):
    model = livelier(make())
    batch = batch_of(model, "text")
    found = answer_logits(model.llm, model.llm_inputs(packed(batch, ROWS)))
    for number, length in enumerate(batch["answer_lens"].tolist()):
        alone = rows(batch, [number])
        alone["answer_ids"] = alone["answer_ids"][:, :length]
        alone["context_ids"] = alone["context_ids"][:, : int(alone["context_lens"])]
        expected = answer_logits(model.llm, model.llm_inputs(alone))[0]
        torch.testing.assert_close(found[number, :length], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_an_example_that_is_replaced_changes_no_other_in_its_row(make):
    model = livelier(make())
    batch = prompted_batch(model, MESSAGES, ANSWERS)
    before = answer_scores(model.llm, model.llm_inputs(packed(batch, ROWS)))[0]
    other = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    ids, length = other["context_ids"], int(other["context_lens"][0])
    ids[0, : length // 2] = ids[0, : length // 2].flip(0)
    first = int(other["answer_lens"][0])
    other["answer_ids"][0, :first] = other["answer_ids"][0, :first].flip(0)
    after = answer_scores(model.llm, model.llm_inputs(packed(other, ROWS)))[0]
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def test_an_implementation_of_attention_of_either_kind(folder, tiny_asr):
    for name, kind in (("t5", SALMT5), ("m2m100", SALMT5), ("gemma3", SALMGPT)):
        for implementation in ("eager", "sdpa"):
            model = seeded(kind, model_config(name, folder, tiny_asr, attn_implementation=implementation))
            assert model.llm.config._attn_implementation == implementation
            loss, gradient = loss_and_gradient(model, both(model, True))
            expected, expected_gradient = loss_and_gradient(model, both(model, False))
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
            assert_equal_gradients(gradient, expected_gradient)


def test_bfloat16(make):
    model = make()
    model.llm.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = loss_and_gradient(model, both(model, True))
        expected, _ = loss_and_gradient(model, both(model, False))
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


def test_microbatches_hold_whole_rows_and_give_the_same_gradient(make):
    model = make()
    batch = both(model, True)
    expected, expected_gradient = loss_and_gradient(model, batch)
    cut = model.split_batch(batch, 8)
    assert [(next(iter(one)), next(iter(one.values()))["packed_sizes"][0]) for one in cut] == [
        ("audio", 1),
        ("audio", 1),
        ("text", 1),
        ("text", 1),
    ]
    assert [next(iter(one.values()))["packed_rows"].tolist() for one in cut] == [[0, 0, 0], [0, 0]] * 2
    total = 0.0
    with model.one_step(batch):
        for microbatch in cut:
            found = model.training_step(microbatch, 0)
            loss = found["loss"] if isinstance(found, dict) else found
            loss.backward()
            total += loss.detach()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    assert_equal_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected_gradient)


def test_lora_on_speech_alone_acts_on_rows_of_speech(make):
    lora = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    model = make(lora=lora, lora_modality="audio").double()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    loss, gradient = loss_and_gradient(model, both(model, True)["audio"])
    expected, expected_gradient = loss_and_gradient(model, both(model, False)["audio"])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_equal_gradients(gradient, expected_gradient)
    assert any(".lora_B." in name for name in gradient)


OBJECTIVES = {"retention": {"weight": 1.0, "teacher": "start"}, "consistency": {"weight": 0.5}}


def test_objectives(make):
    model = make(objectives=OBJECTIVES)
    batches = both(model, False), both(model, True)
    for batch in batches:
        transcripts = prompted_batch(model, MESSAGES, ANSWERS)
        part = batch["audio"]
        part |= {"transcript_ids": transcripts["answer_ids"], "transcript_lens": transcripts["answer_lens"]}
        part |= {"text_context_ids": transcripts["context_ids"], "text_context_lens": transcripts["context_lens"]}
        part["is_transcription"] = torch.zeros(len(ANSWERS), dtype=torch.bool)
    (expected, expected_gradient), (loss, gradient) = (loss_and_gradient(model, batch) for batch in batches)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_equal_gradients(gradient, expected_gradient)


def test_a_row_that_is_too_long_is_refused(t5):
    batch = packed(batch_of(t5, "audio"), ROWS)
    batch["packed_sizes"] = (batch["packed_sizes"][0], 5, batch["packed_sizes"][2])
    with pytest.raises(DataError, match=r"a packed row has \d+ positions, but row_tokens allows 5"):
        t5.llm_inputs(batch)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_masks_is_refused(t5, monkeypatch, implementation):
    monkeypatch.setattr(t5.llm.config, "_attn_implementation_internal", implementation)
    with pytest.raises(ModelError, match="takes no mask by example"):
        t5.llm_inputs(packed(batch_of(t5, "text"), ROWS))


def test_targets_are_read_from_the_rows_where_they_are(folder):
    model = seeded(SALMGPT, model_config("llama", folder))
    batch = prompted_batch(model, MESSAGES, ANSWERS)
    inputs = model.llm_inputs(packed(batch, ROWS))
    lens = (batch["context_lens"] + batch["answer_lens"]).tolist()
    starts = [0, lens[0], lens[0] + lens[1], 0, lens[3]]
    for example, start in enumerate(starts):
        context, answer = int(batch["context_lens"][example]), int(batch["answer_lens"][example])
        expected = [start + context - 1 + token for token in range(answer)]
        assert inputs.positions_BA[example, :answer].tolist() == expected
        assert (inputs.targets_BA[example, answer:] == IGNORE_INDEX).all()
    assert inputs.kwargs["position_ids"][1, : sum(lens[3:])].tolist() == [*range(lens[3]), *range(lens[4])]
