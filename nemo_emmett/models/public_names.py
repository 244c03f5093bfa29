"""Names in the place of paths in the files of an exported model, which may be given to others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMING_KEYS = frozenset(
    {"pretrained_llm", "pretrained_asr", "tokenizer_path", "_name_or_path", "name_or_path", "tokenizer_file"}
    | {"base_model_name_or_path", "vocab_file", "merges_file", "spm_file", "special_tokens_map_file", "model_file"}
)
"""Keys of configs and tokenizers whose values may be local paths; loading an export reads none of them."""

_FILES = ("llm_backbone/config.json", "llm_backbone/generation_config.json", "tokenizer_config.json")


def public_name(value: str) -> str:
    """The last part of a local path; a name on the Hugging Face Hub or NGC stays as it is.

    Example:
        >>> public_name("/home/me/models/t5/"), public_name("google/t5-v1_1-small")
        ('t5', 'google/t5-v1_1-small')
    """
    path = Path(value)
    is_local = path.is_absolute() or value.startswith(("~", ".", "file:")) or value.endswith(".nemo") or path.exists()
    return path.name if is_local else value


def without_paths(value: Any, key: str = "") -> Any:
    """A config with the names of files in the place of their paths: all absolute ones, and those of certain keys."""
    if isinstance(value, dict):
        return {name: without_paths(below, str(name)) for name, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(below, key) for below in value]
    is_absolute = isinstance(value, str) and len(value) > 1 and value.startswith(("/", "~/", "file:/"))
    return public_name(value) if is_absolute or (isinstance(value, str) and key in NAMING_KEYS) else value


def clean_folder(folder: Path) -> None:
    """Replace paths in what transformers has written: the configs of language model and tokenizer."""
    for name in _FILES:
        path = folder / name
        if not path.is_file():
            continue
        config = json.loads(path.read_text(encoding="utf-8"))
        # By their keys alone: among a tokenizer's tokens there may be any text.
        named = {
            key: public_name(value) for key, value in config.items() if key in NAMING_KEYS and isinstance(value, str)
        }
        if any(config[key] != value for key, value in named.items()):
            path.write_text(json.dumps(config | named, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
