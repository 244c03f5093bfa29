"""``nemo-emmett doctor``: checks the installation and prints a remedy for each fault."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemo_emmett import plugin
from nemo_emmett.errors import ConfigError
from nemo_emmett.files import check_writable, existing_folder, shown
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

EXTRAS = {
    "synthesis": ("espeakng_loader", "num2words"),
    "langid": ("py3langid",),
    "charts": ("matplotlib",),
    "serve": ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
}
"""Modules of each optional extra."""

PURPOSES = {
    "synthesis": "prepare phrasebook and prepare captions, which speak their texts",
    "langid": "prepare CORPUS --language-id",
    "charts": "pictures: --output of bins, plan and oomptimize",
    "serve": "the HTTP server",
}
"""What each extra enables."""

OTHERS = {
    "comet": ("unbabel-comet", "the metric COMET of evaluate"),
    "tensorboard": ("tensorboard", "curves of a training, and evaluate --log-dir"),
    "wandb": ("wandb", "exp_manager.create_wandb_logger"),
}
"""Modules that are used if they are installed: their package, and what it enables."""

FFMPEG_FORMATS = "recordings that libsndfile cannot read: .m4a, .aac, .mp4, .webm, such as those of Europarl-ST"

LITTLE_SPACE = 12 * 10**9
"""Bytes: a checkpoint of 1 B trained parameters, their weights and Adam's two moments in float32."""

HYDRA_PLUGIN = "hydra_plugins.nemo_emmett_plugin"

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    part: str  # its heading in the table
    what: str
    value: str  # what was found
    remedy: str = ""  # empty if nothing is missing
    enables: str = ""  # what is missing as long as it is not there
    fatal: bool = False  # whether the package cannot be used as it is


def examine(output: Path = Path()) -> list[Finding]:
    """Run all checks; imports NeMo, which takes about ten seconds.

    Args:
        output: folder that trainings write to.
    """
    # Registrations after the imports of NeMo and Hydra, which run them.
    of_install = [*_libraries(), *_entry_points(), *_registrations()]
    return [*of_install, *_device(), *_disk(output), *_audio(), *_loss_kernels(), *_extras(), *_others()]


def report(console: Console, output: Path = Path(), as_json: bool = False) -> int:
    """Print the findings as a table, or as JSON.

    Args:
        console: where to print.
        output: folder that trainings write to.
        as_json: print one object with ``ready`` and ``findings`` instead of the table.

    Returns:
        The exit code: 0 if the package can be used, otherwise 1.
    """
    with console.status("Importing NeMo, about ten seconds") if not as_json else nullcontext():
        findings = examine(output)
    if as_json:
        ready = not any(finding.fatal for finding in findings)
        text = json.dumps({"ready": ready, "findings": [asdict(finding) for finding in findings]}, indent=2)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return int(not ready)
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
            enables = f"for {finding.enables}: " if finding.enables else ""
            console.print(f"{_mark(finding)} {finding.what}: {escape(enables + finding.remedy)}", highlight=False)
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


def _disk(output: Path) -> Iterator[Finding]:
    folder = output.absolute()
    try:
        check_writable(folder, "--output")
    except ConfigError as error:
        yield Finding("disk", str(output), "cannot be written to", str(error), "the output of a training")
        return
    free = shutil.disk_usage(existing_folder(folder)).free
    remedy = (
        f"make room, or write elsewhere: a checkpoint of 1 B trained parameters takes {shown(LITTLE_SPACE)}"
        if free < LITTLE_SPACE
        else ""
    )
    yield Finding("disk", str(output), f"{shown(free)} free", remedy)


def _audio() -> Iterator[Finding]:
    import soundfile

    yield Finding("audio", "libsndfile", soundfile.__libsndfile_version__)
    path = shutil.which("ffmpeg")
    if path is None:
        remedy = "run: apt-get install ffmpeg, or: conda install -c conda-forge ffmpeg"
        yield Finding("audio", "FFmpeg", "missing", remedy, FFMPEG_FORMATS)
        return
    asked = subprocess.run([path, "-version"], capture_output=True, text=True, check=False)
    if asked.returncode:
        yield Finding("audio", "FFmpeg", "broken", f"repair it: {path} -version fails", FFMPEG_FORMATS)
        return
    yield Finding("audio", "FFmpeg", asked.stdout.removeprefix("ffmpeg version ").split(" ")[0])


def _loss_kernels() -> Iterator[Finding]:
    if find_spec("torch") is None:
        return
    import torch

    from nemo_emmett.modules.linear_cross_entropy import KERNEL_PACKAGES, kernel_is_installed

    yield Finding("loss", "chunked", "built in, for any device")
    has_cuda = torch.cuda.is_available()
    for name, package in KERNEL_PACKAGES.items():
        if kernel_is_installed(name):
            yield Finding("loss", name, "installed" if has_cuda else "installed, for CUDA alone")
        elif not has_cuda:
            yield Finding("loss", name, "not installed, for CUDA alone")
        else:
            purpose = f"the fused loss on CUDA, model.loss_implementation: {name} (auto uses it, too)"
            yield Finding("loss", name, "missing", f"run: pip install {package}", purpose)


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        remedy = f"run: pip install 'nemo_emmett[{extra}]'"
        found = f"missing: {', '.join(missing)}" if missing else "installed"
        enables = PURPOSES.get(extra, "")
        yield Finding("extras", extra, found, remedy if missing else "", enables if missing else "")


def _others() -> Iterator[Finding]:
    for module, (package, purpose) in OTHERS.items():
        if find_spec(module) is not None:
            yield Finding("extras", package, "installed")
        else:
            yield Finding("extras", package, "missing", f"run: pip install {package}", purpose)


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
