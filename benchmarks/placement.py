"""How long does it take to put speech in the place of its locator tokens, compared with NeMo's SALM?

Batches of 64 prompts with one recording each, padded on the left, as SALM reads them. Three ways from the encoder's
padded output to embeddings, mask and targets:

- ours: ``merge_audio_embeddings``;
- NeMo's: ``replace_placeholders_and_build_targets``, given a list of recordings without padding;
- NeMo's with the making of that list: ``encode_audio_with_optional_chunking`` on an encoder that costs nothing.

A training step takes the forward and the backward pass. The forward pass alone is bound by memory where embeddings
are wide: what both have to write into fresh memory is the same, and NeMo copies the embeddings only once more than we
do. In its backward pass NeMo fills and adds up a gradient of the whole batch's size for each row. What an accelerator
would wait for, operations to launch and values to read, is counted too; it depends on neither width nor device.

    python benchmarks/placement.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from measuring import keep
from nemo.collections.speechlm2.models.salm import replace_placeholders_and_build_targets
from nemo.collections.speechlm2.parts.encoder_chunking import encode_audio_with_optional_chunking
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_emmett.modules.placement import merge_audio_embeddings

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch")
B, PAD, LOCATOR, VOCABULARY = 64, 0, 1, 32_000
REPEATS = 5
THREADS = 1
FRAME_SECONDS = 0.08  # FastConformer's


@dataclass(frozen=True)
class Setting:
    """Tokens of the longest prompt with its answer, frames of the longest recording, hidden size."""

    tokens: int
    frames: int
    hidden: int


SETTINGS = [*(Setting(40, 100, hidden) for hidden in (64, 256, 1024, 2048)), Setting(60, 250, 1024)]
"""8 s of speech (20 s in the last), at the widths of a toy, a small model, T5-large and TinyLlama."""


@dataclass
class Batch:
    """The same batch for all ways."""

    ids_BT: Tensor
    is_answer_BT: Tensor
    embeds_BTH: Tensor
    audio_BFH: Tensor
    audio_lens_B: Tensor


def make_batch(setting: Setting) -> Batch:
    """Rows of half to all the tokens, the last fifth of them the answer, and recordings of 0.9 to all the frames."""
    torch.manual_seed(0)
    T, F, H = setting.tokens, setting.frames, setting.hidden
    lens_B = torch.randint(T // 2, T + 1, (B, 1))
    ids_BT = torch.randint(LOCATOR + 1, VOCABULARY, (B, T))
    column_T = torch.arange(T)
    ids_BT = ids_BT.masked_fill(column_T < T - lens_B, PAD).masked_fill(column_T == T - lens_B + 3, LOCATOR)
    return Batch(
        ids_BT=ids_BT,
        is_answer_BT=(column_T >= T - T // 5).expand(B, T),
        embeds_BTH=torch.randn(B, T, H, requires_grad=True),
        audio_BFH=torch.randn(B, F, H, requires_grad=True),
        audio_lens_B=torch.randint(F * 9 // 10, F + 1, (B,)),
    )


def ours(batch: Batch) -> Tensor:
    """The embeddings of ``merge_audio_embeddings``, which also returns mask and targets."""
    placed = merge_audio_embeddings(
        batch.embeds_BTH,
        batch.ids_BT,
        batch.ids_BT != PAD,
        batch.audio_BFH,
        batch.audio_lens_B,
        LOCATOR,
        is_target_BT=batch.is_answer_BT,
        pad_left=True,
    )
    return placed.embeds_LSH


def nemo(batch: Batch, recordings: list[Tensor]) -> Tensor:
    """The embeddings of NeMo's function, which also returns mask and targets."""
    targets_BT = batch.ids_BT.where(batch.is_answer_BT, -100)
    return replace_placeholders_and_build_targets(batch.ids_BT, batch.embeds_BTH, PAD, LOCATOR, recordings, targets_BT)[
        0
    ]


