"""Two processes that train together, and what they train on."""

from __future__ import annotations

import faulthandler
import operator
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from nemo_emmett.models.base import SpeechTextModel

from ..fork_server import fork_server, print_to
from .batches import packed, padded, prompted_batch, with_recordings

RANKS = 2
SECONDS_TO_END = 240


class RankCrashedError(AssertionError):
    """A process of several ranks was ended by a fault in memory."""


def run_on_two_ranks(
    job: Callable[..., None], folder: Path, *arguments: Any, ranks: int = RANKS, seconds: float = SECONDS_TO_END
) -> None:
    """Call ``job(rank, *arguments)`` in two processes, or more, that find each other.

    Args:
        job: a function of a module.
        folder: receives what the ranks print.
        arguments: of the job.
        ranks: how many.
        seconds: after which they hang.

    Raises:
        RankCrashedError: if a rank crashes, with the end of every rank's log.
        AssertionError: if a rank fails or hangs, with the same.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = fork_server()
    processes = [
        context.Process(target=_rank, args=(rank, port, folder / f"rank{rank}.log", job, arguments, seconds))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + 10)  # the other waits for this one
        processes[0].join(0.2)
    for process in processes:
        if process.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
    logs = [(folder / f"rank{rank}.log").read_text()[-5000:] for rank in range(ranks)]
    if any(process.exitcode in (-signal.SIGSEGV, -signal.SIGABRT) for process in processes):
        raise RankCrashedError("\n".join(logs))
    assert [process.exitcode for process in processes] == [0] * ranks, "\n".join(logs)


def _rank(rank: int, port: int, log: Path, job: Callable[..., None], arguments: Sequence[Any], seconds: float) -> None:
    os.setpgrp()
    print_to(log)
    faulthandler.enable(sys.stderr)
    faulthandler.dump_traceback_later(seconds - 5, file=sys.stderr)
    # What Lightning reads to find that its ranks are started by somebody else.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    job(rank, *arguments)
    torch.distributed.barrier()


# What they train on.

TEXT = [("one red house", "ein haus"), ("two", "zwei blaue autos"), ("three green trees", "drei")]
SPEECH = [(0.6, "vier alte türen"), (0.9, "fünf"), (0.5, "sechs große hunde")]
TRANSCRIPTS = ["four old doors", None, "sechs große hunde"]
OBJECTIVES = {
    "objectives": {
        "distillation": {"weight": 0.7},
        "retention": {"weight": 2.0},
        "transcription": {"weight": 0.3},
        "consistency": {"weight": 0.5, "train_text": True},
    }
}
"""Of a model's config. Only the last recording is transcribed."""


def text(model: SpeechTextModel, rows: slice) -> dict[str, Any]:
    """Some rows of ``TEXT``."""
    return prompted_batch(model, *map(list, zip(*TEXT[rows], strict=True)))


def speech(model: SpeechTextModel, rows: slice) -> dict[str, Any]:
    """Some rows of ``SPEECH``, each always with the same noise for a recording, and what objectives read."""
    seconds, answers = zip(*SPEECH[rows], strict=True)
    batch = prompted_batch(model, [model.options.audio_locator_tag] * len(seconds), list(answers))
    first = rows.start or 0
    alone = [with_recordings(model, {}, [s], seed=first + i)["audios"][0] for i, s in enumerate(seconds)]
    lens = torch.tensor([len(recording) for recording in alone])
    transcripts = TRANSCRIPTS[rows]
    texts = prompted_batch(model, [transcript or "" for transcript in transcripts], list(answers))
    tokens = padded([model.tokenizer.text_to_ids(transcript or "") for transcript in transcripts], model.pad_id)
    return batch | {
        "audios": pad_sequence(alone, batch_first=True),
        "audio_lens": lens,
        "text_context_ids": texts["context_ids"],
        "text_context_lens": texts["context_lens"] * torch.tensor([text is not None for text in transcripts]),
        "transcript_ids": tokens[0].long(),
        "transcript_lens": tokens[1],
        "is_transcription": torch.tensor([*map(operator.eq, transcripts, answers)]),
    }


