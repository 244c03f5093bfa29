"""``nemo-emmett <command>``. A command imports what it needs when it runs, so that ``--help`` is fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_emmett import __version__
from nemo_emmett.corpora.commands import CorpusCommands, Names
from nemo_emmett.init.command import init
from nemo_emmett.runner import mistakes_as_sentences

if TYPE_CHECKING:
    from nemo_emmett.corpora.phrasebook.speaking import SpokenSummary
    from nemo_emmett.planning.blend_report import Recipe


class Commands(click.Group):
    """A group of commands; a user's mistake ends one with a sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with mistakes_as_sentences():
            return super().invoke(ctx)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="nemo-emmett")
def main() -> None:
    """Train one model on text and speech translation, with NeMo."""


main.add_command(init)


def _together(*parameters: Callable[[Callable], Callable]) -> Callable[[Callable], Callable]:
    """One decorator for several of click's arguments and options, in their order."""

    def decorate(command: Callable) -> Callable:
        for parameter in reversed(parameters):
            command = parameter(command)
        return command

    return decorate


_PATH = click.Path(path_type=Path)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)
_COUNT = click.IntRange(min=1)
_BETWEEN_0_AND_1 = click.FloatRange(0, 1, min_open=True, max_open=True)
_SPEECH_SHARE = "Share of the memory for speech, where each step holds speech and text."

_recipe = _together(click.argument("config"), click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1))
_tokenizer = click.option(
    "--tokenizer", help="Folder of a tokenizer, or a SentencePiece model.  [default: the model's; blend: or words]"
)
_section = click.option("--section", help="Place of the dataset in the recipe.  [default: data.train_ds]")
_limit = click.option("--limit", type=_COUNT, help="Examples to measure of each group.  [default: all]")
_buckets = _together(
    click.option("--num-buckets", type=_COUNT, help="Buckets of input lengths.  [default: the config's]"),
    click.option(
        "--num-sub-buckets",
        type=_COUNT,
        help="Bins of output lengths in each of them.  [default: the config's, or none]",
    ),
)
_jobs = click.option(
    "--jobs", type=int, help="Processes to speak with; the result does not depend on it.  [default: all cores]"
)
_trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run code that came with the model, of a language model that transformers does not know (docs/security.md).",
)


def _trust(trust_remote_code: bool) -> dict[str, bool]:
    return {"trust_remote_code": True} if trust_remote_code else {}


@main.group(cls=CorpusCommands)
def prepare() -> None:
    """Turn a corpus into manifests to train on: one of those below, from the files that its publisher distributes."""


@prepare.command()
@click.argument("out", type=_FOLDER)
@click.option("--seed", type=int, default=0, help="The same seed gives the same bytes.")
@click.option("--languages", type=Names(), help="ISO 639-1 codes.  [default: en,de,es,fr]")
@click.option("--types", type=Names(), help="What is written and spoken.  [default: number,date,time,price]")
@click.option("--train-items", type=int, help="Items to train on, over all types.")
@click.option("--dev-items", type=int, help="Items to validate on.")
@click.option("--test-items", type=int, help="Items to test on.")
@click.option("--spoken-train-items", type=int, help="How many of the train items are spoken as well as written.")
@click.option("--renditions", type=int, help="Recordings of each spoken train item in each language.")
@click.option("--max-number", type=int, help="The largest number.")
@click.option("--variants", type=Names(), help="eSpeak NG's voice variants, such as f1,m1,m3.  [default: 11 of them]")
@click.option("--accents/--no-accents", default=None, help="Speak English and Spanish in two accents each.")
@_jobs
def phrasebook(out: Path, jobs: int | None, **options: Any) -> None:
    """Write and speak numbers, dates, times and prices in four languages into the folder OUT."""
    from nemo_emmett.corpora.phrasebook import PhrasebookConfig, prepare_phrasebook

    config = PhrasebookConfig(**{name: value for name, value in options.items() if value is not None})
    _print_spoken(prepare_phrasebook(out, config, num_jobs=jobs), "items")


