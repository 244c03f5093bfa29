import math
from pathlib import Path

import pytest
import sacrebleu
import torch

from nemo_emmett.errors import ConfigError, DataError, ModelError
from nemo_emmett.models import SALMT5, load
from nemo_emmett.modules.batch import MODALITIES

from ..fork_server import call_in_new_process
from .batches import audio_batch, text_batch

PAIRS = [("one red house", "ein rotes haus"), ("four old doors", "vier alte türen"), ("six", "sechs")]
SPEECH = [(0.8, "ein rotes haus"), (0.5, "vier")]


@pytest.fixture
def model(salm_t5_config) -> SALMT5:
    torch.manual_seed(0)
    return SALMT5(salm_t5_config).eval()


def step_loss(model: SALMT5, batch: dict) -> float:
    with torch.no_grad():
        return model.training_step(batch, 0).item()


def quiet(model: SALMT5) -> SALMT5:
    """No dropout, and no trainer to log to."""
    model.eval()
    model.log = lambda *args, **kwargs: None
    return model


# Losses


def test_text_loss_is_what_hugging_face_computes(model):
    batch = text_batch(model, PAIRS)
    labels = batch["answer_ids"].masked_fill(batch["answer_ids"] == model.pad_id, -100)
    mask = (batch["context_ids"] != model.pad_id).long()
    expected = model.llm(input_ids=batch["context_ids"], attention_mask=mask, labels=labels).loss.item()
    assert step_loss(quiet(model), {"text": batch}) == pytest.approx(expected, rel=1e-5)


def test_speech_loss_is_that_of_speech_in_the_locators_place(model):
    batch = audio_batch(model, SPEECH)
    total, tokens = 0.0, 0
    for b, (_, target) in enumerate(SPEECH):  # one by one, without padding and without placement
        n = int(batch["audio_lens"][b])
        frames, lens = model.perception(
            input_signal=batch["audios"][b : b + 1, :n], input_signal_length=batch["audio_lens"][b : b + 1]
        )
        prompt = model.llm.shared(torch.tensor([[model.tokenizer.token_to_id("<de>")]]))
        end = model.llm.shared(torch.tensor([[model.tokenizer.eos_id]]))
        space = model.tokenizer.text_to_ids(f"<de> {model.options.audio_locator_tag}")[1:-1]
        space = model.llm.shared(torch.tensor([space], dtype=torch.long))
        embeds = torch.cat([prompt, space, frames[:, : int(lens)], end], dim=1)
        answer = torch.tensor([[*model.tokenizer.text_to_ids(target), model.tokenizer.eos_id]])
        total += model.llm(inputs_embeds=embeds, labels=answer).loss.item() * answer.numel()
        tokens += answer.numel()
    assert step_loss(quiet(model), {"audio": batch}) == pytest.approx(total / tokens, rel=2e-4)


def test_a_step_with_both_adds_the_weighted_means(salm_t5_config):
    torch.manual_seed(0)
    model = quiet(SALMT5(salm_t5_config | {"modality_loss_weights": {"audio": 0.5, "text": 2.0}}))
    text, audio = text_batch(model, PAIRS), audio_batch(model, SPEECH)
    alone = [step_loss(model, {"audio": audio}), step_loss(model, {"text": text})]
    assert step_loss(model, {"audio": audio, "text": text}) == pytest.approx(sum(alone), rel=1e-6)
    unweighted = SALMT5(salm_t5_config)
    unweighted.load_state_dict(model.state_dict())
    assert alone[1] == pytest.approx(2.0 * step_loss(quiet(unweighted), {"text": text}), rel=1e-6)


def test_padding_does_not_change_the_loss(model):
    batch = text_batch(model, PAIRS)
    wide = {
        key: torch.nn.functional.pad(value, (0, 3), value=model.pad_id) if key.endswith("_ids") else value
        for key, value in batch.items()
    }
    assert step_loss(quiet(model), {"text": wide}) == pytest.approx(step_loss(model, {"text": batch}), rel=1e-6)


