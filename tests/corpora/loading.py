"""Prepared corpora through the dataloader.

NeMo is imported where it is needed: that takes longer than all tests of a file that load nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers import AutoTokenizer

LOCATOR = "<|audio|>"


def make_tokenizer(folder: Path, languages: tuple[str, ...]) -> AutoTokenizer:
    """Words are unknown to it, which is all the same to those who count examples."""
    from nemo.collections.common.tokenizers import AutoTokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tags = [f"<{language}>" for language in languages]
    words = ["<pad>", "</s>", "<unk>", LOCATOR, *tags]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[LOCATOR, *tags],
    )
    fast.save_pretrained(folder)
    return AutoTokenizer(str(folder))


def load_part(out: Path, part: str, tokenizer: AutoTokenizer) -> Iterator[tuple[dict, np.ndarray | None]]:
    """The examples of a part, and of speech its samples."""
    from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader

    config = {
        "input_cfg": yaml.safe_load((out / "input_cfg" / f"{part}.yaml").read_text()),
        "prompt_format": "emmett_t5",
        "audio_locator_tag": LOCATOR,
        "sample_rate": 16000,
        "batch_size": 1,
        "shuffle": False,
        "seed": 0,
        "shard_seed": 0,
        "force_finite": True,
        "max_bad_records": 0,
    }
    for batch in get_multimodal_dataloader(config, 0, 1, SpeechTextDataset(tokenizer), tokenizer):
        for of_modality in batch.values():
            (example,) = of_modality["examples"]
            yield example, of_modality["audios"][0].numpy() if "audios" in of_modality else None
