"""The page of frequent errors: each heading explains an error that names it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nemo_emmett.cli import main
from nemo_emmett.corpora.extras import require
from nemo_emmett.data.checks import check_data_config
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.io.index import FileChanged
from nemo_emmett.errors import PAGE, ConfigError, DataError, EmmettError, Help, NonFiniteError, TooManyBadRecords
from nemo_emmett.files import check_writable
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.targets import check_local_path
from nemo_emmett.runner import compose_recipe
from tests.docs.pages import ROOT, anchors_of

PACKAGE = ROOT / "nemo_emmett"


def test_the_page_has_a_heading_for_each_error_and_no_others() -> None:
    headings = anchors_of(ROOT / PAGE, levels=(3,))
    assert headings == {page.value for page in Help}


def test_every_heading_is_named_by_an_error() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"\bHelp\.([A-Z_]+)", code))
    assert named == set(Help.__members__)


def dataset(**keys: Any) -> Callable[[Path], Any]:
    return lambda _: parse_dataset({"manifest_filepath": "a.json", **keys}, "data.train_ds")


def model(**keys: Any) -> Callable[[Path], Any]:
    return lambda _: ModelConfig.from_section({"pretrained_llm": "t5", **keys}, "SALMT5")


MISTAKES: dict[str, tuple[Help, Callable[[Path], Any]]] = {
    "key": (Help.UNKNOWN_KEY, dataset(batch_sizes=2)),
    "value": (Help.VALUE, dataset(batch_size=0)),
    "bins": (Help.BATCH_SIZE, dataset(bucket_duration_bins=[1, 2], bucket_batch_size=[4])),
    "order": (Help.BATCH_SIZE, dataset(bucket_duration_bins=[2, 1])),
    "file": (Help.MISSING_FILE, lambda _: check_data_config({"manifest_filepath": "gone.json", "batch_size": 1})),
    "missing": (Help.MISSING_VALUE, lambda folder: compose_recipe(_written(folder, "model:\n  pretrained_llm: ???\n"))),
    "nemo": (Help.NEMO_KEY, model(packed_sequences=True)),
    "model": (Help.NO_MODEL, lambda folder: check_local_path(f"{folder}/gone/it", "model.pretrained_asr")),
    "disk": (Help.DISK_FULL, lambda folder: check_writable(folder, "export_dir", needed=1 << 60)),
    "package": (Help.MISSING_PACKAGE, lambda _: require("a_module_that_is_nowhere")),
}


def _written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_its_heading(name: str, tmp_path: Path) -> None:
    page, make = MISTAKES[name]
    with pytest.raises(EmmettError) as raised:
        make(tmp_path)
    assert raised.value.page is page
    assert "\n" not in str(raised.value)


def test_classes_of_errors_name_theirs() -> None:
    assert NonFiniteError("x").page is Help.NOT_FINITE
    assert TooManyBadRecords("x").page is Help.BAD_RECORDS
    assert FileChanged.of("x").page is Help.FILE_CHANGED
    assert DataError("x").page is None


def test_it_survives_the_way_from_a_process() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("a: b", page=Help.VALUE)))
    assert (str(error), error.page) == ("a: b", Help.VALUE)


def test_a_command_prints_it_below_the_sentence(tmp_path: Path) -> None:
    recipe = _written(tmp_path, "model:\n  pretrained_llm: ???\n")
    done = CliRunner().invoke(main, ["train", recipe])
    assert done.exit_code == 2
    sentence, page = done.output.splitlines()
    assert sentence.startswith("Error: model.pretrained_llm: the recipe leaves this to you")
    assert page == "See docs/how-to/errors.md#a-value-that-is-left-to-you"
    without = CliRunner().invoke(main, ["train", "gone.yaml"])
    assert without.output == "Error: The recipe 'gone.yaml' cannot be read: there is no such file.\n"
