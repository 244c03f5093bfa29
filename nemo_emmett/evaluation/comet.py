"""COMET, where the package ``unbabel-comet`` is installed: a neural metric of source, translation and reference.

Rei et al., 2020, "COMET: A Neural Framework for MT Evaluation".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nemo_emmett.config import check_keys
from nemo_emmett.errors import ConfigError, DataError, ModelError
from nemo_emmett.evaluation.results import Translation

PERCENT = 100.0
"""COMET's scores lie near 0 to 1; tables give them a hundredfold, beside BLEU."""


@dataclass(frozen=True)
class CometConfig:
    """The recipe's ``comet``."""

    model: str  # a checkpoint's file, or a name that comet knows or finds, such as Unbabel/wmt22-comet-da
    batch_size: int = 16  # translations

    @classmethod
    def of_recipe(cls, settings: Mapping[str, Any] | None) -> CometConfig:
        """Read it.

        Raises:
            ConfigError: if comet is not installed, or a key is missing, unknown or has a value that cannot work.
        """
        if find_spec("comet") is None:
            raise ConfigError("metrics: COMET needs the package unbabel-comet; pip install it, or leave COMET out.")
        settings = dict(settings or {})
        known = [field.name for field in fields(cls)]
        if unknown_keys := check_keys(settings, known, "comet"):
            raise ConfigError(f"comet.{unknown_keys[0]}: there is no such key; the keys are {', '.join(known)}.")
        if not isinstance(settings.get("model"), str):
            raise ConfigError(
                f"comet.model: {settings.get('model')!r} names no model of COMET; give a checkpoint's file, or a name "
                "such as Unbabel/wmt22-comet-da."
            )
        batch_size = settings.get("batch_size", cls.batch_size)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"comet.batch_size: {batch_size!r} is no number of translations; give 1 or more.")
        return cls(settings["model"], batch_size)

    @property
    def signature(self) -> str:
        """The model and comet's version, without which a score of COMET means nothing."""
        try:
            return f"model:{self.model}|version:{version('unbabel-comet')}"
        except PackageNotFoundError:  # a module of that name that no package brought
            return f"model:{self.model}"


def comet_scores(translations: Sequence[Translation], config: CometConfig) -> list[float]:
    """The score of each translation, a hundredfold.

    Raises:
        DataError: if a translation has no source text.
        ModelError: if the model cannot be loaded.
    """
    for one in translations:
        if one.source_text is None:
            raise DataError(
                f"'{one.id}' of test set '{one.test_set}' has no source text, which COMET compares with; add it to the "
                "test set, or leave COMET out."
            )
    samples = [{"src": one.source_text, "mt": one.hypothesis, "ref": one.reference} for one in translations]
    prediction = _load(config.model).predict(
        samples, batch_size=config.batch_size, gpus=int(torch.cuda.is_available()), progress_bar=True
    )
    return [PERCENT * score for score in prediction.scores]


def _load(model: str) -> Any:
    from comet import download_model, load_from_checkpoint

    try:
        return load_from_checkpoint(model if Path(model).is_file() else download_model(model))
    except Exception as error:  # comet raises whatever the checkpoint's reader does, and bare Exception itself
        raise ModelError(f"comet.model: COMET's model '{model}' cannot be loaded: {error}") from error
