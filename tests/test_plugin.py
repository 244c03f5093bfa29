"""What installing the package makes others see, and the seam in NeMo's dataloader factory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from importlib.metadata import EntryPoint

import pytest
from omegaconf import OmegaConf

from nemo_emmett import plugin
from nemo_emmett.errors import ConfigError

from .fork_server import IMPORT_DEPENDENCIES


def entry_points_for_test(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    made = {name: EntryPoint(name, value, "nemo_emmett.models") for name, value in points.items()}
    monkeypatch.setattr(plugin, "entry_points", lambda kind: made)


class TestFind:
    def test_installed_short_names(self) -> None:
        assert {"salm_t5"} <= plugin.entry_points("models").keys()
        assert {"multimodal"} <= plugin.entry_points("dataloaders").keys()
        assert {"oomptimizer", "random_state"} <= plugin.entry_points("callbacks").keys()

    @pytest.mark.parametrize(
        ("kind", "name", "path"),
        [
            ("models", "salm_t5", "nemo_emmett.models.salm_t5.SALMT5"),
            ("dataloaders", "multimodal", "nemo_emmett.data.dataloader.get_multimodal_dataloader"),
            ("callbacks", "oomptimizer", "nemo_emmett.callbacks.oomptimizer.OOMptimizer"),
            ("callbacks", "random_state", "nemo_emmett.callbacks.random_state.RandomState"),
        ],
    )
    def test_every_short_name_and_path_leads_to_its_object(self, kind: str, name: str, path: str) -> None:
        found = plugin.find(kind, name)
        assert f"{found.__module__}.{found.__qualname__}" == path
        assert plugin.find(kind, path) is found

    def test_a_name_from_another_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entry_points_for_test(monkeypatch, ordered="collections:OrderedDict")
        assert plugin.find("models", "ordered").__name__ == "OrderedDict"

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("salm_t4", "models: there is no 'salm_t4'; did you mean 'salm_t5'?; known are 'counter', 'salm_t5'."),
            ("bestow", "models: there is no 'bestow'; known are 'counter', 'salm_t5'."),
            (
                "broken",
                "models: 'broken' (no_such_package:Model) cannot be imported: No module named 'no_such_package'.",
            ),
            ("collections.Countr", "there is no 'Countr' in module 'collections'; did you mean 'Counter'?."),
            ("no_such_package.x.Y", "no module 'no_such_package'; short names are 'counter', 'salm_t5'."),
        ],
    )
    def test_a_wrong_name_is_told_in_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
    ) -> None:
        points = {"salm_t5": "nemo_emmett.models:SALMT5", "counter": "collections:Counter"}
        if name == "broken":
            points["broken"] = "no_such_package:Model"
        entry_points_for_test(monkeypatch, **points)
        with pytest.raises(ConfigError) as error:
            plugin.find("models", name)
        assert sentence in str(error.value)

    def test_a_missing_dependency_of_an_existing_module_keeps_its_own_message(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path
    ) -> None:
        (tmp_path / "half_there.py").write_text("import surely_not_installed\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
            plugin.find("models", "half_there.Model")


class TestRequestedCallbacks:
    def test_nothing_asked_nothing_returned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(plugin.CALLBACKS_VARIABLE, raising=False)
        assert plugin.requested_callbacks() == []
        monkeypatch.setenv(plugin.CALLBACKS_VARIABLE, " ")
        assert plugin.requested_callbacks() == []

    def test_a_plain_trainer_gets_what_the_environment_asks_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning.pytorch import Trainer

        from nemo_emmett.callbacks import RandomState

        def ours() -> list:
            trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
            return [callback for callback in trainer.callbacks if isinstance(callback, RandomState)]

        monkeypatch.delenv(plugin.CALLBACKS_VARIABLE, raising=False)
        assert ours() == []
        monkeypatch.setenv(plugin.CALLBACKS_VARIABLE, "random_state")
        assert len(ours()) == 1

    def test_an_unknown_name_is_told_in_one_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(plugin.CALLBACKS_VARIABLE, "random_state,oomptimiser")
        with pytest.raises(ConfigError, match=r"NEMO_EMMETT_CALLBACKS: .*'oomptimiser'; did you mean 'oomptimizer'"):
            plugin.requested_callbacks()


FIRST = ("nemo_emmett.data.readers.registry", "nemo_emmett.prompts.t5", "nemo_emmett.models.salm_t5")

IMPORT_FIRST = """
import importlib, json, os, sys

