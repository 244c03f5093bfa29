"""Nothing in a model's folder runs: configs, tokenizers, backbones, weights; only the caller's word lets code run."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shutil import copytree

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM

from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.models import SALMT5, load
from nemo_emmett.models.building import _check_configs
from nemo_emmett.planning.blend_report import load_tokenizer
from tests.safety.conftest import Payload, set_in_json, with_own_code

LOADER = "nemo.collections.speechlm2.parts.pretrained.load_pretrained_hf"


def adapter(folder: Path, **keys) -> None:
    """Give the exported model another modality adapter."""
    perception = json.loads((folder / "config.json").read_text())["perception"]
    set_in_json(folder / "config.json", perception=perception | {"modality_adapter": keys})


def class_of_a_stranger(folder: Path, payload: Payload) -> None:
    set_in_json(folder / "config.json", _target_=payload.target)


def asks_for_trust(folder: Path, payload: Payload) -> None:
    with_own_code(folder / "llm_backbone", payload)
    set_in_json(folder / "config.json", trust_remote_code=True)


def asks_for_trust_in_its_tokenizer(folder: Path, payload: Payload) -> None:
    with_own_code(folder, payload, tokenizer=True)
    set_in_json(folder / "config.json", trust_remote_code=True)


def asks_for_trust_as_an_argument_of_the_constructor(folder: Path, payload: Payload) -> None:
    with_own_code(folder / "llm_backbone", payload)
    config = json.loads((folder / "config.json").read_text())
    set_in_json(folder / "config.json", trust_remote_code=True, cfg=config | {"trust_remote_code": True})


def auto_map_of_the_backbone(folder: Path, payload: Payload) -> None:
    with_own_code(folder / "llm_backbone", payload)


def auto_map_of_the_tokenizer(folder: Path, payload: Payload) -> None:
    with_own_code(folder, payload, tokenizer=True)


def stranger_in_the_perception(folder: Path, payload: Payload) -> None:
    adapter(folder, _target_=payload.target)


def stranger_by_nemos_older_key(folder: Path, payload: Payload) -> None:
    adapter(folder, target=payload.target, params={})


def stranger_within_an_allowed_class(folder: Path, payload: Payload) -> None:
    identity = "nemo.collections.speechlm2.modules.perception.IdentityConnector"
    adapter(folder, _target_=identity, d_model=32, extra=[{"_target_": payload.target}])


def module_under_an_allowed_prefix(folder: Path, payload: Payload) -> None:
    # NeMo's list admits `megatron.`, a package that need not be there.
    (payload.folder / "megatron").mkdir()
    (payload.folder / "megatron" / f"{payload.module}.py").write_text(payload.code)
    adapter(folder, _target_=f"megatron.{payload.target}")


def second_backbone(folder: Path, payload: Payload) -> str:
    with_own_code(copytree(folder / "llm_backbone", folder / "second"), payload)
    return str(folder / "second")


def function_that_takes_trust(folder: Path, payload: Payload) -> None:
    adapter(folder, _target_=LOADER, model_path_or_name=second_backbone(folder, payload), trust_remote_code=True)


def function_that_takes_trust_by_position(folder: Path, payload: Payload) -> None:
    adapter(folder, _target_=LOADER, _args_=[second_backbone(folder, payload), True, None, True])


def module_for_peft(folder: Path, payload: Payload) -> None:
    lora = {"r": 2, "target_modules": ["q"], "megatron_config": {"x": 1}, "megatron_core": payload.module}
    set_in_json(folder / "config.json", lora=lora)


def compiler(folder: Path, payload: Payload) -> None:
    set_in_json(folder / "config.json", compile={"options": {"cpp.cxx": [None, payload.command]}})


def pickle_for_safetensors(folder: Path, payload: Payload) -> None:
    torch.save({"weight": payload}, folder / "model.safetensors")


def pickle_beside_safetensors(folder: Path, payload: Payload) -> None:
    torch.save({"weight": payload}, folder / "pytorch_model.bin")


def pickle_in_the_place_of_safetensors(folder: Path, payload: Payload) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": payload}, folder / "pytorch_model.bin")


def generate_of_its_own(folder: Path, payload: Payload) -> None:
    for place in (folder, folder / "llm_backbone"):
        (place / "custom_generate").mkdir()
        (place / "custom_generate" / "generate.py").write_text(payload.code + "def generate(model, **_):\n    pass\n")


def environment_in_the_config(folder: Path, payload: Payload) -> None:
    perception = json.loads((folder / "config.json").read_text())["perception"]
    perception["preprocessor"]["window"] = "${oc.env:HOME}"
    set_in_json(folder / "config.json", perception=perception)


REFUSED = (
    class_of_a_stranger,
    asks_for_trust,
    asks_for_trust_in_its_tokenizer,
    asks_for_trust_as_an_argument_of_the_constructor,
    auto_map_of_the_backbone,
    stranger_in_the_perception,
    stranger_by_nemos_older_key,
    stranger_within_an_allowed_class,
    module_under_an_allowed_prefix,
    function_that_takes_trust,
    function_that_takes_trust_by_position,
    module_for_peft,
    compiler,
    pickle_for_safetensors,
    pickle_in_the_place_of_safetensors,
    environment_in_the_config,
)
UNUSED = (auto_map_of_the_tokenizer, pickle_beside_safetensors, generate_of_its_own)


@pytest.mark.parametrize("tamper", [*REFUSED, *UNUSED], ids=lambda tamper: tamper.__name__)
@pytest.mark.parametrize("load_it", [load, SALMT5.from_pretrained], ids=["load", "from_pretrained"])
def test_nothing_in_an_exported_folder_runs(
    exported: Path, payload: Payload, tamper: Callable, load_it: Callable
) -> None:
    tamper(exported, payload)
    said = payload.refused(
        lambda: load_it(str(exported)).translate(["one red house"], source_lang="en", target_lang="de")
    )
    if tamper in REFUSED and not (tamper is class_of_a_stranger and load_it is not load):  # there the caller chose it
        assert said.startswith(("ModelError: ", "SafetensorError: ", "FileNotFoundError: "))
    if tamper in UNUSED and tamper is not auto_map_of_the_tokenizer:
        assert said == ""


def test_code_of_a_folder_runs_at_the_callers_word(exported: Path, payload: Payload) -> None:
    with_own_code(exported / "llm_backbone", payload)
    with suppress(Exception):  # of what the payload is, there is no model
        load(exported, trust_remote_code=True)
    assert payload.ran


def test_the_command_line_has_the_flag(exported: Path, payload: Payload) -> None:
    from click.testing import CliRunner

    from nemo_emmett.cli import main

    with_own_code(exported / "llm_backbone", payload)
    arguments = ["translate", "one", "--to", "de", "--model", str(exported)]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert "--trust-remote-code" in refused.output
    assert not payload.ran
    CliRunner().invoke(main, [*arguments, "--trust-remote-code"])
    assert payload.ran


def test_an_export_does_not_ask_for_trust(exported: Path, tmp_path: Path) -> None:
    model = load(exported, trust_remote_code=True)
    assert model.trust_remote_code
    model.save_pretrained(tmp_path / "again")
    assert "trust_remote_code" not in (tmp_path / "again" / "config.json").read_text()


def test_a_chat_template_reaches_nothing(exported: Path, payload: Payload) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('" + payload.command + "') }}"
    (exported / "chat_template.jinja").write_text(template)
    tokenizer = load(exported).tokenizer.tokenizer
    assert "SecurityError" in payload.refused(
        lambda: tokenizer.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False)
    )


# A recipe names folders and files that were downloaded.


def weights_in_a_pickle(folder: Path, payload: Payload) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": payload}, folder / "pytorch_model.bin")


def lora_beside_it(folder: Path, payload: Payload) -> None:
    llm = AutoModelForSeq2SeqLM.from_pretrained(folder)
    get_peft_model(llm, LoraConfig(r=2, target_modules=["q"])).save_pretrained(folder)
    set_in_json(folder / "adapter_config.json", megatron_config={"x": 1}, megatron_core=payload.module)


@pytest.mark.parametrize(
    "tamper",
    [weights_in_a_pickle, lora_beside_it, with_own_code, lambda folder, payload: with_own_code(folder, payload, True)],
    ids=["weights", "lora", "config", "tokenizer"],
)
def test_nothing_in_a_backbones_folder_runs(
    backbone: Path, payload: Payload, tamper: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(backbone, payload)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    payload.refused(lambda: SALMT5({"pretrained_llm": str(backbone)}))


def test_of_a_lora_beside_a_backbone_only_what_imports_is_refused(backbone: Path, payload: Payload) -> None:
    lora_beside_it(backbone, payload)
    with pytest.raises(ModelError, match=r"adapter_config\.json': megatron_config: .* may have code run"):
        SALMT5({"pretrained_llm": str(backbone)})
    set_in_json(
        backbone / "adapter_config.json", megatron_config=None, megatron_core="megatron.core"
    )  # as peft writes it
    _check_configs(backbone)


def test_a_recipe_may_trust_a_backbone(backbone: Path, payload: Payload) -> None:
    with_own_code(backbone, payload)
    with suppress(Exception):
        SALMT5({"pretrained_llm": str(backbone), "trust_remote_code": True})
    assert payload.ran


def test_what_is_neither_true_nor_false_is_no_trust(backbone: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code: 'false' cannot be used; give true or false"):
        SALMT5({"pretrained_llm": str(backbone), "trust_remote_code": "false"})


def test_a_tokenizer_for_counting_runs_nothing(backbone: Path, payload: Payload) -> None:
    with_own_code(backbone, payload, tokenizer=True)
    payload.refused(lambda: load_tokenizer(backbone))
