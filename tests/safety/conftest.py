"""Payloads that leave a file behind when they run, and the models and files that they are planted in."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest


class Payload:
    """One piece of code in every form in which a file may carry it; whether it ran shows in ``ran``.

    Args:
        folder: receives the modules and the file that running leaves.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = folder / "it_ran"
        self.module = f"planted_{uuid.uuid4().hex[:8]}"
        self.code = (
            f"open({str(self.marker)!r}, 'w').close()\nimport torch\n\n\nclass Evil(torch.nn.Module):\n    pass\n"
        )
        self.target = f"{self.module}.Evil"
        self.command = f"touch {self.marker}"
        self.yaml = f"!!python/object/apply:os.system ['{self.command}']"
        (folder / f"{self.module}.py").write_text(self.code)

    def __reduce__(self) -> tuple:
        """Pickled, it runs when it is unpickled."""
        return os.system, (self.command,)

    @property
    def ran(self) -> bool:
        return self.marker.exists()

    def refused(self, action: Callable[[], Any]) -> str:
        """Do something that must not run the payload; gives what was said, empty if nothing was."""
        said = ""
        try:
            action()
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {error}"
        assert not self.ran, f"the payload ran; said was: {said}"
        return said


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Payload:
    """Its module can be imported by its name, as one in the folder that Python was started in."""
    folder = tmp_path / "payload"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return Payload(folder)


def set_in_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory, tiny_t5, tiny_asr) -> Path:
    from nemo_emmett.models import SALMT5
    from tests.conftest import perception_config

    folder = tmp_path_factory.mktemp("export")
    config = {"pretrained_llm": str(tiny_t5), "pretrained_asr": str(tiny_asr), "perception": perception_config()}
    SALMT5(config | {"max_new_tokens": 4}).save_pretrained(folder)
    set_in_json(folder / "config.json", files=None)  # whose sizes would tell that a file was tampered with
    return folder


@pytest.fixture
def exported(exported_once: Path, tmp_path: Path) -> Path:
    """An exported model, to be tampered with."""
    return copytree(exported_once, tmp_path / "model")


@pytest.fixture
def backbone(tiny_t5: Path, tmp_path: Path) -> Path:
    """A language model's folder, to be tampered with."""
    return copytree(tiny_t5, tmp_path / "backbone")


def with_own_code(folder: Path, payload: Payload, tokenizer: bool = False) -> None:
    """Make a Hugging Face folder one of a kind that transformers does not know, and that brings its code."""
    code = payload.code + (
        "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast\n"
        "class EvilConfig(PretrainedConfig):\n    model_type = 'evil'\n"
        "class EvilTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "evil_code.py").write_text(code)
    if tokenizer:
        auto_map = {"AutoTokenizer": ["evil_code.EvilTokenizer", "evil_code.EvilTokenizer"]}
        set_in_json(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="EvilTokenizer")
    else:
        auto_map = {"AutoConfig": "evil_code.EvilConfig", "AutoModelForSeq2SeqLM": "evil_code.Evil"}
        set_in_json(folder / "config.json", auto_map=auto_map, model_type="evil")
