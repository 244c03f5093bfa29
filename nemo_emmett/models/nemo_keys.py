"""Keys of the ``model`` section that other speechlm2 models of NeMo have and ours do not (NeMo 3.0.0).

They are refused, not ignored: a recipe for NeMo Automodel, for example, would train another model.
``docs/nemo_recipes.md`` lists the keys of NeMo's recipes and how each is treated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_AUTOMODEL = (
    "it belongs to NeMo Automodel's language models (use_nemo_automodel: true), and ours are Hugging Face's; remove "
    "it, or train NeMo's SALMAutomodel by NeMo's own script"
)
_DUPLEX = "it belongs to NeMo's speech-to-speech models, and ours answer in text; remove it"
_VALIDATION_FILES = (
    "it names a folder for the texts of a validation; remove it, and run `nemo-emmett evaluate` for them"
)

_AUTOMODEL_KEYS = """
    automodel_backend aux_loss_coeff init_configure_model moe_metrics packed_sequences sdpa_method train_gate
    use_nemo_automodel
"""
_DUPLEX_KEYS = """
    advance_text_channel_by asr_loss_weight audio_loss_weight codec_config custom_speech_bos_id
    custom_speech_eos_id custom_speech_pad_id delay_source_text_by delay_text_bos_by delay_text_channel_by
    delay_text_eos_by duplex_asr_text_weight duplex_text_channel_weight duplex_user_channel_weight
    mask_sequence_loss predict_user_text pretrained_audio_codec pretrained_codec_model pretrained_lm_name
    pretrained_tts_model rescale_first_n_layers rescale_pretrained_weights scoring_asr speech_decoder
    speech_generation stt text_loss_weight text_to_text_loss_weight token_loss_weight tts_config use_codec_aug
    use_mic_ir_aug use_noise_aug use_room_ir_aug
"""

NEMO_KEYS: dict[str, str] = {
    **dict.fromkeys(_AUTOMODEL_KEYS.split(), _AUTOMODEL),
    **dict.fromkeys(_DUPLEX_KEYS.split(), _DUPLEX),
    **dict.fromkeys(("val_save_path", "validation_save_path"), _VALIDATION_FILES),
    "asr_transcript_drop_prob": "it belongs to NeMo's SALMWithAsrDecoder; remove it",
    "exclude_norm_from_wd": "all parameters share the optimizer's weight_decay; remove it",
    "init_from_path": "write the checkpoint's path under model.init_from_checkpoint",
}
"""Key -> what to do about it."""


def is_off(value: Any) -> bool:
    """Whether a value has no effect: null, false, 0, an empty collection, or a mapping with ``enabled: false``.

    Example:
        >>> is_off({"enabled": False, "mode": "brief"}), is_off(0.01)
        (True, False)
    """
    if isinstance(value, Mapping):
        return not value.get("enabled", True) or not value
    return value is None or value in (False, 0, "", [], ())
