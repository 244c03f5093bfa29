"""Speech encoder and modality adapter: NeMo's ``AudioPerceptionModule`` around the encoder of a ``.nemo`` file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from annotated_types import Le
from nemo.collections.asr.models import ASRModel
from nemo.collections.speechlm2.modules.perception import AudioPerceptionModule, IdentityConnector
from nemo.collections.speechlm2.parts.pretrained import setup_speech_encoder
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from nemo_emmett.config import check_keys, check_model_file
from nemo_emmett.errors import ConfigError, EmmettError, ModelError
from nemo_emmett.files import check_writable
from nemo_emmett.models.config import PARTS, ModelConfig
from nemo_emmett.models.targets import BUILD_FAULTS, build, check_local_path, class_of, first_line, parse_arguments
from nemo_emmett.modules.encoder_cache import KEY, CachedPerception, default_folder
from nemo_emmett.modules.modality_adapters import MLPConnector, check_modality_adapter, leave_out_collectives
from nemo_emmett.typed_config import Count, PositiveWhole, Share, parse_value

PLACE = "model.perception"
"""Of its section in a recipe, for messages."""

_PARTS = ("preprocessor", "encoder", "spec_augment", "modality_adapter")
_TYPES = {
    **dict.fromkeys(
        ("encoder", "modality_adapter"), dict.fromkeys(("feat_in", "n_layers", "d_model", "n_heads"), PositiveWhole)
    ),
    "spec_augment": {
        **dict.fromkeys(("freq_masks", "time_masks", "freq_width", "rect_masks", "rect_time", "rect_freq"), Count),
        "time_width": Count | Share,  # frames, or a share of the recording
    },
}
"""Types of arguments that NeMo checks late, or not at all."""

_NO_WEIGHTS_ONLY = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_ASR_MODELS = "nemo.collections.asr.models."
_NOT_RESTORED = ("train_ds", "validation_ds", "test_ds", "optim", "trainer", "exp_manager")
"""Sections of a ``.nemo`` file's config that restoring a model does not read."""


def build_perception(
    config: ModelConfig, llm: PreTrainedModel, trusted: bool
) -> tuple[AudioPerceptionModule, DictConfig]:
    """Speech encoder and modality adapter, and their section, completed from the ``.nemo`` file.

    Args:
        config: with ``perception``.
        llm: whose width the adapter must give.
        trusted: build whatever the ``.nemo`` file names.

    Raises:
        ConfigError: if they cannot be built, or do not fit one another, the ``.nemo`` file or the language model.
        ModelError: if the ``.nemo`` file cannot be read.
    """
    asr: dict[str, Any] = {}
    if config.pretrained_weights:
        if not config.pretrained_asr:
            raise ConfigError("model.pretrained_asr is missing: give a .nemo file or the name of a NeMo ASR model.")
        check_local_path(config.pretrained_asr, "model.pretrained_asr")
        asr = read_asr_config(config.pretrained_asr, trusted)
    for name in _PARTS:
        parse_value(dict | None, config.perception.get(name), f"{PLACE}.{name}")
    own = {key: value for key, value in (config.perception.get("encoder") or {}).items() if value is not None}
    # FastConformer all-reduces its longest input by default: a rank that has only text would leave the others waiting
    # in that collective.
    own["sync_max_audio_length"] = False
    parts = {name: config.perception.get(name) for name in _PARTS} | {"encoder": {**asr.get("encoder", {}), **own}}
    if asr:  # as NeMo fills them in
        parts["preprocessor"] = asr["preprocessor"]
        if "output_dim" in (parts["modality_adapter"] or {}):
            parts["modality_adapter"] = {**parts["modality_adapter"], "output_dim": llm.config.hidden_size}
    # A trusted file may name what is not on NeMo's allow-list.
    checked = {name: part for name, part in parts.items() if not trusted or name not in ("preprocessor", "encoder")}
    _check_parts(config.perception, checked)
    if asr and not trusted:
        _check_fit(parts["encoder"], asr["encoder"], config.pretrained_asr)
    # NeMo's function takes the half-built model; it reads these attributes, and sets `perception`.
    section = {"pretrained_asr": config.pretrained_asr, "perception": {**config.perception, "encoder": own}}
    model = SimpleNamespace(cfg=OmegaConf.create(section), llm=llm)
    try:
        with nullcontext() if trusted else _weights_only():
            setup_speech_encoder(model, pretrained_weights=config.pretrained_weights)
    except BUILD_FAULTS as error:
        if isinstance(error.__cause__, EmmettError):  # Hydra wraps what an adapter raises
            raise error.__cause__ from error
        for name, part in parts.items():  # to name the one at fault
            if part:
                build(part, f"{PLACE}.{name}", _make)
        raise ConfigError(f"{PLACE} cannot be built: {first_line(error.__cause__ or error)}; correct it.") from error
    leave_out_collectives(model.perception)
    check_modality_adapter(model.perception, llm.config.hidden_size)
    return model.perception, model.cfg.perception


