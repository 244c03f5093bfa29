"""Exported models to serve, what they are asked, and engines of vLLM.

The models are tiny and trained until they answer, in a folder that has been moved from where it was written.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_emmett.models import SALMGPT
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.prompts.families import stop_ids
from nemo_emmett.prompts.instruction import translation_turns
from nemo_emmett.prompts.markup import Markup, Prompt, joined

from ..conftest import ENCODER_DIM, SAMPLING_RATE, SENTENCES
from ..models import backbones
from ..models.batches import prompted_batch, with_recordings
from ..models.memorising import built, memorise

SECONDS = [0.4, 0.6, 0.8, 1.0, 1.2, 1.4]
"""Of the recordings of the training."""

_MLP = {"_target_": "nemo_emmett.modules.modality_adapters.MLPConnector", "input_dim": ENCODER_DIM, "output_dim": None}
ADAPTERS = {
    "identity": {
        "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
        "d_model": ENCODER_DIM,
    },
    "mlp": _MLP,
    "mlp2": _MLP | {"subsampling_factor": 2},
    "qformer": {
        "_target_": "nemo_emmett.modules.modality_adapters.QFormer",
        "prompt_size": 4,
        "target_layer_ids": [0],
        "qformer_num_hidden_layers": 1,
        "encoder_config": {"d_model": ENCODER_DIM, "encoder_attention_heads": 4},
        "output_dim": None,
    },
}
FAMILIES = tuple(backbones.DECODER_ONLY)


def exported(family: str, adapter: str, folder: Path, asr: Path, **overrides: Any) -> Path:
    """The folder of a model that answers."""
    made = backbone(family, folder)
    own_asr = shutil.copy(asr, made / "encoder.nemo")
    section = {"perception": {"modality_adapter": ADAPTERS[adapter]}} | overrides
    model = built(SALMGPT, family, made, own_asr, **section)
    memorise(model, training_batch(model), steps=600, lr=3e-3)
    return moved(model, folder)


def backbone(family: str, folder: Path) -> Path:
    """The folder ``made`` with a language model that vLLM takes on a CPU, where heads are 32 wide at least."""
    made = folder / "made"
    made.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HIDDEN": 64, "HEADS": 2, "HEAD_DIM": 32}.items():
            patch.setattr(backbones, name, value)
        backbones.backbone(family, made)
    return made


def moved(model: SpeechTextModel, folder: Path) -> Path:
    """An export that has been moved; nothing that the model was made of is left in ``made``."""
    model.save_pretrained(folder / "made" / "export")
    shutil.move(folder / "made" / "export", folder / "moved")
    shutil.rmtree(folder / "made")
    return folder / "moved"


def training_batch(model: SpeechTextModel) -> dict[str, dict]:
    """Six texts and six recordings, with another order of answers."""
    answers = SENTENCES["de"]
    speech = prompted_batch(model, [model.options.audio_locator_tag] * len(SECONDS), answers[::-1])
    return {
        "text": prompted_batch(model, SENTENCES["en"], answers),
        "audio": with_recordings(model, speech, SECONDS),
    }


Request = tuple[str | None, Sequence[np.ndarray]]
"""A text, or None for recordings alone; and recordings, in front of the text."""


def requests(count: int) -> list[Request]:
    """Half of them texts, half recordings: first those of the training, then others."""
    words = sorted({word for text in SENTENCES["en"] for word in text.split()})
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(words, size=random.integers(1, 6))) for _ in range(count)]
    batch = torch.randn(6, round(1.4 * SAMPLING_RATE), generator=torch.Generator().manual_seed(0)) * 0.1
    known = [row[: round(s * SAMPLING_RATE)].numpy() for row, s in zip(batch, SECONDS, strict=True)]
    others = [(0.1 * random.standard_normal(random.integers(1600, 48000))).astype(np.float32) for _ in range(count)]
    half = count // 2
    return [(text, ()) for text in (SENTENCES["en"] + texts)[:half]] + [
        (None, (signal,)) for signal in (known + others)[: count - half]
    ]


def context(model: SpeechTextModel, request: Request) -> list[int]:
    """Ids of a request's prompt, from English to German."""
    text, signals = request
    parts = [Markup(model.options.audio_locator_tag)] * len(signals) + ([] if text is None else [Prompt([text])])
    turns = translation_turns(model._prompt_formatter(), joined(parts) if len(parts) > 1 else parts[0], "de", "en")
    return model._prompt_formatter().encode_dialog(turns=turns)["context_ids"].tolist()


@torch.no_grad()
def own_answers(model: SpeechTextModel, chosen: Sequence[Request], new: int = 24) -> list[list[int]]:
    """Greedy ids of our own generation, one request at a time."""
    answers = []
    for request in chosen:
        _, signals = request
        speech = {}
        if signals:
            lens = torch.tensor([len(signal) for signal in signals])
            padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(signal) for signal in signals], batch_first=True)
            speech = {"audios": padded, "audio_lens": lens}
        answers.append(
            model.generate(torch.tensor([context(model, request)]), **speech, max_new_tokens=new)[0].tolist()
        )
    return answers


@contextmanager
def engine(folder: Path, dtype: str = "float32", **options: Any) -> Iterator[Any]:
    """vLLM in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model=str(folder), dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=16, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers_of(llm: Any, model: SpeechTextModel, chosen: Sequence[Request], new: int = 24) -> list[list[int]]:
    """vLLM's greedy ids, all requests at once."""
    from vllm import SamplingParams

    prompts = []
    for request in chosen:
        prompt: dict[str, Any] = {"prompt_token_ids": context(model, request)}
        if request[1]:
            prompt["multi_modal_data"] = {"audio": [(signal, SAMPLING_RATE) for signal in request[1]]}
        prompts.append(prompt)
    stops = stop_ids(model._prompt_formatter(), model.tokenizer)
    params = SamplingParams(temperature=0, max_tokens=new, stop_token_ids=stops)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
