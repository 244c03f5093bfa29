"""The types of a batch for OOMptimizer, in NeMo's format ``oomptimizer_schema``."""

from __future__ import annotations

from typing import Any

from nemo.core.neural_types import AudioSignal, LabelsType, LengthsType, MaskType, NeuralType

from nemo_emmett.errors import ConfigError
from nemo_emmett.modules.batch import MODALITIES


def oomptimizer_schema(modality: str, vocab_size: int, transcripts: bool = False) -> dict[str, Any]:
    """The types of a one-modality batch, and which of its lengths a bucket bounds.

    Args:
        modality: ``"audio"`` or ``"text"``.
        vocab_size: random ids are drawn below it.
        transcripts: batches of speech hold what objectives read. A transcript is taken to be as long as the answer.

    Raises:
        ConfigError: for another modality.
    """
    if modality not in MODALITIES:
        raise ConfigError(f"oomptimizer schema: '{modality}' is not a modality; use one of {', '.join(MODALITIES)}.")
    ids, lengths = NeuralType(("B", "T"), LabelsType()), NeuralType(("B",), LengthsType())
    # With speech the context is the prompt: short, of a length that the answer's bound covers.
    context = "output" if modality == "audio" else "input"
    inputs = [
        {"name": "context_ids", "type": ids, "seq_length": context, "vocab_size": vocab_size},
        {"name": "context_lens", "type": lengths, "seq_length": context},
        {"name": "answer_ids", "type": ids, "seq_length": "output", "vocab_size": vocab_size},
        {"name": "answer_lens", "type": lengths, "seq_length": "output"},
    ]
    if modality == "audio":
        inputs += [
            {"name": "audios", "type": NeuralType(("B", "T"), AudioSignal()), "seq_length": "input"},
            {"name": "audio_lens", "type": lengths, "seq_length": "input"},
        ]
        if transcripts:
            for name in ("transcript", "text_context"):
                inputs += [
                    {"name": f"{name}_ids", "type": ids, "seq_length": "output", "vocab_size": vocab_size},
                    {"name": f"{name}_lens", "type": lengths, "seq_length": "output"},
                ]
            inputs.append({"name": "is_transcription", "type": NeuralType(("B",), MaskType()), "seq_length": "output"})
    return {"cls": dict, "inputs": inputs}
