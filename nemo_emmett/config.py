"""Checks configurations before they are used.

- A key close to a known one is a typo and is refused: :func:`check_keys`.
- Importing a module runs it, so a ``_target_`` is checked by its name before anything is imported. For a recipe, NeMo's
  allow-list decides: :func:`check_target`. A file that came with a model (``config.json`` of an exported folder, the
  config of a ``.nemo`` file) may name parts of models only, since NeMo's list admits functions that take
  ``trust_remote_code``: :func:`check_model_file`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_emmett.errors import ConfigError, Help, ModelError

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

MAX_TYPO_DISTANCE = 2
"""A key within this many edits of a known one counts as a misspelling of it."""

OWN_PREFIX = "nemo_emmett."

PARTS_OF_MODELS = (
    "nemo.collections.asr.losses.",
    "nemo.collections.asr.metrics.",
    "nemo.collections.asr.modules.",
    "nemo.collections.asr.parts.submodules.adapters.",
    "nemo.collections.asr.parts.submodules.classifier.",
    "nemo.collections.asr.parts.submodules.token_classifier.",
    "nemo.collections.common.losses.",
    "nemo.collections.common.metrics.",
    "nemo.collections.common.parts.adapter_modules.",
    "nemo.collections.common.tokenizers.canary_",
    "nemo.collections.common.tokenizers.CanaryTokenizer",
    "nemo.collections.speechlm2.modules.",
    "nemo.core.classes.mixins.adapter_mixin_strategies.",
    "nemo.core.optim.",
    "nemo_emmett.modules.",
    "nemo_emmett.schedulers.InfiniteLR",
    "torch.nn.",
    "torch.optim.",
)
"""Prefixes of the targets that a file that came with a model may name."""

TARGET_KEYS = ("_target_", "target", "cls")
"""Keys under which Hydra and NeMo name a target to call."""

_KERNEL_KEYS = ("attn_implementation", "experts_implementation")

_RESOLVER = re.compile(r"\$\{[^{}]*:")
"""OmegaConf's ``${oc.env:...}`` and the like; ``${other.key}`` is harmless."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name with the fewest edits from ``name``, or None if all are more than ``MAX_TYPO_DISTANCE`` away.

    Ties go to the name that sorts first. Names of up to three letters allow one edit only, so that ``de`` is not taken
    for ``fr``.
    """
    # Not difflib: its ratio grows with the length, so that it takes NeMo's `lr` for `lora`, `source_lang` for
    # `source_language` and `num_buckets` for `num_sub_buckets` at any cutoff that still finds two edits in short keys.
    limit = MAX_TYPO_DISTANCE if len(name) > 3 else 1
    close = (known_name for known_name in known if abs(len(known_name) - len(name)) <= limit)
    distance, found = min(
        ((_edit_distance(name, candidate), candidate) for candidate in close), default=(limit + 1, None)
    )
    return found if distance <= limit else None


def _edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    previous = list(range(len(b) + 1))
    for i, char_a in enumerate(a, start=1):
        current = [i]
        for j, char_b in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (char_a != char_b)))
        previous = current
    return previous[-1]


def check_keys(config: Mapping, known: Collection[str], where: str, tolerated: Collection[str] = ()) -> list[str]:
    """Refuse the keys of ``config`` that look like misspellings of known ones.

    Args:
        config: a mapping with string keys (a dict or a ``DictConfig``).
        known: the keys that have a meaning here.
        where: the config's place in the recipe, for the message (``data.train_ds``).
        tolerated: unknown keys that are allowed (NeMo's legacy keys), whatever they resemble.

    Returns:
        The unknown keys that resemble no known one; the caller warns about them, as NeMo does.

    Raises:
        ConfigError: if a key is within ``MAX_TYPO_DISTANCE`` edits of a known one.

    Example:
        >>> check_keys({"batch_size": 4, "labels": None}, {"batch_size"}, "data.train_ds")
        ['labels']
    """
    unknown_keys = []
    for key in config:
        key = str(key)
        if key in known or key in tolerated or key.startswith("_"):
            continue
        if (suggestion := nearest(key, known)) is not None:
            raise ConfigError(
                f"{where}.{key}: there is no such key; did you mean '{suggestion}'?", page=Help.UNKNOWN_KEY
            )
        unknown_keys.append(key)
    return unknown_keys


def item_of(where: str, index: int) -> str:
    """The place of a list's item in a recipe, as Hydra takes it on the command line, which refuses brackets.

    Example:
        >>> item_of("data.train_ds.input_cfg", 0)
        'data.train_ds.input_cfg.0'
    """
    return f"{where}.{index}"


def load_yaml(path: str | os.PathLike[str]) -> DictConfig | ListConfig:
    """Read a YAML file, without Hydra.

    Raises:
        ConfigError: if it cannot be read, or is not YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"The config '{path}' cannot be read: {error.strerror or error}.") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"The config '{path}' is not YAML: {' '.join(str(error).split())}.") from error


