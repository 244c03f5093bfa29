"""Weights that a training starts from: NeMo's keys ``init_from_checkpoint``, ``pretrained_s2s_model`` and
``pretrained_perception_from_s2s``.

NeMo (``nemo.collections.speechlm2.parts.pretrained``) takes weights of a matching name and number of values, and keeps
the model's other weights. Here a checkpoint that does not fit the model is refused, since a part with random weights
would be noticed after the training, if at all. The same checkpoint gives the same weights as in NeMo's SALM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from nemo.collections.speechlm2.parts.hf_hub import SAFETENSORS_SINGLE_FILE
from nemo.utils import logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nemo_emmett.errors import ModelError
from nemo_emmett.models.checkpoint import listed, read_weights, shared_names

WHOLE_MODEL_KEYS = ("pretrained_s2s_model", "init_from_checkpoint")
"""Keys that name a checkpoint of the whole model, in the order in which NeMo reads them."""

PERCEPTION_KEY = "pretrained_perception_from_s2s"
"""Key that names a checkpoint of which only the speech encoder and the modality adapter are taken."""

INITIAL_WEIGHTS_KEYS = (PERCEPTION_KEY, *WHOLE_MODEL_KEYS, "incremental_loading")
"""NeMo's keys for where a training starts; they are no part of the trained model."""

_PERCEPTION = "perception."
_LORA = ".lora_"
_TABLES = ("embed_tokens.", "shared.", "lm_head.")  # weights with a row for each token
_REMEDY = (
    "give the model._target_, model.pretrained_llm, model.pretrained_asr and model.perception of its training, or take "
    f"only speech encoder and modality adapter by model.{PERCEPTION_KEY}"
)
_PEFT_LEVELS = ("base_layer.", "original_module.", "modules_to_save.default.")
"""Parts of names that peft inserts for a weight that it adapts or copies."""


def check_initial_weights(paths: Mapping[str, str]) -> None:
    """Check that the checkpoints exist, before anything is built.

    Args:
        paths: what the keys of the ``model`` section name.

    Raises:
        ModelError: naming the key and the path.
    """
    for key, path in paths.items():
        if not Path(path).exists():
            raise ModelError(
                f"model.{key}: there is no checkpoint '{path}'; give a .ckpt file, the folder of a distributed "
                "checkpoint, or the folder of an exported model."
            )


def load_initial_weights(model: nn.Module, paths: Mapping[str, str], trusted: bool = False) -> None:
    """Load the checkpoints that a ``model`` section names, in NeMo's order. Optimizer and counters start fresh.

    Args:
        model: one of ours, with LoRA and speech encoder in place.
        paths: what the keys of the section name.
        trusted: unpickle whatever the checkpoints hold.

    Raises:
        ModelError: if a checkpoint cannot be read, or is not of this model.
    """
    if (path := paths.get(PERCEPTION_KEY)) is not None:
        _load_perception(model, path, trusted)
    for key in WHOLE_MODEL_KEYS:
        if (path := paths.get(key)) is not None:
            weights = _fitted(_read(path, key, trusted), model, f"model.{key}: '{path}'")
            model.load_state_dict(weights)
            _check_ties(model, weights, f"model.{key}: '{path}'")
            logging.info(f"The training starts from the weights of '{path}' (model.{key}).")


def _load_perception(model: nn.Module, path: str, trusted: bool) -> None:
    place = f"model.{PERCEPTION_KEY}: '{path}'"
    if model.perception is None:
        raise ModelError(f"{place} holds a speech encoder, but this model reads text only; give it model.perception.")
    weights = _read(path, PERCEPTION_KEY, trusted)
    of_perception = {
        name.removeprefix(_PERCEPTION): value for name, value in weights.items() if name.startswith(_PERCEPTION)
    }
    model.perception.load_state_dict(_fitted(of_perception, model.perception, place))
    logging.info(f"Speech encoder and modality adapter start from the weights of '{path}' (model.{PERCEPTION_KEY}).")


def _read(path: str, key: str, trusted: bool) -> dict[str, Tensor]:
    exported = Path(path) / SAFETENSORS_SINGLE_FILE
    try:
        return load_file(exported) if exported.is_file() else read_weights(path, trusted)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model.{key}: '{exported}' cannot be read ({error}); give another checkpoint.") from error
    except ModelError as error:
        raise ModelError(f"model.{key}: {error}") from error


def _fitted(weights: Mapping[str, Tensor], model: nn.Module, place: str) -> dict[str, Tensor]:
    """The weights by the names of the model's state: all of them, none surplus, none of another shape."""
    own = model.state_dict()
    adapts = not any(_LORA in name for name in weights)  # a checkpoint without LoRA may start a training with it
    sources = {name: _without_peft(name) if adapts and name not in weights else name for name in own}
    for names in shared_names(model):
        if there := [sources[name] for name in names if sources[name] in weights]:
            sources.update({name: there[0] for name in names if sources[name] not in weights})
    missing = [name for name, source in sources.items() if source not in weights and not (adapts and _LORA in name)]
    surplus = weights.keys() - set(sources.values())
    if missing or surplus:
        raise ModelError(f"{place} is not of this model: {_difference(sorted(missing), sorted(surplus))}.")
    for name, source in sources.items():
        if source in weights and weights[source].shape != own[name].shape:
            raise ModelError(f"{place} is not of this model: {_other_shape(name, weights[source], own[name])}.")
    return {name: weights.get(source, own[name]) for name, source in sources.items()}


def _without_peft(name: str) -> str:
    """The name that a weight has without peft around its module."""
    name = name.replace("llm.base_model.model.", "llm.", 1)
    for level in _PEFT_LEVELS:
        name = name.replace(level, "", 1)
    return name


def _difference(missing: list[str], surplus: list[str]) -> str:
    if adapters := [name for name in surplus if _LORA in name]:
        return f"it holds LoRA adapters ('{adapters[0]}'); give the model.lora of its training"
    parts = [f"it lacks {listed(missing)}"] if missing else []
    parts += [f"it holds {listed(surplus)}, which this model does not have"] if surplus else []
    return f"{' and '.join(parts)}; {_REMEDY}"


def _other_shape(name: str, there: Tensor, here: Tensor) -> str:
    shapes = f"its '{name}' has the shape {tuple(there.shape)}, this model's {tuple(here.shape)}"
    if _LORA in name:
        return f"{shapes}; give the model.lora of its training"
    if any(table in name for table in _TABLES) and there.shape[1:] == here.shape[1:]:
        return (
            f"{shapes}; give the tokenizer of its training by model.tokenizer_path, and "
            "model.resize_token_embeddings: true if the table was resized for it"
        )
    return f"{shapes}; {_REMEDY}"


def _check_ties(model: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Refuse a checkpoint with two values for one parameter of the model, of which the last would be used."""
    for first, *others in shared_names(model):
        for other in others:
            if weights[first] is not weights[other] and not torch.equal(weights[first], weights[other]):
                raise ModelError(
                    f"{place} is not of this model: '{first}' and '{other}' differ there and are one parameter here; "
                    "give the model.pretrained_llm of its training."
                )
