"""``nemo-emmett doctor``: what is installed, what is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from nemo_emmett import doctor, plugin


def test_a_sound_installation_is_fit_for_use(invoke) -> None:
    done = invoke("doctor")
    assert done.exit_code == 0, done.output
    for found in ("nemo_toolkit", "models: salm_t5", "NeMo: data types", "CPU", "extras", "ready for use"):
        assert found in done.output


def test_a_failed_registration_makes_it_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = plugin.Registration("data types", "json", print, state="failed", error="AttributeError: moved")
    monkeypatch.setattr(plugin, "REGISTRATIONS", (failed,))
    console = Console(record=True, width=200)
    assert doctor.report(console) == 1
    text = console.export_text()
    assert "failed AttributeError: moved" in text
    assert "NeMo: data types: use the NeMo version of constraints.txt" in text


def test_a_broken_entry_point_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Broken:
        value = "gone:Model"
        dist = SimpleNamespace(name="third-party")

        def load(self) -> None:
            raise ImportError("no module named gone")

    monkeypatch.setattr(plugin, "entry_points", lambda kind: {"theirs": Broken()})
    (finding, *_) = doctor._entry_points()
    assert finding.fatal
    assert "no module named gone" in finding.value
    assert finding.remedy == "the entry point of package third-party is broken"


def test_missing_extras_are_told_but_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"synthesis": ("yaml", "surely_not_installed")})
    (finding,) = doctor._extras()
    assert (finding.value, finding.fatal) == ("missing: surely_not_installed", False)
    assert "nemo_emmett[synthesis]" in finding.remedy
    console = Console(record=True, width=200)
    doctor.report(console)
    assert finding.remedy in console.export_text(), "brackets are text, not markup"


def test_every_missing_piece_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from nemo_emmett.modules import linear_cross_entropy

    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name != "torch" else True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(linear_cross_entropy, "kernel_is_installed", lambda name: False)
    findings = [*doctor._audio(), *doctor._loss_kernels(), *doctor._extras(), *doctor._others()]
    missing = {one.what: one for one in findings if one.value.startswith("missing")}
    assert {*missing} == {
        "FFmpeg",
        "liger",
        "cut_cross_entropy",
        *doctor.EXTRAS,
        "unbabel-comet",
        "tensorboard",
        "wandb",
    }
    assert all(one.enables and one.remedy and not one.fatal for one in missing.values())
    assert missing["liger"].remedy == "run: pip install liger-kernel"
    assert ".m4a" in missing["FFmpeg"].enables


def test_ffmpeg_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "ffmpeg"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for code, found, remedy in ((0, "7.1", ""), (3, "broken", f"repair it: {program} -version fails")):
        program.write_text(f"#!/bin/sh\necho ffmpeg version 7.1 Copyright\nexit {code}\n")
        program.chmod(0o755)
        (_, finding) = doctor._audio()
        assert (finding.value, finding.remedy) == (found, remedy)


def test_the_disk_of_the_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for free, said in (
        (2**40, ""),
        (2**30, "make room, or write elsewhere: a checkpoint of 1 B trained parameters"),
    ):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder, usage=usage: usage)
        (finding,) = doctor._disk(tmp_path / "new")
        assert finding.remedy.startswith(said)
        assert bool(finding.remedy) == bool(said)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    (finding,) = doctor._disk(tmp_path / "file" / "folder")
    assert finding.value == "cannot be written to"


def test_findings_as_json(monkeypatch: pytest.MonkeyPatch, invoke) -> None:
    findings = [doctor.Finding("a", "b", "[c]"), doctor.Finding("a", "d", "missing", "run it", "e")]
    for fatal in (False, True):
        more = [doctor.Finding("f", "g", "h", "i", fatal=True)] * fatal
        monkeypatch.setattr(doctor, "examine", lambda output, more=more: [*findings, *more])
        done = invoke("doctor", "--json")
        assert done.exit_code == int(fatal)
        found = json.loads(done.stdout)
        assert found["ready"] is not fatal
        assert [one["value"] for one in found["findings"]][:2] == ["[c]", "missing"]
