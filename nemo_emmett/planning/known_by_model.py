"""What a recipe's model says of its data, for reports on the data alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nemo.utils import logging
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_emmett.errors import ModelError
from nemo_emmett.planning.architecture import architecture_only
from nemo_emmett.planning.fake_training import fake_training
from nemo_emmett.planning.needed import look_up

WRITTEN = ("prompt_format", "audio_locator_tag")
"""Keys of the ``model`` section that its data needs as well."""


@dataclass(frozen=True)
class KnownByModel:
    """What need not be written into the data's section.

    Args:
        defaults: keys of a dataset's config, as training fills them in (``data_defaults`` of our models).
        tokenizer: the model's NeMo tokenizer; None where no model was built.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None


def known_by_model(content: DictConfig | ListConfig, find_model: Callable[[str], type]) -> KnownByModel:
    """Build a recipe's model on fake tensors, and ask it for its tokenizer and what it sets in its data.

    Without ``model._target_`` that is what the ``model`` section says itself; where the pretrained parts are not at
    hand, too, with a warning.

    Args:
        content: a recipe, the config of a dataset, or a list of sources.
        find_model: the class behind ``model._target_``.

    Raises:
        ConfigError: for a mistake in the ``model`` section.
    """
    section = content._get_node("model") if isinstance(content, DictConfig) and "model" in content else None
    if not isinstance(section, DictConfig):
        return KnownByModel()
    written = {key: value for key in WRITTEN if (value := look_up(section, key)) is not None}
    target = look_up(section, "_target_")
    if target is None or "pretrained_llm" not in section:
        return KnownByModel(written)
    model_class = find_model(target)
    try:
        plain = OmegaConf.to_container(section, resolve=True, throw_on_missing=True)
        with logging.temp_verbosity(logging.ERROR), fake_training():
            model = model_class(architecture_only(plain))
    except (ModelError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        logging.warning(
            f"The model cannot be built here ({reason}): what it defines for its data (prompt format, token durations, "
            "tokenizer) is left out; write the keys into the data's section, and name a --tokenizer."
        )
        return KnownByModel(written)
    return KnownByModel({**written, **getattr(model, "data_defaults", {})}, model.tokenizer)
