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

from nemo_emmett.config import check_keys
from nemo_emmett.errors import ConfigError, DataError, ModelError
from nemo_emmett.evaluation.results import Translation
from nemo_emmett.typed_config import NonEmpty, PositiveWhole, parse_section, parse_value


@dataclass(frozen=True)
class CometConfig:
    """The recipe's ``comet`` section."""

    model: NonEmpty  # a checkpoint's file, or a name that comet resolves, such as Unbabel/wmt22-comet-da
    batch_size: PositiveWhole = 16  # translations

    @classmethod
    def parse(cls, section: Mapping[str, Any] | None) -> CometConfig:
        """Parse the recipe's ``comet``.

        Raises:
            ConfigError: if comet is not installed, or a key is missing, unknown or has a value that cannot work.
        """
        if find_spec("comet") is None:
            raise ConfigError("metrics: COMET needs the package unbabel-comet; pip install it, or leave COMET out.")
        section = parse_value(dict, section or {}, "comet")
        known = [field.name for field in fields(cls)]
        if unknown_keys := check_keys(section, known, "comet"):
            raise ConfigError(f"comet.{unknown_keys[0]}: there is no such key; the keys are {', '.join(known)}.")
        if not isinstance(section.get("model"), str):
            raise ConfigError(
                f"comet.model: {section.get('model')!r} names no model of COMET; give a checkpoint's file, or a name "
                "such as Unbabel/wmt22-comet-da."
            )
        return parse_section(cls, section, "comet")

    @property
    def signature(self) -> str:
        """The model and comet's version, without which scores of COMET cannot be compared."""
        try:
            return f"model:{self.model}|version:{version('unbabel-comet')}"
        except PackageNotFoundError:  # a module of that name that no installed package provides
            return f"model:{self.model}"


def comet_scores(translations: Sequence[Translation], config: CometConfig) -> list[float]:
    """The score of each translation, which is between about 0 and 1, times 100, as BLEU.

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
    import torch
    from comet import download_model, load_from_checkpoint

    try:
        is_file = Path(config.model).is_file()
        model = load_from_checkpoint(config.model if is_file else download_model(config.model))
    except Exception as error:  # comet raises whatever the checkpoint's reader does, and bare Exception itself
        raise ModelError(f"comet.model: COMET's model '{config.model}' cannot be loaded: {error}") from error
    samples = [{"src": one.source_text, "mt": one.hypothesis, "ref": one.reference} for one in translations]
    gpus = int(torch.cuda.is_available())
    prediction = model.predict(samples, batch_size=config.batch_size, gpus=gpus, progress_bar=True)
    return [100.0 * score for score in prediction.scores]
