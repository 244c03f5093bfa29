"""Every number in the tables of docs/benchmarks.md is that of the file in benchmarks/results that its section names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def data_loading() -> Iterator[str]:
    measured = {(m["kind"], m["workers"], m["lines"], m["loader"]): m for m in result("dataloading")["measurements"]}
    for kind in ("text", "speech"):
        for workers in (0, 2):
            nemo, ours = (measured[kind, workers, 200_000, loader] for loader in ("nemo", "nemo_emmett"))
            theirs, rate = nemo["examples_per_second"], ours["examples_per_second"]
            memory = ours["rss"] / measured[kind, workers, 20_000, "nemo_emmett"]["rss"]
            yield (
                f"| {kind}, {workers} workers | {theirs:,.0f} | {rate:,.0f} | {rate / theirs:.2f} "
                f"| {nemo['first_batch']:.2f} s | {ours['first_batch']:.2f} s | {memory:.3f} |"
            )


def resuming() -> Iterator[str]:
    for row in result("resume")["resumed"]:
        early, late = row["seconds_at_10_percent"], row["seconds_at_90_percent"]
        yield f"| {row['kind']}, {row['workers']} workers | {early:.2f} s | {late:.2f} s | {row['ratio']:.2f} |"


def ranks() -> Iterator[str]:
    measured = result("ranks")["measurements"]
    for kind in ("text", "speech"):
        for size in (1, 8, 64, 512):
            nemo, ours = (measured[f"{kind}, {loader}, {size} ranks"] for loader in ("nemo", "nemo_emmett"))
            rates = (nemo["examples_per_second"], ours["examples_per_second"], ours["of_worker"])
            yield f"| {kind}, {size} | {' | '.join(f'{rate:,.0f}' for rate in rates)} | {ours['schedule_ms']:.2f} ms |"
    firsts = {
        "20,000 lines": "large, nemo_emmett, 1 ranks, 20,000 lines",
        "2,000,000 lines": "large, nemo_emmett, 1 ranks, 2,000,000 lines",
        "10,000 files": "shards, nemo_emmett, 1 ranks",
        "2,000,000 lines, resumed at 10 %": "large, nemo_emmett, 1 ranks, 2,000,000 lines, resumed at 10%",
        "2,000,000 lines, resumed at 90 %": "large, nemo_emmett, 1 ranks, 2,000,000 lines, resumed at 90%",
    }
    for what, name in firsts.items():
        row = measured[name]
        memory = "" if "resumed" in what else f"{row['anonymous']:.0f} MiB"
        yield f"| {what} | {row['first_batch']:.2f} s | {row['first_batch_cpu']:.2f} s | {memory} |"


def padding() -> Iterator[str]:
    columns = ("estimate_token_bins", "estimate_duration_bins_2d", "least padding")
    places = {"to the caps": "to the bin edges", "real batches": "real batches"}
    for kind, measured in result("padding")["multi30k"].items():
        for row in measured["rows"]:
            if row["padded"] in places:
                shares = " | ".join(f"{100 * row[column]['share']:.1f}" for column in columns)
                yield f"| {kind}, {places[row['padded']]} | {row['buckets']} | {shares} |"


def oomptimizer() -> Iterator[str]:
    for kind, methods in result("oomptimizer")["groups"].items():
        for method, row in methods.items():
            steps = round(row["steps_per_bucket"] * len(row["sizes"]))
            yield (
                f"| {kind}, {method} | {row['steps_per_bucket']:.1f} | {row['over_budget']} of {steps} "
                f"| {row['seconds_in_steps']:.0f} | {sum(row['sizes']):,} |"
            )


def planning() -> Iterator[str]:
    kept = result("planning")
    rows = {"whole on the device": kept}
    rows |= {f"sharded over {devices} devices (FSDP2)": row for devices, row in kept["sharded"].items()}
    for what, row in rows.items():
        yield (
            f"| {what} | {row['parameters'] / 1e9:.2f} billion | {row['buckets']} | {row['steps']} "
            f"| {row['seconds']:.0f} | {row['seconds_to_build']:.0f} | {row['peak_rss_gib']} GiB |"
        )
        assert row["seconds"] < 180
        assert row["peak_rss_gib"] < 2


def training_step() -> Iterator[str]:
    steps = result("training_step")
    for row in steps["settings"]:
        numbers = (f"{row['ratio_of_seconds']:.2f}", f"{row['ratio_of_peaks']:.2f}")
        yield f"| {row['vocabulary']:,} | {row['layers']} | {' | '.join(numbers)} |"
    for row in steps["large"]:
        yield f"| {row['encoder']} | {row['peak_gib']['nemo']} | {row['peak_gib']['ours']} |"
    worst = max(row["largest_difference_of_losses"] for row in steps["settings"])
    yield f"agree to {worst:.1e}".replace("e-07", "e-7")


def gradient_conflict() -> Iterator[str]:
    row = result("gradient_conflict")
    for kind, seconds in row["seconds"].items():
        yield f"| {kind} | {seconds:.2f} | " + (f"{row['ratio'][kind]:.2f} |" if kind in row["ratio"] else "|")
    yield f"which adds {100 * row['overhead_of_monitoring']:.2f} % to the training"
    yield f"{row['copy_of_gradients_mib']} MiB here"
    assert row["overhead_of_monitoring"] < 0.03


def loss() -> Iterator[str]:
    for name, row in result("loss")["cases"].items():
        yield (
            f"| {name} | {row['ratio_of_seconds']} | {row['peak_gib']['naive']} GiB | {row['peak_gib']['chunked']} GiB "
            f"| {row['ratio_of_peaks']} |"
        )


def objectives() -> Iterator[str]:
    for name, row in result("objectives")["cases"].items():
        copy = row["copy_of_teacher_gib"] / row["peak_gib"]["none"]
        yield f"| {name} | {row['ratio_of_seconds']:.2f} | {row['ratio_of_peaks']:.2f} | {copy:.2f} |"


def placement() -> Iterator[str]:
    for row in result("placement")["settings"]:
        faster = f"{row['times_faster_forward']} | {row['times_faster_forward_backward']}"
        yield f"| {row['hidden']:,} | {row['frames']} | {faster} |"


def models() -> Iterator[str]:
    measured = result("models")
    names = ("SALMT5", "SALMGPT", "BestowGPT")
    yield " | ".join(f"{measured['parameters'][name]['all'] / 1e6:.1f}" for name in names)
    for row in measured["results"].values():
        first, *others = (row["ratio_of_seconds"][name] for name in names)
        seconds = row["seconds"]["SALMT5"]
        digits = 1 if seconds > 2 else 2
        yield " | ".join([f"{first:.0f} ({seconds:.{digits}f} s)", *(f"{ratio:.2f}" for ratio in others)])
        if "peak_gib" in row:
            yield "| peak, GiB | " + " | ".join(f"{row['peak_gib'][name]:.2f}" for name in names)


def generation() -> Iterator[str]:
    results = result("generation")["results"]
    sizes = ("tiny", "50 M")
    for tiny, medium in zip(*(results[size]["differing_lengths"] for size in sizes), strict=True):
        yield f"| {tiny['model']}: {tiny['lengths']} | {tiny['ratio']['ours']:.2f} | {medium['ratio']['ours']:.2f} |"
    for size in sizes:
        cases = results[size]["same_lengths"]
        for first in range(0, len(cases), 4):
            four = cases[first : first + 4]
            ratios = " | ".join(f"{case['ratio']['ours']:.2f}" for case in four)
            yield f"| {size}: {four[0]['model']}, {four[0]['modality']} | {ratios} |"
    for row in results["ways_to_decode"]:
        ratios = " | ".join(f"{row['ratio'][way]:.2f}" for way in ("static", "compiled", "inference_mode"))
        yield f"| {row['model']} | {ratios} | {row['seconds_to_compile']} s |"


def published_sizes() -> Iterator[str]:
    for name, row in result("scaling")["runs"].items():
        code = ", ".join(f"`{part}`" for part in name.split("+"))
        sizes = " | ".join(f"batch of {row[group]['batch_sizes'][-1]}" for group in ("audio", "text"))
        yield f"| {code} | {row['parameters']['all'] / 1e9:.2f} B | {sizes} | {row['step_seconds']:.2f} |"


def starting() -> Iterator[str]:
    for row in result("startup")["milliseconds"].values():
        yield f"| {row['median']:,} |"


def serving() -> Iterator[str]:
    rows = result("serving")["measurements"]
    rate = {(row["server"], row["requests"]): row["requests_per_second"] for row in rows if row["clients"] == 16}
    gains = [rate["vLLM, SALM-GPT", kind] / rate["serve, SALM-GPT", kind] for kind in ("text", "speech")]
    yield f"some {gains[0]:.1f} times the texts of `serve` in a second and {gains[1]:.1f} times the recordings"
    for row in rows:
        latencies = " | ".join(f"{row['latency_ms'][p]:,.0f}" for p in ("p50", "p95", "p99"))
        times = f" {row['times_one_at_a_time']:.2f} |" if row["clients"] > 1 else " |"
        what = f"{row['server']} | {row['requests']}, {row['clients']}"
        yield f"| {what} | {row['requests_per_second']:.1f} | {latencies} |{times}"
        if "vLLM" not in row["server"]:
            assert row.get("times_one_at_a_time", 2) >= 2


TITLES = {"salm_t5": "SALM-T5", "salm_gpt": "SALM-GPT", "bestow_gpt": "BESTOW-GPT", "nemo_salm": "NeMo's SALM"}


def packing() -> Iterator[str]:
    kept = result("packing")
    nemo = kept["steps"].pop("nemo_salm")
    of_nemo = nemo["audio"]["bucketed"]["tokens_per_second"]
    for name, modalities in [("nemo_salm", nemo), *kept["steps"].items()]:
        for modality, ways in modalities.items():
            padded, bucketed = (ways[way]["tokens_per_second"] for way in ("padded", "bucketed"))
            for way, found in ways.items():
                rate, peak = found["tokens_per_second"], found["peak"] / ways["padded"]["peak"]
                over_nemo = f" {rate / of_nemo:.2f} " if modality == "audio" else " "
                ratios = f"{rate / padded:.2f} | {rate / bucketed:.2f} |{over_nemo}| {peak:.2f}"
                what = "speech" if modality == "audio" else modality
                yield f"| {TITLES[name]}, {what} | {way} | {rate:,.0f} | {ratios} |"
    over = {
        (modality, reference): [
            found["tokens_per_second"] / ways[reference]["tokens_per_second"]
            for of_model in kept["steps"].values()
            for name, ways in of_model.items()
            for way, found in ways.items()
            if name == modality and way.startswith("rows")
        ]
        for modality in ("audio", "text")
        for reference in ("padded", "bucketed")
    }
    peaks = [
        of_model["audio"]["rows of 256"]["peak"] / of_model["audio"]["padded"]["peak"]
        for of_model in kept["steps"].values()
    ]
    spans = [f"{min(values):.2f} to {max(values):.2f}" for values in (*over.values(), peaks)]
    of_speech, of_buckets, of_text, _, of_peaks = spans
    summary = (
        f"speech: {of_speech} times the target tokens a second, {of_buckets} times those of buckets, at {of_peaks}"
    )
    assert summary in PAGE
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("data.md", "models.md")]
    assert all(f"{of_speech} times the target tokens of speech in a second" in page for page in pages)
    assert f"{of_text} times those\nof text" in pages[0]
    for one in kept["captions"]:
        what, sizes = "speech" if one["modality"] == "audio" else "text", " and ".join(map(str, one["row_tokens"]))
        audio = f"{one['audio_used']:.3f}" if "audio_used" in one else ""
        yield f"| {what}, rows of {sizes} | {one['examples']:,} | {one['positions_used']:.3f} | {audio} |".replace(
            "  |", " |"
        )
        assert one["positions_used"] > 0.97


def step_options() -> Iterator[str]:
    kept = result("step_options")
    for name, ways in kept["steps"].items():
        for way, one in ways.items():
            numbers = f"{one['cpu_seconds']:.2f} | {one['ratio']:.2f} | {one['peak'] / 2**20:,.0f}"
            yield f"| {TITLES[name]} | {way} | {numbers} |"
    compiled = kept["steps"]["salm_gpt"]["compiled"]
    yield f"{kept['graphs']} graphs, and {compiled['seconds_of_first_turn']:.0f} s"
    differing = [
        one["loss_differs"] for ways in kept["steps"].values() for one in ways.values() if "loss_differs" in one
    ]
    assert max(differing) < 1e-5


def out_of_memory() -> Iterator[str]:
    kept = result("out_of_memory")
    assert not any(cell["failures"] for cell in kept["cells"])
    for cell in kept["cells"]:
        errors = cell["redone"] + cell["exits"]
        slowest = f"{cell['slowest_exit']:.1f} s" if cell["exits"] else ""
        first = f"{cell['strategy']}, {cell['accumulated']} | {cell['phase']}"
        yield f"| {first} | {errors} | {cell['redone']} | {cell['exits']} | {slowest} |"
    differ = [cell["last_weights_differ"] for cell in kept["cells"] if cell["last_weights_differ"] is not None]
    yield f"{kept['errors']} errors"
    yield f"by at most {max(differ):.0e}"


SECTIONS = {
    "Data loading": data_loading,
    "Resuming": resuming,
    "Number of ranks": ranks,
    "Padding": padding,
    "OOMptimizer": oomptimizer,
    "Errors of memory": out_of_memory,
    "Planning": planning,
    "Training step": training_step,
    "Gradients of speech and text": gradient_conflict,
    "The loss alone": loss,
    "Objectives": objectives,
    "Placing speech among tokens": placement,
    "The three models": models,
    "Generation": generation,
    "Published sizes": published_sizes,
    "Serving": serving,
    "Packed rows": packing,
    "Options of a step": step_options,
    "Starting": starting,
}


@pytest.mark.parametrize("title", SECTIONS)
def test_the_tables_of_a_section_are_those_of_its_file(title: str) -> None:
    section = re.split(r"^##+ ", PAGE.partition(f"# {title}\n")[2], flags=re.MULTILINE)[0]
    rows = list(SECTIONS[title]())
    assert rows
    for row in rows:
        assert row in section


def test_every_result_is_on_the_page() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"(../benchmarks/results/{path.name})" in PAGE, path.name