def test_a_one_modality_batch_and_nemos_flat_batch_give_the_same_loss(model):
    text = text_batch(model, PAIRS[:2])
    expected = step_loss(quiet(model), {"text": text})
    assert step_loss(model, text) == pytest.approx(expected)
    rows = [
        (text["context_ids"][b, :c].tolist(), text["answer_ids"][b, :a].tolist())
        for b, (c, a) in enumerate(zip(text["context_lens"], text["answer_lens"], strict=True))
    ]
    width = max(len(context) + len(answer) for context, answer in rows)
    flat = {"input_ids": [], "loss_mask": [], "audios": torch.tensor([]), "audio_lens": torch.tensor([])}
    for context, answer in rows:  # NeMo's SALMDataset pads on the left
        padding = width - len(context) - len(answer)
        flat["input_ids"].append([model.pad_id] * padding + context + answer)
        flat["loss_mask"].append([0] * (padding + len(context)) + [1] * len(answer))
    flat |= {key: torch.tensor(flat[key]) for key in ("input_ids", "loss_mask")}
    assert step_loss(model, flat) == pytest.approx(expected, rel=1e-6)


# Training


def test_a_step_on_text_alone_moves_the_language_model_and_nothing_else(model):
    model.train()
    quiet(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = model.configure_optimizers()["optimizer"]
    model.training_step({"text": text_batch(model, PAIRS)}, 0).backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[0] for name in moved} == {"llm"}
    assert {"llm.shared.weight", "llm.encoder.block.0.layer.0.SelfAttention.q.weight"} <= moved


def test_each_modality_is_logged_apart_and_an_absent_one_shows_as_no_examples(model):
    logged = {}
    model.log = lambda name, value, **kwargs: logged.__setitem__(name, (float(value), kwargs.get("prog_bar", False)))
    model.training_step({"text": text_batch(model, PAIRS)}, 0)
    assert logged["examples_text"] == (3.0, True)
    assert logged["examples_audio"] == (0.0, True)
    assert "loss_audio" not in logged
    # <de> one red house </s> | <de> four old doors </s> | <de> six </s>: the padding of contexts and answers, by hand.
    batch = text_batch(model, PAIRS)
    used = int(batch["context_lens"].sum() + batch["answer_lens"].sum())
    cells = 3 * (int(batch["context_lens"].max()) + int(batch["answer_lens"].max()))
    assert logged["padding_text"][0] == pytest.approx(1 - used / cells)
    assert logged["tokens_text"][0] == int(batch["answer_lens"].sum())

    model.training_step({"audio": audio_batch(model, SPEECH)}, 1)
    assert logged["examples_audio"] == (2.0, True)
    assert logged["padding_audio"][0] == pytest.approx(1 - (0.8 + 0.5) / (2 * 0.8))


def test_frozen_parts_stay_as_they_are_and_in_evaluation_mode(salm_t5_config):
    model = SALMT5(salm_t5_config | {"freeze_params": [r"^perception\.encoder\..+$"]})
    quiet(model)
    model.configure_optimizers()
    model.train()
    model.training_step({"audio": audio_batch(model, SPEECH)}, 0).backward()
    assert not model.perception.encoder.training
    assert model.llm.training
    assert all(p.grad is None for p in model.perception.encoder.parameters())
    assert model.perception.proj.weight.grad.abs().sum() > 0


def test_a_new_model_trains_with_the_dropout_of_all_its_parts(salm_t5_config):
    model = SALMT5(salm_t5_config)
    assert model.llm.training
    assert model.perception.encoder.training
    text = text_batch(quiet_training(model), PAIRS)
    assert model.training_step({"text": text}, 0).item() != model.training_step({"text": text}, 1).item()


def quiet_training(model: SALMT5) -> SALMT5:
    model.log = lambda *args, **kwargs: None
    return model


def test_no_collective_in_the_encoder(model):
    assert model.perception.encoder.sync_max_audio_length is False


# Validation


