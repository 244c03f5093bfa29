"""Models that the benchmarks make on the spot: random weights, nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = "one two three four five six seven eight nine ten eins zwei drei vier fünf sechs sieben acht neun zehn"


def build_salm_t5(
    folder: Path, width: int, layers: int, encoder_layers: int, encoder_width: int | None = None, vocab_size: int = 512
) -> Any:
    """SALM-T5 of random weights.

    Args:
        folder: receives the language model's config and tokenizer.
        width: of T5, a multiple of 64.
        layers: of T5's encoder, and of its decoder.
        encoder_layers: of FastConformer.
        encoder_width: of FastConformer, a multiple of 64; by default that of T5.
        vocab_size: rows of the embedding table.
    """
    import torch
    from transformers import T5Config

    from nemo_emmett.corpora.tokenizers import train_t5_tokenizer
    from nemo_emmett.models import SALMT5

    train_t5_tokenizer(WORDS.split(), folder, vocab_size=120, languages=("en", "de"))
    T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=64,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=width // 64,
        decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    return SALMT5(
        {
            "pretrained_llm": str(folder),
            "pretrained_weights": False,
            "prompt_format": "emmett_t5",
            "perception": _perception(encoder_width or width, encoder_layers, width),
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4},
        }
    )


def _perception(width: int, layers: int, output_width: int) -> dict[str, Any]:
    asr = "nemo.collections.asr.modules"
    return {
        "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
        "output_dim": output_width,
        "preprocessor": {
            "_target_": f"{asr}.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000,
            "features": 80,
            "window_size": 0.025,
            "window_stride": 0.01,
        },
        "encoder": {
            "_target_": f"{asr}.ConformerEncoder",
            "feat_in": 80,
            "feat_out": -1,
            "n_layers": layers,
            "d_model": width,
            "n_heads": width // 64,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": 256,
            "conv_kernel_size": 9,
        },
        "modality_adapter": {
            "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
            "d_model": width,
        },
    }
