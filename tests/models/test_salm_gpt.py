"""SALMGPT compared with NeMo's SALM: the same weights give the same numbers."""

import json
import logging

import pytest
import torch
from lhotse import CutSet, SupervisionSegment
from lhotse.testing.dummies import dummy_cut, dummy_recording
from lightning.pytorch import Trainer
from nemo.collections.common.data.lhotse import NeMoMultimodalConversation
from nemo.collections.common.data.lhotse.text_adapters import AudioTurn, TextTurn
from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.speechlm2.data import SALMDataset
from nemo.collections.speechlm2.models import SALM
from omegaconf import OmegaConf
from transformers import GenerationConfig

from nemo_emmett.errors import ConfigError, DataError, ModelError
from nemo_emmett.exporting import export_checkpoint
from nemo_emmett.models import SALMGPT, SALMT5, load
from nemo_emmett.modules.batch import split_modalities
from nemo_emmett.modules.loss import IGNORE_INDEX

from ..conftest import write_tone
from .backbones import backbone, model_config

LOCATOR = "<|audio|>"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "llama": {},
    "qwen2, tied embeddings": {},
    "gemma2, soft caps": {},
    "llama with LoRA": {"lora": LORA, "freeze_params": [r"^llm\..+$"], "prevent_freeze_params": []},
    "llama, audio in chunks": {"encoder_chunk_size_seconds": 0.3},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, folder, tiny_asr):
    """NeMo's SALM, and ours with its weights."""
    torch.manual_seed(0)
    section = model_config(request.param.split()[0].strip(","), folder, tiny_asr, **KINDS[request.param])
    section |= {"audio_locator_tag": LOCATOR, "pretrained_weights": True, "prompt_format": "llama2"}
    theirs, ours = SALM(json.loads(json.dumps(section))).eval(), SALMGPT(section).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:  # they begin at zero
            torch.nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture
def model(folder, tiny_asr):
    return SALMGPT(model_config("llama", folder, tiny_asr)).eval()


def flat_batch(model, turns=1) -> dict:
    """NeMo's: padded on the left; two recordings in one row, one in the next, none in the last."""
    generator = torch.Generator().manual_seed(1)
    locator = model.audio_locator_tag_id
    rows, masks = [], []
    for recordings, context, answer in ((2, 5, 3), (1, 4, 6), (0, 9, 2)):
        ids, mask = [], []
        for turn in range(turns):
            words = torch.randint(10, 60, (context + answer,), generator=generator).tolist()
            here = [locator] * recordings if turn == 0 else []
            ids += words[:2] + here + words[2:]
            mask += [False] * (context + len(here)) + [True] * answer
        rows.append(ids)
        masks.append(mask)
    width = max(map(len, rows))
    pad = model.text_pad_id
    samples = torch.randn(3, 12000, generator=generator) * 0.1
    return {
        "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids in rows]),
        "loss_mask": torch.tensor([[False] * (width - len(mask)) + mask for mask in masks]),
        "audios": samples,
        "audio_lens": torch.tensor([12000, 8000, 10000]),
    }