def test_validation_reports_each_set_and_direction(model):
    metrics = {}
    model.log_dict = lambda values, **kwargs: metrics.update({k: float(v) for k, v in values.items()})
    text, audio = text_batch(model, PAIRS), audio_batch(model, SPEECH, target_lang="en", source_lang="de")
    with torch.no_grad():
        model.on_validation_epoch_start()
        model.validation_step({"dev_text": {"text": text}, "dev_speech": None}, 0)
        model.validation_step({"dev_text": None, "dev_speech": {"audio": audio}}, 1)
        model.on_validation_epoch_end()
        expected = step_loss(quiet(model), {"text": text})
    assert metrics["val_loss_dev_text"] == pytest.approx(expected, rel=1e-5)
    assert metrics["val_loss"] == pytest.approx((metrics["val_loss_dev_text"] + metrics["val_loss_dev_speech"]) / 2)
    assert metrics["val_loss_dev_text_en-de"] == pytest.approx(expected, rel=1e-5)
    bleu = sacrebleu.corpus_bleu(model.translate_batch(text), [[target for _, target in PAIRS]]).score
    assert metrics["val_bleu_dev_text_en-de"] == pytest.approx(bleu)
    assert {"val_bleu_dev_speech_de-en", "val_bleu", "val_acc_dev_text", "val_acc"} <= set(metrics)


def test_a_validation_set_of_both_modalities_counts_as_two(model):
    metrics = {}
    model.log_dict = lambda values, **kwargs: metrics.update(values)
    with torch.no_grad():
        model.on_validation_epoch_start()
        model.validation_step({"dev": {"text": text_batch(model, PAIRS), "audio": audio_batch(model, SPEECH)}}, 0)
        model.on_validation_epoch_end()
    assert {"val_loss_dev_text", "val_loss_dev_audio"} <= set(metrics)
    assert "val_loss_dev" not in metrics


# Generation


def test_generation_is_the_same_whichever_side_is_padded_and_one_by_one(model):
    batch = text_batch(model, PAIRS)
    right = batch["context_ids"]
    left = torch.stack([row.roll(int(right.shape[1] - n)) for row, n in zip(right, batch["context_lens"], strict=True)])
    from_right = model.generate(right)
    assert torch.equal(from_right, model.generate(left))
    assert torch.equal(from_right, model.generate_answers(batch, max_new_tokens=8))
    for row, n, answer in zip(right, batch["context_lens"], from_right, strict=True):
        alone = model.generate(row[None, :n])[0]
        assert torch.equal(alone, answer[: len(alone)])


def test_speech_from_tensors_and_from_a_file_generate_the_same(model, tiny_corpus):
    import soundfile

    path = tiny_corpus / "audio" / "en-0.wav"
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None]
    locator = model.options.audio_locator_tag
    turns = [{"role": "user", "slots": {"target_lang": "de", "message": locator}, "audio": [str(path)]}]
    from_file = model.generate([turns])
    turns = [{"role": "user", "slots": {"target_lang": "de", "message": locator}}]
    from_tensors = model.generate([turns], audios=samples, audio_lens=torch.tensor([samples.shape[1]]))
    assert torch.equal(from_file, from_tensors)
    text = model.tokenizer.tokenizer.batch_decode(from_file, skip_special_tokens=True)[0].strip()
    assert model.translate([path], None, "de") == [text]


def test_translating_a_model_in_training_has_no_dropout_and_leaves_it_in_training(model, tiny_corpus):
    inputs = ["one red house", tiny_corpus / "audio" / "en-2.wav"]
    expected = model.eval().translate(inputs, None, "de")
    model.train()
    model.perception.encoder.eval()
    assert model.translate(inputs, None, "de") == expected
    assert model.llm.training
    assert not model.perception.encoder.training


def test_translate_keeps_the_order_of_texts_and_recordings(model, tiny_corpus):
    inputs = ["one red house", tiny_corpus / "audio" / "en-3.wav", "six", str(tiny_corpus / "audio" / "en-0.wav")]
    together = model.translate(inputs, None, "de", batch_tokens=20)
    assert together == [model.translate([item], None, "de")[0] for item in inputs]


def test_translate_refuses_an_unknown_language_and_missing_or_broken_audio(model, tmp_path):
    with pytest.raises(ConfigError, match="'dex' is not a known language; did you mean 'de'"):
        model.translate(["six"], None, "dex")
    with pytest.raises(DataError, match=r"nowhere\.wav' does not exist"):
        model.translate(["nowhere.wav"], None, "de")
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"broken\.wav' cannot be read"):
        model.translate([broken], None, "de")


