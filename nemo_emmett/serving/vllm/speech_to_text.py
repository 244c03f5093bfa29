"""Prompts of ``/v1/audio/translations`` and ``/v1/audio/transcriptions``."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.models.whisper.tokenization_whisper import LANGUAGES
from vllm.config import SpeechToTextConfig
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.inputs import TokensPrompt

from nemo_emmett.errors import EmmettError
from nemo_emmett.models.exported import chunk_seconds_of
from nemo_emmett.prompts.instruction import translation_turns
from nemo_emmett.prompts.languages import language_name
from nemo_emmett.prompts.markup import AUDIO_LOCATOR, Markup
from nemo_emmett.serving.request_errors import RequestError
from nemo_emmett.serving.vllm.config import ExportedConfig
from nemo_emmett.serving.vllm.parts import direction_of, formatter_of, lengths_of

SUPPORTED_LANGUAGES: Mapping[str, str] = {code: language_name(code) for code in LANGUAGES}
"""Languages of requests: those that vLLM knows, by our names."""

_SHORTEST_CLIP = 2
"""Seconds: vLLM looks for a quiet place in the last second of a clip."""


def speech_to_text_config(config: ExportedConfig) -> SpeechToTextConfig:
    """Recordings longer than those of the training are cut into clips, by vLLM, at quiet places."""
    lengths = lengths_of(config)
    if lengths is None:
        return SpeechToTextConfig()
    seconds = max(_SHORTEST_CLIP, int(chunk_seconds_of(config.section)))
    return SpeechToTextConfig(sample_rate=lengths.sampling_rate, max_audio_clip_s=seconds)


def audio_tokens(config: ExportedConfig, seconds: float) -> int | None:
    """Positions that a recording takes."""
    lengths = lengths_of(config)
    return None if lengths is None else lengths([round(seconds * lengths.sampling_rate)])[0]


def generation_prompt(params: SpeechToTextParams) -> TokensPrompt:
    """The prompt of a clip, as the model was trained with it.

    Raises:
        ValueError: for a language that is missing or not the model's, or a model that reads text only; the status of
            vLLM's answer is 400.
    """
    config: ExportedConfig = params.model_config.hf_config
    if lengths_of(config) is None:
        raise ValueError("this model reads text only, so it cannot take audio.")
    try:
        direction = direction_of(config.section, params.task_type, params.language, params.to_language)
        formatter = formatter_of(config)
        locator = Markup(config.section.get("audio_locator_tag", AUDIO_LOCATOR))
        turns = translation_turns(formatter, locator, direction.target, direction.source)
        ids = formatter.encode_dialog(turns=turns)["context_ids"].tolist()
    except (EmmettError, RequestError) as error:
        raise ValueError(str(error)) from error
    if direction.wants_transcript:
        raise ValueError(
            "language: this model transcribes in front of a translation only; send the recording to "
            "/v1/audio/translations, whose answers begin with the transcript."
        )
    return TokensPrompt(prompt_token_ids=ids, multi_modal_data={"audio": (params.audio, params.stt_config.sample_rate)})
