"""Bins in tokens: the batch sizes are the largest of which no batch that the sampler can make exceeds the budget.

The reference is made of examples as the loader makes them, put into buckets by NeMo's own measure. It is independent of
the adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lhotse import MonoCut, SupervisionSegment
from lightning.pytorch import LightningModule, Trainer
from nemo.collections.common.data.lhotse.dataloader import tokenize_with_prompt
from nemo.collections.common.data.lhotse.sampling import MultimodalFixedBucketBatchSizeConstraint2D
from nemo.collections.common.data.lhotse.text_adapters import (
    AudioTurn,
    NeMoMultimodalConversation,
    SourceTargetTextExample,
    TextExample,
    TextTurn,
)

from nemo_emmett.models import SALMGPT, BestowGPT
from nemo_emmett.modules import linear_cross_entropy
from nemo_emmett.oomptimizer.meter import TensorMeter
from nemo_emmett.oomptimizer.steps import TrainingSteps
from nemo_emmett.prompts.families import prompt_formatter
from nemo_emmett.prompts.instruction import translation_instruction

from ..models.backbones import model_config
from .fits import AtFitStart, Data, trainer_with
from .models import encoder, preprocessor, tiny_salm
from .test_calibration import MIB, calibrated

FRAME, RATE = 0.08, 16000
SPEECH = {"type": "nemo", "source_lang": "en", "target_lang": "de"}
TEXT = {"type": "parallel_text", "source_lang": "en", "target_lang": "de"}
IN_TOKENS = {"use_multimodal_sampling": True, "token_equivalent_duration": FRAME}


def built(kind: str, folder: Path, **overrides: Any) -> LightningModule:
    """A model without dropout, dither and batch norm; always the same."""
    if kind == "SALM":
        return tiny_salm(folder)
    torch.manual_seed(0)
    perception = {
        "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
        "output_dim": 32,
        "preprocessor": preprocessor(),
        "encoder": encoder(16, 1),
        "modality_adapter": {
            "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
            "d_model": 16,
        },
    }
    options = {"perception": perception, "pretrained_weights": False, **overrides}
    return {"SALMGPT": SALMGPT, "BestowGPT": BestowGPT}[kind](model_config("llama", folder, **options))


@dataclass(frozen=True)
class Row:
    """An example: of so many frames of speech, none where it is text, and so many tokens of context and answer."""

    frames: int
    context: int
    answer: int


class Loader:
    """Examples of a model's training, and batches of them."""

    def __init__(self, model: LightningModule, train_ds: dict) -> None:
        self.model, self.is_salm = model, type(model).__name__ == "SALM"
        bins = train_ds["bucket_duration_bins"]
        self.constraint = MultimodalFixedBucketBatchSizeConstraint2D(
            bins, [1] * len(bins), token_equivalent_duration=FRAME, measure_total_length=True
        )
        self.has_text = TEXT in train_ds["input_cfg"]
        of_words = [self._example(0, word) for word in ("a", "ein", ".")]  # some tokenizers make two tokens of a letter
        spoken, written = min(of_words, key=lambda example: len(example.answer_ids)), self._example(None, "a")
        self.prompt = len(spoken.context_ids)
        self.least_answer = len(spoken.answer_ids)
        self.text_prompt = len(written.context_ids)

    def _example(self, frames: int | None, answer: str) -> Any:
        if frames is None:
            source, target = TextExample("one", "en"), TextExample(answer, "de")
            example = SourceTargetTextExample(source, target, custom={"source_lang": "en", "target_lang": "de"})
        elif self.is_salm:
            instruction = TextTurn(translation_instruction("de", "en"), "user")
            spoken = AudioTurn(MonoCut("0", 0.0, 1.0, 0), "user", self.model.audio_locator_tag)
            turns = [instruction, spoken, TextTurn(answer, "assistant")]
            example = NeMoMultimodalConversation("0", turns, token_equivalent_duration=FRAME)
        else:
            said = SupervisionSegment("0", "0", 0.0, 1.0, text=answer, language="de")
            custom = {"audio_locator_tag": self.model.audio_locator_tag, "source_lang": "en", "target_lang": "de"}
            example = MonoCut("0", 0.0, 1.0, 0, supervisions=[said], custom=custom)
        name = self.model.cfg.prompt_format
        if frames is not None and self.is_salm:
            return example.apply_prompt_format(prompt_formatter(name, self.model.tokenizer))
        if self.is_salm:
            example.context_ids = example.answer_ids = torch.ones(2)
            return example
        return tokenize_with_prompt(example, self.model.tokenizer, name)

    def bucket(self, row: Row) -> int | None:
        """Where the sampler puts an example."""
        total = torch.zeros(row.context + row.answer)
        if row.frames == 0:
            example = self._example(None, "a")
        elif self.is_salm:
            example = self._example(0, "a")
            example.list_cuts()[0].duration = samples_of(row.frames) / RATE
        else:
            example = MonoCut("0", 0.0, samples_of(row.frames) / RATE, 0)
        example.input_ids, example.context_ids, example.answer_ids = total, total[: row.context], total[row.context :]
        return self.constraint.select_bucket(self.constraint.max_seq_len_buckets, example=example)

    def batches(self, index: int) -> list[Callable[[int], list[Row]]]:
        """Makers of batches of the bucket.

        Of equal examples, from all speech to all answer; of one with the longest speech among others; and with padding.
        """
        cap = self.constraint.max_seq_len_buckets[index]
        if isinstance(self.constraint.max_seq_len_buckets[0], float | int):
            most = int(cap) - self.prompt - self.least_answer + self.is_salm
            frames = sorted({f for f in (1, most // 2, most) if f > 0})
            rows = [Row(f, self.prompt, self.least_answer + most - f) for f in frames]
            mixed = [Row(0, self.text_prompt, int(cap) - self.text_prompt)] if self.has_text else []
        elif self.is_salm:
            rows, mixed = [Row(int(cap[0]) - self.prompt + 1, self.prompt, int(cap[1]))], []
        else:
            rows, mixed = [Row(int(cap[0]), self.prompt, int(cap[1]) - self.prompt)], []
        assert [self.bucket(row) for row in [*rows, *mixed]] == [index] * len(rows + mixed)
        # None of these would be longer by a frame or a token.
        assert all(self.bucket(Row(r.frames + 1, r.context, r.answer)) != index for r in rows)
        assert all(self.bucket(Row(r.frames, r.context, r.answer + 1)) != index for r in rows + mixed)
        makers = [lambda n, row=row: [row] * n for row in rows + mixed]
        shorter = Row(rows[-1].frames - 1, rows[-1].context, rows[-1].answer)
        assert self.bucket(shorter) == index
        makers += [lambda n, other=other: [rows[-1], *[other] * (n - 1)] for other in {*mixed, rows[0]}]
        return [*makers, lambda n: [shorter, *[rows[-1]] * (n - 1)]]

    def collated(self, rows: Sequence[Row]) -> dict:
        """A batch as the dataset collates it; token ids and audio are random."""
        draws = torch.Generator().manual_seed(0)
        spoken = [row for row in rows if row.frames]
        lens = torch.tensor([samples_of(row.frames) for row in spoken], dtype=torch.long)
        widest = max(lens.tolist(), default=0)
        audios = {"audios": 0.1 * torch.randn(len(spoken), widest, generator=draws), "audio_lens": lens}

        def ids(lengths: list[int], left: bool = False) -> torch.Tensor:
            made = torch.full((len(lengths), max(lengths)), self.pad_id)
            for row, length in enumerate(lengths):
                drawn = torch.randint(4, 12, (length,), generator=draws)
                made[row, -length:] = drawn if left else made[row, -length:]
                if not left:
                    made[row, :length] = drawn
            return made

        if self.is_salm:
            input_ids = ids([row.context + row.answer for row in rows], left=True)
            mask = torch.zeros_like(input_ids, dtype=torch.bool)
            for number, row in enumerate(rows):
                mask[number, -row.answer :] = True
                input_ids[number, -row.answer - row.context // 2] = self.model.audio_locator_tag_id
            return {"input_ids": input_ids, "loss_mask": mask, **audios}

        def part(of: list[Row]) -> dict:
            contexts, answers = [row.context for row in of], [row.answer for row in of]
            return {
                "context_ids": ids(contexts),
                "context_lens": torch.tensor(contexts),
                "answer_ids": ids(answers),
                "answer_lens": torch.tensor(answers),
            }

        batch = {}
        if spoken:
            batch["audio"] = part(spoken) | audios
            batch["audio"]["context_ids"][:, 1] = self.model.audio_locator_id
        if written := [row for row in rows if not row.frames]:
            batch["text"] = part(written)
        return batch

    @property
    def pad_id(self) -> int:
        return self.model.text_pad_id if self.is_salm else self.model.pad_id


def samples_of(frames: int) -> int:
    """Of the longest recording that counts as so many tokens."""
    samples = frames * 1280
    constraint = MultimodalFixedBucketBatchSizeConstraint2D([[1, 1]], [1], token_equivalent_duration=FRAME)
    cut = MonoCut("0", 0.0, samples / RATE, 0)
    cut.input_ids = [0]
    return samples - (constraint.measure_length(cut)[0] > frames)


def check(folder: Path, model: LightningModule, train_ds: dict, budget: int, sizes: Sequence[int]) -> list[list[float]]:
    """Of each bucket the peaks of all batches of its size, and of the worst one where it is larger by 2 %."""
    found = []

    def at_start(trainer: Trainer, module: LightningModule) -> None:
        loader = Loader(module, train_ds)
        with TrainingSteps(trainer, module, TensorMeter(torch.device("cpu"))) as steps:
            steps.warm_up(loader.collated(loader.batches(0)[-1](1)))
            for index, size in enumerate(sizes):
                makers = loader.batches(index)
                peaks = [steps.run(loader.collated(make(size))).peak for make in makers]
                worst = makers[peaks.index(max(peaks))]
                larger = steps.run(loader.collated(worst(int(size / 0.98) + 1))).peak
                found.append([peak / budget for peak in (*peaks, larger)])

    trainer_with(folder, AtFitStart(at_start)).fit(model, datamodule=Data(train_ds))
    return found


@pytest.mark.parametrize(
    ("kind", "bins", "sources", "mib"),
    [
        pytest.param("SALM", [96], [SPEECH], 170, id="SALM, whole"),
        pytest.param("SALM", [[60, 40]], [SPEECH], 120, id="SALM, two dimensions"),
        pytest.param("SALMGPT", [48], [SPEECH, TEXT], 80, id="SALMGPT, whole, with text"),
        pytest.param("SALMGPT", [[20, 60]], [SPEECH], 60, id="SALMGPT, two dimensions"),
        pytest.param("BestowGPT", [48], [SPEECH], 80, id="BestowGPT, whole"),
    ],
)
def test_batch_sizes_are_the_largest_of_which_every_batch_fits(
    kind: str, bins: list, sources: list, mib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory rises with the examples: what fits of one size, and not of one that is larger by 2 %, is what a bisection
    would find."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(linear_cross_entropy, "MIN_CHUNK_ROWS", 256)
    train_ds = {**IN_TOKENS, "bucket_duration_bins": bins, "input_cfg": sources}
    budget = mib * MIB
    profile, _ = calibrated(tmp_path, built(kind, tmp_path), train_ds, memory_budget=budget)
    sizes = list(profile.groups[""].bucket_batch_size)
    found = check(tmp_path, built(kind, tmp_path), train_ds, budget, sizes)
    print(kind, bins, sizes, [[round(share, 3) for share in shares] for shares in found])
    for *fitting, larger in found:
        assert max(fitting) <= 1 < larger
    assert min(sizes) > 45
