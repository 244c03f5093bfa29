"""What does a GPU hold and read when the recipes train on 80 GiB devices? The numbers behind docs/scaling.md.

The recipes ``salm_t5``, ``salm_gpt`` and ``bestow_gpt`` as they are, with models of the published architectures
(Canary-1B's encoder, mT5-large, TinyLlama-1.1B) whose weights nobody needs, and with six buckets of speech and six of
text in the place of ``auto``. Batch sizes and operations are those of plans on fake tensors; seconds are predicted from
operations (``nemo_emmett/planning/timing.py``), none is measured.

    python benchmarks/scaling.py [RECIPE[:FREEZING][+KEY=VALUE] ...]   # plans them; by default all of RUNS
    python benchmarks/scaling.py --table                               # the kept plans on 8, 64 and 512 GPUs
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from measuring import RESULTS, keep
from measuring.models import WORDS
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import AutoConfig, LlamaConfig, MT5Config, PreTrainedTokenizerFast

from nemo_emmett.corpora.tokenizers import train_t5_tokenizer
from nemo_emmett.oomptimizer.memory import parse_memory
from nemo_emmett.planning.fake_training import fake_training
from nemo_emmett.planning.planner import Planner
from nemo_emmett.planning.recipe import without_device, without_training
from nemo_emmett.planning.timing import Rate
from nemo_emmett.runner import compose_recipe
from nemo_emmett.training import build_training

PACKAGES = ("nemo_emmett", "nemo_toolkit", "lightning", "torch", "transformers")
DEVICE = "H100"
MEMORY_FRACTION, SAFETY_MARGIN = 0.9, 0.03
SPEECH = [[seconds, tokens] for seconds, tokens in product((5, 15, 30), (25, 100))]
TEXT = [[tokens, outputs] for tokens, outputs in product((32, 96, 256), (32, 200))]
GPUS = (8, 64, 512)
WAV_BYTES_PER_SECOND = 32_000
"""16 kHz, 16 bit, mono; FLAC takes about half."""
SECONDS_A_TEXT, SECONDS_A_SECOND_OF_SPEECH = 0.2e-3, 0.3e-3
"""What a data worker takes to read and tokenise an example of text, and to read speech (ranks.py, one core)."""
SCHEDULE_SECONDS_AN_EXAMPLE = 0.15e-6
"""What the main process of a rank takes for each example of the global batch (ranks.py)."""
RUNS = (
    "salm_gpt",
    "salm_t5",
    "bestow_gpt",
    "salm_gpt+model.activation_checkpointing=true",
    "salm_gpt+emmett_strategy=fsdp2+trainer.strategy.data_parallel_size=8",
    "salm_gpt+emmett_strategy=fsdp2+trainer.strategy.data_parallel_size=64",
    "salm_gpt+emmett_strategy=hsdp+trainer.strategy.replicas=8+trainer.strategy.data_parallel_size=64",
    "salm_gpt+emmett_strategy=fsdp2+trainer.strategy.data_parallel_size=16+trainer.strategy.tensor_parallel_size=4",
    "salm_t5+emmett_strategy=fsdp2+trainer.strategy.data_parallel_size=64",
    "bestow_gpt+emmett_strategy=fsdp2+trainer.strategy.data_parallel_size=64",
)
"""Of the sharded ones, the last three of `salm_gpt` are of 64 GPUs: all in one group, eight groups, four to a layer."""


def write_language_models(folder: Path) -> dict[str, Path]:
    """Folders with the configs of TinyLlama-1.1B and mT5-large, as published, and a tokenizer; by the kind of model."""
    tiny_llama = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    )
    mt5_large = MT5Config(
        vocab_size=250_112,
        d_model=1024,
        d_kv=64,
        d_ff=2816,
        num_layers=24,
        num_heads=16,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        architectures=["MT5ForConditionalGeneration"],
    )
    folders = {}
    for kind, config in (("gpt", tiny_llama), ("t5", mt5_large)):
        folders[kind] = folder / kind
        train_t5_tokenizer(WORDS.split(), folders[kind], vocab_size=120, languages=("en", "de"))
        config.save_pretrained(folders[kind])
    # Llama's prompt begins with a token of its own.
    PreTrainedTokenizerFast.from_pretrained(folders["gpt"], bos_token="</s>").save_pretrained(folders["gpt"])
    return folders


def canary_1b() -> dict[str, Any]:
    """Preprocessor and encoder of Canary-1B: FastConformer, 24 layers, 1024 wide."""
    asr = "nemo.collections.asr.modules"
    preprocessor = {"_target_": f"{asr}.AudioToMelSpectrogramPreprocessor", "sample_rate": 16000, "features": 128}
    encoder = {
        "_target_": f"{asr}.ConformerEncoder",
        "feat_in": 128,
        "n_layers": 24,
        "d_model": 1024,
        "n_heads": 8,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "subsampling_conv_channels": 256,
        "conv_kernel_size": 9,
        "dropout": 0.1,
    }
    return {"preprocessor": preprocessor, "encoder": encoder}


def recipe(run: str, folders: dict[str, Path]) -> DictConfig:
    """A shipped recipe for eight GPUs, its model without weights, its bins given."""
    name, *overrides = run.split("+")
    name, _, freezing = name.partition(":")
    cfg = compose_recipe(name, [f"emmett_freezing={freezing or 'full'}", *overrides])
    folder = folders[name.rpartition("_")[2]]
    width = AutoConfig.from_pretrained(folder).hidden_size
    cfg.model.update(pretrained_llm=str(folder), pretrained_weights=False)
    OmegaConf.set_struct(cfg, False)
    cfg.model.perception.update(canary_1b(), output_dim=width)
    if "output_dim" in cfg.model.perception.modality_adapter:
        cfg.model.perception.modality_adapter.output_dim = width
    cfg.data.train_ds.audio.bucket_duration_bins = SPEECH
    cfg.data.train_ds.text.bucket_duration_bins = TEXT
    cfg.trainer.devices = 8
    return without_training(cfg)


def parameters(cfg: DictConfig) -> dict[str, int]:
    """Parameters of each part, and those that learn."""
    with fake_training():
        model = build_training(without_device(cfg)).model
        model.configure_optimizers()
        counts = {"all": 0, "trained": 0, "speech encoder": 0, "modality adapter": 0, "language model": 0, "other": 0}
        for name, parameter in model.named_parameters():
            part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "other")
            counts["all"] += parameter.numel()
            counts["trained"] += parameter.numel() * parameter.requires_grad
            counts[part] += parameter.numel()
    return counts


PARTS = {
    "perception.encoder": "speech encoder",
    "perception.": "modality adapter",
    "llm.": "language model",
    "embed_tokens.": "language model",
}


def plan(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Batch sizes of each bucket, and what a mean step is like, all pairs of buckets being equally frequent."""
    budget = int(parse_memory(DEVICE, "--memory") * MEMORY_FRACTION)
    planner = Planner(cfg, build_training, budget, SAFETY_MARGIN, 0.5, f"Batch sizes planned for {DEVICE}", console)
    profile = planner.search(count_operations=True)
    rate = Rate.of(DEVICE)
    result: dict[str, Any] = {"budget": budget, "ddp_bytes": planner.ddp_bytes}
    seconds = 2 * [0.0]
    for place, (name, bins) in enumerate((("audio", SPEECH), ("text", TEXT))):
        sizes = profile.groups[name].bucket_batch_size
        time_model = rate.time_model(*planner.operations[name])
        seconds[place] = mean(time_model.of_step(*pair) - rate.overhead for pair in zip(sizes, bins, strict=True))
        lines = [measure.memory for measure in profile.measures[name]]
        result[name] = {
            "bins": bins,
            "batch_sizes": list(sizes),
            "bytes_per_example": [round(line.slope) for line in lines],
            "floor_bytes": lines[0].floor,
            "mean_batch_size": float(np.mean(sizes)),
            "inputs_per_step": float(np.mean([size * caps[0] for size, caps in zip(sizes, bins, strict=True)])),
            "outputs_per_step": float(np.mean([size * caps[1] for size, caps in zip(sizes, bins, strict=True)])),
        }
    return result | {"step_seconds": rate.overhead + sum(seconds), "rate": str(rate)}


