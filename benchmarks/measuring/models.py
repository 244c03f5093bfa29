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

    from nemo_emmett.models import SALMT5

    write_t5(folder, width, layers, vocab_size)
    torch.manual_seed(0)
    return SALMT5(model_section(folder, "emmett_t5", width, encoder_layers, encoder_width))


def write_t5(folder: Path, width: int, layers: int, vocab_size: int, **options: Any) -> None:
    """Config and tokenizer of a T5; see :func:`build_salm_t5`.

    Args:
        options: further arguments of transformers' ``T5Config``.
    """
    from transformers import T5Config

    from nemo_emmett.corpora.tokenizers import train_t5_tokenizer

    train_t5_tokenizer(WORDS.split(), folder, vocab_size=120, languages=("en", "de"))
    sizes = {"d_model": width, "d_kv": 64, "d_ff": 4 * width, "num_layers": layers, "num_heads": width // 64}
    T5Config(
        vocab_size=vocab_size,
        decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"],
        **sizes | options,
    ).save_pretrained(folder)


def write_llama(folder: Path, width: int, layers: int, vocab_size: int, **options: Any) -> None:
    """Config and tokenizer of a Llama.

    Args:
        folder: receives them.
        width: a multiple of 64, the width of a head.
        layers: of its decoder.
        vocab_size: rows of the embedding table.
        options: further arguments of transformers' ``LlamaConfig``.
    """
    from transformers import LlamaConfig

    from nemo_emmett.corpora.tokenizers import train_llama_tokenizer

    train_llama_tokenizer(WORDS.split(), folder, vocab_size=120, languages=("en", "de"))
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}  # the tokenizer's
    LlamaConfig(
        vocab_size=vocab_size,
        num_attention_heads=width // 64,
        architectures=["LlamaForCausalLM"],
        **sizes | special | options,
    ).save_pretrained(folder)


def model_section(
    folder: Path,
    prompt_format: str,
    width: int,
    encoder_layers: int,
    encoder_width: int | None = None,
    conv_channels: int = 256,
) -> dict[str, Any]:
    """The ``model`` section of a recipe, of ours as of NeMo's SALM, for random weights.

    Args:
        folder: what :func:`write_t5` or :func:`write_llama` wrote.
        prompt_format: name of a NeMo prompt format.
        width: of the language model.
        encoder_layers: of FastConformer.
        encoder_width: of FastConformer, a multiple of 64; by default that of the language model.
        conv_channels: of the convolutions that make one frame of eight; Canary's are a quarter of its width.
    """
    return {
        "pretrained_llm": str(folder),
        "pretrained_weights": False,
        "prompt_format": prompt_format,
        "audio_locator_tag": "<|audio|>",
        "perception": _perception(encoder_width or width, encoder_layers, width, conv_channels),
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4},
    }


def without_chance(model: Any) -> Any:
    """The model, whose training steps draw no random numbers from now on: neither dropout nor dither."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # attention that calls the function
            module.dropout = 0.0
    model.perception.preprocessor.featurizer.dither = 0.0
    model.log = model.log_dict = _log_nothing  # there is no trainer
    return model


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


def _perception(width: int, layers: int, output_width: int, conv_channels: int) -> dict[str, Any]:
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
            "subsampling_conv_channels": conv_channels,
            "conv_kernel_size": 9,
        },
        "modality_adapter": {
            "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
            "d_model": width,
        },
    }