for first in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    importlib.import_module(first)
    from nemo_emmett import plugin
    import nemo.collections.speechlm2
    found = [f"{r.what}: {r.state} {r.error}" for r in plugin.REGISTRATIONS if r.state != "done"]
    print("FOUND", json.dumps({first: found}), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def not_done() -> dict[str, list[str]]:
    """The registrations that are not done, by the module of ours that a new process imports first."""
    code = IMPORT_DEPENDENCIES + IMPORT_FIRST
    done = subprocess.run([sys.executable, "-", *FIRST], input=code, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return {first: found for line in lines for first, found in json.loads(line.removeprefix("FOUND ")).items()}


class TestRegistration:
    def test_everything_is_registered_once_nemo_is_imported(self) -> None:
        import nemo.collections.speechlm2  # noqa: F401

        assert {r.what: (r.state, r.error) for r in plugin.register()} == {
            r.what: ("done", "") for r in plugin.REGISTRATIONS
        }

    def test_nemo_reads_our_data_type_from_a_recipe(self, tmp_path) -> None:
        from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config

        (tmp_path / "text.en").write_text("one\ntwo\n")
        (tmp_path / "text.de").write_text("eins\nzwei\n")
        source = {"type": "parallel_text", "source_language": "en", "target_language": "de", "force_finite": True}
        paths = {"source_paths": str(tmp_path / "text.en"), "target_paths": str(tmp_path / "text.de")}
        cuts, _ = read_cutset_from_config(OmegaConf.create({"input_cfg": [source | paths], "force_finite": True}))
        assert [(pair.source.text, pair.target.text) for pair in cuts] == [("one", "eins"), ("two", "zwei")]

    def test_nemo_admits_our_callback_and_knows_our_formats(self) -> None:
        from nemo.collections.common.prompts.formatter import PromptFormatter
        from nemo.core.classes.common import safe_instantiate

        callback = safe_instantiate(OmegaConf.create({"_target_": "nemo_emmett.callbacks.RandomState"}))
        assert type(callback).__name__ == "RandomState"
        assert PromptFormatter.resolve("emmett_t5").NAME == "emmett_t5"

    @pytest.mark.parametrize("first", FIRST)
    def test_holds_whichever_of_our_modules_imports_nemo_first(self, first: str, not_done: dict[str, list]) -> None:
        assert not_done[first] == []

    def test_a_failing_registration_is_logged_and_spares_the_import(self, caplog: pytest.LogCaptureFixture) -> None:
        def fail(_: types.ModuleType) -> None:
            raise AttributeError("moved")

        registration = plugin.Registration("data types", "json", fail)
        with caplog.at_level(logging.ERROR):
            registration.wait()
        assert (registration.state, registration.error) == ("failed", "AttributeError: moved")
        assert "could not register its data types with NeMo" in caplog.text

    def test_waits_until_its_module_is_imported(self, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        (tmp_path / "imported_late.py").write_text("VALUE = 42\n")
        monkeypatch.syspath_prepend(tmp_path)
        seen = []
        registration = plugin.Registration("test", "imported_late", lambda module: seen.append(module.VALUE))
        registration.wait()
        registration.wait()
        assert (registration.state, seen) == ("waiting", [])
        import imported_late  # noqa: F401

        assert (registration.state, seen) == ("done", [42])


class TestSeam:
    @pytest.fixture
    def factory(self) -> types.ModuleType:
        """A module with the two functions that NeMo's factory looks up."""
        module = types.ModuleType("dataloader")

        def get_lhotse_dataloader_from_single_config(config, global_rank, world_size, dataset, tokenizer=None):
            return "single", config, global_rank, world_size, dataset, tokenizer

        def get_lhotse_dataloader_from_multi_config(top_level_config, global_rank, world_size, dataset, tokenizer=None):
            return "multi", top_level_config, global_rank, world_size, dataset, tokenizer

        module.get_lhotse_dataloader_from_single_config = get_lhotse_dataloader_from_single_config
        module.get_lhotse_dataloader_from_multi_config = get_lhotse_dataloader_from_multi_config
        plugin.open_dataloader_factory(module)
        return module

    @pytest.fixture
    def ours(self, monkeypatch: pytest.MonkeyPatch) -> list:
        import nemo_emmett.data

        calls = []

        def get_multimodal_dataloader(config, global_rank, world_size, dataset, tokenizer=None):
            calls.append((config, global_rank, world_size, dataset, tokenizer))
            return "ours"

        # Not setattr, which would import the real one to look at it.
        monkeypatch.setitem(vars(nemo_emmett.data), "get_multimodal_dataloader", get_multimodal_dataloader)
        return calls

    @pytest.mark.parametrize("kind", ["single", "multi"])
    @pytest.mark.parametrize("content", [{}, {"use_emmett": False}, {"nested": {"use_emmett": False}}])
    def test_other_configs_reach_the_original_unchanged(self, factory, ours, kind, content) -> None:
        config = OmegaConf.create(content)
        OmegaConf.set_struct(config, True)
        build = getattr(factory, f"get_lhotse_dataloader_from_{kind}_config")
        assert build(config, 1, 2, dataset="d", tokenizer="t") == (kind, config, 1, 2, "d", "t")
        assert ours == []

    @pytest.mark.parametrize(
        ("name", "parameter"),
        [
            ("get_lhotse_dataloader_from_single_config", "config"),
            ("get_lhotse_dataloader_from_multi_config", "top_level_config"),
        ],
    )
    def test_use_emmett_reaches_ours(self, factory, ours, name, parameter) -> None:
        config = OmegaConf.create({"use_emmett": True})
        OmegaConf.set_struct(config, True)
        assert getattr(factory, name)(config, 1, 2, "d") == "ours"
        call = {parameter: config, "global_rank": 1, "world_size": 2, "dataset": "d", "tokenizer": "t"}
        assert getattr(factory, name)(**call) == "ours"
        assert ours == [(config, 1, 2, "d", None), (config, 1, 2, "d", "t")]

    def test_opening_twice_wraps_once_and_keeps_the_original(self, factory) -> None:
        once = factory.get_lhotse_dataloader_from_single_config
        plugin.open_dataloader_factory(factory)
        assert factory.get_lhotse_dataloader_from_single_config is once
        assert once.__wrapped__({}, 0, 1, None)[0] == "single"
        assert not hasattr(once.__wrapped__, "__wrapped__")

    def test_nemos_own_factory_goes_through_it(self, ours) -> None:
        from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config

        config = OmegaConf.create({"use_emmett": True, "cuda_expandable_segments": False})
        assert get_lhotse_dataloader_from_config(config, 0, 1, "d", "t") == "ours"
        config.multi_config = True
        assert get_lhotse_dataloader_from_config(config, 0, 1, "d", "t") == "ours"
        assert len(ours) == 2


def test_prompt_formats_are_registered_whichever_of_our_modules_imports_nemo_first() -> None:
    code = """
import nemo_emmett.prompts.answers
from nemo_emmett.plugin import register
from nemo.collections.common.prompts import PromptFormatter
print([one.state for one in register() if one.what == "prompt formats"], PromptFormatter.resolve("emmett_t5").NAME)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["['done'] emmett_t5"], done.stderr
    assert "could not register" not in done.stderr


def test_of_another_packages_optimizers_only_those_of_the_list_are_allowed(monkeypatch) -> None:
    from nemo.core.classes.common import _is_target_allowed

    plugin.register()
    package, module = types.ModuleType("torchao"), types.ModuleType("torchao.optim")
    package.optim = module
    for name in ("AdamW8bit", "OptimState8bit"):
        setattr(module, name, type(name, (), {"__module__": "torchao.optim"}))
    module.load = module.os = print
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.optim", module)
    assert _is_target_allowed("torchao.optim.AdamW8bit")
    assert not any(_is_target_allowed(f"torchao.optim.{name}") for name in ("OptimState8bit", "load", "os"))
    assert not _is_target_allowed("torchao.quantization.quantize_")
