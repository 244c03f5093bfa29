"""The files of an exported folder: whether they are whole, and whether any could run code. Imports no torch.

``config.json`` lists the files that loading reads, with their sizes, under ``files``. Others (``README.md``,
``chat_template.jinja``, ``generation_config.json``, ``preprocessor_config.json``) may be changed or left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_emmett.config import check_model_file
from nemo_emmett.errors import Help, ModelError

CONFIG_FILE = "config.json"
"""Hugging Face's name of the config."""

WEIGHTS_FILE = "model.safetensors"
"""Hugging Face's name of the weights."""

LLM_FOLDER = "llm_backbone"
"""NeMo's name of the folder with the language model's own config."""

FILES_KEY = "files"
"""Key of ``config.json`` for the files that loading reads: path in the folder -> bytes."""

_NOT_READ = (CONFIG_FILE, "README.md", "chat_template.jinja", "generation_config.json", "preprocessor_config.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json")
"""Of many entries, which are data to whatever reads them."""

_AGAIN = "copy the folder again, or export the model again"


def sizes_of_files(folder: Path) -> dict[str, int]:
    """The value of ``files`` for a folder that is being written."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {name.as_posix(): (folder / name).stat().st_size for name in names if name.as_posix() not in _NOT_READ}


def files_of_export(folder: Path) -> list[str]:
    """The files that an export wrote to a folder, but for its config; empty if there is none."""
    try:
        sizes = read_json_object(folder / CONFIG_FILE).get(FILES_KEY)
    except ModelError:
        sizes = None
    return [*sizes, *_NOT_READ[1:]] if isinstance(sizes, Mapping) else []


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        ModelError: if it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ModelError(f"'{path}' is damaged: it is not JSON ({reason}); {_AGAIN}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"'{path}' is damaged: it is not a JSON object; {_AGAIN}.")
    return content


def check_whole(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that the files that loading reads are there, and as long as they were.

    Args:
        folder: of the export.
        config: the content of its ``config.json``.

    Raises:
        ModelError: naming the file.
    """
    sizes = config.get(FILES_KEY)
    if not isinstance(sizes, Mapping):  # earlier exports, and NeMo's, which may leave the last two out
        of_ours = ("tokenizer_config.json", f"{LLM_FOLDER}/{CONFIG_FILE}") if "_target_" in config else ()
        sizes = dict.fromkeys((WEIGHTS_FILE, *of_ours))
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"'{folder}' has no {name}, so it is no complete export; {_AGAIN}.")
        found = path.stat().st_size
        if size is not None and found != size:
            raise ModelError(
                f"'{path}' is damaged: it has {found:,} bytes, not {size}; {_AGAIN}, or, if you changed the file, take "
                f"it out of `{FILES_KEY}` in {CONFIG_FILE}."
            )


def check_no_code(folder: Path) -> None:
    """Refuse files with what could run code, and links to files outside of the folder.

    Raises:
        ModelError: naming file and key.
    """
    for path in _files(folder):
        if path.suffix == ".json" and path.name not in _VOCABULARIES:
            content = read_json_object(path)
            if path == folder / CONFIG_FILE:  # which class it is, and whether it is trusted, is decided elsewhere
                content |= {"_target_": None, "trust_remote_code": None}
            check_model_file(content, f"'{path}'")


def _files(folder: Path) -> Iterator[Path]:
    """What is in the folder, and in that of the language model."""
    home = folder.resolve()
    # Hugging Face's cache has links to files of the same model (snapshots/COMMIT -> blobs).
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in sorted([*folder.iterdir(), *folder.glob(f"{LLM_FOLDER}/*")]):
        if path.is_symlink() and not any(path.resolve().is_relative_to(one) for one in homes):
            raise ModelError(
                f"'{path}' is a link to '{path.readlink()}', outside of the model's folder, which a folder that came "
                "from elsewhere may not have; put the file itself there, or, if you trust the folder, load it with "
                "trust_remote_code=True (--trust-remote-code).",
                page=Help.CODE_IN_MODEL,
            )
        if path.is_dir():
            continue
        if not path.is_file():
            raise ModelError(f"'{path}' is no regular file; {_AGAIN}.")
        yield path
