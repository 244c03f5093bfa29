"""The teachers of a training's objectives (nemo_emmett/objectives/teaching.py).

A teacher is a language model that predicts the answers of a one-modality batch, without dropout and gradient. It is the
trained language model itself where that gives the teacher (without its LoRA, or where nothing of it is trained), else a
frozen module of its own: on the model's device, in its precision, sharded with it, but a part of no checkpoint, export
or optimizer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch._guards import active_fake_mode
from transformers import AutoTokenizer

from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.models.building import build_llm
from nemo_emmett.models.causal import detach_embeddings
from nemo_emmett.models.exported_files import CONFIG_FILE, check_whole
from nemo_emmett.models.head import TeacherAnswers, teacher_answers
from nemo_emmett.models.lora_modality import KEEP_BASE_WEIGHTS
from nemo_emmett.models.targets import first_line
from nemo_emmett.modules.evaluation_mode import evaluation_mode
from nemo_emmett.objectives.objective import Objective
from nemo_emmett.objectives.teaching import START, WITHOUT_LORA, Retention, TeachingObjective

_UNTRAINED = "untrained"
"""The source of a teacher that is the trained language model itself, of which nothing is trained."""

_LANGUAGE_MODEL = ("llm", "embed_tokens")
"""Modules of a model that its language model consists of; encoder-decoders have no second one."""


class LanguageModel(nn.Module):
    """A language model of its own, frozen and always in evaluation mode.

    Args:
        parts: its modules by the names that they have in the model.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LanguageModel:
        """It stays in evaluation mode."""
        return super().train(False)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Within it the model's own language model is this one."""
        own = {name: model._modules[name] for name in self._modules}
        model._modules.update(self._modules)
        try:
            yield
        finally:
            model._modules.update(own)


class Teachers(nn.Module):
    """The teachers of a model's objectives.

    Args:
        model: complete, with the weights that the training starts from.
        objectives: of the training; those that have no teacher are left out.

    Raises:
        ConfigError: if a teacher is not possible for this model.
        ModelError: if a folder holds none.
    """

    def __init__(self, model: Any, objectives: Sequence[Objective]) -> None:
        super().__init__()
        taught = [objective for objective in objectives if isinstance(objective, TeachingObjective)]
        trained = _trained_parts(model) if taught else []
        self._sources = {objective.name: _source(objective, model, trained) for objective in taught}
        self._models = nn.ModuleList()
        self._index: dict[str, int] = {}  # source -> which of the models
        for objective in taught:
            source = self._sources[objective.name]
            if source not in (*self._index, WITHOUT_LORA, _UNTRAINED):
                self._index[source] = len(self._models)
                self._models.append(_build(source, model, f"{objective.place}.teacher"))
        self.register_load_state_dict_post_hook(_ignore_missing)

    def language_models(self) -> list[LanguageModel]:
        """Those that are modules of their own."""
        return list(self._models)

    def state_dict(self, *args: Any, destination: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
        """Nothing: teachers are made again from what the recipe names."""
        return {} if destination is None else destination

    @torch.no_grad()
    def answers(self, model: Any, objective: TeachingObjective, part: Mapping) -> TeacherAnswers:
        """What an objective's teacher predicts for the answers of a one-modality batch.

        Args:
            model: whose teachers these are.
            objective: of the training.
            part: the batch that the student reads.
        """
        batch = objective.teacher_batch(part, model.pad_id)
        with self._reading(model, self._sources[objective.name]):
            return teacher_answers(model.llm, model.llm_inputs(batch))

    @contextmanager
    def _reading(self, model: Any, source: str) -> Iterator[None]:
        with ExitStack() as stack:
            if source in self._index:
                stack.enter_context(self._models[self._index[source]].in_place_of(model))
            else:
                for part in _parts(model).values():
                    stack.enter_context(evaluation_mode(part))
            if source == WITHOUT_LORA:
                stack.enter_context(_without_lora(model.llm))
            yield


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model._modules[name] for name in _LANGUAGE_MODEL if model._modules.get(name) is not None}


def _trained_parts(model: Any) -> list[str]:
    """The names of the language model's parameters that are trained."""
    prefixes = tuple(f"{name}." for name in _LANGUAGE_MODEL)
    return [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes) and parameter.requires_grad and not model.options.freezes(name)
    ]


def _source(objective: TeachingObjective, model: Any, trained: Sequence[str]) -> str:
    """What an objective's teacher is made of."""
    if isinstance(objective, Retention) and not trained:
        raise ConfigError(
            f"{objective.place}: the language model is frozen, so it forgets nothing; leave the objective out, or "
            "train the language model (model.freeze, model.lora)."
        )
    place, lora = f"{objective.place}.teacher", model.options.lora
    others = [name for name in trained if ".lora_" not in name]
    initialisation = (lora or {}).get("init_lora_weights", True)
    keeps_weights = str(initialisation).lower() in KEEP_BASE_WEIGHTS
    source = objective.teacher
    if source is None:
        source = WITHOUT_LORA if lora is not None and keeps_weights and not others else START
    if source == WITHOUT_LORA:
        if not keeps_weights:
            raise ConfigError(
                f"{place}: {WITHOUT_LORA} is not the language model that was given, whose weights "
                f"model.lora.init_lora_weights: {initialisation} changes; write {START}."
            )
        if others:
            raise ConfigError(
                f"{place}: {WITHOUT_LORA} is no fixed teacher, since '{others[0]}' of the language model is trained as "
                f"well; write {START}."
            )
    if source == START and not trained:
        return _UNTRAINED
    return source