@prepare.command()
@click.argument("source", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--languages", type=Names(), help="Of the text.  [default: en,de,fr]")
@click.option("--spoken-languages", type=Names(), help="Among en, de, es and fr.  [default: en]")
@click.option("--max-words", type=int, help="Leave out captions of more words in any language.  [default: none]")
@click.option("--train-captions", type=int, help="The first so many of those left.  [default: all]")
@click.option("--spoken-train-captions", type=int, help="How many of them are spoken as well.  [default: all]")
@click.option("--dev-captions", type=int, help="Of the validation set; the others are the test split.  [default: 100]")
@click.option("--accents/--no-accents", default=None, help="Speak English and Spanish in two accents.  [default: no]")
@click.option("--variants", type=Names(), help="eSpeak NG's voice variants.  [default: f1,m1,m3]")
@click.option("--speed", type=(int, int), help="Words a minute, slowest and fastest.  [default: 190 210]")
@click.option("--pitch", type=(int, int), help="Of eSpeak NG's 0 to 99, lowest and highest.  [default: 40 60]")
@click.option("--seed", type=int, help="Of the voices.  [default: 0]")
@_jobs
def captions(source: Path, out: Path, jobs: int | None, **options: Any) -> None:
    """Speak captions that are line-aligned in several languages, from the folder SOURCE (Multi30k), into OUT."""
    from nemo_emmett.corpora.captions import CaptionsConfig, prepare_captions

    config = CaptionsConfig(**{name: value for name, value in options.items() if value is not None})
    _print_spoken(prepare_captions(source, out, config, num_jobs=jobs), "captions")


def _print_spoken(summary: SpokenSummary, unit: str) -> None:
    """Print the size of each split of a spoken corpus."""
    state = "written" if summary.made_now else "there already"
    for split, items in summary.items.items():
        recordings, hours = sum(summary.recordings[split].values()), sum(summary.hours[split].values())
        click.echo(f"{split:>5}: {items} {unit}, {recordings} recordings, {hours:.2f} hours ({state})")


@prepare.command()
@click.argument("training", type=_PATH, nargs=-1, required=True)
@click.option(
    "--held-out",
    type=_PATH,
    multiple=True,
    required=True,
    help="Test data: text, a manifest or a prepared corpus; may be repeated.",
)
@click.option("--examples", type=click.IntRange(min=0), default=10, help="Leaks shown of each kind, at most.")
@click.option("--near/--no-near", default=True, help="Look for test sentences with a few words changed, too.")
def leaks(training: Sequence[Path], held_out: Sequence[Path], examples: int, near: bool) -> None:
    """Find test sentences in TRAINING: text, manifests or prepared corpora; exit with 1 if there are any."""
    from nemo_emmett.corpora.leaks_command import print_leaks

    raise SystemExit(int(print_leaks(training, held_out, examples=examples, near=near)))


@main.command()
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--to", "target_lang", required=True, help="Language to translate to, such as de.")
@click.option("--from", "source_lang", help="Language to translate from, if the model needs it.")
@click.option(
    "--model", required=True, envvar="NEMO_EMMETT_MODEL", show_envvar=True, type=_PATH, help="Folder of a saved model."
)
@_trust_option
def translate(inputs: Sequence[str], model: Path, trust_remote_code: bool, **languages: str | None) -> None:
    """Translate each INPUT, a text or an audio file, and print one translation per line."""
    from nemo_emmett.models.inputs import check_inputs

    check_inputs(inputs)
    from nemo_emmett.models import load

    loaded = load(model, **_trust(trust_remote_code))
    for translation in loaded.translate(list(inputs), **languages):
        click.echo(translation)


@main.command()
@click.argument("model", type=_PATH)
@click.argument("config", type=_PATH)
@click.option("--output", type=_FOLDER, help="Folder for evaluation.json and report.html.")
@click.option("--num-beams", type=_COUNT, help="1 is greedy search.  [default: the recipe's, or 1]")
@click.option("--max-new-tokens", type=_COUNT, help="Longest translation.  [default: the model's]")
@click.option("--log-dir", type=_PATH, help="TensorBoard logs of the training, for its curves.")
@click.option("--name", help="Name of the model in tables.  [default: the end of its folder's path]")
@click.option(
    "--metrics",
    type=Names(),
    help="Of BLEU, chrF++, chrF, TER, spBLEU and COMET; BLEU is always computed.  [default: BLEU,chrF++]",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=_PATH,
    help="An earlier evaluation.json, its folder, or the folder of a model to compare with; may be repeated.",
)
@click.option("--examples", type=click.IntRange(min=0), help="Translations in the report.  [default: 10]")
@_trust_option
def evaluate(model: Path, config: Path, trust_remote_code: bool, **options: Any) -> None:
    """Translate the test sets of the recipe CONFIG with the model in the folder MODEL, and score the translations.

    Options that are not given are the recipe's. Started by torchrun or srun, the processes share each test set.
    """
    from nemo_emmett.evaluation import evaluate_recipe

    evaluate_recipe(config, model, **options, **_trust(trust_remote_code))


@main.command()
@click.argument("recipe")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
def train(recipe: str, overrides: Sequence[str]) -> None:
    """Train the model of RECIPE, a YAML file or the name of a recipe of nemo_emmett; KEY=VALUE overrides a key of it.

    Started again, it resumes from its newest complete checkpoint. torchrun and srun may start it on several devices.
    """
    from nemo_emmett.runner import compose_recipe

    cfg = compose_recipe(recipe, overrides)
    from nemo_emmett.run_log import quiet_console

    with quiet_console("Importing NeMo and checking the recipe ..."):
        from nemo_emmett.training import train

        train(cfg)


@main.command()
@click.argument("checkpoint", type=_PATH)
@click.argument("folder", type=_PATH)
@click.option(
    "--config", help="Recipe of the training, by its path or name.  [default: recipe.yaml next to CHECKPOINT]"
)
def export(checkpoint: Path, folder: Path, config: str | None) -> None:
    """Write the model of CHECKPOINT, a .ckpt file or the folder of a sharded one, into FOLDER, for translate and
    evaluate."""
    from nemo_emmett.runner import compose_recipe

    recipe = None if config is None else compose_recipe(config)
    from nemo_emmett.exporting import export_checkpoint

    export_checkpoint(checkpoint, folder, recipe)
    click.echo(f"The model of {checkpoint} is in {folder}")


@main.command()
def doctor() -> None:
    """Report versions, what is registered where, the devices, and what is missing; exit with 1 if unfit for use."""
    from rich.console import Console

    from nemo_emmett.doctor import report

    raise SystemExit(report(Console()))


def _read_data(
    config: str, overrides: Sequence[str], section: str | None, given: Mapping[str, Any] | None = None
) -> tuple[Recipe, Any]:
    """The dataset of a command, with its model's defaults, and the model's tokenizer."""
    from nemo_emmett.runner import compose_data

    content = compose_data(config, overrides)
    from nemo_emmett.data.checks import check_files
    from nemo_emmett.planning.blend_report import read_recipe
    from nemo_emmett.planning.known_by_model import known_by_model
    from nemo_emmett.plugin import find_model

    recipe = read_recipe(content, config, section)
    if "model" not in content:
        return read_recipe(content, config, section, given), None
    check_files(recipe.dataset.sources)  # before the model is built, which takes seconds
    known = known_by_model(content, find_model)
    return read_recipe(content, config, section, {**known.defaults, **(given or {})}), known.tokenizer


_index_dir = click.option(
    "--index-dir",
    type=click.Path(file_okay=False),
    help="Folder for indexes that cannot be written next to the data.  [default: the dataset's index_dir]",
)


@main.command()
@_recipe
@_section
@_tokenizer
@_index_dir
def index(
    config: str, overrides: Sequence[str], section: str | None, tokenizer: str | None, index_dir: str | None
) -> None:
    """Build the length indexes of the data of CONFIG ahead of its training, and show their sizes and what was skipped.

    CONFIG is a recipe (a YAML file, or the name of one of nemo_emmett), the config of a dataset, or a list of sources
    (input_cfg); KEY=VALUE overrides a key of it, as for train. No audio is read. Ended and started again, it goes on
    where it was.
    """
    recipe, of_model = _read_data(config, overrides, section)
    from nemo_emmett.planning.bins_report import tokenizer_of
    from nemo_emmett.planning.index_report import print_index

    print_index(recipe.dataset, tokenizer=tokenizer_of(recipe, tokenizer, of_model), index_dir=index_dir)


@main.command()
@_recipe
@_section
@click.option("--steps", type=_COUNT, help="How far to look ahead.  [default: trainer.max_steps, or 1000]")
@_tokenizer
@_index_dir
def blend(config: str, overrides: Sequence[str], section: str | None, tokenizer: str | None, **options: Any) -> None:
    """Show the sizes of the data of CONFIG, the share of each part in the examples, and how often it is repeated.

    CONFIG is a recipe (a YAML file, or the name of one of nemo_emmett), the config of a dataset, or a list of sources
    (input_cfg); KEY=VALUE overrides a key of it, as for train. No audio is read.
    """
    recipe, of_model = _read_data(config, overrides, section)
    from nemo_emmett.planning.bins_report import tokenizer_of
    from nemo_emmett.planning.blend_report import print_blend

    print_blend(recipe, tokenizer=tokenizer_of(recipe, tokenizer, of_model), **options)


@main.command()
@_recipe
@_section
@_buckets
@_limit
@click.option(
    "--outliers",
    type=click.FloatRange(min=0, min_open=True),
    help="Leave out outputs so many standard deviations too long for their inputs.  [default: none]",
)
@_tokenizer
@click.option(
    "--token-equivalent-duration",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds of speech that count as one token.  [default: the config's, or the model's]",
)
@click.option("--output", type=_FILE, help="PNG to draw the lengths and bins in.")
def bins(config: str, overrides: Sequence[str], section: str | None, tokenizer: str | None, **options: Any) -> None:
    """Find the bins of least padding for each group of the data of CONFIG, and show what they save.

    CONFIG is a recipe (a YAML file, or the name of one of nemo_emmett), the config of a dataset, or a list of sources
    (input_cfg); KEY=VALUE overrides a key of it, as for train. No audio is read.
    """
    output, seconds = options.pop("output"), options.pop("token_equivalent_duration")
    given = {"token_equivalent_duration": seconds} if seconds else {}
    recipe, of_model = _read_data(config, overrides, section, given)
    from nemo_emmett.planning.bins_report import bins_of_dataset, draw_bins, print_bins, tokenizer_of

    groups = bins_of_dataset(recipe.dataset, tokenizer_of(recipe, tokenizer, of_model), **options)
    print_bins(groups)
    if output is not None:
        draw_bins(groups, output)


class Share(click.ParamType):
    """A number between 0 and 1, or ``auto``."""

    name = "share|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Parse the option's value."""
        return value if value == "auto" else _BETWEEN_0_AND_1.convert(value, param, ctx)


_search_options = _together(
    _recipe,
    click.option(
        "--profile", type=_FILE, default="profile.yaml", help="Profile to write, for the OOMptimizer callback to read."
    ),
    click.option(
        "--memory-fraction",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.9,
        help="Share of the device's memory that a step may take.",
    ),
    click.option(
        "--safety-margin",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.03,
        help="Share of that which stays free.",
    ),
    _limit,
    click.option("--output", type=_FILE, help="PNG to draw batch sizes and memory in."),
)


@main.command()
@_search_options
@click.option("--memory-budget", help="Memory of a step, instead of the fraction, such as 72GiB.")
@click.option("--modality-share", type=Share(), default=0.5, help=_SPEECH_SHARE)
@click.option("--predict-epoch", is_flag=True, help="Measure the data, and predict the time of an epoch.")
def oomptimize(config: str, overrides: Sequence[str], **options: Any) -> None:
    """Find the batch size of every bucket of the recipe CONFIG, on the device of this machine.

    CONFIG is a YAML file, or the name of a recipe of nemo_emmett; KEY=VALUE overrides a key of it, as for train. A few
    steps of the training are run on made-up batches, none on the data.
    """
    from nemo_emmett.planning.needed import needed_for_planning
    from nemo_emmett.runner import compose_incomplete

    recipe = needed_for_planning(compose_incomplete(config, overrides), reads_data=options["predict_epoch"])
    from nemo_emmett.planning import oomptimize
    from nemo_emmett.training import build_training

    oomptimize(recipe, build_training, **options)


@main.command()
@_search_options
@click.option("--memory", help="The device to plan for, such as H100, or its memory, such as 80GiB.")
@click.option("--modality-share", type=_BETWEEN_0_AND_1, default=0.5, help=_SPEECH_SHARE)
@click.option("--optimise-bins", is_flag=True, help="Measure the data, and find the bins with the shortest epoch.")
@_buckets
def plan(config: str, overrides: Sequence[str], **options: Any) -> None:
    """Find the batch size of every bucket of the recipe CONFIG for a device that need not be here.

    CONFIG is a YAML file, or the name of a recipe of nemo_emmett; KEY=VALUE overrides a key of it, as for train. Steps
    are run without computing anything; no weights are read, and no data unless bins are to be found.
    """
    from nemo_emmett.planning.needed import needed_for_planning
    from nemo_emmett.runner import compose_incomplete

    recipe = needed_for_planning(compose_incomplete(config, overrides), reads_data=options["optimise_bins"])
    from nemo_emmett.planning import plan
    from nemo_emmett.training import build_training

    plan(recipe, build_training, **options)
