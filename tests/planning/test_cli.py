"""``nemo-emmett oomptimize`` and ``nemo-emmett plan``: what they hand on, and mistakes in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest


class TestBatchSizes:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list:
        """The commands' functions, which note what they are called with."""
        import nemo_emmett.planning

        calls = []
        for name in ("oomptimize", "plan"):
            note = lambda cfg, build, name=name, **options: calls.append((name, cfg, build, options))  # noqa: E731
            monkeypatch.setitem(vars(nemo_emmett.planning), name, note)
        return calls

    def test_oomptimize_hands_the_composed_recipe_and_its_options_on(self, invoke, calls, tmp_path: Path) -> None:
        from nemo_emmett.training import build_training

        options = ["--memory-budget", "70GiB", "--modality-share", "auto", "--predict-epoch", "--output", "p.png"]
        done = invoke("oomptimize", "salm_t5", "trainer.max_steps=7", *options)
        assert done.exit_code == 0, done.output
        ((name, cfg, build, options),) = calls
        assert (name, cfg.trainer.max_steps, build) == ("oomptimize", 7, build_training)
        assert options == {
            "profile": Path("profile.yaml"),
            "memory_fraction": 0.9,
            "memory_budget": "70GiB",
            "safety_margin": 0.03,
            "modality_share": "auto",
            "predict_epoch": True,
            "limit": None,
            "output": Path("p.png"),
        }

    def test_plan_does_so_too(self, invoke, calls) -> None:
        options = ["--memory", "H100", "--optimise-bins", "--choose-checkpointing"]
        options += ["--num-buckets", 10, "--num-sub-buckets", 2]
        done = invoke("plan", "salm_t5", *options, "--profile", "mine.yaml", "--limit", 1000)
        assert done.exit_code == 0, done.output
        ((name, _, _, options),) = calls
        assert name == "plan"
        assert options == {
            "profile": Path("mine.yaml"),
            "memory": "H100",
            "memory_fraction": 0.9,
            "safety_margin": 0.03,
            "modality_share": 0.5,
            "optimise_bins": True,
            "choose_checkpointing": True,
            "num_buckets": 10,
            "num_sub_buckets": 2,
            "limit": 1000,
            "output": None,
        }

    @pytest.mark.parametrize("share", ["0", "1.5", "half"])
    def test_a_share_that_is_none_is_refused(self, invoke, calls, share: str) -> None:
        assert invoke("oomptimize", "salm_t5", "--modality-share", share).exit_code == 2
        assert calls == []

    @pytest.mark.parametrize("command", ["oomptimize", "plan"])
    def test_mistakes_are_one_sentence(self, invoke, command: str) -> None:
        done = invoke(command, "gone.yaml", "--profile", "p.yaml")
        assert (done.exit_code, done.output.count("\n")) == (2, 1)
        assert done.output == "Error: The recipe 'gone.yaml' cannot be read: there is no such file.\n"

    def test_a_plan_needs_the_memory(self, invoke) -> None:
        done = invoke("plan", "salm_t5")
        assert done.exit_code == 2
        assert (
            "Error: --memory: is missing; name the device to plan for (H100), or its memory (80GiB).\n" in done.output
        )
