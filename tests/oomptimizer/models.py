"""Tiny models of each family with an adapter; random weights, no dropout, no dither, nothing downloaded.

Every normalisation is a layer norm, so that an example's loss does not depend on what it is batched with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf

SAMPLING_RATE = 16000
LOCATOR = "<|audio|>"
WORDS = [
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eins", "zwei", "drei", "vier", "red", "blue", "house", "tree", "door"),
]
ASR = "nemo.collections.asr"


def tiny_salm(folder: Path, width: int = 16, layers: int = 1, encoder_layers: int = 1, **overrides: Any):
    """NeMo's SALM: FastConformer in front of a Llama, both of one width.

    Args:
        folder: receives the language model.
        width: of the encoder and of the language model, a multiple of 4.
        layers: of the language model.
        encoder_layers: of the speech encoder.
        overrides: keys of the model's config, such as ``lora`` or ``freeze_params``.
    """
    from nemo.collections.speechlm2 import SALM

    torch.manual_seed(0)
    config = {
        "pretrained_llm": str(write_llama(Path(folder) / "llm", width, layers)),
        "pretrained_weights": False,
        "audio_locator_tag": LOCATOR,
        "prompt_format": "llama3",
        "perception": {
            "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
            "output_dim": width,
            "preprocessor": preprocessor(),
            "encoder": encoder(width, encoder_layers),
            "modality_adapter": {
                "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
                "d_model": width,
            },
        },
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
        "lr_scheduler": {
            "_target_": "nemo.core.optim.lr_scheduler.CosineAnnealing",
            "warmup_steps": 0,
            "min_lr": 1e-4,
            "max_steps": 100,
        },
    }
    return SALM(config | overrides).train()


def tiny_ctc(folder: Path, width: int = 16, layers: int = 1, **overrides: Any):
    """NeMo's EncDecCTCModelBPE on a FastConformer; ``overrides`` are keys of the model's config."""
    from nemo.collections.asr.models import EncDecCTCModelBPE

    torch.manual_seed(0)
    config = {
        "sample_rate": SAMPLING_RATE,
        "tokenizer": {"dir": str(write_sentencepiece(Path(folder) / "pieces")), "type": "bpe"},
        "preprocessor": preprocessor(),
        "encoder": encoder(width, layers),
        "decoder": {
            "_target_": f"{ASR}.modules.ConvASRDecoder",
            "feat_in": None,
            "num_classes": -1,
            "vocabulary": [],
        },
        "optim": {"name": "adamw", "lr": 1e-3},
    }
    return EncDecCTCModelBPE(OmegaConf.create(config | overrides)).train()


def tiny_rnnt(folder: Path, width: int = 16, layers: int = 1, **overrides: Any):
    """NeMo's EncDecRNNTBPEModel with the loss in PyTorch; ``overrides`` are keys of the model's config."""
    from nemo.collections.asr.models.rnnt_bpe_models import EncDecRNNTBPEModel

    torch.manual_seed(0)
    config = {
        "sample_rate": SAMPLING_RATE,
        "tokenizer": {"dir": str(write_sentencepiece(Path(folder) / "pieces")), "type": "bpe"},
        "model_defaults": {"enc_hidden": width, "pred_hidden": width, "joint_hidden": width},
        "preprocessor": preprocessor(),
        "encoder": encoder(width, layers),
        "decoder": {
            "_target_": f"{ASR}.modules.RNNTDecoder",
            "normalization_mode": None,
            "prednet": {"pred_hidden": width, "pred_rnn_layers": 1, "dropout": 0.0},
        },
        "joint": {
            "_target_": f"{ASR}.modules.RNNTJoint",
            "fuse_loss_wer": False,
            "jointnet": {"joint_hidden": width, "activation": "relu", "dropout": 0.0},
        },
        "decoding": {"strategy": "greedy", "greedy": {"max_symbols": 5}},
        "loss": {"loss_name": "pytorch"},
        "optim": {"name": "adamw", "lr": 1e-3},
    }
    return EncDecRNNTBPEModel(OmegaConf.create(config | overrides)).train()


def tiny_hybrid(folder: Path, width: int = 16, layers: int = 1, **overrides: Any):
    """NeMo's EncDecHybridRNNTCTCBPEModel: :func:`tiny_rnnt` with an additional CTC decoder."""
    from nemo.collections.asr.models import EncDecHybridRNNTCTCBPEModel

    config = OmegaConf.to_container(tiny_rnnt(folder, width, layers).cfg)
    del config["target"]
    decoder = {"_target_": f"{ASR}.modules.ConvASRDecoder", "feat_in": None, "num_classes": -1, "vocabulary": []}
    config["aux_ctc"] = {"ctc_loss_weight": 0.3, "decoder": decoder, "decoding": {"strategy": "greedy"}}
    torch.manual_seed(0)
    return EncDecHybridRNNTCTCBPEModel(OmegaConf.create(config | overrides)).train()


