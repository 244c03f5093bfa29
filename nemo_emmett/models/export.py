"""A model as one folder, in the layout of Hugging Face and of NeMo's SALM, and checks that weights fit.

The folder holds ``model.safetensors``, ``config.json``, a model card (``README.md``) and the files of
:mod:`nemo_emmett.models.artifacts`; nothing else is needed to load it with :func:`nemo_emmett.models.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from huggingface_hub import snapshot_download
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import HfHubHTTPError
from nemo.collections.speechlm2.parts.hf_hub import SAFETENSORS_SINGLE_FILE
from nemo.utils import logging
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from nemo_emmett.config import check_model_file
from nemo_emmett.errors import ModelError
from nemo_emmett.files import atomic_folder
from nemo_emmett.models.artifacts import write_artifacts
from nemo_emmett.models.card import CARD_FILE, model_card
from nemo_emmett.models.checkpoint import listed, read_checkpoint, shared_names
from nemo_emmett.models.exported import BASE_MODELS_KEY, check_exported
from nemo_emmett.models.exported_files import FILES_KEY, check_no_code, files_of_export, sizes_of_files
from nemo_emmett.models.public_names import without_paths
from nemo_emmett.models.targets import first_line
from nemo_emmett.modules.tensors import refuse_nonfinite


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an export without private paths, with the names of the pretrained parts."""
    public = without_paths(dict(config))
    parts = {"language_model": "pretrained_llm", "speech_encoder": "pretrained_asr"}
    # A model that was loaded has the folder of its export in the place of the first name, and of its tokenizer's.
    if BASE_MODELS_KEY in config:
        public.pop("tokenizer_path", None)
    names = config.get(BASE_MODELS_KEY) or {part: public[key] for part, key in parts.items() if public.get(key)}
    public.update({key: names[part] for part, key in parts.items() if part in names})
    return public | {BASE_MODELS_KEY: dict(names)}


