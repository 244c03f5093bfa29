"""Recordings of a request: checked, and given as many positions of the prompt as the speech encoder gives embeddings.

Recordings reach the model as samples, in float32; the encoder's features are computed where the encoder is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import AudioProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from nemo_emmett.models.exported import chunk_seconds_of
from nemo_emmett.modules.perception_lengths import PerceptionLengths
from nemo_emmett.prompts.markup import AUDIO_LOCATOR
from nemo_emmett.serving.vllm.config import ExportedConfig
from nemo_emmett.serving.vllm.parts import lengths_of

_RESERVED_FOR_TEXT = 32  # tokens of a prompt


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM's front end needs to know about the model."""

    def get_hf_config(self) -> ExportedConfig:
        """The folder's."""
        return self.ctx.get_hf_config(ExportedConfig)

    @property
    def lengths(self) -> PerceptionLengths | None:
        """Positions that recordings take; None for a model that reads text only."""
        return lengths_of(self.get_hf_config())

    @property
    def locator(self) -> str:
        """The token that marks a recording's place in the prompt."""
        return self.get_hf_config().section.get("audio_locator_tag", AUDIO_LOCATOR)

    @property
    def locator_id(self) -> int:
        """The id of :attr:`locator`."""
        return self.get_tokenizer().get_vocab()[self.locator]

    def get_data_parser(self) -> MultiModalDataParser:
        """One that mixes recordings down to one channel and resamples them."""
        rate = None if self.lengths is None else self.lengths.sampling_rate
        width = self._get_expected_hidden_size()
        return MultiModalDataParser(target_sr=rate, target_channels=1, expected_hidden_size=width)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of recordings, unless the model reads text only."""
        return {} if self.lengths is None else {"audio": None}


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """The largest input, by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """As many locators as recordings."""
        return self.info.locator * mm_counts.get("audio", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Silent recordings, as long as those of the training, or of the ``length`` in samples that vLLM's option
        ``--limit-mm-per-prompt`` names."""
        count = mm_counts.get("audio", 0)
        if not count:
            return {}
        lengths, wanted = self.info.lengths, mm_options.get("audio")
        samples = getattr(wanted, "length", None) or round(
            chunk_seconds_of(self.info.get_hf_config().section) * lengths.sampling_rate
        )
        fitting = lengths.most_samples(max(1, seq_len // count - _RESERVED_FOR_TEXT))
        return {"audio": [torch.zeros(max(lengths.shortest, min(samples, fitting))).numpy()] * count}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Recordings to the model's inputs, and to positions in the prompt."""

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        signals = [torch.as_tensor(signal, dtype=torch.float32) for signal in _recordings(mm_items)]
        shortest = self.info.lengths.shortest if signals else 0
        for signal in signals:
            if signal.dim() != 1 or len(signal) < shortest:
                raise ValueError(
                    f"a recording has {signal.shape[-1]} samples, fewer than the {shortest} that the speech encoder "
                    "needs; leave it out."
                )
            if not signal.isfinite().all():
                raise ValueError("a recording holds values that are not numbers; convert it again.")
        if not signals:
            return BatchFeature()
        return BatchFeature({"audio_signal": signals, "audio_signal_length": torch.tensor([len(s) for s in signals])})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {name: MultiModalFieldConfig.batched("audio") for name in ("audio_signal", "audio_signal_length")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: Any,
    ) -> Sequence[PromptUpdate]:
        signals, locator = _recordings(mm_items), self.info.locator_id

        def positions(number: int) -> list[int]:
            return [locator] * self.info.lengths([len(signals[number])])[0]

        return [PromptReplacement(modality="audio", target=[locator], replacement=positions)]


def _recordings(mm_items: MultiModalDataItems) -> list[Any]:
    if "audio" not in mm_items:
        return []
    items = mm_items.get_items("audio", AudioProcessorItems)
    return [items.get(number) for number in range(items.get_count())]
