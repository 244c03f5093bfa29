"""What installing the package costs programs that do not use it: neither torch nor NeMo is imported."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HEAVY = ("torch", "nemo", "lightning", "lhotse", "transformers")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running ``code``."""
    code = textwrap.dedent(code) + "\nimport sys\nprint('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import nemo_emmett; assert nemo_emmett.__version__",
        """
        import nemo_emmett.data, nemo_emmett.models, nemo_emmett.evaluation, nemo_emmett.oomptimizer
        import nemo_emmett.prompts.languages, nemo_emmett.schedulers
        """,
        "from nemo_emmett import cli, runner",
        """
        from importlib.metadata import entry_points
        (point,) = entry_points(group="lightning.pytorch.callbacks_factory", name="nemo_emmett")
        assert point.load()() == []
        """,
        """
        from hydra.core.plugins import Plugins
        from hydra.plugins.search_path_plugin import SearchPathPlugin
        assert "NemoEmmettSearchPath" in {cls.__name__ for cls in Plugins.instance().discover(SearchPathPlugin)}
        """,
        """
        from hydra import compose, initialize_config_module
        with initialize_config_module("nemo_emmett.conf", version_base=None):
            cfg = compose(overrides=["+emmett_callbacks=random_state"])
        assert cfg.trainer.callbacks[0]._target_ == "nemo_emmett.callbacks.RandomState"
        """,
    ],
    ids=["package", "lazy subpackages", "cli", "callback factory", "hydra plugins", "hydra compose"],
)
def test_leaves_heavy_libraries_alone(code: str) -> None:
    assert not modules_after(code) & set(HEAVY)


REFUSALS = {
    "train gone.yaml": "The recipe 'gone.yaml' cannot be read",
    "train keys.yaml": "the recipe has no section 'model'",
    "train typo.yaml": "recipe.trainr: there is no such key; did you mean 'trainer'?",
    "train empty.yaml": "export_dir: '' cannot be used",
    "train files.yaml": "data.train_ds.input_cfg.0.manifest_filepath: there is no file 'gone.json'",
    "train not.yaml": "while parsing",
    "evaluate model gone.yaml": "The config 'gone.yaml' cannot be read",
    "evaluate model not.yaml": "The config 'not.yaml' is not YAML",
    "evaluate model keys.yaml": "data.test_ds.datasets is missing in",
    "evaluate model misspelt.yaml": "recipe.metrcs: there is no such key; did you mean 'metrics'?",
    "evaluate model tests.yaml": "test_ds.datasets.one.input_cfg.0.paths.de: there is no file 'gone.de'",
    "evaluate model tests.yaml --metrics BLUE": "metrics: there is no metric 'BLUE'; did you mean BLEU?",
    "evaluate model tests.yaml --baseline gone": "The evaluation gone cannot be read",
    "evaluate model tests.yaml --log-dir gone": "log_dir: there is no folder 'gone'",
    "evaluate gone tests.yaml": "'gone' is not an exported model",
    "export gone.ckpt out": "'gone.ckpt': there is no such checkpoint",
    "export keys.yaml out": "recipe.yaml' does not exist; give the recipe of the training by --config",
    "export keys.yaml keys.yaml --config salm_t5": "FOLDER: ",
    "serve gone": "'gone' is not an exported model",
    "translate text --to de --model gone": "'gone' is not an exported model",
    "translate text --to de --model half": "'half' has no model.safetensors",
    "translate text --to xx --model model": "--to: 'xx' is not a known language",
    "translate text --model model": "--to: is missing",
    "translate gone.wav --to de --model model": "audio file 'gone.wav' does not exist",
    "translate --tsv gone.tsv --to de --model model": "--tsv: there is no file 'gone.tsv'",
    "translate text --to de --model model --device gpu": "--device: 'gpu' is no device",
    "translate text --to de --model model --output keys.yaml": "--output: 'keys.yaml' exists already",
    "index gone.yaml": "The recipe 'gone.yaml' cannot be read",
    "blend keys.yaml": "has no data.train_ds",
    "bins files.yaml": "data.train_ds.input_cfg.0.manifest_filepath: there is no file 'gone.json'",
    "index list.yaml": "list.input_cfg.0.paths: there is no file 'gone.txt'",
    "plan salm_t5": "--memory: is missing",
    "plan salm_t5 --memory H100 --profile keys.yaml": "--profile: 'keys.yaml' exists already",
    "plan gone.yaml": "The recipe 'gone.yaml' cannot be read",
    "oomptimize keys.yaml": "data.train_ds: the recipe has none",
    "prepare europarl-s a b": "did you mean 'europarl-st'?",
    "prepare europarl-st gone out": "'gone' is missing",
    "prepare captions gone out": "'gone/train.en' does not exist",
    "prepare phrasebook out --languages xx": "phrasebook.languages: there is no 'xx'",
    "prepare leaks gone --held-out gone": "'gone' does not exist",
}
"""Command lines with a mistake that can be seen without NeMo, and what they say."""


def test_mistakes_are_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """All in one process: what one of them imports, the others would show as well."""
    source = "{type: nemo, manifest_filepath: gone.json}"
    sections = "model: {}\ntrainer: {}\n"
    files = {
        "keys.yaml": "hello: 1\n",
        "typo.yaml": "model: {}\ntrainr: {}\ndata: {}\n",
        "empty.yaml": f"{sections}data: {{}}\nexport_dir: ''\n",
        "files.yaml": f"{sections}data: {{train_ds: {{input_cfg: [{source}]}}}}\n",
        "list.yaml": "- {type: txt, paths: gone.txt}\n",
        "not.yaml": "a: [\n",
        "misspelt.yaml": "metrcs: [BLEU]\ntest_ds: {datasets: {one: {}}}\n",
        "tests.yaml": "test_ds: {datasets: {one: {input_cfg: [{type: parallel_text, paths: {de: gone.de}}]}}}\n",
        "model/config.json": "{}",
        "model/model.safetensors": "",
        "half/config.json": "{}",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    code = f"""
        import json, os
        from click.testing import CliRunner
        from nemo_emmett.cli import main
        os.chdir({str(tmp_path)!r})
        said = {{}}
        for line in {[*REFUSALS]!r}:
            done = CliRunner().invoke(main, line.split())
            said[line] = done.exit_code, done.output
        json.dump(said, open("said.json", "w"))
    """
    assert not modules_after(code) & {"torch", "nemo", "lightning", "lhotse"}
    said = json.loads((tmp_path / "said.json").read_text())
    for line, (exit_code, output) in said.items():
        sentence, *more = output.splitlines()
        assert (exit_code, [one.strip().partition(" ")[0] for one in more]) in ((2, []), (2, ["See"])), (line, output)
        assert output.startswith("Error: "), (line, output)
        assert REFUSALS[line] in sentence, line


def test_the_check_sees_what_is_imported() -> None:
    assert "lightning" not in modules_after("import nemo_emmett")
    assert "yaml" in modules_after("import nemo_emmett, yaml")