def _build(source: str, model: Any, place: str) -> LanguageModel:
    if source == START:
        # At once, so that tied weights stay tied.
        return LanguageModel(deepcopy(_parts(model)))
    with torch.random.fork_rng(devices=[]):
        parts = _from_folder(source, model, place)
    logging.info(f"{place}: the teacher is that of '{source}'.")
    return LanguageModel(parts)


def _from_folder(source: str, model: Any, place: str) -> dict[str, nn.Module]:
    """The language model of an exported model, or one of Hugging Face's."""
    folder = Path(source).expanduser()
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        is_export = "_target_" in config
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{place}: '{source}' has no {CONFIG_FILE} that can be read; give another folder.") from error
    _check_tokenizer(folder, model, place)
    parts = _exported(folder, config, model, place) if is_export else _pretrained(folder, model, place)
    own, rows = model.token_embedding.num_embeddings, _embedding_rows(parts)
    if rows < own and model.options.resize_token_embeddings:
        raise ModelError(
            f"{place}: the embedding table of '{source}' has {rows} rows, that of this model {own}; give a model with "
            "all tokens."
        )
    return parts


def _exported(folder: Path, config: Mapping[str, Any], model: Any, place: str) -> dict[str, nn.Module]:
    own_class = type(model)
    if config["_target_"] != f"{own_class.__module__}.{own_class.__qualname__}":
        raise ModelError(
            f"{place}: '{folder}' is a {config['_target_']}, but this model is a {own_class.__name__}; give one of the "
            "same class, or a Hugging Face language model."
        )
    if active_fake_mode() is not None:  # a plan reads no weights
        section = dict(config) | {"pretrained_llm": str(folder / "llm_backbone"), "tokenizer_path": str(folder)}
        section |= {"pretrained_weights": False, "perception": None}
        return _parts(own_class(section, for_loading=True))
    check_whole(folder, config)
    with redirect_stdout(io.StringIO()):  # huggingface_hub prints where it reads from
        return _parts(own_class.from_pretrained(str(folder), trust_remote_code=model.trust_remote_code))


def _pretrained(folder: Path, model: Any, place: str) -> dict[str, nn.Module]:
    options = replace(model.options, pretrained_llm=str(folder), pretrained_weights=active_fake_mode() is None)
    try:
        llm = build_llm(options, model.auto_class, type(model).__name__, model.trust_remote_code)
        return {"llm": llm} if model.is_encoder_decoder else {"embed_tokens": detach_embeddings(llm), "llm": llm}
    except (ModelError, OSError, ValueError) as error:
        reason = str(error).replace("model.pretrained_llm: ", "")
        raise ModelError(f"{place}: {first_line(reason)}") from error


def _embedding_rows(parts: Mapping[str, nn.Module]) -> int:
    table = parts.get("embed_tokens") or parts["llm"].get_input_embeddings()
    return table.num_embeddings


def _check_tokenizer(folder: Path, model: Any, place: str) -> None:
    """The student's ids must mean the same to the teacher; the audio locator is never read by it."""
    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=model.trust_remote_code).get_vocab()
    except (OSError, ValueError) as error:
        raise ModelError(f"{place}: '{folder}' has no tokenizer ({first_line(error)}); give another folder.") from error
    own = model.tokenizer.tokenizer.get_vocab()
    theirs, own = ({t: i for t, i in of.items() if t != model.audio_locator_tag} for of in (theirs, own))
    if theirs != own:
        token = min(dict(theirs.items() ^ own.items()))
        raise ModelError(
            f"{place}: '{folder}' has another tokenizer than this model ({token!r} is {theirs.get(token)} there and "
            f"{own.get(token)} here); give a teacher with the same."
        )


@contextmanager
def _without_lora(llm: nn.Module) -> Iterator[None]:
    """Within it the language model computes what it would without peft's adapters.

    peft's own ``disable_adapter`` also changes which parameters are trained.
    """
    adapted = [part for part in llm.modules() if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    was_off = [part._disable_adapters for part in adapted]
    for part in adapted:
        part._disable_adapters = True
    try:
        yield
    finally:
        for part, off in zip(adapted, was_off, strict=True):
            part._disable_adapters = off


def _ignore_missing(teachers: Teachers, incompatible: Any) -> None:
    tensors = [f(remove_duplicate=False) for f in (teachers.named_parameters, teachers.named_buffers)]
    own = tuple(f".{name}" for name, _ in chain(*tensors))
    kept = [key for key in incompatible.missing_keys if not (".teachers." in f".{key}" and key.endswith(own))]
    incompatible.missing_keys[:] = kept
