"""Arguments and options that several commands have."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import click

from nemo_emmett.corpora.commands import NamedPath, NumberRange
from nemo_emmett.run_log import quiet_console


def together(*parameters: Callable[[Callable], Callable]) -> Callable[[Callable], Callable]:
    """One decorator for several of click's arguments and options, in their order."""

    def decorate(command: Callable) -> Callable:
        for parameter in reversed(parameters):
            command = parameter(command)
        return command

    return decorate


PATH = NamedPath("path")
FOLDER = NamedPath("folder", file_okay=False)
FILE = NamedPath("file", dir_okay=False)
RECIPE = NamedPath("path|name", path_type=str)
MODEL = NamedPath("folder")  # whether it is one is checked with what is in it
COUNT = click.IntRange(min=1)
COUNT.name = "number"
BETWEEN_0_AND_1 = NumberRange(0, 1, min_open=True, max_open=True)

recipe_arguments = together(
    click.argument("config", type=RECIPE), click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
)
tokenizer_option = click.option(
    "--tokenizer",
    type=RECIPE,
    help="Folder of a tokenizer, or a SentencePiece model.  [default: the model's; blend: or words]",
)
section_option = click.option("--section", help="Place of the dataset in the recipe.  [default: data.train_ds]")
limit_option = click.option("--limit", type=COUNT, help="Examples to measure of each group.  [default: all]")
bucket_options = together(
    click.option("--num-buckets", type=COUNT, help="Buckets of input lengths.  [default: the config's]"),
    click.option(
        "--num-sub-buckets",
        type=COUNT,
        help="Bins of output lengths in each of them.  [default: the config's, or none]",
    ),
)
index_dir_option = click.option(
    "--index-dir",
    type=NamedPath("folder", file_okay=False, path_type=str),
    help="Folder for indexes that cannot be written next to the data.  [default: the dataset's index_dir]",
)
jobs_option = click.option(
    "--jobs", type=int, help="Processes to speak with; the result does not depend on it.  [default: all cores]"
)
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run code that came with the model, of a language model that transformers does not know (docs/security.md).",
)
max_new_tokens_option = click.option(
    "--max-new-tokens", type=COUNT, help="Longest translation, in tokens.  [default: the model's]"
)
chunk_seconds_option = click.option(
    "--chunk-seconds",
    type=NumberRange(min=1),
    metavar="SECONDS",
    help="Longest part of a recording that is translated at once; a longer recording is cut at its quietest places.  "
    "[default: the longest recordings of the training (max_duration of its data), if the model's config.json has "
    "them; otherwise 30]",
)
device_option = click.option(
    "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...  [default: cuda if there is one, otherwise cpu]"
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")


def loading(what: str) -> AbstractContextManager[None]:
    """Print what a command waits for, before it imports NeMo, and keep what the libraries log off the console."""
    opening = f"Loading NeMo and {what}, which takes about 15 seconds ..."
    return quiet_console(opening, stdout_is_output=True)


def warn(sentence: str) -> None:
    """Print a warning on stderr."""
    click.echo(f"Warning: {sentence}", err=True)


def trust_argument(trust_remote_code: bool) -> dict[str, bool]:
    """The argument as functions take it that load a model; absent where it is not set."""
    return {"trust_remote_code": True} if trust_remote_code else {}


def check_device(device: str | None) -> None:
    """Refuse what is no name of a device.

    Raises:
        ConfigError: naming the option.
    """
    from nemo_emmett.errors import ConfigError

    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?|mps", device):
        raise ConfigError(f"--device: '{device}' is no device; name cpu, cuda, or one of several as cuda:1.")


def available_device(device: str | None) -> str:
    """The device by that name; without one, a GPU if there is one.

    Raises:
        ConfigError: if this machine has no such device.
    """
    import torch

    from nemo_emmett.errors import ConfigError

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(number or 0) >= count:
        raise ConfigError(f"--device: there is no '{device}' on this machine; leave the option out, or name cpu.")
    return device
