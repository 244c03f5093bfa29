"""A training that starts from a checkpoint: with NeMo's keys, and with the weights that NeMo's SALM has by them."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from nemo.collections.speechlm2.models import SALM

from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT, load
from nemo_emmett.models.checkpoint import read_weights
from nemo_emmett.planning.architecture import architecture_only

from .backbones import HIDDEN, model_config

MODELS = {"t5": SALMT5, "t5v1_1": SALMT5, "llama": SALMGPT, "qwen2": BestowGPT}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
FORMS = ("file", "folder", "distributed")


def build(name, folder, asr, seed=0, model=None, **keys):
    torch.manual_seed(seed)
    return (model or MODELS[name])(model_config(name, folder, asr, **keys))


def changed(model):
    """Every weight has a value that no freshly built model has."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    return model


def write(model, path, form):
    """A checkpoint in one of the forms that NeMo's key takes."""
    if form == "file":
        torch.save({"state_dict": model.state_dict(), "optimizer_states": [{"step": torch.tensor(3)}]}, path)
    elif form == "folder":
        model.save_pretrained(path)
    else:
        content = {"state_dict": model.state_dict(), "optimizer_0": {"step": torch.tensor(3)}, "global_step": 7}
        distributed_checkpoint.save(content, checkpoint_id=str(path), no_dist=True)
    return str(path)


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


@pytest.fixture(scope="module")
def salm(folder, tiny_asr):
    """The section of NeMo's SALM, and one with weights of its own."""
    section = model_config("llama", folder, tiny_asr) | {
        "audio_locator_tag": "<|audio|>",
        "pretrained_weights": True,
        "prompt_format": "llama2",
    }
    return section, changed(SALM(json.loads(json.dumps(section))))


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_nemos_salm_by_the_same_key(form, salm, tmp_path):
    section, source = salm
    path = tmp_path / "checkpoint"
    written = write(source, path, form)
    theirs = SALM(json.loads(json.dumps(section | {"init_from_checkpoint": written})))
    ours = SALMGPT(section | {"init_from_checkpoint": written})
    assert_equal(theirs.state_dict(), source.state_dict())
    assert_equal(ours.state_dict(), theirs.state_dict())


def test_nemos_older_keys(salm, tmp_path):
    section, source = salm
    path = write(source, tmp_path / "a.ckpt", "file")
    ours = SALMGPT(section | {"pretrained_s2s_model": path, "incremental_loading": True})
    assert_equal(ours.state_dict(), source.state_dict())

    key = {"pretrained_perception_from_s2s": path}
    theirs, ours = SALM(json.loads(json.dumps(section | key))), SALMGPT(section | key)
    assert_equal(ours.state_dict(), theirs.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value) == (name.startswith("perception.") or not value.numel())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_starts_from_every_form(name, form, folder, tiny_asr, tmp_path):
    source = changed(build(name, folder, tiny_asr))
    path = write(source, tmp_path / "checkpoint", form)
    started = build(name, folder, tiny_asr, seed=1, init_from_checkpoint=path)
    assert_equal(started.state_dict(), source.state_dict())


def test_speech_encoder_and_adapter_of_another_kind_of_model(folder, tiny_asr, tmp_path):
    source = changed(build("llama", folder, tiny_asr))
    path = write(source, tmp_path / "a.ckpt", "file")
    started = build("t5", folder, tiny_asr, pretrained_perception_from_s2s=path)
    assert_equal(started.perception.state_dict(), source.perception.state_dict())
    assert_equal(started.llm.state_dict(), build("t5", folder, tiny_asr).llm.state_dict())


# LoRA, tied weights, resized tables.


@pytest.mark.parametrize("name", ["t5", "llama", "qwen2"])
def test_lora_starts_from_a_checkpoint_without_it(name, folder, tiny_asr, tmp_path):
    lora = LORA | {"target_modules": "all-linear"}
    source = changed(build(name, folder, tiny_asr))
    started = build(name, folder, tiny_asr, lora=lora, init_from_checkpoint=write(source, tmp_path / "a.ckpt", "file"))
    expected = build(name, folder, tiny_asr, lora=lora).state_dict()
    plain = dict(source.state_dict())
    for key, value in started.state_dict().items():
        if ".lora_" in key:
            assert torch.equal(value, expected[key])
        else:
            source_name = key.replace("base_model.model.", "").replace("base_layer.", "")
            assert torch.equal(value, plain.pop(source_name)), key
    assert not plain


