"""Exported folders: complete wherever they are, the same each time, and what others read of them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from nemo.collections.common.tokenizers import AutoTokenizer as NemoTokenizer
from nemo.collections.speechlm2.models import SALM
from omegaconf import OmegaConf
from transformers import AutoFeatureExtractor, AutoTokenizer, GenerationConfig

from nemo_emmett import plugin
from nemo_emmett.errors import ModelError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT, load
from nemo_emmett.models.artifacts import preprocessor_settings
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.models.perception import read_asr_config
from nemo_emmett.prompts.families import prompt_formatter
from nemo_emmett.prompts.instruction import translation_turns
from nemo_emmett.prompts.markup import Markup, Prompt

from ..conftest import perception_config
from ..fork_server import call_in_new_process
from .backbones import DECODER_ONLY, PROMPT_FORMAT, model_config
from .batches import prompted_batch, with_recordings

LOCATOR = "<|audio|>"

OURS = "nemo_emmett.modules.modality_adapters"
QUERIES = {"prompt_size": 3, "target_layer_ids": [0], "qformer_num_hidden_layers": 1}
ADAPTERS = {
    "identity": perception_config()["modality_adapter"],
    "mlp": {"_target_": f"{OURS}.MLPConnector", "input_dim": 32, "output_dim": None, "subsampling_factor": 2},
    "qformer": {
        "_target_": f"{OURS}.QFormer",
        **QUERIES,
        "encoder_config": {"d_model": 32, "encoder_attention_heads": 4},
        "output_dim": None,
    },
}
FAMILIES = {
    **dict.fromkeys(DECODER_ONLY, SALMGPT),
    **dict.fromkeys(("t5", "mt5", "nllb", "m2m100", "mbart50"), SALMT5),
}
KINDS: dict[str, tuple[type[SpeechTextModel], str, str | None]] = {
    **{f"{name}, {adapter}": (SALMGPT, name, adapter) for name in DECODER_ONLY for adapter in ("identity", "mlp")},
    **{f"{name}, qformer": (SALMGPT, name, "qformer") for name in ("llama", "qwen3", "gemma3")},
    **{f"{name}, identity": (SALMT5, name, "identity") for name, kind in FAMILIES.items() if kind is SALMT5},
    "BESTOW-GPT, llama3": (BestowGPT, "llama3", "identity"),
    "BESTOW-GPT, gemma2": (BestowGPT, "gemma2", "mlp"),
    "text alone": (SALMGPT, "qwen2", None),
    "no pretrained encoder": (SALMGPT, "qwen3", "of its own"),
}


def section(name: str, adapter: str | None, folder: Path, asr: Path) -> dict[str, Any]:
    config = model_config(name, folder, asr if adapter in ADAPTERS else None, max_new_tokens=6)
    if adapter in ADAPTERS:
        config["perception"] = {"modality_adapter": ADAPTERS[adapter]}
    elif adapter is not None:
        parts = read_asr_config(str(asr))
        config["perception"] = {**perception_config(), "output_dim": 32}
        config["perception"] |= {part: parts[part] for part in ("preprocessor", "encoder")}
        config["pretrained_weights"] = False
    return config


@torch.no_grad()
def outputs(model: SpeechTextModel) -> list[torch.Tensor]:
    """Logits of text and speech."""
    batches = [prompted_batch(model, ["one red house", "four old doors?"], ["ein rotes haus", "vier türen"])]
    if model.perception is not None:
        batches.append(with_recordings(model, prompted_batch(model, [LOCATOR], ["ein rotes haus"]), [0.7]))
    return [model(batch)[0] for batch in batches]


@pytest.fixture(scope="module")
def moved(tiny_asr, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """An export of each kind, moved and made read-only (``folder``), and the outputs of the models that were exported;
    what they were made from is gone."""
    plugin.register()
    origin = tmp_path_factory.mktemp("origin")
    asr = shutil.copy(tiny_asr, origin / "encoder.nemo")
    expected = {}
    with tempfile.TemporaryDirectory() as elsewhere:
        home = Path(elsewhere, "my models – Übersetzer 翻訳 #1 100%")
        for kind, (model_class, name, adapter) in KINDS.items():
            torch.manual_seed(0)
            layers = {"cross_attention": {"num_layers": 1, "num_heads": 4, "width": 24}}
            options = layers if model_class is BestowGPT else {}
            model = model_class(section(name, adapter, origin, asr) | options).eval()
            model.save_pretrained(origin / "exports" / kind)
            expected[kind] = outputs(model)
        shutil.move(origin / "exports", home)
        shutil.rmtree(origin)
        for path in [*home.rglob("*"), home]:
            path.chmod(path.stat().st_mode & ~0o222)
        yield SimpleNamespace(home=home, folder=home.__truediv__, outputs=expected)
        for path in [home, *home.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)


def load_all(home: str) -> SimpleNamespace:
    """The outputs of the exports of a folder, loaded without the rights of root, a cache or a network, and the network
    addresses that were asked for."""
    if os.getuid() == 0:  # else it could write to what is read-only
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, nothing) == 0
        with pytest.raises(PermissionError):
            Path(home, "new").mkdir()
    asked: list[Any] = []

    def ask(*address: Any, **_: Any) -> None:
        asked.append(address)
        raise OSError("there is no network")

    socket.socket.connect = socket.getaddrinfo = ask
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    huggingface_hub.constants.HF_HUB_CACHE = "/nowhere"
    plugin.register()
    folders = sorted(Path(home).iterdir())
    return SimpleNamespace(outputs={folder.name: outputs(load(folder)) for folder in folders}, asked=asked)


@pytest.fixture(scope="module")
def loaded(moved) -> SimpleNamespace:
    return call_in_new_process(load_all, str(moved.home))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_was_moved_and_is_read_only_gives_what_the_model_gave(moved, loaded, kind) -> None:
    for expected, got in zip(moved.outputs[kind], loaded.outputs[kind], strict=True):
        assert torch.equal(got, expected)


def test_loading_asks_no_network(loaded) -> None:
    assert loaded.asked == []


# What other programs read.

ENDS = {
    "llama": ["</s>"],
    "llama3": ["<|eot_id|>"],
    "mistral": ["</s>"],
    "qwen2": ["<|im_end|>"],
    "qwen3": ["<|im_end|>"],
    **{name: ["<eos>", "<end_of_turn>"] for name in ("gemma", "gemma2", "gemma3")},
    **{name: ["</s>"] for name, kind in FAMILIES.items() if kind is SALMT5},
}
"""The tokens that end an answer."""


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_defaults_are_those_of_translate(moved, name) -> None:
    folder = moved.folder(f"{name}, identity")
    tokenizer, defaults = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(defaults.eos_token_id) == ENDS[name]
    assert (defaults.max_new_tokens, defaults.do_sample, defaults.temperature) == (6, False, 0.0)
    pads = [number for number in (tokenizer.pad_token_id, tokenizer.unk_token_id, 0) if number is not None]
    assert defaults.pad_token_id == pads[0]
    assert (defaults.decoder_start_token_id is not None) == (FAMILIES[name] is SALMT5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_chat_template_of_an_export_has_the_ids_of_its_prompt_format(moved, name) -> None:
    folder = moved.folder(f"{name}, identity")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if FAMILIES[name] is SALMT5:
        assert tokenizer.chat_template is None
        return
    formatter = prompt_formatter(PROMPT_FORMAT[name], NemoTokenizer(str(folder), use_fast=True))
    for message in (Prompt(["drei grüne Bäume"]), Markup(LOCATOR)):
        expected = formatter.encode_dialog(translation_turns(formatter, message, "de", "en"))["context_ids"]
        asked = [{"role": "user", "content": f"Translate from English to German: {message}"}]
        got = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert got == expected.tolist()


def test_preprocessor_settings_give_transformers_the_same_features(moved) -> None:
    folder = moved.folder("qwen2, mlp")
    extractor, perception = AutoFeatureExtractor.from_pretrained(folder), load(folder).perception
    samples = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0)) * 0.1
    lens = torch.tensor([9000, 6000])
    expected, frames = perception.preprocessor(input_signal=samples, length=lens)
    recordings = [row[:n].numpy() for row, n in zip(samples, lens, strict=True)]
    got = extractor(recordings, sampling_rate=16000, return_tensors="pt")
    assert got["attention_mask"].sum(1).equal(frames)
    torch.testing.assert_close(got["input_features"].mT, expected, rtol=1e-3, atol=1e-3)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["seconds_per_token"] == pytest.approx(0.01 * 8 * 2)
    assert settings["audio_token"] == LOCATOR


def test_other_features_than_those_of_transformers_are_not_said_to_be_the_same(moved) -> None:
    config = json.loads(moved.folder("qwen2, mlp").joinpath("config.json").read_text())
    perception = load(moved.folder("qwen2, mlp")).perception
    assert "feature_extractor_type" in preprocessor_settings(perception, config)
    for key, value in (("normalize", "all_features"), ("window", "hamming"), ("_target_", "nemo.x.Other")):
        changed = config["perception"] | {"preprocessor": config["perception"]["preprocessor"] | {key: value}}
        assert "feature_extractor_type" not in preprocessor_settings(perception, config | {"perception": changed})


def test_a_model_of_text_alone_has_no_preprocessor(moved) -> None:
    assert not moved.folder("text alone").joinpath("preprocessor_config.json").exists()


# Whole folders.

WHOLE = ("qwen3, qformer", "m2m100, identity", "BESTOW-GPT, gemma2")
"""With a fast tokenizer, one of SentencePiece, and weights of cross-attention."""


@pytest.fixture
def copied(moved, tmp_path) -> Callable[[str], Path]:
    """A copy of an export that a test may change."""

    def copy(kind: str) -> Path:
        folder = shutil.copytree(moved.folder(kind), tmp_path / "model")
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
        return folder

    return copy


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [Path.unlink, cut_in_half, Path.touch], ids=["missing", "cut", "emptied"])
@pytest.mark.parametrize("kind", WHOLE)
def test_a_folder_with_a_damaged_file_is_refused_by_its_name_or_gives_the_same(moved, copied, kind, damage) -> None:
    whole = copied(kind)
    refused, loaded = {}, set()
    for path in [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]:
        content = (whole / path).read_bytes()
        if damage is Path.touch:
            (whole / path).unlink()
        damage(whole / path)
        try:
            results = outputs(load(whole))
        except ModelError as error:
            refused[path.as_posix()] = str(error)
        else:
            assert all(map(torch.equal, results, moved.outputs[kind])), path
            loaded.add(path.as_posix())
        (whole / path).write_bytes(content)
    assert loaded <= {"README.md", "chat_template.jinja", "generation_config.json", "preprocessor_config.json"}
    for name, sentence in refused.items():
        assert name in sentence
        assert re.search(r"copy the folder again|name the folder", sentence)
        assert "\n" not in sentence
    assert refused.keys() >= {"config.json", "model.safetensors", "llm_backbone/config.json", "tokenizer_config.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", "llm_backbone/config.json"])
def test_a_damaged_file_of_an_earlier_export_is_found_without_its_size(copied, name) -> None:
    folder = copied("qwen3, qformer")
    config = json.loads((folder / "config.json").read_text())
    del config["files"]
    (folder / "config.json").write_text(json.dumps(config))
    load(folder)
    cut_in_half(folder / name)
    with pytest.raises(ModelError, match=f"'{folder / name}' is damaged"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"'{folder}' has no {name}, so it is no complete export"):
        load(folder)


def test_what_is_not_read_may_be_changed(moved, copied) -> None:
    folder = copied("qwen3, qformer")
    for name in ("README.md", "chat_template.jinja"):
        (folder / name).write_text("Of my own.")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 9}))
    (folder / "notes.txt").write_text("x")
    assert torch.equal(outputs(load(folder))[0], moved.outputs["qwen3, qformer"][0])


@pytest.mark.parametrize("name", ["model_type", "num_attention_heads", "hidden_act", "hidden_size", "layer_types"])
def test_a_config_of_no_language_model_gets_one_sentence(copied, name) -> None:
    folder = copied("qwen3, qformer")
    path = folder / "llm_backbone" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "other"}))
    config = json.loads((folder / "config.json").read_text())
    del config["files"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"'{path.parent}'") as error:
        load(folder)
    assert "\n" not in str(error.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", WHOLE)
def test_exporting_twice_gives_the_same_bytes(moved, tmp_path, kind) -> None:
    model = load(moved.folder(kind))
    model.save_pretrained(tmp_path / "one" / "model")
    model.translate(["one red house"], "en", "de", max_new_tokens=2)
    model.tokenizer.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    model.save_pretrained(tmp_path / "two" / "model")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    model = load(tmp_path / "two" / "model")
    model.save_pretrained(tmp_path / "three" / "model")
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_an_export_leaves_no_file_of_the_one_before(moved, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for kind in ("m2m100, identity", "qwen3, qformer", "t5, identity", "text alone"):
        load(moved.folder(kind)).save_pretrained(tmp_path)
        assert contents(tmp_path).keys() == contents(moved.folder(kind)).keys() | {"mine.txt"}


# NeMo's own SALM, and its plugin for vLLM.


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_nemos_salm_reads_a_folder_that_was_moved(moved, name) -> None:
    kind = f"{name}, mlp"
    theirs = SALM.from_pretrained(str(moved.folder(kind))).eval()
    ours = SALMGPT(OmegaConf.to_container(theirs.cfg), for_loading=True).eval()
    ours.load_state_dict(theirs.state_dict())
    for expected, got in zip(moved.outputs[kind], outputs(ours), strict=True):
        assert torch.equal(got, expected)