def nemo_from_padded(batch: Batch) -> Tensor:
    """The same from the encoder's output."""
    recordings = encode_audio_with_optional_chunking(
        lambda input_signal, input_signal_length: (input_signal, input_signal_length),
        batch.audio_BFH,
        batch.audio_lens_B,
        chunk_size_seconds=None,
        sampling_rate=16_000,
    )
    return nemo(batch, recordings)


def measure(setting: Setting) -> dict[str, Any]:
    """Times and counts of all ways on one batch."""
    batch = make_batch(setting)
    recordings = [row[:n] for row, n in zip(batch.audio_BFH.unbind(), batch.audio_lens_B.tolist(), strict=True)]
    ways = {
        "nemo": lambda: nemo(batch, recordings),
        "nemo_with_list": lambda: nemo_from_padded(batch),
        "ours": lambda: ours(batch),
    }
    upstream = torch.randn_like(ours(batch))

    def there_and_back(way: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(way(), (batch.embeds_BTH, batch.audio_BFH), upstream)

    check(*(way() for way in ways.values()))
    for gradients in zip(*map(there_and_back, ways.values()), strict=True):
        check(*gradients)
    steps = {name: lambda way=way: there_and_back(way) for name, way in ways.items()}
    with torch.no_grad():
        forward = milliseconds(ways)
    return {
        **asdict(setting),
        "seconds_of_speech": setting.frames * FRAME_SECONDS,
        "forward_ms": forward,
        "forward_backward_ms": (training := milliseconds(steps)),
        "times_faster_forward": round(forward["nemo"] / forward["ours"], 1),
        "times_faster_forward_backward": round(training["nemo"] / training["ours"], 1),
        "times_faster_forward_backward_with_list": round(training["nemo_with_list"] / training["ours"], 1),
        "counts_forward": {name: counts(way) for name, way in ways.items()},
        "counts_forward_backward": {name: counts(step) for name, step in steps.items()},
    }


def check(first: Tensor, *others: Tensor) -> None:
    """All ways agree, to the bit."""
    if not all(torch.equal(first, other) for other in others):
        raise RuntimeError("the ways differ in what they make of a batch")


def milliseconds(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The least time of each, measured in turns."""
    taken = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: round(min(times), 2) for name, times in taken.items()}


class Operations(TorchDispatchMode):
    """Counts operations, and those whose result the host waits for."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waiting = 0, 0

    def __torch_dispatch__(self, func: Any, types: Sequence, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += 1
        self.waiting += func.name() in self.WAITING
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts tensors read as lists, which no operation shows on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Sequence, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


def counts(way: Callable[[], Any]) -> dict[str, int]:
    """Operations dispatched, views included, and times that the host waits for a value."""
    with Operations() as operations, Lists() as lists:
        way()
    return {"operations": operations.count, "host_reads": operations.waiting + lists.count}


def table(results: Sequence[dict[str, Any]]) -> Table:
    """A line for each setting and pass."""
    passes = {"forward": "forward", "forward_backward": "and back"}
    shown = Table(title=f"Placing audio, batch {B}, {THREADS} thread: milliseconds")
    for column in ("tokens", "frames", "hidden", "pass", "NeMo", "with list", "ours", "faster"):
        shown.add_column(column, justify="right")
    for result in results:
        for kind, name in passes.items():
            times, faster = result[f"{kind}_ms"], result[f"times_faster_{kind}"]
            cells = [*(result[key] for key in ("tokens", "frames", "hidden")), name]
            shown.add_row(*map(str, [*cells, *times.values(), f"{faster} x"]))
    return shown


def main() -> None:
    """Measure, print and keep."""
    torch.set_num_threads(THREADS)
    results = [measure(setting) for setting in SETTINGS]
    console = Console()
    console.print(table(results))
    for kind in ("forward", "forward_backward"):
        console.print(f"{kind}: {results[0][f'counts_{kind}']}")
    keep("placement", {"batch": B, "threads": THREADS, "repeats": REPEATS, "settings": results}, PACKAGES)


if __name__ == "__main__":
    main()
