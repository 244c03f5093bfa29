"""SALMGPT in vLLM: our speech encoder and adapter in front of a language model of vLLM's own.

Shapes: T tokens of a batch of requests, H hidden size, R recordings, N samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from nemo.collections.speechlm2.parts.encoder_chunking import encode_audio_with_optional_chunking
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import ModelConfig, SpeechToTextConfig, VllmConfig
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.inputs import TokensPrompt
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP, SupportsTranscription
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.torch_utils import set_default_torch_dtype

from nemo_emmett.prompts.markup import AUDIO_LOCATOR
from nemo_emmett.serving.vllm.parts import lengths_of, perception_of
from nemo_emmett.serving.vllm.processing import DummyInputs, ProcessingInfo, Processor
from nemo_emmett.serving.vllm.speech_to_text import (
    SUPPORTED_LANGUAGES,
    audio_tokens,
    generation_prompt,
    speech_to_text_config,
)
from nemo_emmett.serving.vllm.weights import checked_weights, language_model_shapes, language_model_weights

_PERCEPTION = "perception."


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class SpeechTextForCausalLM(nn.Module, SupportsMultiModal, SupportsPP, SupportsTranscription):
    """An exported SALMGPT.

    Args:
        vllm_config: whose model config is an :class:`~nemo_emmett.serving.vllm.config.ExportedConfig`.
        prefix: of the names of its modules.
    """

    supported_languages = SUPPORTED_LANGUAGES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        self.config = model_config.hf_config
        text_config = self.config.text_config
        self.vocab_size = text_config.vocab_size
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]],
            )
        with self._mark_tower_model(vllm_config, "audio"):
            # NeMo computes filter banks and positions on the CPU, in float32.
            with set_default_torch_dtype(torch.float32), torch.device("cpu"):
                self.perception = perception_of(self.config)
            if self.perception is not None:
                self.perception.to(device=vllm_config.device_config.device, dtype=model_config.dtype)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for a recording in a chat message, where the chat template does not write it."""
        return AUDIO_LOCATOR if modality.startswith("audio") else None

    def embed_multimodal(
        self,
        audio_signal: Tensor | list[Tensor] | None = None,
        audio_signal_length: Tensor | None = None,
        **_: object,
    ) -> list[Tensor]:
        """The embeddings of recordings.

        Args:
            audio_signal: R recordings, float32 samples.
            audio_signal_length: (R,) samples of each.

        Returns:
            One (positions, H) tensor for each.
        """
        if audio_signal is None:
            return []
        lens_R = audio_signal_length.flatten()
        rows = [signal.flatten()[:n] for signal, n in zip(audio_signal, lens_R.tolist(), strict=True)]
        weight = next(self.perception.parameters())
        lengths = lengths_of(self.config)
        return [
            embeds.to(weight.dtype)
            for embeds in encode_audio_with_optional_chunking(
                self.perception,
                pad_sequence(rows, batch_first=True).to(weight.device, torch.float32),
                lens_R.to(weight.device),
                chunk_size_seconds=self.config.section.get("encoder_chunk_size_seconds"),
                sampling_rate=lengths.sampling_rate,
            )
        ]

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """vLLM's; the locator's id may be beyond the embedding table, and a prompt may hold one without a recording."""
        known = input_ids.masked_fill(input_ids >= self.vocab_size, 0)
        if multimodal_embeddings is None or is_multimodal is None:
            return super().embed_input_ids(known)
        return super().embed_input_ids(known, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Any:
        """(T, H) hidden states of the language model."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(T, vocabulary) logits."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the folder's weights.

        Raises:
            ModelError: if weights are missing, of another shape or too many, or LoRA cannot be merged.
        """
        perception: dict[str, Tensor] = {}

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, value in weights:
                if name.startswith(_PERCEPTION):
                    perception[name.removeprefix(_PERCEPTION)] = value
                else:
                    yield name, value

        text_config = self.config.text_config
        own = language_model_weights(others(), self.config.section.get("lora"), bool(text_config.tie_word_embeddings))
        # vLLM joins several weights to one, and does not see that a part of one is missing.
        checked = checked_weights(own, language_model_shapes(text_config), "language model")
        loaded = AutoWeightsLoader(self).load_weights((f"language_model.{name}", value) for name, value in checked)
        expected = {} if self.perception is None else self.perception.state_dict()
        perception = dict(checked_weights(perception.items(), expected, "speech encoder"))
        if self.perception is not None:
            self.perception.load_state_dict(perception)
        return loaded | {f"{_PERCEPTION}{name}" for name in perception}

    def get_mm_mapping(self) -> MultiModelKeys:
        """The parts of the model by their names."""
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="perception.modality_adapter",
            tower_model="perception.encoder",
        )

    # Speech to text.

    @classmethod
    def get_speech_to_text_config(cls, model_config: ModelConfig, task_type: str) -> SpeechToTextConfig:
        """See :func:`~nemo_emmett.serving.vllm.speech_to_text.speech_to_text_config`."""
        return speech_to_text_config(model_config.hf_config)

    @classmethod
    def get_num_audio_tokens(
        cls, audio_duration_s: float, stt_config: SpeechToTextConfig, model_config: ModelConfig
    ) -> int | None:
        """See :func:`~nemo_emmett.serving.vllm.speech_to_text.audio_tokens`."""
        return audio_tokens(model_config.hf_config, audio_duration_s)

    @classmethod
    def get_generation_prompt(cls, stt_params: SpeechToTextParams) -> TokensPrompt:
        """See :func:`~nemo_emmett.serving.vllm.speech_to_text.generation_prompt`."""
        return generation_prompt(stt_params)

    @classmethod
    def post_process_output(cls, text: str) -> str:
        """Without the whitespace around it, as ``translate`` returns it."""
        return text.strip()
