"""EMMeTT in miniature, from nothing: a corpus, a speech encoder, a T5, their joint training, and the table of scores.

Usage:
    python examples/speechlm/demo.py [--data data/phrasebook] [--exp exp/phrasebook] [--speech-alone]

Each stage is a command that it prints and that can be run by hand; a stage that has finished is not run again. With
``--speech-alone`` it also trains from the same start on speech alone, to show what becomes of text translation then.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from stages import KEEP_MEMORY, installed, script, tail


@dataclass
class Stage:
    """A command, and the file that exists when it has finished."""

    title: str
    command: list[str]
    result: Path
    shows: bool = False  # whether its output is shown; of the others only the progress is


def main() -> None:
    """Run the stages and print how long each took."""
    parser = argparse.ArgumentParser(description="EMMeTT in miniature, from nothing.")
    parser.add_argument("--data", type=Path, default=Path("data/phrasebook"), help="folder of the corpus")
    parser.add_argument("--exp", type=Path, default=Path("exp/phrasebook"), help="folder of the experiment")
    parser.add_argument("--speech-alone", action="store_true", help="also train on speech alone, to compare")
    options = parser.parse_args()

    started = time.monotonic()
    seconds = {}
    stages = demo_stages(options.data, options.exp)
    if options.speech_alone:
        stages += speech_alone_stages(options.data, options.exp)
    for number, stage in enumerate(stages, start=1):
        print(f"\n=== {number}/{len(stages)} {stage.title}\n$ {shlex.join(stage.command)}", flush=True)
        seconds[stage.title] = run(stage, options.exp / "logs" / f"{number}.log")

    print("\nTime of each stage")
    for title, duration in seconds.items():
        print(f"  {title:<58} {'done before' if duration is None else f'{duration:6.0f} s'}")
    print(f"  {'together':<58} {time.monotonic() - started:6.0f} s")
    print(f"\nThe report, with recordings to listen to: {options.exp / 'evaluation' / 'report.html'}")
    translate = [installed("nemo-emmett"), "translate", "--model", str(options.exp / "salm_t5" / "model"), "--to", "de"]
    print("Translate a text, or recordings:")
    print(f'  {shlex.join(translate)} "ten twenty in the morning"')
    print(f"  {shlex.join(translate)} {options.data / 'audio' / 'test' / 'en'}/*.wav")


def run(stage: Stage, log: Path) -> float | None:
    """Run a stage unless its result exists; returns its seconds, or None."""
    if stage.result.exists():
        print(f"{stage.result} exists already.")
        return None
    begun = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        streams = {"stderr": output} if stage.shows else {"stdout": output, "stderr": output}
        process = subprocess.Popen(stage.command, env={**KEEP_MEMORY, **os.environ}, **streams)
        if not stage.shows:
            show_progress(process, log)
        process.wait()
    if process.returncode != 0:
        print(log.read_text(errors="replace")[-3000:])
        sys.exit(f"'{stage.title}' failed (exit code {process.returncode}), see {log}. `make demo` continues from it.")
    return time.monotonic() - begun


def show_progress(process: subprocess.Popen, log: Path) -> None:
    """Repeat the progress that a process writes into its log, bars or lines of steps, until the process ends."""
    shown = ""
    while process.poll() is None:
        time.sleep(0.5)
        bars = [line for line in re.split(r"[\r\n]", tail(log)) if re.search("it/s|s/it|^step ", line)]
        if bars and sys.stdout.isatty() and bars[-1] != shown:
            shown = bars[-1]
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{shown[:width]:<{width}}", end="", flush=True)
    if shown:
        print()


def demo_stages(data: Path, exp: Path) -> list[Stage]:
    """The stages from the corpus to the table of scores."""
    t5, encoder, salm, scores = exp / "t5", exp / "encoder", exp / "salm_t5", exp / "evaluation"
    return [
        Stage(
            "Write and speak the phrasebook",
            [installed("nemo-emmett"), "prepare", "phrasebook", str(data), *PHRASEBOOK],
            data / "phrasebook.json",
            shows=True,
        ),
        Stage(
            "Pretrain the speech encoder (CTC)",
            script("pretrain_encoder.py", f"corpus={data}", f"exp_dir={encoder}"),
            encoder / "encoder.nemo",
        ),
        Stage(
            "Pretrain the language model (T5, text alone)",
            script("pretrain_t5.py", f"corpus={data}", f"exp_dir={t5}"),
            t5 / "t5" / "config.json",
        ),
        Stage(
            "Score the T5 before the training with speech",
            script(
                "evaluate.py",
                f"model={t5 / 'model'}",
                f"corpus={data}",
                f"output={scores / 'text_before'}",
                "~test_ds.datasets.test_speech",
            ),
            scores / "text_before" / "report.html",
            shows=True,
        ),
        Stage(
            "Train SALM-T5 on speech and text together",
            script("train.py", f"corpus={data}", f"exp_dir={salm}", *pretrained(exp)),
            salm / "model" / "config.json",
        ),
        scoring_stage("Score it on speech and text", data, exp, salm, scores),
    ]


def speech_alone_stages(data: Path, exp: Path) -> list[Stage]:
    """The same training without text, scored against the same T5."""
    salm, scores = exp / "speech_alone", exp / "evaluation"
    return [
        Stage(
            "Train SALM-T5 on speech alone",
            script("train.py", f"corpus={data}", f"exp_dir={salm}", *pretrained(exp), "~data.train_ds.text"),
            salm / "model" / "config.json",
        ),
        scoring_stage("Score the model trained on speech alone", data, exp, salm, scores / "speech_alone"),
    ]


def scoring_stage(title: str, data: Path, exp: Path, trained: Path, output: Path) -> Stage:
    """The scores on both test sets, compared with those of the T5 before the training with speech."""
    command = script(
        "evaluate.py",
        f"model={trained / 'model'}",
        f"corpus={data}",
        f"output={output}",
        f"log_dir={trained}",
        f"baseline={exp / 'evaluation' / 'text_before' / 'evaluation.json'}",
    )
    return Stage(title, command, output / "report.html", shows=True)


def pretrained(exp: Path) -> list[str]:
    """Overrides that name the pretrained parts of the joint training."""
    encoder = exp / "encoder" / "encoder.nemo"
    return [f"model.pretrained_llm={exp / 't5' / 't5'}", f"model.pretrained_asr={encoder}"]


PHRASEBOOK = ["--types", "time,price", "--variants", "f1,m1,m3", "--no-accents"]
PHRASEBOOK += ["--train-items", "2400", "--spoken-train-items", "1600", "--test-items", "120", "--dev-items", "40"]
"""Options for a corpus that two cores train on in a quarter of an hour: two of four types, three of eleven voices."""


if __name__ == "__main__":
    main()
