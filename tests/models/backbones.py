"""Backbones of every family, tiny and of random weights, in the Hugging Face folders that recipes name.

Each is configured as the published checkpoints of its family are (what is tied, scaled, capped; special tokens and
generation settings), but for its size and its dropout, of which there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..conftest import SENTENCES, perception_config
from ..prompts import tiny_tokenizers

HIDDEN = 32
HEADS = 4
HEAD_DIM = 8
LAYERS = 2
TEXTS = (
    *(sentence for language in SENTENCES.values() for sentence in language),
    "Translate from English to German: user\n\n assistant\n model\n system\n",
    "Translate to German: [INST] [/INST] Transcribe in English:",
)


def backbone(name: str, folder: str | Path) -> Path:
    """The folder ``folder/name`` with the backbone of that name, written where it is not there yet."""
    made = Path(folder) / name
    if not (made / "config.json").exists():
        made.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        (ENCODER_DECODERS | DECODER_ONLY)[name](made)
    return made


def model_config(name: str, folder: str | Path, asr: str | Path | None = None, **overrides: Any) -> dict:
    """The ``model`` section of a recipe on the backbone of that name.

    Args:
        name: a key of ``ENCODER_DECODERS`` or ``DECODER_ONLY``.
        folder: where backbones are kept.
        asr: a .nemo file for the speech encoder; None: a model that reads text only.
        overrides: further keys.
    """
    config = {
        "pretrained_llm": str(backbone(name, folder)),
        "prompt_format": PROMPT_FORMAT[name],
        "max_new_tokens": 12,
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
    }
    if asr is not None:
        config |= {"pretrained_asr": str(asr), "perception": perception_config()}
    return config | overrides


def livelier(model: Any) -> Any:
    """A model of ours with weights so large that its answers differ."""
    torch.manual_seed(0)
    for parameter in model.llm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter)
    return model


# Encoder-decoders.


def write_t5(folder: Path, feed_forward: str = "relu", tied: bool = True, kind: str = "T5") -> Path:
    """T5 and its kin; where ``tied`` is false the output layer is one of its own, and is not fed scaled states."""
    tokenizer = tiny_tokenizers.t5_tokenizer(folder, TEXTS)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer) + 8,  # published ones are padded as well
        d_model=HIDDEN,
        d_kv=8,
        d_ff=64,
        num_layers=LAYERS,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    if not tied:
        _untie(model)
    return _save(folder, model, tokenizer, GenerationConfig(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))


def write_t5v1_1(folder: Path) -> Path:
    """T5 1.1."""
    return write_t5(folder, "gated-gelu", tied=False)


def write_ul2(folder: Path) -> Path:
    """UL2, which is a T5 in all but its activation."""
    return write_t5(folder, "gated-silu", tied=False)


def write_mt5(folder: Path) -> Path:
    """mT5."""
    return write_t5(folder, "gated-gelu", tied=False, kind="MT5")


def write_umt5(folder: Path) -> Path:
    """UMT5, whose every layer has a position bias."""
    return write_t5(folder, "gated-gelu", tied=False, kind="UMT5")


def write_m2m100(folder: Path) -> Path:
    """M2M100."""
    return _write_m2m100(folder, tiny_tokenizers.m2m100_tokenizer(folder, TEXTS, vocab_size=90))


def write_nllb(folder: Path) -> Path:
    """NLLB: M2M100's model with a tokenizer of its own."""
    return _write_m2m100(folder, tiny_tokenizers.nllb_tokenizer(folder, TEXTS, vocab_size=110))