def escape_interpolations(text: str) -> str:
    r"""A text as it must be written in a recipe, so that ``${`` in it, such as in a path, is no interpolation.

    Example:
        >>> print(escape_interpolations("/data/${name}"))
        /data/\${name}
    """
    return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", text)


def check_target(target: Any, where: str) -> None:
    """Refuse a class path of a recipe that is not on NeMo's allow-list, without importing it.

    Raises:
        ConfigError: naming the key and the prefixes that are allowed.
    """
    if isinstance(target, str) and target.startswith(OWN_PREFIX):
        return
    from nemo.core.classes.common import ALLOWED_TARGET_PREFIXES

    # `tests.` is for NeMo's own tests: it would import from the folder in which Python was started.
    allowed = [prefix for prefix in ALLOWED_TARGET_PREFIXES if not prefix.startswith("tests.")]
    if not (isinstance(target, str) and target.startswith(tuple(allowed))):
        raise ConfigError(
            f"{where}: '{target}' is not imported, for it is not on NeMo's allow-list ({', '.join(allowed)}); name one "
            "of those, or give your class a short name by an entry point of its package.",
            page=Help.CLASS_NOT_ALLOWED,
        )


def check_model_file(config: Any, where: str) -> None:
    """Refuse values of a configuration that came with a model that could run code.

    Args:
        config: plain mappings, lists and scalars.
        where: the file, for messages; below it the place in the file.

    Raises:
        ModelError: naming the place and the value.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            place = f"{where}: {key}" if ": " not in where else f"{where}.{key}"
            if key in TARGET_KEYS and isinstance(value, str) and not _is_part_of_model(value):
                raise _refused(place, value, "is not a part of a model")
            if key == "trust_remote_code" and value:
                raise _refused(place, value, "asks for code to be run")
            # Arguments without their names, a module that peft imports (megatron_core), and options of a compiler.
            if key in ("_args_", "megatron_config", "compile_config") and value is not None:
                raise _refused(place, value, "may have code run")
            # A name of two parts is a kernel on the Hugging Face Hub, whose code transformers would fetch and run.
            if key.lstrip("_").removesuffix("_internal") in _KERNEL_KEYS and "/" in str(value):
                raise _refused(place, value, "names code of the Hugging Face Hub")
            # Other arguments of torch.compile may name code to run.
            if key == "compile" and isinstance(value, Mapping) and value.keys() - {"dynamic", "fullgraph", "mode"}:
                raise _refused(place, dict(value), "may have code run")
            check_model_file(value, place)
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for number, value in enumerate(config):
            check_model_file(value, f"{where}[{number}]")
    elif isinstance(config, str) and _RESOLVER.search(config):
        raise _refused(where, config, "calls a resolver")


def _is_part_of_model(target: str) -> bool:
    """Whether a target is one name in a module of those packages; ``torch.nn.functional.torch.hub.load`` is not."""
    if not target.startswith(PARTS_OF_MODELS):
        return False
    top, *names = target.split(".")
    spec = find_spec(top)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        path, inner = Path(place), list(names)
        while inner and (path / inner[0]).is_dir():
            path /= inner.pop(0)
        if inner and any((path / inner[0]).with_suffix(suffix).is_file() for suffix in (".py", ".pyi")):
            inner.pop(0)
        # NeMo's published models name a module that NeMo 3 does not have, canary_multilingual_tokenizer.
        if len(inner) == 1 or (len(inner) == 2 and inner[0].startswith("canary_")):
            return True
    return False


def _refused(where: str, value: Any, what: str) -> ModelError:
    return ModelError(
        f"{where}: {value!r} {what}, which a file that came with a model may not have; if you trust the file, load it "
        "with trust_remote_code=True (--trust-remote-code).",
        page=Help.CODE_IN_MODEL,
    )
