"""``nemo-emmett doctor``: checks the installation and prints a remedy for each fault."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemo_emmett import plugin
from nemo_emmett.processes import available_cores

PACKAGES = (
    "nemo_emmett",
    "nemo_toolkit",
    "torch",
    "lightning",
    "lhotse",
    "transformers",
    "peft",
    "hydra-core",
    "omegaconf",
    "sacrebleu",
)
"""Required distributions, whose versions are printed."""

EXTRAS = {"demo": ("espeakng_loader", "num2words"), "hygiene": ("py3langid",), "report": ("matplotlib",)}
"""Modules of each optional extra."""

HYDRA_PLUGIN = "hydra_plugins.nemo_emmett_plugin"

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    part: str  # its heading in the table
    what: str
    value: str  # what was found
    remedy: str = ""  # empty if nothing is wrong
    fatal: bool = False  # whether the package cannot be used as it is


def examine() -> list[Finding]:
    """Run all checks; imports NeMo, which takes about ten seconds."""
    # Registrations after the imports of NeMo and Hydra, which run them.
    return [*_libraries(), *_entry_points(), *_registrations(), *_device(), *_extras()]


def report(console: Console) -> int:
    """Print the findings as a table.

    Returns:
        The exit code: 0 if the package can be used, otherwise 1.
    """
    with console.status("Importing NeMo, about ten seconds"):
        findings = examine()
    table = Table("", "", "found", title="nemo-emmett doctor")
    part = None
    for finding in findings:
        if finding.part != part:
            part = finding.part
            table.add_section()
            table.add_row("", f"[bold]{part}[/bold]", "")
        table.add_row(_mark(finding), finding.what, finding.value)
    console.print(table)
    fatal = [finding for finding in findings if finding.fatal]
    for finding in findings:
        if finding.remedy:
            console.print(f"{_mark(finding)} {finding.what}: {escape(finding.remedy)}", highlight=False)
    console.print("nemo_emmett cannot be used as it is." if fatal else "nemo_emmett is ready for use.")
    return 1 if fatal else 0


def _libraries() -> Iterator[Finding]:
    yield Finding("versions", "python", platform.python_version())
    for package in PACKAGES:
        try:
            yield Finding("versions", package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding("versions", package, "not installed", "run: pip install nemo_emmett", fatal=True)
    for module in ("torch", "lightning.pytorch", "lhotse", "nemo.collections.asr", "nemo.collections.speechlm2"):
        yield _tried(
            "imports",
            module,
            lambda module=module: import_module(module) and "imports",
            f"repair its installation: python -c 'import {module}' shows what fails",
        )


def _entry_points() -> Iterator[Finding]:
    for kind in plugin.KINDS:
        points = plugin.entry_points(kind)
        if not points:
            yield Finding("plugin", kind, "no entry points", "run: pip install nemo_emmett", fatal=True)
        for name, point in sorted(points.items()):
            yield _tried(
                "plugin",
                f"{kind}: {name}",
                lambda point=point: point.load() and point.value,
                f"the entry point of package {point.dist.name if point.dist else 'unknown'} is broken",
            )
    yield _tried(
        "plugin", "Lightning callbacks", _callback_factory, f"correct the variable {plugin.CALLBACKS_VARIABLE}"
    )
    yield _tried("plugin", "Hydra", _hydra_plugin, "run: pip install --force-reinstall --no-deps nemo_emmett")


def _callback_factory() -> str:
    installed = metadata.entry_points(group="lightning.pytorch.callbacks_factory", name="nemo_emmett")
    if not installed:
        raise RuntimeError("the entry point is not installed")
    requested = [type(callback).__name__ for callback in plugin.requested_callbacks()]
    return ", ".join(requested) or f"none requested ({plugin.CALLBACKS_VARIABLE})"


def _hydra_plugin() -> str:
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    if HYDRA_PLUGIN not in {cls.__module__ for cls in Plugins.instance().discover(SearchPathPlugin)}:
        raise RuntimeError(f"Hydra does not find {HYDRA_PLUGIN}")
    return "configs found in pkg://nemo_emmett.conf"


def _registrations() -> Iterator[Finding]:
    for registration in plugin.register():
        done = registration.state == "done"
        yield Finding(
            "plugin",
            f"NeMo: {registration.what}",
            "registered" if done else f"{registration.state} {registration.error}".strip(),
            "" if done else "use the NeMo version of constraints.txt",
            fatal=not done,
        )


def _device() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("device", "CPU", f"{available_cores()} cores, {memory / GIB:.1f} GiB")
    if find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding("device", "CUDA", "no device: training runs on the CPU")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("device", f"CUDA {index}", f"{device.name}, {device.total_memory / GIB:.1f} GiB")


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        yield Finding(
            "extras",
            extra,
            f"missing: {', '.join(missing)}" if missing else "installed",
            f"if you need it, run: pip install 'nemo_emmett[{extra}]'" if missing else "",
        )


def _tried(part: str, what: str, look: Callable[[], str], remedy: str) -> Finding:
    """The finding of one check; any exception becomes a fatal one."""
    try:
        return Finding(part, what, look())
    except Exception as error:
        return Finding(part, what, " ".join(f"{type(error).__name__}: {error}".split()), remedy, fatal=True)


def _mark(finding: Finding) -> str:
    if finding.fatal:
        return "[red]✗[/red]"
    return "[yellow]![/yellow]" if finding.remedy else "[green]✓[/green]"
