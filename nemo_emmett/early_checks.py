"""Checks of a recipe before NeMo is imported, which takes ten seconds: its sections, and the paths in it.

An empty text names no file: pathlib takes it for the current folder, other libraries for "none". Files of the data that
are named literally are looked for; patterns of shards are expanded when the recipe is parsed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_emmett.config import check_keys, item_of
from nemo_emmett.errors import ConfigError, DataError, ModelError

RECIPE_KEYS = ("model", "trainer", "data", "exp_manager", "export_dir", "export", "seed", "num_threads")
"""Keys of a recipe that are read; a recipe may hold others for its own interpolations."""

RECIPE_FILE = "recipe.yaml"
"""The resolved recipe, in the folder of the checkpoints."""

SOURCE_PATHS = frozenset(
    {"manifest_filepath", "tarred_audio_filepaths", "cuts_path", "shar_path", "source_paths", "target_paths", "paths"}
)
"""Keys of sources that name files."""

_PATH = re.compile(r"(\w+_)?(path|paths|filepath|filepaths|dir|dirpath)|(init|resume)_from_checkpoint")
"""Keys whose name says that the value is a path, in NeMo's recipes and in ours."""

_OTHER_PATHS = frozenset(
    {"pretrained_llm", "pretrained_asr", "pretrained_s2s_model", "pretrained_perception_from_s2s"}
    | {"input_cfg", "files_to_copy", "output", "baseline", "profile"}
)
"""Paths, and names in the place of which a path may be given, whose keys do not show it."""

_DATASETS = re.compile(r"(train|validation|test|predict)_ds")
_NOT_LITERAL = re.compile(r"://|^pipe:|[\[\]{}<>()]|_OP_|_CL_")


def is_path_key(key: str) -> bool:
    """Whether a key of a recipe names a file or folder.

    Example:
        >>> is_path_key("export_dir"), is_path_key("manifest_filepath"), is_path_key("max_steps")
        (True, True, False)
    """
    return key in _OTHER_PATHS or _PATH.fullmatch(key) is not None


def check_sections(recipe: DictConfig) -> None:
    """Refuse a recipe of a training that lacks a section or misspells a key at its top.

    Raises:
        ConfigError: naming the key, and the nearest known one.
    """
    check_keys(recipe, RECIPE_KEYS, "recipe")
    for section in ("model", "trainer", "data"):
        if section not in recipe:
            raise ConfigError(f"the recipe has no section '{section}'; the recipes in conf/ show what belongs there.")


def check_checkpoint(checkpoint: Path, has_recipe: bool) -> None:
    """Refuse a checkpoint that there is not, or that has no recipe next to it where none is given.

    Raises:
        ConfigError: if there is no recipe.
        ModelError: if there is no checkpoint.
    """
    if not checkpoint.exists():
        raise ModelError(f"'{checkpoint}': there is no such checkpoint.")
    recipe = checkpoint.absolute().parent / RECIPE_FILE
    if not has_recipe and not recipe.is_file():
        raise ConfigError(f"'{recipe}' does not exist; give the recipe of the training by --config.")


def refuse_empty_paths(recipe: DictConfig | ListConfig, place: str = "") -> None:
    """Refuse empty texts where a file or folder is to be named.

    Args:
        recipe: composed, or a section of it; what cannot be resolved is left to its parser.
        place: of the section in the recipe, for messages.

    Raises:
        ConfigError: naming the key.
    """
    for where, key, text, _ in _texts(recipe, place):
        if not text.strip() and is_path_key(key):
            raise ConfigError(f"{where}: {text!r} cannot be used; give the path of a file or folder, or null.")


def check_dataset_files(recipe: DictConfig | ListConfig, place: str = "", in_dataset: bool = False) -> None:
    """Look for the files that the datasets of a recipe name literally.

    Args:
        recipe: composed, or a section of it.
        place: of the section in the recipe, for messages.
        in_dataset: the section is that of a dataset.

    Raises:
        DataError: naming the key and the file.
    """
    for where, key, text, is_of_data in _texts(recipe, place, in_dataset=in_dataset):
        is_file = is_of_data and (key in SOURCE_PATHS or key == "input_cfg")
        if is_file and not _NOT_LITERAL.search(text) and not os.path.exists(text):
            raise DataError(f"{where}: there is no file '{text}'; correct the path, or prepare the data first.")


def _texts(node: Any, place: str, key: str = "", in_dataset: bool = False) -> Iterator[tuple[str, str, str, bool]]:
    """The texts below a node, in the recipe's order: place, the nearest key that names what they are, and the text."""
    if isinstance(node, (DictConfig, ListConfig)):
        if node._is_none() or node._is_missing():
            return
        names = list(node) if isinstance(node, DictConfig) else range(len(node))
        for name in names:
            of_list = isinstance(node, ListConfig)
            try:
                value = None if OmegaConf.is_missing(node, name) else node[name]
            except OmegaConfBaseException:
                continue
            below = item_of(place, name) if of_list and place else f"{place}.{name}".lstrip(".")
            # Items of a list, and files by language, are what the key above them says.
            is_kept = of_list or (isinstance(value, (str, ListConfig)) and key in SOURCE_PATHS)
            known = key if is_kept else str(name)
            yield from _texts(value, below, known, in_dataset or bool(_DATASETS.fullmatch(str(name))))
    elif isinstance(node, str):
        yield place, key, node, in_dataset