def test_lora_starts_from_a_checkpoint_with_it_as_in_nemo(salm, tmp_path):
    section = salm[0] | {"lora": LORA | {"task_type": "CAUSAL_LM"}, "prevent_freeze_params": []}
    source = changed(SALM(json.loads(json.dumps(section))))
    path = write(source, tmp_path / "a.ckpt", "file")
    theirs = SALM(json.loads(json.dumps(section | {"init_from_checkpoint": path})))
    assert_equal(SALMGPT(section | {"init_from_checkpoint": path}).state_dict(), theirs.state_dict())


def test_of_tied_weights_one_is_enough(folder, tiny_asr, tmp_path):
    source = changed(build("qwen2", folder, tiny_asr, model=SALMGPT))
    path = write(source, tmp_path / "exported", "folder")
    held = read_weights(write(source, tmp_path / "a.ckpt", "file"))
    started = build("qwen2", folder, tiny_asr, seed=1, model=SALMGPT, init_from_checkpoint=path)
    assert_equal(started.state_dict(), held)
    assert started.llm.lm_head.weight is started.embed_tokens.weight


def test_two_values_for_tied_weights_are_refused(folder, tiny_asr, tmp_path):
    source = build("qwen2", folder, tiny_asr, model=SALMGPT)
    weights = {name: value.clone() for name, value in source.state_dict().items()}
    weights["llm.lm_head.weight"] += 1
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match=r"init_from_checkpoint: .*'llm\.lm_head\.weight'.* differ there and are one"):
        build("qwen2", folder, tiny_asr, model=SALMGPT, init_from_checkpoint=str(tmp_path / "a.ckpt"))


def test_a_resized_table_starts_from_a_checkpoint_of_its_size_only(folder, tmp_path):
    small = model_config("qwen2", folder)
    table = build("qwen2", folder, None, model=SALMGPT).embed_tokens.num_embeddings
    source = SALMGPT(small)
    weights = {
        name: torch.cat([value, value[:2]]) if value.shape[:1] == (table,) else value
        for name, value in source.state_dict().items()
    }
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    with pytest.raises(ModelError) as refused:
        SALMGPT(small | {"init_from_checkpoint": str(tmp_path / "a.ckpt")})
    assert f"has the shape {(table + 2, HIDDEN)}, this model's {(table, HIDDEN)}" in str(refused.value)
    assert "model.tokenizer_path, and model.resize_token_embeddings: true" in str(refused.value)


# What comes out does not depend on where it came from.


def test_a_trained_model_is_loaded_without_the_checkpoint_it_started_from(salm, tmp_path):
    section, source = salm
    path = write(source, tmp_path / "a.ckpt", "file")
    started = changed(SALMGPT(section | {"init_from_checkpoint": path}))
    theirs = SALM(json.loads(json.dumps(section | {"init_from_checkpoint": path})))
    started.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for model, name in ((started, "ours"), (theirs, "theirs")):
        hyper_parameters = {"cfg": dict(model.hparams["cfg"])}
        content = {"state_dict": model.state_dict(), "hyper_parameters": hyper_parameters, "loops": {}}
        torch.save(content | {"pytorch-lightning_version": "2.4.0"}, tmp_path / f"{name}.ckpt")
    (tmp_path / "a.ckpt").unlink()
    assert "init_from_checkpoint" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    for model, name in ((started, "ours"), (theirs, "theirs")):
        assert_equal(load(tmp_path / name).state_dict(), model.state_dict())
        assert_equal(SALMGPT.load_from_checkpoint(tmp_path / f"{name}.ckpt").state_dict(), model.state_dict())
    assert_equal(SALM.from_pretrained(str(tmp_path / "ours")).state_dict(), started.state_dict())


def test_a_plan_reads_no_checkpoint(salm):
    section = architecture_only(salm[0] | {"init_from_checkpoint": "/nowhere.ckpt"})
    assert "init_from_checkpoint" not in section


# Mistakes.


