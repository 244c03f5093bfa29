"""Lists the keys of NeMo's own recipes, and the status of each with nemo_emmett.

    python tools/nemo_recipe_keys.py NEMO/examples   # reads the recipes, writes tests/nemo_recipe_keys.json
    python tools/nemo_recipe_keys.py                 # writes docs/nemo_recipes.md from it

``NEMO`` is a checkout of NeMo at the version that is installed. Only the names of keys are kept. The status of a
key is looked up in the tables by which recipes are checked; ``tests/test_nemo_recipe_keys.py`` tries out each of them.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import nemo
import yaml
from lightning.pytorch import Trainer
from nemo.collections.speechlm2.parts.parallel import AutomodelParallelStrategy
from nemo.utils.exp_manager import ExpManagerConfig

from nemo_emmett.data.config.schema import ANY_SOURCE_KEYS, KEYS_OF_TYPE, LEGACY_KEYS, LOADER_KEYS
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.nemo_keys import NEMO_KEYS

ROOT = Path(__file__).parents[1]
KEYS = ROOT / "tests" / "nemo_recipe_keys.json"
PAGE = ROOT / "docs" / "nemo_recipes.md"

RECIPES = {
    "speechlm2": ("speechlm2/conf/salm*.yaml",),
    "asr": (
        "asr/conf/*/*ctc_bpe.yaml",
        "asr/conf/asr_finetune/speech_to_text_finetune.yaml",
        "asr/conf/speech_multitask/*.yaml",
    ),
}
"""The recipes by the kind of script that they are for."""

IN_COMMENTS = (
    *(f"model.lora.{key}" for key in ("task_type", "r", "lora_alpha", "lora_dropout", "target_modules")),
    "model.perception.spec_augment",
    *(f"model.{key}" for key in ("automodel_backend", "compile.enabled", "sdpa_method")),
    "trainer.strategy.data_parallel_size",
    "trainer.strategy.tensor_parallel_size",
    "data.train_ds.input_cfg[].tags.system_prompt",
    *(f"data.train_ds.{key}" for key in ("use_bucketing", "use_multimodal_sampling", "measure_total_length")),
    *(f"data.train_ds.{key}" for key in ("batch_tokens", "max_tokens", "bucket_duration_bins", "num_buckets")),
    "data.train_ds.bucket_buffer_size",
)
"""Keys that NeMo's recipes of SALM offer in their comments."""

IN_CODE = ("model.pretrained_s2s_model", "model.pretrained_perception_from_s2s", "model.incremental_loading")
"""Keys that NeMo's SALM reads and no recipe of it has."""

DATASETS = ("train_ds", "validation_ds", "test_ds")

WORKS, NO_EFFECT, REFUSED = "works", "no effect", "refused"

NOTES = {
    "exp_manager": "passed on",
    "trainer": "passed on",
    "trainer.strategy.tensor_parallel_size": "for decoder-only models; SALM-T5 has 1",
    "model.incremental_loading": "weights are always read tensor by tensor",
    "model.init_from_checkpoint": "a checkpoint that does not fit is refused, where NeMo leaves out what does not",
    "model.lora": "passed on",
    "model.lr_scheduler": "passed on",
    "model.optimizer": "passed on",
    "model.perception": "passed on",
    "data.audio_locator_tag": "the model's; may be left out",
    "data.prompt_format": "the model's; may be left out",
    "data.bucket_buffer_size": "our own samplers need no buffer",
    "data.use_lhotse": "needed; NeMo's CTC recipes leave it out",
    "data.is_tarred": "lhotse's is `tarred_audio_filepaths`",
    "data.shuffle_n": "lhotse's is `shuffle_buffer_size`",
    "data.bucketing_batch_size": "lhotse's is `bucket_batch_size`",
    "data.bucketing_strategy": "lhotse's is `use_bucketing`",
}
"""Notes on keys in addition to their status; a section's note is for all keys in it."""


@dataclass(frozen=True)
class Verdict:
    """The status of a key, with a note."""

    status: str
    note: str = ""


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all values; list entries that are mappings share one."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from keys_of(child, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(child, Mapping) for child in value):
        for child in value:
            yield from keys_of(child, f"{path}[]")
    else:
        yield path


def extract(examples: Path) -> dict[str, Any]:
    """The keys of NeMo's recipes, each with the recipes that have it; of ASR recipes, those of their datasets."""
    listed: dict[str, Any] = {"nemo": nemo.__version__}
    for kind, patterns in RECIPES.items():
        places: dict[str, list[str]] = {}
        for path in sorted({path for pattern in patterns for path in examples.glob(pattern)}):
            for key in sorted(set(keys_of(yaml.safe_load(path.read_text())))):
                if kind != "asr" or key.startswith(tuple(f"model.{dataset}." for dataset in DATASETS)):
                    places.setdefault(key, []).append(path.stem)
        listed[kind] = dict(sorted(places.items()))
    listed["speechlm2"] |= {key: ["comments"] for key in IN_COMMENTS} | {key: ["code"] for key in IN_CODE}
    return listed