def tiny_multitask(folder: Path, width: int = 16, layers: int = 1, **overrides: Any):
    """NeMo's EncDecMultiTaskModel (Canary); ``overrides`` are keys of the model's config."""
    from nemo.collections.asr.models import EncDecMultiTaskModel
    from nemo.collections.common.tokenizers import CanaryTokenizer

    torch.manual_seed(0)
    folder = Path(folder)
    CanaryTokenizer.build_special_tokenizer(["en", "de", "transcribe", "translate"], folder / "special")
    pieces = {"dir": str(write_sentencepiece(folder / "pieces")), "type": "bpe"}
    transformer = {"hidden_size": width, "inner_size": 2 * width, "num_layers": layers, "num_attention_heads": 2}
    no_dropout = dict.fromkeys(("embedding_dropout", "ffn_dropout", "attn_score_dropout", "attn_layer_dropout"), 0.0)
    config = {
        "sample_rate": SAMPLING_RATE,
        "prompt_format": "canary",
        "restore_timestamps_model": False,  # which NeMo looks for once any .nemo file was restored in the process
        "model_defaults": {"asr_enc_hidden": width, "lm_enc_hidden": width, "lm_dec_hidden": width},
        "tokenizer": {
            "dir": None,
            "type": "agg",
            "langs": {
                "spl_tokens": {"dir": str(folder / "special"), "type": "bpe"},
                "en": dict(pieces),
                "de": dict(pieces),
            },
            "custom_tokenizer": {
                "_target_": "nemo.collections.common.tokenizers.canary_tokenizer.CanaryTokenizer",
                "tokenizers": None,
            },
        },
        "preprocessor": preprocessor(),
        "encoder": encoder(width, layers),
        "transf_decoder": {
            "_target_": f"{ASR}.modules.transformer.get_nemo_transformer",
            "model_name": None,
            "pretrained": False,
            "encoder": None,
            "pre_ln_final_layer_norm": True,
            "config_dict": {
                "max_sequence_length": 512,
                "num_token_types": 0,
                "pre_ln": True,
                "vocab_size": None,
                **transformer,
                **no_dropout,
            },
        },
        "head": {
            "_target_": f"{ASR}.parts.submodules.token_classifier.TokenClassifier",
            "num_layers": 1,
            "activation": "relu",
            "log_softmax": True,
            "hidden_size": width,
            "num_classes": None,
            "dropout": 0.0,
        },
        "decoding": {"strategy": "beam", "beam": {"beam_size": 1}},
        "loss": {
            "_target_": "nemo.collections.common.losses.smoothed_cross_entropy.SmoothedCrossEntropyLoss",
            "label_smoothing": 0.0,
        },
        "optim": {"name": "adamw", "lr": 1e-3},
    }
    return EncDecMultiTaskModel(OmegaConf.create(config | overrides)).train()


def with_trainer(model: LightningModule) -> LightningModule:
    """The model as its ``training_step`` wants it: with a trainer, an optimizer, and nothing logged."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=100, log_every_n_steps=1000, **quiet)
    trainer.strategy.connect(model)
    model.trainer = trainer
    # Logging asks in which hook it is called; outside of `fit` there is none.
    model.log = model.log_dict = lambda *_, **__: None
    if hasattr(model, "setup_optimization"):
        model.setup_optimization()
    else:
        trainer.strategy.optimizers = [torch.optim.AdamW(model.parameters())]
    return model


def encoder(width: int, layers: int) -> dict:
    """A FastConformer without anything random in it."""
    off = dict.fromkeys(("dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att"), 0.0)
    return {
        "_target_": f"{ASR}.modules.ConformerEncoder",
        "feat_in": 16,
        "feat_out": -1,
        "n_layers": layers,
        "d_model": width,
        "n_heads": 2,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "subsampling_conv_channels": 8,
        "conv_kernel_size": 5,
        "conv_norm_type": "layer_norm",
        "sync_max_audio_length": False,
        **off,
    }


def preprocessor() -> dict:
    """Mel features without dither and padding."""
    return {
        "_target_": f"{ASR}.modules.AudioToMelSpectrogramPreprocessor",
        "sample_rate": SAMPLING_RATE,
        "features": 16,
        "dither": 0.0,
        "pad_to": 0,
    }


def write_llama(folder: Path, width: int, layers: int) -> Path:
    """A Llama's config and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<|eot_id|>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    LlamaConfig(vocab_size=32, num_attention_heads=2, **size).save_pretrained(folder)
    return folder


def write_sentencepiece(folder: Path) -> Path:
    """A SentencePiece model in NeMo's layout."""
    from nemo_emmett.corpora.tokenizers import train_sentencepiece

    return train_sentencepiece([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], folder, vocab_size=40)