def _write_m2m100(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    config = transformers.M2M100Config(vocab_size=len(tokenizer) + 4, scale_embedding=True, **_bart_size())
    model = transformers.M2M100ForConditionalGeneration(config)
    generation = GenerationConfig(**_bart_tokens(), max_length=200, num_beams=5, early_stopping=True)
    return _save(folder, model, tokenizer, generation)


def write_mbart(folder: Path) -> Path:
    """mBART of 25 languages."""
    return _write_mbart(folder, tiny_tokenizers.mbart_tokenizer(folder, TEXTS, vocab_size=90), scale_embedding=False)


def write_mbart50(folder: Path) -> Path:
    """mBART-50."""
    return _write_mbart(folder, tiny_tokenizers.mbart50_tokenizer(folder, TEXTS, vocab_size=90), scale_embedding=True)


def _write_mbart(folder: Path, tokenizer: PreTrainedTokenizerBase, scale_embedding: bool) -> Path:
    config = transformers.MBartConfig(vocab_size=len(tokenizer), scale_embedding=scale_embedding, **_bart_size())
    model = transformers.MBartForConditionalGeneration(config)
    model.final_logits_bias.normal_(std=0.1)
    generation = GenerationConfig(**_bart_tokens(), max_length=200, num_beams=5, forced_eos_token_id=2)
    return _save(folder, model, tokenizer, generation)


def _bart_size() -> dict[str, Any]:
    sizes = {f"{side}_layers": LAYERS for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")}
    sizes |= dict.fromkeys(("dropout", "attention_dropout", "encoder_layerdrop", "decoder_layerdrop"), 0.0)
    return sizes | {"d_model": HIDDEN, "max_position_embeddings": 256, "init_std": 0.1, **_bart_tokens()}


def _bart_tokens() -> dict[str, int]:
    return {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


# Decoder-only models.


def write_llama(folder: Path) -> Path:
    """TinyLlama: grouped-query attention, and padding with the end of the text."""
    tokenizer = _piece_tokenizer(pad_token="</s>")
    config = transformers.LlamaConfig(**_llama_size(tokenizer), tie_word_embeddings=False)
    return _save(folder, transformers.LlamaForCausalLM(config), tokenizer, GenerationConfig(max_length=2048))


def write_llama3(folder: Path) -> Path:
    """Llama 3 Instruct: no padding token, and two tokens that end the generation."""
    markers = ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"]
    tokenizer = _byte_tokenizer(markers, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    config = transformers.LlamaConfig(**_llama_size(tokenizer), rope_parameters=rope)
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    generation = GenerationConfig(eos_token_id=ends, do_sample=True, temperature=0.6, top_p=0.9)
    return _save(folder, transformers.LlamaForCausalLM(config), tokenizer, generation)


def write_mistral(folder: Path) -> Path:
    """Mistral: grouped-query attention in a sliding window, no padding token."""
    tokenizer = _piece_tokenizer(markers=["[INST]", "[/INST]"])
    config = transformers.MistralConfig(**_llama_size(tokenizer), sliding_window=16)
    return _save(folder, transformers.MistralForCausalLM(config), tokenizer, GenerationConfig())


def write_qwen2(folder: Path) -> Path:
    """Qwen2.5 Instruct of a small size: tied embeddings, biased projections; it samples by default."""
    tokenizer = _byte_tokenizer(["<|im_start|>"], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.Qwen2Config(**_llama_size(tokenizer), tie_word_embeddings=True)
    generation = _qwen_generation(tokenizer, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    return _save(folder, transformers.Qwen2ForCausalLM(config), tokenizer, generation)


def write_qwen3(folder: Path) -> Path:
    """Qwen3 of a small size: tied embeddings, normalised heads; it samples by default."""
    markers = ["<|im_start|>", "<think>", "</think>"]
    tokenizer = _byte_tokenizer(markers, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.Qwen3Config(**_llama_size(tokenizer), head_dim=HEAD_DIM, tie_word_embeddings=True)
    generation = _qwen_generation(tokenizer, temperature=0.6, top_p=0.95, top_k=20)
    return _save(folder, transformers.Qwen3ForCausalLM(config), tokenizer, generation)


def _qwen_generation(tokenizer: PreTrainedTokenizerBase, **sampling: float) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )


def write_gemma(folder: Path) -> Path:
    """Gemma: scaled embeddings, heads wider than the hidden size would make them."""
    return _write_gemma(folder, "Gemma", head_dim=2 * HEAD_DIM)


def write_gemma2(folder: Path) -> Path:
    """Gemma 2: every second layer in a sliding window, capped logits in attention and output."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _write_gemma(folder, "Gemma2", head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, sliding_window=16, **caps)


def write_gemma3(folder: Path) -> Path:
    """Gemma 3, text alone: a layer in a sliding window and a global one, of different rotary bases."""
    layers = ["sliding_attention", "full_attention"]
    heads = {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM}
    return _write_gemma(folder, "Gemma3", "Gemma3Text", **heads, sliding_window=16, layer_types=layers)


def _write_gemma(folder: Path, kind: str, config_kind: str | None = None, **options: Any) -> Path:
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = _byte_tokenizer(["<start_of_turn>", "<end_of_turn>"], **special)
    config = getattr(transformers, f"{config_kind or kind}Config")(**_llama_size(tokenizer) | options)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    sampling = {"do_sample": True, "top_k": 64, "top_p": 0.95} if kind == "Gemma3" else {}
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return _save(
        folder, model, tokenizer, GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, **sampling)
    )


def _llama_size(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return special | {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }


def _byte_tokenizer(markers: list[str], **special: str) -> PreTrainedTokenizerBase:
    return tiny_tokenizers.byte_level_tokenizer(markers, special, TEXTS, vocab_size=380)


def _piece_tokenizer(markers: list[str] | None = None, **special: str) -> transformers.LlamaTokenizer:
    """Llama's own: pieces that mark the beginning of a word, and bytes for other characters."""
    trained = tiny_tokenizers.nllb_tokenizer(Path(), TEXTS, vocab_size=110)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    pieces = [piece for piece in model["vocab"] if piece not in tiny_tokenizers.SPECIAL]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return transformers.LlamaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in model["merges"]],
        additional_special_tokens=markers,
        **special,
    )


# What families share.


def _untie(model: PreTrainedModel) -> None:
    """An output layer of its own, as transformers finds it in the published checkpoints."""
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.all_tied_weights_keys.pop("lm_head.weight", None)


def _save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig
) -> Path:
    model.save_pretrained(folder)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        _set_in_json(folder / "config.json", tie_word_embeddings=False)
    tokenizer.save_pretrained(folder)
    # Written last and as it is: the defaults of a published checkpoint are not checked against one another.
    (folder / "generation_config.json").write_text(json.dumps(generation.to_diff_dict()))
    return folder


def _set_in_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


ENCODER_DECODERS: dict[str, Callable[[Path], Path]] = {
    "t5": write_t5,
    "t5v1_1": write_t5v1_1,
    "mt5": write_mt5,
    "umt5": write_umt5,
    "ul2": write_ul2,
    "m2m100": write_m2m100,
    "nllb": write_nllb,
    "mbart": write_mbart,
    "mbart50": write_mbart50,
}
"""Name -> writes its folder."""

DECODER_ONLY: dict[str, Callable[[Path], Path]] = {
    "llama": write_llama,
    "llama3": write_llama3,
    "mistral": write_mistral,
    "qwen2": write_qwen2,
    "qwen3": write_qwen3,
    "gemma": write_gemma,
    "gemma2": write_gemma2,
    "gemma3": write_gemma3,
}
"""Name -> writes its folder."""

PROMPT_FORMAT: dict[str, str] = {
    **dict.fromkeys(("t5", "t5v1_1", "mt5", "umt5"), "emmett_t5"),
    "ul2": "emmett_ul2",
    **{name: f"emmett_{name}" for name in ("m2m100", "nllb", "mbart", "mbart50")},
    "llama": "emmett_llama2",
    "llama3": "emmett_llama3",
    "mistral": "emmett_mistral",
    "qwen2": "emmett_qwen",
    "qwen3": "emmett_qwen3",
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), "emmett_gemma"),
}
"""Name -> the prompt format that the family was made for."""


def seeded(kind, section: dict):
    """The model of a section in evaluation mode, with the same random weights each time; it logs nothing."""
    torch.manual_seed(0)
    model = kind(section).eval()
    model.log = lambda *_, **__: None
    return model