def cache_encoder(perception: AudioPerceptionModule | None, config: ModelConfig) -> None:
    """Have the speech encoder's outputs kept on disk (``cache_encoder``).

    Args:
        perception: changed in place.
        config: the model's.

    Raises:
        ConfigError: if there is no speech encoder, it is trained, its input is drawn at random, or the folder cannot
            be written to.
    """
    if perception is None:
        raise ConfigError(f"{KEY}: this model reads text only; leave the key out, or give it model.perception.")
    trained = [name for name, _ in perception.named_parameters(prefix="perception") if _is_trained(name, config)]
    if trained:
        raise ConfigError(
            f"{KEY}: '{trained[0]}' is trained, so that its outputs change; freeze the speech encoder (model.freeze: "
            "[encoder]), or leave the key out."
        )
    if perception.spec_augmentation is not None:
        raise ConfigError(
            f"{KEY}: {PLACE}.spec_augment makes each input of the encoder another; leave one of the two out."
        )
    folder = Path(config.cache_encoder).expanduser() if isinstance(config.cache_encoder, str) else default_folder()
    check_writable(folder, KEY)
    CachedPerception.of(perception, folder)


def _is_trained(name: str, config: ModelConfig) -> bool:
    """Whether a parameter of that name is one of the encoder's, and is trained."""
    return re.match(PARTS["encoder"], name) is not None and not config.freezes(name)


def _check_parts(perception: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Check the sections of the parts by the signatures of their classes; ``perception`` as the recipe has it."""
    check_keys(perception, (*_PARTS, "target", "output_dim"), PLACE)
    for name, section in parts.items():
        place = f"{PLACE}.{name}"
        if section is None and name == "modality_adapter":
            raise ConfigError(
                f"{place} is missing: give it a `_target_`, such as {MLPConnector.__module__}.MLPConnector."
            )
        if section is None:
            continue
        if {"target", "cls"} & set(section):  # NeMo's older keys for `_target_`
            continue
        kind = class_of(section, place, nn.Module)
        # Some numbers of the preprocessor may be words.
        parse_arguments(kind, section, place, (), _TYPES.get(name, {}), name != "preprocessor")
        if kind is IdentityConnector:  # takes any argument; NeMo reads its width
            check_keys(section, ["d_model"], place)
            parse_value(Annotated[PositiveWhole, Le(2**16)], section.get("d_model", 1), f"{place}.d_model")


def _check_fit(encoder: Mapping[str, Any], asr_encoder: Mapping[str, Any], source: str) -> None:
    """Refuse keys by which an encoder has weights that its ``.nemo`` file does not hold. Of layers left out there are
    too many in the file, which does no harm."""
    changed = [
        key for key, value in encoder.items() if asr_encoder.get(key) != value and key != "sync_max_audio_length"
    ]
    if not changed:
        return
    place = f"{PLACE}.encoder"
    own, there = build(encoder, place, _shapes), _shapes(asr_encoder)
    if wrong := [name for name, shape in own.items() if there.get(name) != shape]:
        for key in changed:
            other = {name: value for name, value in encoder.items() if name != key}
            if key in asr_encoder:
                other[key] = asr_encoder[key]
            if _shapes(other) != own:
                break
        raise ConfigError(
            f"{place}.{key}: {encoder[key]!r} does not fit the weights of '{source}', where it is "
            f"{asr_encoder.get(key)!r}: '{wrong[0]}' has another shape there, or is missing; leave the key out."
        )


def _make(section: Mapping[str, Any]) -> nn.Module:
    return AudioPerceptionModule.from_config_dict(OmegaConf.create(dict(section)))


def _shapes(section: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's state by name, without its memory."""
    with FakeTensorMode():  # on the device `meta`, NeMo could not read the values that it computes widths from
        return {name: tuple(value.shape) for name, value in _make(section).state_dict().items()}


def read_asr_config(source: str, trusted: bool = False) -> dict[str, Any]:
    """The config of a NeMo ASR model; nothing that it names is built.

    Args:
        source: a ``.nemo`` file, or the name of a model.
        trusted: do not check it.

    Raises:
        ModelError: if it could run code, or cannot be read.
    """
    is_file = source.endswith(".nemo") and Path(source).exists()  # NeMo's rule
    read = ASRModel.restore_from if is_file else ASRModel.from_pretrained
    try:
        config = read(source, return_config=True)
    except Exception as error:  # of NeMo, Hugging Face, the network, or an archive
        raise ModelError(
            f"model.pretrained_asr: the config of '{source}' cannot be read ({first_line(error)}); give a .nemo file "
            "or the name of a NeMo ASR model."
        ) from error
    if not trusted:
        # Unresolved, and without what restoring does not build: NeMo's own files have resolvers there.
        parts = {key: value for key, value in OmegaConf.to_container(config).items() if key not in _NOT_RESTORED}
        target = str(parts.pop("target", _ASR_MODELS))
        if not target.startswith(_ASR_MODELS):
            raise ModelError(f"'{source}': target: '{target}' is not an ASR model of NeMo; give another file.")
        check_model_file(parts, f"'{source}'")
    return OmegaConf.to_container(config, resolve=True)


@contextmanager
def _weights_only() -> Iterator[None]:
    """torch reads pickled weights as data by default; a variable that turns this off is hidden from it meanwhile."""
    hidden = os.environ.pop(_NO_WEIGHTS_ONLY, None)
    try:
        yield
    finally:
        if hidden is not None:
            os.environ[_NO_WEIGHTS_ONLY] = hidden