# What is written and read


def translate(folder: Path, inputs: list[str]) -> list[str]:
    return load(folder).translate(inputs, None, "de")


def test_an_exported_folder_translates_the_same_in_a_new_process(model, tmp_path, tiny_corpus):
    inputs = ["one red house", str(tiny_corpus / "audio" / "en-1.wav")]
    expected = model.translate(inputs, None, "de")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").exists()
    assert call_in_new_process(translate, folder, inputs) == expected


def test_a_loaded_folder_has_every_weight_and_can_be_trained_on(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert isinstance(loaded, SALMT5)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    again = SALMT5(dict(loaded.cfg))
    assert again.options.pretrained_weights is False


def test_a_lightning_checkpoint_loads(model, tmp_path):
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = SALMT5.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_model_without_perception_reads_text_only(salm_t5_config):
    model = SALMT5({k: v for k, v in salm_t5_config.items() if k not in ("perception", "pretrained_asr")})
    assert math.isfinite(step_loss(quiet(model), {"text": text_batch(model, PAIRS)}))
    with pytest.raises(ModelError, match="reads text only"):
        _ = model.sampling_rate


def test_the_schema_names_what_a_batch_holds(model):
    for modality, batch in (("audio", audio_batch(model, SPEECH)), ("text", text_batch(model, PAIRS))):
        names = {item["name"] for item in model.oomptimizer_schema(modality)["inputs"]}
        assert names == set(batch) - {"examples"}
    with pytest.raises(ConfigError, match="'video' is not a modality"):
        model.oomptimizer_schema("video")
    assert MODALITIES == ("audio", "text")


# Mistakes


def test_a_decoder_only_backbone_is_refused_by_its_kind(salm_t5_config, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
    from shutil import copytree

    copytree(salm_t5_config["pretrained_llm"], tmp_path, dirs_exist_ok=True, ignore=lambda *_: ["config.json"])
    with pytest.raises(ModelError, match=r"decoder-only model \(llama\), but SALMT5 is built on an encoder-decoder"):
        SALMT5(salm_t5_config | {"pretrained_llm": str(tmp_path)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pretrained_lm": "x"}, "model.pretrained_lm: there is no such key; did you mean 'pretrained_llm'"),
        ({"pretrained_llm": None}, "model.pretrained_llm is missing"),
        ({"pretrained_llm": "./no/such/folder"}, "model.pretrained_llm: './no/such/folder' does not exist"),
        ({"pretrained_asr": "nowhere.nemo"}, "model.pretrained_asr: 'nowhere.nemo' does not exist"),
        ({"modality_loss_weights": {"speech": 1.0}}, "model.modality_loss_weights.speech: there is no such modality"),
        ({"modality_loss_weights": {"adio": 1.0}}, "model.modality_loss_weights.adio: .* did you mean 'audio'"),
    ],
)
def test_mistakes_get_one_sentence(salm_t5_config, change, sentence):
    with pytest.raises((ConfigError, ModelError), match=sentence):
        SALMT5(salm_t5_config | change)


def test_a_name_that_no_hub_knows_is_told_in_one_sentence(salm_t5_config, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("google/t6 is not a valid model identifier")

    monkeypatch.setattr("nemo_emmett.models.building.AutoTokenizer", refuse)
    with pytest.raises(ModelError, match="'google/t6' is neither a folder"):
        SALMT5(salm_t5_config | {"pretrained_llm": "google/t6"})


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"is not an exported model: it has no config\.json"):
        load(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=r"config\.json' is damaged: it is not "):
            load(tmp_path)
    for content in ("{}", '{"_target_": "no.such.Class"}', '{"_target_": 3}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match="names no model class"):
            load(tmp_path)
    (tmp_path / "config.json").write_text('{"_target_": "collections.OrderedDict"}')
    with pytest.raises(ModelError, match="OrderedDict, which is not a model of ours"):
        load(tmp_path)