@pytest.fixture(scope="module")
def checkpoint(folder, tiny_asr, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "llama.ckpt"
    return write(build("llama", folder, tiny_asr), path, "file")


def refusal(name, folder, asr, **keys) -> str:
    with pytest.raises((ModelError, ConfigError)) as refused:
        build(name, folder, asr, **keys)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_does_not_fit_gets_one_sentence(checkpoint, folder, tiny_asr, tmp_path):
    weights = read_weights(checkpoint)

    def with_weights(**changes) -> str:
        torch.save({"state_dict": {k: v for k, v in (weights | changes).items() if v is not None}}, tmp_path / "a.ckpt")
        return refusal("llama", folder, tiny_asr, init_from_checkpoint=str(tmp_path / "a.ckpt"))

    name = "perception.proj.weight"
    said = with_weights(**{name: None})
    assert said.startswith(
        f"model.init_from_checkpoint: '{tmp_path / 'a.ckpt'}' is not of this model: it lacks '{name}'"
    )
    assert f"it holds '{name}2', which this model does not have" in with_weights(**{f"{name}2": weights[name]})
    assert f"its '{name}' has the shape (3, 32), this model's (32, 32)" in with_weights(**{name: weights[name][:3]})
    # As many values in another shape, which NeMo takes for a fit.
    assert f"its '{name}' has the shape (16, 64)" in with_weights(**{name: weights[name].reshape(16, 64)})
    adapter = "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert "it holds LoRA adapters" in with_weights(**{adapter: weights[name]})
    assert "pretrained_perception_from_s2s" in refusal("t5", folder, tiny_asr, init_from_checkpoint=checkpoint)
    assert "lacks 'cross_attention." in refusal(
        "llama", folder, tiny_asr, model=BestowGPT, init_from_checkpoint=checkpoint
    )
    assert "this model reads text only" in refusal("llama", folder, None, pretrained_perception_from_s2s=checkpoint)


def test_lora_of_another_rank_is_named(salm, tmp_path):
    section = salm[0] | {"lora": LORA, "prevent_freeze_params": []}
    path = write(SALMGPT(section), tmp_path / "a.ckpt", "file")
    with pytest.raises(ModelError, match=r"lora_A.* has the shape \(2, 32\).*give the model\.lora of its training"):
        SALMGPT(section | {"lora": LORA | {"r": 4}, "init_from_checkpoint": path})


def test_what_cannot_be_read_gets_one_sentence(checkpoint, folder, tmp_path):
    def of(path) -> str:
        return refusal("llama", folder, None, init_from_checkpoint=path)

    assert of(str(tmp_path / "nowhere.ckpt")).startswith("model.init_from_checkpoint: there is no checkpoint '")
    assert of(3).startswith("model.init_from_checkpoint: 3 cannot be used; give a text")
    assert "is no distributed checkpoint" in of(str(tmp_path))
    (tmp_path / "torn.ckpt").write_bytes(Path(checkpoint).read_bytes()[:1000])
    assert "cannot be read as a checkpoint" in of(str(tmp_path / "torn.ckpt"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    assert f"'{tmp_path / 'torn' / 'model.safetensors'}' cannot be read" in of(str(tmp_path / "torn"))
    torch.save({"epoch": 3}, tmp_path / "other.ckpt")
    assert "holds no 'state_dict'" in of(str(tmp_path / "other.ckpt"))


class Runs:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("place", ["file", "metadata", "entry"])
def test_a_checkpoint_runs_nothing_unless_it_is_trusted(place, salm, tmp_path):
    section, source = salm
    ran, path = tmp_path / "ran", tmp_path / "checkpoint"
    if place == "file":
        torch.save({"state_dict": source.state_dict(), "more": Runs(ran)}, path)
    elif place == "entry":
        content = {"state_dict": source.state_dict() | {"more": {"odd"}}}
        distributed_checkpoint.save(content, checkpoint_id=str(path), no_dist=True)
    else:
        write(source, path, "distributed")
        metadata = pickle.loads((path / ".metadata").read_bytes())
        metadata.planner_data = {**metadata.planner_data, "more": Runs(ran)}
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ModelError, match=r"model\.trust_remote_code: true|trust_remote_code=True"):
        SALMGPT(section | {"init_from_checkpoint": str(path)})
    assert not ran.exists()
    if place != "entry":
        trusted = SALMGPT(section | {"init_from_checkpoint": str(path), "trust_remote_code": True})
        assert ran.exists()
        assert_equal(trusted.state_dict(), source.state_dict())
