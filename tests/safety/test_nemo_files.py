"""Nothing in a ``.nemo`` file runs or lands outside of the folder that it is unpacked to."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from nemo_emmett.config import check_model_file
from nemo_emmett.models import SALMT5
from nemo_emmett.planning.architecture import architecture_only
from tests.conftest import perception_config
from tests.safety.conftest import Payload, with_own_code
from tests.safety.test_models import LOADER


def tampered(path: Path, to: Path, change: Callable[[dict], None], weights: object = None) -> Path:
    """A copy of a ``.nemo`` file with another config, and perhaps other weights."""
    with tarfile.open(path) as old, tarfile.open(to, "w") as new:
        for member in old.getmembers():
            data = old.extractfile(member).read() if member.isfile() else None
            if member.name.endswith("model_config.yaml"):
                config = yaml.safe_load(data)
                change(config)
                data = yaml.safe_dump(config).encode()
            if member.name.endswith("model_weights.ckpt") and weights is not None:
                buffer = io.BytesIO()
                torch.save(weights, buffer)
                data = buffer.getvalue()
            if data is not None:
                member.size = len(data)
            new.addfile(member, None if data is None else io.BytesIO(data))
    return to


def section(tiny_t5: Path, asr: Path) -> dict:
    return {"pretrained_llm": str(tiny_t5), "pretrained_asr": str(asr), "perception": perception_config()}


def targets(payload: Payload, backbone: Path) -> dict[str, Callable[[dict], None]]:
    function = {"_target_": LOADER, "model_path_or_name": str(backbone), "trust_remote_code": True}
    return {
        "foreign class": lambda config: config["preprocessor"].update(_target_=payload.target),
        "foreign class as the model": lambda config: config.update(target=payload.target),
        "foreign class in the tokenizer": lambda config: config["tokenizer"].update(
            custom_tokenizer={"_target_": payload.target}
        ),
        "allowed prefix": lambda config: config["encoder"].update(_target_=f"megatron.{payload.target}"),
        "allowed prefix as the model": lambda config: config.update(target=f"megatron.{payload.target}"),
        "function that takes trust": lambda config: config.update(preprocessor=function),
        "environment": lambda config: config["encoder"].update(self_attention_model="${oc.env:HOME}"),
    }


@pytest.mark.parametrize(
    "target",
    [
        "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
        "nemo.collections.asr.modules.ConformerEncoder",
        "nemo.collections.asr.modules.SpectrogramAugmentation",
        "nemo.collections.asr.modules.transformer.get_nemo_transformer",
        "nemo.collections.asr.modules.RNNTJoint",
        "nemo.collections.asr.metrics.WER",
        "nemo.collections.asr.parts.submodules.token_classifier.TokenClassifier",
        "nemo.collections.common.losses.smoothed_cross_entropy.SmoothedCrossEntropyLoss",
        "nemo.collections.common.tokenizers.canary_tokenizer.CanaryTokenizer",
        "nemo.collections.common.tokenizers.canary_multilingual_tokenizer.CanaryMultilingualTokenizer",
        "nemo.collections.speechlm2.modules.perception.MultiLayerProjectionConnector",
        "nemo_emmett.modules.modality_adapters.QFormer",
        "nemo_emmett.schedulers.InfiniteLR",
    ],
)
def test_what_nemos_published_models_name_is_admitted(target: str) -> None:
    check_model_file({"part": {"_target_": target, "size": "${other.size}"}}, "model.nemo")


@pytest.mark.parametrize("build", ["train", "plan"])
@pytest.mark.parametrize("name", targets(None, None))
def test_nothing_that_its_config_names_is_imported(
    payload: Payload, backbone: Path, tiny_t5: Path, tiny_asr: Path, tmp_path: Path, name: str, build: str
) -> None:
    with_own_code(backbone, payload)
    (payload.folder / "megatron").mkdir()
    (payload.folder / "megatron" / f"{payload.module}.py").write_text(payload.code)
    asr = tampered(tiny_asr, tmp_path / "evil.nemo", targets(payload, backbone)[name])
    config = section(tiny_t5, asr)
    said = payload.refused(lambda: SALMT5(config if build == "train" else architecture_only(config)))
    assert said.startswith("ModelError: ")
    assert str(asr) in said


def test_its_weights_are_not_unpickled(
    payload: Payload, tiny_t5: Path, tiny_asr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    asr = tampered(tiny_asr, tmp_path / "evil.nemo", lambda config: None, {"weight": payload})
    assert payload.refused(lambda: SALMT5(section(tiny_t5, asr)))
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


@pytest.mark.parametrize("kind", ["parent", "absolute", "link"])
def test_nothing_is_unpacked_to_elsewhere(
    payload: Payload, tiny_t5: Path, tiny_asr: Path, tmp_path: Path, kind: str
) -> None:
    asr = tampered(tiny_asr, tmp_path / "evil.nemo", lambda config: None)
    names = {"parent": f"{'../' * 12}{payload.marker}", "absolute": str(payload.marker), "link": "out/it_ran"}
    with tarfile.open(asr, "a") as tar:
        if kind == "link":
            link = tarfile.TarInfo("out")
            link.type, link.linkname = tarfile.SYMTYPE, str(payload.folder)
            tar.addfile(link)
        member = tarfile.TarInfo(names[kind])
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    payload.refused(lambda: SALMT5(section(tiny_t5, asr)))