def at_scale(planned: dict[str, Any], gpus: int) -> dict[str, float]:
    """What follows from a plan on so many GPUs, all steps taking as long as on one; GB are 10**9 bytes."""
    every, trained = planned["parameters"]["all"], planned["parameters"]["trained"]
    steps_per_second = 1 / planned["step_seconds"]
    audio_per_second = planned["audio"]["inputs_per_step"] * steps_per_second
    examples = planned["audio"]["mean_batch_size"] + planned["text"]["mean_batch_size"]
    states = 4 * every + 12 * trained  # weights; gradients and two moments, float32 all of them
    others = (gpus - 1) / gpus
    return {
        "DDP: states, GB a GPU": states / 1e9,
        "FSDP2: states, GB a GPU": states / gpus / 1e9,
        "DDP: sent, GB a step and GPU": 2 * 4 * trained * others / 1e9,
        "FSDP2: sent, GB a step and GPU": (2 * 4 * every + 4 * trained) * others / 1e9,
        "steps a second": steps_per_second,
        "examples a step, all GPUs": examples * gpus,
        "audio read, MB a second and GPU": audio_per_second * WAV_BYTES_PER_SECOND / 1e6,
        "audio read, GB a second, all GPUs": audio_per_second * WAV_BYTES_PER_SECOND * gpus / 1e9,
        "data workers a GPU, at least": planned["text"]["mean_batch_size"] * steps_per_second * SECONDS_A_TEXT
        + audio_per_second * SECONDS_A_SECOND_OF_SPEECH,
        "schedule, ms a step": examples * gpus * SCHEDULE_SECONDS_AN_EXAMPLE * 1000,
        "hours for 10,000 hours of speech": 10_000 * 3600 / audio_per_second / gpus / 3600,
    }


def print_table(results: dict[str, Any], console: Console) -> None:
    """All runs on all numbers of GPUs."""
    for run, planned in results.items():
        console.print(f"\n{run}", highlight=False)
        columns = [at_scale(planned, gpus) for gpus in GPUS]
        for quantity in columns[0]:
            values = "".join(f"{column[quantity]:>12,.3g}" for column in columns)
            console.print(f"{quantity:36}{values}", highlight=False)


def main() -> None:
    """Plan, print and keep; runs that were kept before stay."""
    logging.setLevel(logging.ERROR)
    console = Console()
    path = RESULTS / "scaling.json"
    results = json.loads(path.read_text()).get("runs", {}) if path.exists() else {}
    if sys.argv[1:] == ["--table"]:
        print_table(results, console)
        return
    with tempfile.TemporaryDirectory() as name:
        folders = write_language_models(Path(name))
        for run in sys.argv[1:] or RUNS:
            began = time.perf_counter()
            cfg = recipe(run, folders)
            results[run] = {"parameters": parameters(cfg), **plan(cfg, console)}
            results[run]["seconds_to_plan"] = round(time.perf_counter() - began, 1)
            console.print(run, {k: v for k, v in results[run].items() if k not in ("audio", "text")})
            keep("scaling", {"runs": results}, PACKAGES)


if __name__ == "__main__":
    main()