def verdict(kind: str, key: str) -> Verdict:
    """The status of a key of a recipe.

    Args:
        kind: ``speechlm2``: trained by ``examples/speechlm/train.py`` with a model of ours; ``asr``: by NeMo's own
            script, with ``use_emmett: true`` in its datasets.
        key: its path; with ``asr`` that of a dataset's key.

    Raises:
        KeyError: if it is in none of the tables.
    """
    section, _, rest = key.partition(".")
    top, _, inner = rest.partition(".")
    if section == "model" and kind == "asr":
        return _of_dataset(inner)
    if section == "data":
        return _of_dataset(inner.split(".", 2)[2] if inner.startswith("datasets.") else inner)
    if top in NEMO_KEYS or key == "model.compile.enabled":
        return Verdict(REFUSED, "NeMo Automodel's" if "Automodel" in NEMO_KEYS.get(top, "Automodel") else "")
    if section == "trainer" and top == "strategy" and inner in inspect.signature(AutomodelParallelStrategy).parameters:
        return Verdict(REFUSED, "NeMo Automodel's")
    known = {
        "model": [f.name for f in fields(ModelConfig)],
        "trainer": inspect.signature(Trainer).parameters,
        "exp_manager": ExpManagerConfig.__dataclass_fields__,
    }
    if top not in known.get(section, ()):
        raise KeyError(f"nothing is known of NeMo's key {key}")
    return Verdict(WORKS, NOTES.get(key) or NOTES.get(f"{section}.{top}") or NOTES.get(section, ""))


def _of_dataset(key: str) -> Verdict:
    top, _, inner = key.partition(".")
    name = inner.partition(".")[0] if top == "input_cfg[]" else top
    of_sources = frozenset().union(ANY_SOURCE_KEYS, *KEYS_OF_TYPE.values()) if top == "input_cfg[]" else frozenset()
    works = name in LOADER_KEYS | of_sources | {"use_lhotse"}
    assert works or name in LEGACY_KEYS, f"nothing is known of NeMo's key {key}"
    return Verdict(WORKS if works else NO_EFFECT, NOTES.get(f"data.{name}", ""))


def page(listed: Mapping[str, Any]) -> str:
    """The text of docs/nemo_recipes.md."""
    datasets: dict[str, list[str]] = {}
    for key, recipes in listed["asr"].items():
        datasets.setdefault(key.split(".", 2)[2], []).extend(recipes)
    return "\n".join(
        [
            f"# The keys of NeMo's recipes (NeMo {listed['nemo']})",
            "",
            "Written by `python tools/nemo_recipe_keys.py`; `tests/test_nemo_recipe_keys.py` tries each key out.",
            "",
            "- **works**: accepted, and has NeMo's effect or is passed on to NeMo, Lightning, transformers or peft.",
            "- **no effect**: NeMo's lhotse dataloader warns that it ignores the key, and so does ours.",
            "- **refused**: one sentence before training names the key. Values that switch nothing on (`null`,",
            "  `false`, 0, `enabled: false`) are accepted.",
            "",
            "## SALM: a model of ours in NeMo's recipe",
            "",
            "`speechlm2/conf/salm*.yaml` under `examples/speechlm/train.py`, with `++model._target_=salm_gpt`,",
            "`salm_t5` or `bestow_gpt`, which take the same keys. Refused are also the keys of NeMo's Automodel and",
            "speech-to-speech models that no recipe of SALM has (`nemo_emmett/models/nemo_keys.py`).",
            "",
            *_table(listed["speechlm2"], "speechlm2"),
            "",
            "## CTC and Canary: NeMo's model with our dataloader",
            "",
            "Keys of `model.train_ds`, `validation_ds` and `test_ds` under NeMo's own scripts, with `use_emmett: true`",
            "in the dataset. All other sections are NeMo's own, and nemo_emmett does not touch them. CTC recipes also",
            "need `use_lhotse: true`: without it `use_emmett` and OOMptimizer are refused, since NeMo reads the data",
            "by an older dataloader, which takes neither our loader nor `bucket_batch_size`.",
            "",
            *_table(datasets, "asr"),
            "",
        ]
    )


def _table(places: Mapping[str, list[str]], kind: str) -> list[str]:
    rows = ["| key | | |", "|---|---|---|"]
    everywhere = {name for names in places.values() for name in names} - {"comments", "code"}
    for key in sorted(places):
        found = _of_dataset(key) if kind == "asr" else verdict(kind, key)
        names = sorted(set(places[key]))
        where = {"comments": "in NeMo's comments", "code": "in NeMo's code"}.get(names[0])
        if where is None:
            where = "" if len(names) > 2 or len(names) == len(everywhere) else f"`{'`, `'.join(names)}`"
        rows.append(f"| `{key}` | {found.status} | {'; '.join(part for part in (found.note, where) if part)} |")
    return rows


def main() -> None:
    """Write the list of keys, the page, or both."""
    if len(sys.argv) > 1:
        KEYS.write_text(json.dumps(extract(Path(sys.argv[1])), indent=1) + "\n")
    PAGE.write_text(page(json.loads(KEYS.read_text())))


if __name__ == "__main__":
    main()
