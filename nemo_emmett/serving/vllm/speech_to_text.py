"""Prompts of ``/v1/audio/translations`` and ``/v1/audio/transcriptions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.whisper.tokenization_whisper import LANGUAGES
from vllm.config import SpeechToTextConfig
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.inputs import TokensPrompt

from nemo_emmett.errors import EmmettError
from nemo_emmett.models.exported import only_source, trained_directions, trained_targets
from nemo_emmett.prompts.instruction import translation_turns
from nemo_emmett.prompts.languages import check_language, language_name
from nemo_emmett.prompts.markup import AUDIO_LOCATOR, Markup
from nemo_emmett.serving.vllm.config import ExportedConfig
from nemo_emmett.serving.vllm.parts import formatter_of, lengths_of
from nemo_emmett.serving.vllm.processing import LONGEST_SECONDS

SUPPORTED_LANGUAGES: Mapping[str, str] = {code: language_name(code) for code in LANGUAGES}
"""Languages of requests: those that vLLM knows, by our names."""


def speech_to_text_config(config: ExportedConfig) -> SpeechToTextConfig:
    """Longer recordings are cut into clips at quiet places."""
    lengths = lengths_of(config)
    if lengths is None:
        return SpeechToTextConfig()
    return SpeechToTextConfig(sample_rate=lengths.sampling_rate, max_audio_clip_s=int(LONGEST_SECONDS))


def audio_tokens(config: ExportedConfig, seconds: float) -> int | None:
    """Positions that a recording takes."""
    lengths = lengths_of(config)
    return None if lengths is None else lengths([round(seconds * lengths.sampling_rate)])[0]


def generation_prompt(params: SpeechToTextParams) -> TokensPrompt:
    """The prompt of a clip, as the model was trained with it.

    Raises:
        ValueError: if a language is needed and not named, or the model reads text only; vLLM answers 400.
    """
    config: ExportedConfig = params.model_config.hf_config
    if lengths_of(config) is None:
        raise ValueError("this model reads text only, so it cannot take audio.")
    try:
        source, target = _languages(config.section, params)
        formatter = formatter_of(config)
        locator = Markup(config.section.get("audio_locator_tag", AUDIO_LOCATOR))
        turns = translation_turns(formatter, locator, target, source)
        ids = formatter.encode_dialog(turns=turns)["context_ids"].tolist()
    except EmmettError as error:
        raise ValueError(str(error)) from error
    return TokensPrompt(prompt_token_ids=ids, multi_modal_data={"audio": (params.audio, params.stt_config.sample_rate)})


def _languages(section: Mapping[str, Any], params: SpeechToTextParams) -> tuple[str | None, str]:
    """Source and target language of a request."""
    source = None if params.language is None else check_language(params.language, "language")
    if params.task_type == "transcribe":
        if source is None:
            both = {target for one, target in trained_directions(section) if one == target}
            if len(both) != 1:
                raise ValueError("language: is missing; name the language of the recording, such as en.")
            (source,) = both
        return source, source
    targets = trained_targets(section) - {source}
    if params.to_language is not None:
        target = check_language(params.to_language, "to_language")
    elif "en" in targets or not targets:
        target = "en"  # OpenAI's endpoint translates to English
    elif len(targets) == 1:
        (target,) = targets
    else:
        raise ValueError(f"to_language: is missing; name one of {', '.join(sorted(targets))}.")
    return source or only_source(section, target), target


