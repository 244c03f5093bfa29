"""The config of an exported folder, as vLLM reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from nemo_emmett.config import check_model_file
from nemo_emmett.errors import ModelError

SERVED = "SALMGPT"
"""The architecture in ``config.json`` of the models that are served."""

_BACKBONE = "llm_backbone"
_OF_TRANSFORMERS = ("_name_or_path", "transformers_version")


class ExportedConfig(PretrainedConfig):
    """``config.json`` of an exported folder, and the config of its language model.

    Args:
        section: the folder's config, a ``model`` section of a recipe.
        folder: path, or name on the Hugging Face Hub.
        text_config: of the language model, from ``llm_backbone`` in the folder.
        kwargs: of transformers.
    """

    model_type = "nemo_emmett"
    has_no_defaults_at_init = True

    def __init__(
        self,
        section: Mapping[str, Any] | None = None,
        folder: str = "",
        text_config: PretrainedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.section = dict(section or {})
        self.folder = folder
        self.text_config = text_config
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Called by transformers with what it read of ``config.json``.

        Raises:
            ModelError: for a model that vLLM cannot serve, or a config that could run code.
        """
        folder = str(kwargs.pop("name_or_path", config_dict.get("_name_or_path", "")))
        return_unused = kwargs.pop("return_unused_kwargs", False)
        section = {key: value for key, value in config_dict.items() if key not in _OF_TRANSFORMERS}
        _check_served(section, folder)
        text_config = AutoConfig.from_pretrained(folder, subfolder=_BACKBONE, **_where(kwargs))
        config = cls(section, folder, text_config, architectures=[SERVED], dtype=text_config.dtype, name_or_path=folder)
        return (config, kwargs) if return_unused else config

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:
        """The language model's."""
        return self if self.text_config is None else self.text_config


def _where(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options that say where on the Hugging Face Hub a file is."""
    return {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}


def _check_served(section: Mapping[str, Any], folder: str) -> None:
    names = section.get("architectures") or [None]
    if names[0] != SERVED:
        raise ModelError(
            f"'{folder}': vLLM serves {SERVED}, and this is a {names[0]}; serve it with `nemo-emmett serve`."
        )
    if section.get("lora_modality") == "audio":
        raise ModelError(
            f"'{folder}': lora_modality: audio has LoRA act on speech alone, for which vLLM has no interface; serve it "
            "with `nemo-emmett serve`."
        )
    check_model_file({**section, "_target_": None}, f"'{folder}/config.json'")