class Export:
    """Mixin of :class:`~nemo_emmett.models.base.SpeechTextModel`: writing and reading of folders and weights."""

    model_type: ClassVar[str] = "nemo_emmett"  # in config.json, by which our plugin of vLLM recognises the folder

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write the model to a folder, from rank 0; every rank must call it.

        Args:
            save_directory: is made if need be.
            kwargs: of huggingface_hub's ``save_pretrained``. To its ``config``, which NeMo's ``to_hf.py`` gives, the
                model's own is added.

        Raises:
            NonFiniteError: if a weight is not finite; then nothing is written.
            ConfigError: if another process is writing to the folder.
        """
        weights = self.whole_weights()
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return None
        return self.write_folder(save_directory, weights, **kwargs)

    def write_folder(self, folder: str | Path, weights: Mapping[str, Tensor], **kwargs: Any) -> str | None:
        """Write a folder as :meth:`save_pretrained` does, from this process alone; it appears whole or not at all.

        Args:
            folder: is made if need be.
            weights: on the CPU, by the names of the model's state; shared ones may be there once or several times.
            kwargs: as of :meth:`save_pretrained`, which raises the same.
        """
        refuse_nonfinite(weights, {name for name, _ in self.named_buffers()})
        again = {name for names in shared_names(self) for name in names[1:]}
        kwargs.setdefault("repo_id", Path(folder).name)
        own_class = next(kind for kind in type(self).__mro__ if not issubclass(kind, FSDPModule))
        config = {
            **(kwargs.pop("config", None) or {}),
            **OmegaConf.to_container(self.cfg, resolve=True),
            "_target_": f"{own_class.__module__}.{own_class.__qualname__}",
            "model_type": self.model_type,
            "architectures": [own_class.__name__],
        }
        config.pop("trust_remote_code", None)  # decided by who loads the folder
        for key in ("objectives", "attn_implementation", "cache_encoder"):  # of the training, not of the model
            config.pop(key, None)
        config = public_config(config)
        self._to_save = {name: value.contiguous() for name, value in weights.items() if name not in again}, config
        try:
            with atomic_folder(folder, last=CONFIG_NAME, stale=files_of_export(Path(folder))) as unfinished:
                write_artifacts(unfinished, self, config)
                (unfinished / CARD_FILE).write_text(model_card(config), encoding="utf-8")
                return super().save_pretrained(unfinished, config=config, **kwargs)
        finally:
            del self._to_save

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights; called by huggingface_hub, which then writes the config."""
        weights, config = self._to_save
        save_file(weights, Path(save_directory) / SAFETENSORS_SINGLE_FILE, metadata={"format": "pt"})
        config[FILES_KEY] = sizes_of_files(Path(save_directory))

    def whole_weights(self) -> dict[str, Tensor]:
        """All weights on the CPU; of a sharded model, on rank 0. Every rank must call it."""
        if isinstance(self, FSDPModule):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return get_model_state_dict(self, options=options)
        return {name: value.detach().cpu() for name, value in self.state_dict().items()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, trust_remote_code: bool = False, **kwargs: Any
    ) -> Export:
        """Load an exported model.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hugging Face Hub.
            trust_remote_code: run code that came with the model; no file of the folder can set it.
            kwargs: of huggingface_hub's ``from_pretrained``.

        Raises:
            ModelError: if a file is missing, damaged or could run code, or the weights are not the model's.
        """
        where = {name: kwargs[name] for name in _WHERE_ON_THE_HUB if name in kwargs}
        folder = _local_folder(str(pretrained_model_name_or_path), **where)
        if check_exported(folder).get("trust_remote_code"):
            logging.warning(
                f"'{Path(folder, CONFIG_NAME)}' asks for code of the model to be run (trust_remote_code), which only "
                "the caller can allow; the key is ignored."
            )
        if not trust_remote_code:
            check_no_code(Path(folder))
        # Always given: huggingface_hub takes an argument that is absent from the folder's config.json.
        return super().from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Export:
        """Lightning's, of a checkpoint that is read as data: a ``.ckpt`` file is a pickle, which could run code.

        Args:
            checkpoint_path: of a ``.ckpt`` file.
            args: Lightning's.
            kwargs: Lightning's, and ``trust_remote_code`` for a file that may run code.

        Raises:
            ModelError: if it holds more than tensors and plain values, or names what could run code.
        """
        kwargs["for_loading"] = True
        if not kwargs.setdefault("trust_remote_code", False):
            checkpoint = read_checkpoint(checkpoint_path, map_location="meta", mmap=True)
            config = dict(checkpoint.get("hyper_parameters", {}).get("cfg", {}))
            check_model_file({**config, "_target_": None, "trust_remote_code": None}, f"'{checkpoint_path}'")
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> Export:
        """Build a model and read its weights; called by huggingface_hub."""
        return super()._from_pretrained(**kwargs | {"for_loading": True})

    @classmethod
    def _load_as_safetensor(cls, model: Export, model_file: str, map_location: str, strict: bool) -> Export:
        """huggingface_hub's, which alone would leave weights that it does not find at random."""
        try:
            loaded = super()._load_as_safetensor(model, model_file, map_location, strict)
        except SafetensorError as error:
            raise ModelError(
                f"'{model_file}' is damaged ({error}); copy the folder again, or export the model again."
            ) from error
        with safe_open(model_file, framework="pt") as file:
            found = set(file.keys())
        for names in shared_names(loaded):
            if found.intersection(names):
                found.update(names)
        expected = set(loaded.state_dict())
        missing, surplus = sorted(expected - found), sorted(found - expected)
        if missing or surplus:
            what = f"lacks {listed(missing)}" if missing else f"holds the surplus {listed(surplus)}"
            raise ModelError(
                f"'{model_file}' {what}: it is not of the model that its config.json describes; export the model again."
            )
        return loaded

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """PyTorch's, once the shapes fit.

        Raises:
            ModelError: naming the first parameter that has another shape.
        """
        own = self.state_dict()
        for name, value in state_dict.items():
            if name in own and own[name].shape != value.shape:
                raise ModelError(
                    f"the checkpoint is of another model: its '{name}' has the shape {tuple(value.shape)}, this "
                    f"model's {tuple(own[name].shape)}; check model.pretrained_llm, model.pretrained_asr and "
                    "model.perception."
                )
        return super().load_state_dict(state_dict, *args, **kwargs)


def _local_folder(name: str, **where: Any) -> str:
    """The folder of a model; one on the Hugging Face Hub is fetched whole, so that all of it is checked."""
    if Path(name).is_dir():
        return name
    try:
        return snapshot_download(name, allow_patterns=_FILES_ON_THE_HUB, **where)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(
            f"'{name}' is neither the folder of an exported model nor the name of one that could be fetched "
            f"({first_line(error)}); name the folder that `nemo-emmett train` or `nemo-emmett export` has written."
        ) from error


_WHERE_ON_THE_HUB = ("revision", "cache_dir", "force_download", "local_files_only", "token")
_FILES_ON_THE_HUB = ["*.json", "*.jinja", "*.md", "*.model", "*.txt", "*.safetensors"]