NONE = slice(0, 0)


def batch_of(model: SpeechTextModel, rows_of_text: slice, rows_of_speech: slice) -> dict[str, dict[str, Any]]:
    """A batch of both modalities, or of that which has rows."""
    of_each = {"audio": (speech, rows_of_speech), "text": (text, rows_of_text)}
    return {modality: make(model, rows) for modality, (make, rows) in of_each.items() if rows.start < rows.stop}


def packed_batch_of(model: SpeechTextModel, rows_of_text: slice, rows_of_speech: slice) -> dict[str, dict[str, Any]]:
    """As :func:`batch_of`, two examples to a row."""
    batch = batch_of(model, rows_of_text, rows_of_speech)
    return {name: packed(part, [row // 2 for row in range(len(part["context_ids"]))]) for name, part in batch.items()}


def joined(model: SpeechTextModel, ranks: Sequence[tuple[slice, slice]]) -> dict[str, dict[str, Any]]:
    """The batch of what the ranks have between them: rows that follow one another."""
    rows = []
    for of_ranks in zip(*ranks, strict=True):
        there = [of_rank for of_rank in of_ranks if of_rank.start < of_rank.stop]
        rows.append(slice(min(r.start for r in there), max(r.stop for r in there)) if there else NONE)
    return batch_of(model, *rows)


# How they train.


class Steps(Callback):
    """Writes down the gradients of each optimizer step, whole, and the loss of each batch; saves a checkpoint.

    Args:
        save_after: so many optimizer steps.
        checkpoint: where to.
    """

    def __init__(self, save_after: int | None = None, checkpoint: Path | None = None) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self._save_after = save_after
        self._checkpoint = checkpoint

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients.append(gradients(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        # Lightning hands out what it calls backward on.
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        if trainer.global_step == self._save_after:
            trainer.save_checkpoint(self._checkpoint)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name, zeros where there are none."""
    return {
        name: torch.zeros(parameter.shape) if parameter.grad is None else whole(parameter.grad)
        for name, parameter in model.named_parameters()
    }


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Whole parameters by name."""
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def shards(model: torch.nn.Module) -> dict[str, Tensor]:
    """What this rank holds of distributed parameters, and buffers, by name."""
    state = model.state_dict()
    return {name: (v.to_local() if isinstance(v, DTensor) else v).clone() for name, v in state.items()}


def whole(tensor: Tensor) -> Tensor:
    """A copy; of a distributed tensor, gathered from all ranks."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


LORA = {"lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}}
SGD = {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01}}
"""Of a model's config: plain gradient descent, which depends on the size of gradients."""


def in_one_process(
    model: SpeechTextModel, steps: Sequence[Sequence[Mapping]], clip: float | None = None
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Gradient of each optimizer step, each over some batches, and the loss of each batch, without Lightning.

    Args:
        model: is trained.
        steps: the batches of each optimizer step.
        clip: the largest norm of a gradient that is applied.
    """
    model.configure_optimizers()  # which freezes what is to be frozen
    found, losses = [], []
    for step in steps:
        model.zero_grad()
        for batch in step:
            output = model.training_step(batch, 0)
            loss = output["loss"] if isinstance(output, dict) else output
            (loss / len(step)).backward()
            losses.append(loss.item())
        found.append(gradients(model))
        learning = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(learning, clip)
        with torch.no_grad():
            for parameter in learning:
                parameter -= SGD["optimizer"]["lr"] * parameter.grad
    return found, losses


def quiet_trainer(**options: Any) -> Trainer:
    """A trainer of two ranks on the CPU that writes nothing by itself."""
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"),
        False,
    )
    defaults = {"devices": RANKS, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", max_epochs=1, **defaults | quiet | options)


def assert_equal_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """To a relative tolerance of 1e-5, elements that nearly cancel out to that of their parameter's largest.

    What is zero but for rounding, such as the gradient of the keys' bias, is recognised by the model's largest element.
    """
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        atol = 1e-5 * gradient.abs().max().item() + 1e-8 * largest
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=atol, msg=lambda message, name=name: f"{name}: {message}"
        )