def logits_of_theirs(theirs: SALM, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, V) logits where there is a target, and the targets, row by row."""
    inputs = theirs.prepare_inputs(batch)
    said = theirs(inputs["input_embeds"], attention_mask=inputs["attention_mask"])["logits"]
    has_target = inputs["target_ids"] != IGNORE_INDEX
    return said[has_target], inputs["target_ids"][has_target]


def logits_of_ours(ours: SALMGPT, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    (part,) = split_modalities(batch, ours.pad_id).values()
    logits, targets = ours(part)
    has_target = targets != IGNORE_INDEX
    return logits[has_target], targets[has_target]


@torch.no_grad()
def assert_same(theirs: SALM, ours: SALMGPT, turns: int = 1) -> None:
    batch = flat_batch(theirs, turns)
    for expected, got in zip(logits_of_theirs(theirs, batch), logits_of_ours(ours, batch), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# Exchange.


def test_parameters_have_nemos_names_and_logits_are_nemos(pair):
    theirs, ours = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(theirs, ours)


def test_every_turn_of_a_conversation_is_trained_on_as_nemo_does(pair):
    theirs, ours = pair
    assert_same(theirs, ours, turns=3)


@pytest.mark.filterwarnings("ignore")
def test_the_loss_and_every_gradient_are_nemos(pair):
    theirs, ours = pair
    batch = flat_batch(theirs, turns=2)
    logits, targets = logits_of_theirs(theirs, batch)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    ours.log = lambda *_, **__: None
    got = ours.training_step(batch, 0)["loss"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    theirs.zero_grad()
    ours.zero_grad()
    expected.backward()
    got.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if gradients[name].grad is not None or parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_prepare_inputs_is_nemos(pair):
    theirs, ours = pair
    batch = flat_batch(theirs, turns=2)
    expected, got = theirs.prepare_inputs(batch), ours.prepare_inputs(batch)
    assert got["attention_mask"].equal(expected["attention_mask"])
    assert got["target_ids"].equal(expected["target_ids"])
    torch.testing.assert_close(got["input_embeds"], expected["input_embeds"], rtol=1e-4, atol=1e-5)


def test_a_folder_of_nemos_becomes_ours(pair, tmp_path):
    theirs, _ = pair
    theirs.save_pretrained(tmp_path / "plain")
    assert_same(theirs, load(tmp_path / "plain"))


@pytest.mark.parametrize(
    "target", [{}, {"_target_": "nemo.collections.speechlm2.models.SALM"}, {"_target_": "salm_gpt"}]
)
def test_a_checkpoint_of_nemos_becomes_a_folder(pair, tmp_path, target):
    theirs, ours = pair
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "nemo.ckpt")
    section = OmegaConf.to_container(ours.cfg) | target
    export_checkpoint(tmp_path / "nemo.ckpt", tmp_path / "model", OmegaConf.create({"model": section}))
    assert_same(theirs, load(tmp_path / "model"))


def test_a_folder_as_nemos_export_script_writes_it_becomes_ours(pair, tmp_path):
    theirs, _ = pair
    write_as_to_hf(theirs, tmp_path)
    assert_same(theirs, load(tmp_path))


def write_as_to_hf(salm: SALM, folder) -> None:
    """The layout of NeMo 3.0.0's examples/speechlm2/to_hf.py: the language model's config apart, the tokenizer next to
    the weights, its special tokens as a dict."""
    salm.cfg.pretrained_weights = False
    salm.save_pretrained(folder)
    salm.llm.config.save_pretrained(folder / "llm_backbone")
    salm.tokenizer.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"extra_special_tokens": {"audio_token": LOCATOR}, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_a_folder_of_ours_becomes_nemos(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path)
    assert_same(SALM.from_pretrained(str(tmp_path)).eval(), ours)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nemo_emmett"


def test_lightning_checkpoints_are_exchanged(pair, tmp_path):
    theirs, ours = pair
    for model, other in ((theirs, SALMGPT), (ours, SALM)):
        path = tmp_path / f"{type(model).__name__}.ckpt"
        trainer = Trainer(logger=False, accelerator="cpu", max_steps=1, enable_progress_bar=False)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(path)
        loaded = other.load_from_checkpoint(path, map_location="cpu").eval()
        assert_same(theirs, loaded) if other is SALMGPT else assert_same(loaded, ours)


# NeMo's own unit tests of SALM, with local models.


@pytest.fixture
def conversation():
    cut = dummy_cut(0, recording=dummy_recording(0, with_data=True))
    cut.supervisions = [SupervisionSegment(cut.id, cut.recording_id, start=0, duration=1.0, text="ein rotes haus")]
    turns = [
        TextTurn(role="user", value="Repeat after me:"),
        AudioTurn(role="user", cut=cut, audio_locator_tag=LOCATOR),
        TextTurn(role="assistant", value=cut.supervisions[0].text),
    ]
    return CutSet([NeMoMultimodalConversation(id="0", turns=turns, token_equivalent_duration=0.08)])


@pytest.fixture
def nemo_batch(model, conversation):
    formatter = PromptFormatter.resolve("llama2")(model.tokenizer)
    return SALMDataset(model.tokenizer)[conversation.map(lambda c: c.apply_prompt_format(formatter), apply_fn=None)]


def test_training_step_of_nemos_dataset(model, nemo_batch):
    model.log = lambda *_, **__: None
    loss = model.training_step(nemo_batch, batch_idx=0)["loss"]
    assert torch.isfinite(loss)
    assert loss > 0


def test_validation_step_of_nemos_dataset(model, nemo_batch):
    model.on_validation_epoch_start()
    assert model.validation_step({"dummy_val_set": nemo_batch}, batch_idx=0) is None
    (tally,) = model._tallies.values()
    assert tally.num_tokens == nemo_batch["loss_mask"].sum()


def assert_ids(model, answer, shape):
    assert answer.shape == shape
    assert answer.dtype == torch.long
    assert (answer >= 0).all()
    assert (answer < model.text_vocab_size).all()


def test_generation_from_a_conversation_and_tensors(model):
    turns = [{"role": "user", "slots": {"message": f"Repeat after me: {LOCATOR}"}}]
    audio = {"audios": torch.randn(1, 16000), "audio_lens": torch.tensor([16000])}
    assert_ids(model, model.generate([turns], **audio, max_new_tokens=4, min_new_tokens=4), (1, 4))


def test_generation_from_files_named_in_conversations(model, tmp_path):
    path = write_tone(tmp_path / "audio.wav", 0.5)
    prompts = [
        [{"role": "user", "content": f"Repeat after me: {LOCATOR}", "audio": [path]}],
        [{"role": "user", "content": f"Repeat after me: {LOCATOR} and {LOCATOR}", "audio": [path, path]}],
    ]
    answer = model.generate(prompts, generation_config=GenerationConfig(max_new_tokens=4, min_new_tokens=4))
    assert_ids(model, answer, (2, 4))


def test_generation_from_prompts_as_a_tensor(model):
    prompts = torch.tensor([[1, 4, 5, 6, 7, model.audio_locator_tag_id]])
    audio = {"audios": torch.randn(1, 16000), "audio_lens": torch.tensor([16000])}
    assert_ids(model, model.generate(prompts, **audio, max_new_tokens=4, min_new_tokens=4), (1, 4))


# Text, which NeMo's SALM has no way for.


@torch.no_grad()
def test_a_text_batch_gives_what_the_language_model_alone_gives(model):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
    batch = {
        "context_ids": ids[:, :3],
        "context_lens": torch.tensor([3, 2]),
        "answer_ids": torch.tensor([[8, 9, 10], [13, 14, 0]]),
        "answer_lens": torch.tensor([3, 2]),
    }
    logits, targets = model(batch)
    whole = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
    for row, ids_of_row in enumerate(whole):
        alone = model.llm(inputs_embeds=model.embed_tokens(torch.tensor([ids_of_row]))).logits[0]
        context = batch["context_lens"][row]
        answer = batch["answer_lens"][row]
        torch.testing.assert_close(logits[row, :answer], alone[context - 1 : context - 1 + answer])
        assert targets[row, :answer].tolist() == ids_of_row[context:]


# Wrong use.


def test_an_encoder_decoder_is_refused(folder, tiny_asr):
    section = model_config("llama", folder, tiny_asr) | {"pretrained_llm": str(backbone("t5", folder))}
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\), but SALMGPT is built on a decoder-only model"):
        SALMGPT(section)


def test_a_decoder_only_model_is_refused_by_salm_t5(folder, tiny_asr):
    with pytest.raises(ModelError, match=r"is a decoder-only model \(llama\), but SALMT5 is built on"):
        SALMT5(model_config("llama", folder, tiny_asr))


def test_an_unknown_target_of_lora_is_told_with_the_layers_there_are(folder, tiny_asr):
    with pytest.raises(ConfigError, match=r"model.lora: .*quary_proj.*down_proj, gate_proj, k_proj"):
        SALMGPT(model_config("llama", folder, tiny_asr, lora={"target_modules": ["quary_proj"]}))


def test_a_locator_without_a_recording_is_told_with_both_counts(model):
    batch = flat_batch(model)
    batch["audios"], batch["audio_lens"] = batch["audios"][:2], batch["audio_lens"][:2]
    with pytest.raises(DataError, match="2 recordings but 3 audio locator tokens"):
        logits_of_ours(model, batch)


def test_a_checkpoint_of_another_shape_is_told_by_its_first_parameter(model):
    weights = model.state_dict() | {"embed_tokens.weight": torch.zeros(7, 32)}
    with pytest.raises(ModelError, match=r"'embed_tokens.weight' has the shape \(7, 32\)"):
        model.load_state_dict(weights)


def test_a_folder_whose_weights_are_incomplete_is_told(model, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["llm.model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"files": None}))
    for load_it in (load, SALMGPT.from_pretrained):
        with pytest.raises(ModelError, match=r"lacks 'llm\.model\.norm\.weight'"):
            load_it(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load(tmp_path)


def test_activation_checkpointing_gives_frozen_embeddings_no_gradient(folder, tiny_asr, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = SALMGPT(model_config("llama", folder, tiny_asr, activation_checkpointing=True, freeze=["llm"])).train()
    assert not [record.message for record in caplog.records if "input embeddings" in record.message]
    assert model.llm.model.layers[0].gradient_checkpointing
    model.configure_optimizers()
    # Otherwise text, of which nothing is learned then, would pass through the whole backward pass.
    assert not model.embed(torch.tensor([[5, 6]])).requires_grad


def test_a_config_that_is_given_to_the_export_is_completed(model, tmp_path) -> None:
    """NeMo's ``to_hf.py`` gives the model's config with the type of the weights in it."""
    given = OmegaConf.to_container(model.cfg) | {"dtype": "float32", "trust_remote_code": True}
    model.save_pretrained(tmp_path, config=given)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert written["_target_"] == "nemo_emmett.models.salm_gpt.SALMGPT"
    assert "trust_remote_code" not in written
    again = load(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
