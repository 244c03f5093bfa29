"""Every file of an exported folder: what could run code in it is refused in one sentence, or not read.

``test_models.py`` has the same for ``_target_`` and ``trust_remote_code`` in each place of ``config.json``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import jinja2
import pytest
import torch
from transformers import AutoTokenizer

from nemo_emmett.errors import DataError, ModelError
from nemo_emmett.models import SALMGPT, load
from nemo_emmett.prompts.encoding import encode_texts
from tests.models.backbones import model_config
from tests.safety.conftest import Payload, set_in_json

LLM = "llm_backbone/config.json"
JSON_FILES = ("config.json", LLM, "tokenizer_config.json", "generation_config.json", "preprocessor_config.json")
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
CODE = "planted_code.Evil"
AUTO_MAP = {
    "AutoConfig": CODE,
    "AutoModel": CODE,
    "AutoModelForCausalLM": CODE,
    "AutoFeatureExtractor": CODE,
    "AutoProcessor": CODE,
    "AutoTokenizer": [CODE, CODE],
}


@pytest.fixture(scope="module")
def exported_gpt(tmp_path_factory, tiny_asr) -> Path:
    folder = tmp_path_factory.mktemp("gpt")
    SALMGPT(model_config("qwen3", folder, tiny_asr, max_new_tokens=3)).save_pretrained(folder / "model")
    set_in_json(folder / "model" / "config.json", files=None)  # whose sizes would tell that a file was tampered with
    return folder / "model"


@pytest.fixture
def folder(exported_gpt: Path, tmp_path: Path, payload: Payload) -> Path:
    """An export, to be tampered with, and next to its files code that their keys may name."""
    folder = copytree(exported_gpt, tmp_path / "model")
    for place in (folder, folder / "llm_backbone"):
        for name in ("planted_code", "modeling_qwen3", "configuration_qwen3", "tokenization_evil", "handler"):
            (place / f"{name}.py").write_text(payload.code)
    return folder


def use(folder: Path) -> list[str]:
    return load(folder).translate(["one red house"], "en", "de")


def refused(payload: Payload, folder: Path, said: str) -> None:
    message = payload.refused(lambda: use(folder))
    assert message.startswith("ModelError: '"), message
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("key", ["_target_", "target", "cls"])
def test_a_class_path_is_refused_in_every_file(folder, payload, name, key) -> None:
    content = (folder / name).read_text()
    places = [{"some": [{"where": {key: payload.target}}]}]
    if (name, key) != ("config.json", "_target_"):  # which names the model's class
        places.append({key: payload.target})
    for place in places:
        set_in_json(folder / name, **place)
        refused(payload, folder, f"{key}: '{payload.target}' is not a part of a model")
        (folder / name).write_text(content)


@pytest.mark.parametrize("name", [*JSON_FILES[1:], "processor_config.json", "adapter_config.json"])
def test_trust_is_asked_for_in_vain_in_every_file(folder, payload, name) -> None:
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    set_in_json(folder / name, trust_remote_code=True)
    refused(payload, folder, "trust_remote_code: True asks for code to be run")


@pytest.mark.parametrize("key", KERNEL_KEYS)
def test_a_kernel_of_the_hub_is_refused(folder, payload, key) -> None:
    for value in ("someone/kernel", {"": "someone/kernel"}):
        set_in_json(folder / LLM, **{key: value})
        refused(payload, folder, "names code of the Hugging Face Hub")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (LLM, "compile_config", {"options": {"cpp.cxx": [None, "touch /tmp/it_ran"]}, "_compile_all_devices": True}),
        ("config.json", "compile", {"options": {"cpp.cxx": [None, "touch /tmp/it_ran"]}}),
        ("adapter_config.json", "megatron_config", {"x": 1}),
        ("config.json", "optimizer", {"_target_": "torch.optim.sgd.torch.hub.load", "source": "local"}),
        ("config.json", "optimizer", {"_target_": "torch.nn.functional.os.system", "command": "touch /tmp/it_ran"}),
        ("config.json", "lr_scheduler", {"_target_": "torch.optim.lr_scheduler.types.FunctionType"}),
        ("config.json", "perception", {"preprocessor": {"_target_": "nemo.collections.asr.modules.rnnt.random.seed"}}),
        ("config.json", "audio_locator_tag", "${oc.env:HOME}"),
    ],
)
def test_other_ways_to_code_are_refused(folder, payload, name, key, value) -> None:
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    set_in_json(folder / name, **{key: value})
    refused(payload, folder, f"'{folder / name}': {key}")


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    "keys",
    [
        {"auto_map": AUTO_MAP},
        {"custom_pipelines": {"evil": {"impl": CODE, "pt": ["AutoModel"]}}},
        {"custom_generate": "."},
        {"tokenizer_class": "Evil", "processor_class": "Evil", "feature_extractor_type": "Evil", "model_class": CODE},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_code_that_a_file_names_is_not_run(exported_gpt, folder, payload, name, keys) -> None:
    set_in_json(folder / name, **keys)
    assert payload.refused(lambda: use(folder)) == ""


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    "yaml", ["!!python/object/apply:os.system ['touch it_ran']", "{'a': !!python/name:os.system }"]
)
def test_yaml_is_no_json(folder, payload, name, yaml) -> None:
    (folder / name).write_text(yaml)
    refused(payload, folder, "is damaged: it is not JSON")


def code_beside(folder: Path, payload: Payload) -> None:
    """Of every kind that some program would run."""
    for place in (folder, folder / "llm_backbone"):
        for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "adapter_model.bin", "vocab.pkl", "optimizer.pth"):
            torch.save({"weight": payload}, place / name)
        (place / "encoder.nemo").write_bytes((place / "model.pt").read_bytes())
        (place / "custom_generate").mkdir()
        (place / "custom_generate" / "generate.py").write_text(payload.code)
        (place / "requirements.txt").write_text("evil")
        (place / "__init__.py").write_text(payload.code)
        (place / "sitecustomize.py").write_text(payload.code)
        (place / "conftest.py").write_text(payload.code)


def test_code_beside_the_files_is_not_run(folder, payload, monkeypatch) -> None:
    code_beside(folder, payload)
    monkeypatch.chdir(folder)
    assert payload.refused(lambda: use(Path())) == ""


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pickle_in_the_place_of_another_file_is_refused(folder, payload, name) -> None:
    torch.save({"weight": payload}, folder / name)
    message = payload.refused(lambda: use(folder))
    assert message.startswith(f"ModelError: '{folder}")
    assert "\n" not in message


TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('COMMAND') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('COMMAND').read() }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute filter": "{{ (messages | attr('__class__')).__init__.__globals__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}{{ messages.__class__ }}",
    "function": "{{ raise_exception.__globals__['os'].system('COMMAND') }}",
    "import": "{% import 'os' as os %}{{ os.system('COMMAND') }}",
    "include": "{% include '/etc/passwd' %}",
    "changes": "{{ messages.clear() }}",
}
"""Ways out of a template; what is loaded renders none, and transformers renders them in a sandbox."""


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/a"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_reaches_nothing(folder, payload, template, place) -> None:
    text = TEMPLATES[template].replace("COMMAND", payload.command)
    if place == "tokenizer_config.json":
        (folder / "chat_template.jinja").unlink()
        set_in_json(folder / place, chat_template=text)
    else:
        path = (folder / place).with_suffix(".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    name = "a" if place.endswith("/a") else None
    with pytest.raises((jinja2.TemplateError, TypeError)):
        tokenizer.apply_chat_template([{"role": "user", "content": "one"}], chat_template=name, tokenize=False)
    assert not payload.ran


def test_loading_renders_no_chat_template(folder, payload) -> None:
    (folder / "chat_template.jinja").write_text("{% for _ in range(10 ** 12) %}{% endfor %}{{ 1 / 0 }}")
    assert payload.refused(lambda: use(folder)) == ""


def test_a_pattern_that_takes_forever_ends_with_a_sentence(folder, payload) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    model, start = load(folder), time.monotonic()
    with pytest.raises(DataError, match=r"the tokenizer cannot encode '.*' \(.*retry-limit.*\); leave the text out\."):
        model.translate(["a" * 60], "en", "de")
    with pytest.raises(DataError, match="cannot encode one of 9 texts"):
        encode_texts(model.tokenizer, ["a" * 60] * 9)
    assert time.monotonic() - start < 60


# Links.


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "README.md", "llm_backbone", LLM]
)
def test_a_link_out_of_the_folder_is_refused(folder, payload, tmp_path, name) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    refused(payload, folder, f"'{folder / name}' is a link to '{outside}', outside of the model's folder")


def test_links_within_the_folder_and_of_hugging_faces_cache_are_none(exported_gpt, tmp_path, payload) -> None:
    snapshot = copytree(exported_gpt, tmp_path / "models--a--b" / "snapshots" / "c0ffee")
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = tmp_path / "models--a--b" / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    (snapshot / "copy.md").symlink_to("README.md")
    (tmp_path / "link").symlink_to(snapshot)
    assert use(tmp_path / "link") == use(exported_gpt)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_pipe_is_no_file(folder, payload, name) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(payload, folder, f"'{folder / name}' is no regular file")


# A model on the Hugging Face Hub, which is fetched whole, so that all of it is checked.


@pytest.fixture
def on_the_hub(folder, tmp_path, monkeypatch) -> Callable[[], Path]:
    """Names of folders become those of repositories, in Hugging Face's cache."""
    calls: list[Any] = []

    def fetch(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(folder)

    monkeypatch.setattr("nemo_emmett.models.export.snapshot_download", fetch)
    fetch.calls = calls
    return fetch


def test_a_model_on_the_hub_is_checked_like_a_folder(folder, payload, on_the_hub) -> None:
    assert SALMGPT.from_pretrained("someone/model", revision="main").translate(["one"], "en", "de") == use_text(folder)
    ((name, options),) = on_the_hub.calls
    assert (name, options["revision"]) == ("someone/model", "main")
    set_in_json(folder / LLM, attn_implementation="someone/kernel")
    with pytest.raises(ModelError, match="names code of the Hugging Face Hub"):
        SALMGPT.from_pretrained("someone/model")


def use_text(folder: Path) -> list[str]:
    return load(folder).translate(["one"], "en", "de")
