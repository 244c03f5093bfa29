"""The one base of our models: what they share is everything but how context and answer pass through the language model.

A model is built as NeMo's speechlm2 models are, from a config dict, with NeMo's perception module (speech encoder and
modality adapter), NeMo's freezing and NeMo's optimizer set-up.

Shapes: B examples, T context tokens, S positions after audio is placed, A answer tokens, V vocabulary, H hidden size,
R recordings, N samples, M modalities.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.speechlm2.data.utils import get_pad_id
from nemo.collections.speechlm2.parts.hf_hub import LLM_BACKBONE_DIR, HFHubMixin
from nemo.collections.speechlm2.parts.optim_setup import configure_optimizers, is_frozen
from nemo.collections.speechlm2.parts.pretrained import setup_speech_encoder
from nemo.core.neural_types import AudioSignal, LabelsType, LengthsType, NeuralType
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor
from transformers import AddedToken, AutoConfig, PreTrainedModel

from nemo_emmett.config import check_keys
from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.models.generation import Generation
from nemo_emmett.models.pieces import PieceSums, TokenCounts, cut_batch, target_counts
from nemo_emmett.models.step_log import StepLog
from nemo_emmett.models.validation import Tallies, count_batch, gather_tallies, validation_metrics
from nemo_emmett.modules.batch import MODALITIES, split_modalities
from nemo_emmett.modules.loss import (
    IGNORE_INDEX,
    correct_tokens,
    example_cross_entropies,
    modality_loss,
    token_cross_entropy,
)
from nemo_emmett.modules.placement import place_audio
from nemo_emmett.modules.random_state import RandomState


@dataclass
class ModelConfig:
    """The keys of a recipe's ``model`` section. Those up to ``lr_scheduler`` mean what they mean for NeMo's SALM."""

    pretrained_llm: str  # folder or Hugging Face name of the language model
    pretrained_asr: str | None = None  # .nemo file or NGC/Hugging Face name of the speech encoder's ASR model
    pretrained_weights: bool = True  # False: the same architecture with random weights
    tokenizer_path: str | None = None  # folder or name of the tokenizer; default: that of pretrained_llm
    audio_locator_tag: str = "<|audio|>"  # stands in the prompt where a recording belongs
    prompt_format: str = "emmett_t5"  # name of a NeMo prompt format
    perception: dict | None = None  # NeMo's AudioPerceptionModule; None: a model that reads text only
    freeze_params: list[str] = field(default_factory=list)  # regular expressions of parameters that stay as they are
    prevent_freeze_params: list[str] = field(default_factory=list)  # exceptions to freeze_params
    optimizer: dict | None = None
    lr_scheduler: dict | None = None
    modality_loss_weights: dict[str, float] = field(default_factory=dict)  # {"audio": 1.0, "text": 1.0} by default
    max_new_tokens: int = 256  # longest translation that is generated, in tokens
    validation_bleu: bool = True  # translate the validation sets and log their BLEU


# What else stands in the config of an exported folder, or is read by NeMo's own functions.
_TOLERATED_KEYS = ("model_type", "architectures", "trust_remote_code", "torch_dtype")


class SpeechTextModel(Generation, LightningModule, HFHubMixin):
    """A speech encoder and a language model that translate speech and text.

    A subclass says how a batch passes through its language model: :meth:`forward` and :meth:`generate_answers`.

    Args:
        cfg: the ``model`` section of a recipe, see :class:`ModelConfig`.

    Raises:
        ConfigError: for a misspelt or missing key.
        ModelError: if a pretrained part cannot be found or is of the wrong kind.
    """

    auto_class: ClassVar[type]  # the transformers Auto class that builds the language model
    is_encoder_decoder: ClassVar[bool]

    def __init__(self, cfg: dict | DictConfig) -> None:
        super().__init__()
        cfg = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
        known = [f.name for f in fields(ModelConfig)]
        for key in check_keys(cfg, known, "model", tolerated=_TOLERATED_KEYS):
            logging.warning(f"model.{key} is not a key that {type(self).__name__} knows; it is ignored.")
        if not cfg.get("pretrained_llm"):
            raise ConfigError("model.pretrained_llm is missing: give a folder or a Hugging Face name.")
        self.save_hyperparameters({"cfg": cfg})
        self.options = ModelConfig(**{k: v for k, v in cfg.items() if k in known and v is not None})
        # NeMo's helpers ask `"key" in cfg`, so keys that are not set stay out.
        self.cfg = DictConfig({k: v for k, v in cfg.items() if v is not None})
        self.cfg.pretrained_weights = self.options.pretrained_weights

        self.tokenizer = self._build_tokenizer()
        self.llm = self._build_llm()
        self.perception = None
        if self.options.perception is not None:
            self._build_perception()
        weights = dict.fromkeys(MODALITIES, 1.0) | dict(self.options.modality_loss_weights)
        for stranger in check_keys(weights, MODALITIES, "model.modality_loss_weights"):
            raise ConfigError(
                f"model.modality_loss_weights.{stranger}: there is no such modality; use {' and '.join(MODALITIES)}."
            )
        self.register_buffer("_loss_weights", torch.tensor([weights[m] for m in MODALITIES]), persistent=False)
        self._tallies: Tallies = {}
        self._step_log: StepLog | None = None
        self._counts: TokenCounts | None = None  # of the last step's batch
        self._pieces: PieceSums | None = None  # only while a batch is trained on in pieces

    # Construction.

    def _build_tokenizer(self) -> AutoTokenizer:
        source = self.options.tokenizer_path or self.options.pretrained_llm
        _check_local_path(source, "model.tokenizer_path" if self.options.tokenizer_path else "model.pretrained_llm")
        with _as_model_error(source):
            tokenizer = AutoTokenizer(source, use_fast=True, trust_remote_code=self.cfg.get("trust_remote_code", False))
        # Not NeMo's add_special_tokens: it replaces the list in which multilingual tokenizers keep their languages.
        tokenizer.tokenizer.add_tokens(
            [AddedToken(self.options.audio_locator_tag, special=True, normalized=False)], special_tokens=True
        )
        return tokenizer

    def _build_llm(self) -> PreTrainedModel:
        name = self.options.pretrained_llm
        trust = {"trust_remote_code": self.cfg.get("trust_remote_code", False)}
        with _as_model_error(name):
            config = AutoConfig.from_pretrained(name, **trust)
        if config.is_encoder_decoder != self.is_encoder_decoder:
            kinds = {True: "an encoder-decoder", False: "a decoder-only model"}
            raise ModelError(
                f"model.pretrained_llm: '{name}' is {kinds[config.is_encoder_decoder]} ({config.model_type}), "
                f"but {type(self).__name__} is built on {kinds[self.is_encoder_decoder]}; choose another of either."
            )
        if self.options.pretrained_weights:
            llm = self.auto_class.from_pretrained(name, dtype=torch.float32, **trust)
        else:
            llm = self.auto_class.from_config(config, dtype=torch.float32, **trust)
        # transformers hands it over in evaluation mode, and Lightning's fit leaves modes as they are.
        return llm.train()

    def _build_perception(self) -> None:
        if self.options.pretrained_weights:
            if not self.options.pretrained_asr:
                raise ConfigError("model.pretrained_asr is missing: give a .nemo file or the name of a NeMo ASR model.")
            _check_local_path(self.options.pretrained_asr, "model.pretrained_asr")
        with open_dict(self.cfg):
            # FastConformer all-reduces its longest input by default: a rank that has only text would leave the others
            # waiting in that collective.
            self.cfg.perception.setdefault("encoder", {})
            self.cfg.perception.encoder.sync_max_audio_length = False
        setup_speech_encoder(self, pretrained_weights=self.options.pretrained_weights)

    # What others ask of a model.

    @property
    def pad_id(self) -> int:
        """The id that fills batches of token ids."""
        return get_pad_id(self.tokenizer)

    @property
    def audio_locator_id(self) -> int:
        """The id of the token that stands in the prompt where a recording belongs."""
        return self.tokenizer.token_to_id(self.options.audio_locator_tag)

    @property
    def sampling_rate(self) -> int:
        """Samples per second that the speech encoder expects."""
        return self._perception().preprocessor.featurizer.sample_rate

    @property
    def token_equivalent_duration(self) -> float:
        """Seconds of audio behind one position of the language model's input."""
        return self._perception().token_equivalent_duration

    @property
    def data_defaults(self) -> dict[str, Any]:
        """What a dataset's config need not say, since the model knows it: prompt, locator, sampling rate, frame."""
        known = {"prompt_format": self.options.prompt_format, "audio_locator_tag": self.options.audio_locator_tag}
        if self.perception is None:
            return known
        return known | {
            "sample_rate": self.sampling_rate,
            "token_equivalent_duration": self.token_equivalent_duration,
        }

    def _perception(self) -> torch.nn.Module:
        if self.perception is None:
            raise ModelError("this model reads text only: its config has no `perception`, so it cannot take audio.")
        return self.perception

    def oomptimizer_schema(self, schema: str = "audio") -> dict:
        """The types of a batch of one modality, for OOMptimizer (the format is NeMo's).

        Args:
            schema: ``"audio"`` or ``"text"``.

        Raises:
            ConfigError: for another modality.
        """
        if schema not in MODALITIES:
            raise ConfigError(f"oomptimizer schema: '{schema}' is not a modality; use one of {', '.join(MODALITIES)}.")
        ids, lengths = NeuralType(("B", "T"), LabelsType()), NeuralType(("B",), LengthsType())
        vocab_size = self.llm.get_input_embeddings().num_embeddings
        context = {"seq_length": "input", "vocab_size": vocab_size}
        answer = {"seq_length": "output", "vocab_size": vocab_size}
        inputs = [
            {"name": "context_ids", "type": ids, **context},
            {"name": "context_lens", "type": lengths, "seq_length": "input"},
            {"name": "answer_ids", "type": ids, **answer},
            {"name": "answer_lens", "type": lengths, "seq_length": "output"},
        ]
        if schema == "audio":
            # Beside speech the context is the prompt: short, of a length that the answer's bound covers.
            inputs[0] |= {"seq_length": "output"}
            inputs[1] |= {"seq_length": "output"}
            inputs += [
                {"name": "audios", "type": NeuralType(("B", "T"), AudioSignal()), "seq_length": "input"},
                {"name": "audio_lens", "type": lengths, "seq_length": "input"},
            ]
        return {"cls": dict, "inputs": inputs}

    # Forward.

    @abstractmethod
    def forward(self, batch: Mapping) -> tuple[Tensor, Tensor]:
        """Logits (B, A, V) and targets (B, A) of a one-modality batch."""

    @abstractmethod
    def generate_answers(self, batch: Mapping, **generate_options: Any) -> Tensor:
        """Generated ids (B, A) for the contexts of a one-modality batch."""

    def embed_with_audio(
        self, context_ids_BT: Tensor, context_lens_B: Tensor, audios_RN: Tensor, audio_lens_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of the context with encoded speech at its locators: (B, S, H), and their (B, S) bool mask."""
        audio_embeds, audio_embed_lens = self._perception()(input_signal=audios_RN, input_signal_length=audio_lens_R)
        # The locator may lie beyond the embedding table; its own embedding is never used.
        ids_BT = context_ids_BT.masked_fill(context_ids_BT == self.audio_locator_id, self.pad_id)
        return place_audio(
            token_embeds_BTH=self.llm.get_input_embeddings()(ids_BT),
            token_ids_BT=context_ids_BT,
            token_lens_B=context_lens_B,
            audio_embeds_RFH=audio_embeds,
            audio_lens_R=audio_embed_lens,
            locator_id=self.audio_locator_id,
        )

    # Training.

    def configure_optimizers(self) -> dict:
        """NeMo's: freezing, optimizer and schedule by the config."""
        return configure_optimizers(self)

    def configure_callbacks(self) -> list[Callback]:
        """Random states belong in every checkpoint of this model: without them dropout differs after resuming."""
        return [RandomState()]

    def on_train_start(self) -> None:
        """Log anew."""
        self._step_log = StepLog(self.trainer.log_every_n_steps)

    def training_step(self, batch: Mapping, batch_idx: int) -> Tensor:
        """The weighted sum of the modalities' losses, in nats per token; logs each modality apart.

        A rank whose batch has nothing left of it (an empty dict) steps along with the others, with a loss of zero.
        """
        self._hold_frozen_parts()
        parts = split_modalities(batch, self.pad_id) if batch else {}
        if self._pieces is None:
            self._counts = TokenCounts(batch, parts, self.device)
        # The only collective of a forward pass comes before anything large: see modules/loss.py.
        totals_M = self._counts.over_all_ranks()
        loss_sums_M = self._loss_sums(parts)
        loss = modality_loss(loss_sums_M, totals_M, self._loss_weights)
        if not parts:
            loss = loss + sum(0.0 * parameter.sum() for parameter in self.parameters() if parameter.requires_grad)
        if self._pieces is None:
            self._log_step(parts, loss_sums_M, loss)
        else:
            self._pieces.add(loss_sums_M, target_counts(parts, self.device))
        return loss

    def _loss_sums(self, parts: Mapping[str, Mapping]) -> Tensor:
        """(M,) summed cross-entropies of the one-modality batches, nats; 0 where a modality is absent."""
        sums = [token_cross_entropy(*self(parts[m])) if m in parts else None for m in MODALITIES]
        return torch.stack([torch.zeros((), device=self.device) if s is None else s for s in sums])

    def _hold_frozen_parts(self) -> None:
        """Keep frozen parts in evaluation mode, as NeMo's SALM does: no dropout, no update of batch norm."""
        parts = [self.llm]
        if self.perception is not None:
            parts += [self.perception.preprocessor, self.perception.encoder]
        for part in parts:
            if is_frozen(part):
                part.eval()

    def _log_step(self, parts: Mapping[str, Mapping], loss_sums_M: Tensor, loss: Tensor) -> None:
        if self._step_log is None:  # a step outside of `fit`
            self._step_log = StepLog(window=1)
        self._step_log.add(parts, loss_sums_M, self._counts.here_M)
        lr = self.trainer.optimizers[0].param_groups[0]["lr"] if self._trainer is not None else 0.0
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        self.log("learning_rate", lr, batch_size=1)
        for name, value in self._step_log.values().items():
            self.log(name, value, prog_bar=name.startswith(("loss", "examples")), batch_size=1)
        self._counts.logged = True

    # Training steps in pieces.

    def split_batch(self, batch: Mapping, pieces: int) -> list[Mapping]:
        """Cut a batch into at most so many smaller ones, each of one modality; see :func:`cut_batch`."""
        return cut_batch(batch, pieces, self.pad_id, self.audio_locator_id)

    def loss_weight(self, piece: Mapping, whole: Mapping) -> float:
        """What the loss of a piece counts in that of the whole batch: all of it, for within :meth:`one_step` a piece's
        tokens are divided by the whole's."""
        return 1.0

    @contextmanager
    def one_step(self, batch: Mapping) -> Iterator[None]:
        """Around the training steps of a batch's pieces: their losses add up to the batch's, and they are logged as one
        step when all are done, unless the whole batch's forward pass was logged before its backward pass failed.
        """
        parts = split_modalities(batch, self.pad_id)
        if self._counts is None or not self._counts.are_of(batch):
            self._counts = TokenCounts(batch, parts, self.device)
        self._pieces = PieceSums(self._counts)
        try:
            yield
            if not self._counts.logged:
                loss_sums_M = self._pieces.loss_sums()
                totals_M = self._counts.over_all_ranks()
                self._log_step(parts, loss_sums_M, modality_loss(loss_sums_M, totals_M, self._loss_weights))
        finally:
            self._pieces = None

    # Validation.

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self._tallies = {}

    def validation_step(self, batch: Mapping, batch_idx: int) -> None:
        """Count losses and collect translations of ``{dataset_name: batch or None}``."""
        for dataset, dataset_batch in batch.items():
            if dataset_batch is None:
                continue  # this set is shorter than the others
            for modality, part in split_modalities(dataset_batch, self.pad_id).items():
                logits, targets = self(part)
                examples = part.get("examples")
                count_batch(
                    self._tallies,
                    dataset,
                    modality,
                    examples,
                    losses_B=example_cross_entropies(logits, targets),
                    tokens_B=(targets != IGNORE_INDEX).sum(1),
                    correct_B=correct_tokens(logits, targets),
                    hypotheses=self.translate_batch(part) if self.options.validation_bleu and examples else None,
                )

    def on_validation_epoch_end(self) -> None:
        """Log what :func:`validation_metrics` makes of all ranks' counts."""
        metrics = validation_metrics(gather_tallies(self._tallies))
        self.log_dict({k: torch.tensor(v) for k, v in metrics.items()}, batch_size=1)
        self._tallies = {}

    def on_test_epoch_start(self) -> None:
        """Count anew."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Mapping, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.on_validation_epoch_end()

    # Folders.

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write a folder in Hugging Face's layout, which :func:`nemo_emmett.models.load` reads.

        It holds ``model.safetensors``, ``config.json``, the tokenizer, and the language model's own config under
        ``llm_backbone``; nothing else is needed to load it.
        """
        folder = Path(save_directory)
        config = OmegaConf.to_container(self.cfg, resolve=True)
        config |= {
            "_target_": f"{type(self).__module__}.{type(self).__qualname__}",
            "model_type": "nemo_emmett",
            "architectures": [type(self).__name__],
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.tokenizer.save_pretrained(folder)
        self.llm.config.save_pretrained(folder / LLM_BACKBONE_DIR)
        return super().save_pretrained(folder, config=config, **kwargs)


def _check_local_path(source: str, key: str) -> None:
    """Refuse what is plainly a path on this machine and is not there; other names may be a hub's."""
    looks_local = source.startswith((".", "/", "~")) or source.endswith(".nemo") or source.count("/") > 1
    if looks_local and not Path(source).expanduser().exists():
        raise ModelError(f"{key}: '{source}' does not exist; give a folder or file that does, or the name of a model.")


@contextmanager
def _as_model_error(name: str) -> Iterator[None]:
    """What transformers and NeMo raise where a name leads to nothing, in one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(
            f"'{name}' is neither a folder with a Hugging Face model nor the name of one that could be fetched; "
            "check model.pretrained_llm and model.tokenizer_path."
        ) from error
