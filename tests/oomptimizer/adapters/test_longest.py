"""A bucket's synthetic batch is the longest that the loader's own measure lets into the bucket, and no longer."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lhotse import MonoCut, SupervisionSegment
from nemo.collections.common.data.lhotse.dataloader import tokenize_with_prompt
from nemo.collections.common.data.lhotse.sampling import (
    FixedBucketBatchSizeConstraint2D,
    MultimodalFixedBucketBatchSizeConstraint2D,
)
from nemo.collections.common.data.lhotse.text_adapters import AudioTurn, NeMoMultimodalConversation, TextTurn
from omegaconf import OmegaConf

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.oomptimizer import guard
from nemo_emmett.oomptimizer.adapters import Adapter, SpeechTextAdapter, adapter_for
from nemo_emmett.oomptimizer.adapters.draws import samples_of
from nemo_emmett.oomptimizer.buckets import Group, Task, read_groups
from nemo_emmett.prompts.families import prompt_formatter
from nemo_emmett.prompts.instruction import translation_instruction
from nemo_emmett.prompts.languages import known_languages

from ...models.backbones import model_config
from ..models import tiny_salm, with_trainer
from .steps import CPU

FRAME = 0.08
RATE = 16000
KNOWN = {"type": "nemo", "source_lang": "en", "target_lang": "de"}
IN_TOKENS = {"use_multimodal_sampling": True, "token_equivalent_duration": FRAME}
BINS_1D = [70, 83.5, 100, 151]
BINS_2D = [[20, 60], [20, 90], [57, 70], [57, 110]]
KINDS = ["SALMGPT", "BestowGPT", "SALMT5", "SALM"]


@pytest.fixture(scope="module")
def adapters(tiny_asr, tmp_path_factory) -> dict[str, Adapter]:
    folder = tmp_path_factory.getbasetemp() / "backbones"
    ours = {kind: ("t5" if kind is SALMT5 else "qwen3") for kind in (SALMGPT, BestowGPT, SALMT5)}
    made = {
        kind.__name__: adapter_for(with_trainer(kind(model_config(name, folder, tiny_asr))))
        for kind, name in ours.items()
    }
    return made | {"SALM": adapter_for(with_trainer(tiny_salm(tmp_path_factory.mktemp("salm"))))}


def group_of(bins: list, sources: Any = (KNOWN,), **options: Any) -> Group:
    config = {**IN_TOKENS, "input_cfg": list(sources), "bucket_duration_bins": bins, **options}
    (group,) = read_groups(OmegaConf.create(config)).values()
    return group


def constraint_of(group: Group) -> FixedBucketBatchSizeConstraint2D:
    """As NeMo's ``determine_sampling_constraint`` makes it."""
    bins, sizes = [list(b) if isinstance(b, tuple) else b for b in group.bins], [1] * len(group.bins)
    if not group.config.use_multimodal_sampling:
        return FixedBucketBatchSizeConstraint2D(bins, sizes)
    return MultimodalFixedBucketBatchSizeConstraint2D(
        bins,
        sizes,
        token_equivalent_duration=FRAME,
        measure_total_length=group.config.get("measure_total_length", True),
    )


def recording(samples: int) -> MonoCut:
    return MonoCut("0", 0.0, samples / RATE, 0)


def examples_in(adapter: Adapter, batch: dict) -> Iterator[MonoCut | NeMoMultimodalConversation]:
    """What the sampler would have seen of a batch's examples."""
    if isinstance(adapter, SpeechTextAdapter):
        part = batch["audio"]
        for row, samples in enumerate(part["audio_lens"].tolist()):
            context = part["context_ids"][row, : part["context_lens"][row]]
            cut = recording(samples)
            cut.input_ids = torch.cat([context, part["answer_ids"][row, : part["answer_lens"][row]]])
            yield cut
        return
    pad, locator = adapter.model.text_pad_id, adapter.model.audio_locator_tag_id
    for ids, mask, samples in zip(batch["input_ids"], batch["loss_mask"], batch["audio_lens"].tolist(), strict=True):
        assert (ids == locator).sum() == 1
        conversation = conversation_of([AudioTurn(recording(samples), "user", "<|audio|>")], "")
        conversation.input_ids = ids[ids != pad]
        conversation.context_ids, conversation.answer_ids = ids[(ids != pad) & ~mask], ids[mask]
        yield conversation


def conversation_of(turns: list, answer: str) -> NeMoMultimodalConversation:
    return NeMoMultimodalConversation("0", [*turns, TextTurn(answer, "assistant")], token_equivalent_duration=FRAME)


@pytest.mark.parametrize(
    ("bins", "options"),
    [
        pytest.param(BINS_1D, {}, id="whole examples"),
        pytest.param(BINS_2D, {}, id="two dimensions"),
        pytest.param(BINS_1D, {"measure_total_length": False}, id="inputs"),
        pytest.param([[1.23, 60], [2.0, 50], [2.0, 81]], {"use_multimodal_sampling": False}, id="seconds and tokens"),
        pytest.param([1.0, 2.345, 4.0], {"use_multimodal_sampling": False}, id="seconds"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_example_is_at_the_upper_edge_of_its_bucket(adapters: dict, kind: str, bins: list, options: dict) -> None:
    if kind == "SALM" and options.get("use_multimodal_sampling") is False:
        pytest.skip("conversations have no duration: NeMo cannot put them into such bins")
    adapter, group = adapters[kind], group_of(bins, **options)
    constraint = constraint_of(group)
    for bucket in group.buckets:
        batch = adapter.synthetic_batch(bucket.shape, 3, CPU)
        for row, example in enumerate(examples_in(adapter, batch)):
            measured = constraint.measure_length(example)
            assert constraint.select_bucket(constraint.max_seq_len_buckets, example=example) == bucket.index, measured
            if isinstance(bucket.bin, tuple):
                input_length, output_length = measured
                # Padding: one row is a token shorter, on the side that holds the prompt.
                shorter = row == 0
                in_context = kind == "SALM"
                assert input_length == pytest.approx(bucket.bin[0] - (shorter and in_context), abs=1.01 / RATE)
                assert output_length == bucket.bin[1] - (shorter and not in_context)
            elif not group.config.use_multimodal_sampling:
                assert measured == pytest.approx(bucket.bin, abs=1 / RATE)
            else:
                assert int(bucket.bin) - (row == 0) <= measured <= int(bucket.bin)
        # Guard, which sees no more than a batch's longest parts, finds the bucket again.
        (extent,) = adapter.extents(adapter.synthetic_batch(bucket.shape, 1, CPU))
        if not bucket.shape.total or kind in ("SALM", "SALMGPT"):
            measured_by_guard = (guard.bucket_fit(b, extent, adapter.measures_conversations) for b in group.buckets)
            assert [found.surely_fits for found in measured_by_guard].index(True) == bucket.index


WORDS = ("a", "I", "1", ".", "ein", "one red house")


def real_cuts(adapter: SpeechTextAdapter, languages: list[tuple], context: str | None = None) -> list[MonoCut]:
    """Cuts as the loader prompts them, with recordings that are still to be chosen."""
    model, cuts = adapter.model, []
    words = WORDS if len(languages) < 10 else WORDS[:1]
    for (source, target), word in ((pair, word) for pair in languages for word in words):
        said = SupervisionSegment("0", "0", 0.0, 1.0, text=word, language=target)
        custom = {"audio_locator_tag": model.audio_locator_tag, "source_lang": source, "target_lang": target}
        custom |= {"context": context} if context else {}
        cut = MonoCut("0", 0.0, 1.0, 0, supervisions=[said], custom=custom)
        cuts.append(tokenize_with_prompt(cut, model.tokenizer, model.options.prompt_format))
    return cuts


def most_speech(examples: list, constraint: Any, index: int) -> int:
    """Samples of the longest recording that is put into a bucket, of those of whole frames or a sample less."""
    longest = 0
    for example in examples:
        cut = example if isinstance(example, MonoCut) else example.list_cuts()[0]
        for samples in (frames * 1280 - less for frames in range(1, 151) for less in (0, 1)):
            cut.duration = samples / RATE
            if constraint.select_bucket(constraint.max_seq_len_buckets, example=example) == index:
                longest = max(longest, samples)
    return longest


ANY_LANGUAGES = [(source, target) for target in sorted(known_languages()) for source in (None, target)]


@pytest.mark.parametrize(
    ("source", "languages"),
    [
        pytest.param(KNOWN, [("en", "de")], id="said by the source"),
        pytest.param({**KNOWN, "source_lang": "fr", "tags": {"source_lang": "en"}}, [("en", "de")], id="by tags"),
        pytest.param(
            {"type": "nemo", "target_lang": ["de", "fr"]},
            [(source, target) for target in ("de", "fr") for source in (None, target)],
            id="the target alone",
        ),
        pytest.param({"type": "nemo"}, ANY_LANGUAGES, id="said by the records"),
    ],
)
@pytest.mark.parametrize("kind", ["SALMGPT", "BestowGPT", "SALMT5"])
def test_no_cut_in_a_bucket_has_more_speech(adapters: dict, kind: str, source: dict, languages: list) -> None:
    adapter, group = adapters[kind], group_of([110], [source])
    constraint = constraint_of(group)
    cuts = real_cuts(adapter, languages)
    shortest = min(cuts, key=lambda cut: len(cut.input_ids))
    made = adapter.synthetic_batch(group.buckets[0].shape, 2, CPU)["audio"]["audio_lens"].max().item()
    assert made == most_speech([shortest], constraint, 0)
    assert made == most_speech([shortest, *cuts[:: max(1, len(cuts) // 12)]], constraint, 0)


def test_no_cut_with_the_source_s_own_instruction_has_more_speech(adapters: dict) -> None:
    adapter = adapters["SALMGPT"]
    source = {"type": "group", "tags": {"context": "one"}, "input_cfg": [{"type": "nemo", "target_lang": "de"}]}
    group = group_of([110], [source])
    assert group.buckets[0].shape.contents.tasks == (Task(None, "de", "one"),)
    cuts = real_cuts(adapter, [(None, "de")], context="one")
    made = adapter.synthetic_batch(group.buckets[0].shape, 2, CPU)["audio"]["audio_lens"].max().item()
    assert made == most_speech(cuts, constraint_of(group), 0)


@pytest.mark.parametrize(
    ("source", "turns_before"),
    [
        pytest.param({"type": "multimodal_conversation"}, [], id="conversations"),
        pytest.param(KNOWN, [TextTurn(translation_instruction("de", "en"), "user")], id="records"),
    ],
)
def test_no_conversation_in_a_bucket_has_more_speech(adapters: dict, source: dict, turns_before: list) -> None:
    adapter, bins = adapters["SALM"], [140, [120, 60]]
    for bin_ in bins:
        group = group_of([bin_], [source])
        conversations = []
        for word in WORDS:
            spoken = AudioTurn(recording(RATE), "user", adapter.model.audio_locator_tag)
            conversation = conversation_of([*turns_before, spoken], word)
            conversations.append(conversation.apply_prompt_format(prompt_formatter("llama3", adapter.model.tokenizer)))
        made = adapter.synthetic_batch(group.buckets[0].shape, 2, CPU)["audio_lens"].max().item()
        assert made == most_speech(conversations, constraint_of(group), 0)


def test_a_bin_too_small_for_speech_holds_text_where_there_is_any(adapters: dict) -> None:
    adapter, text = adapters["SALMGPT"], {"type": "txt_pair"}
    (mixed,) = group_of([12], [KNOWN, text]).buckets
    batch = adapter.synthetic_batch(mixed.shape, 3, CPU)
    assert list(batch) == ["text"]
    assert (batch["text"]["context_lens"] + batch["text"]["answer_lens"]).tolist() == [11, 12, 12]
    (spoken,) = group_of([12]).buckets
    (part,) = (adapter.synthetic_batch(spoken.shape, 2, CPU)["audio"],)
    assert part["audio_lens"].tolist() == [1280, 1280]
    joined = adapter.join([batch, adapter.synthetic_batch(group_of([20], [text]).buckets[0].shape, 2, CPU)])
    assert joined["text"]["context_lens"].shape == (5,)


def test_frames_whose_length_is_counted_as_one_more_are_a_sample_shorter() -> None:
    model = SimpleNamespace(sampling_rate=RATE)
    # 0.56 / 0.08 is 7.000000000000001 in floating point.
    assert samples_of(model, 7 * FRAME, FRAME) == 7 * 1280 - 1
    assert samples_of(model, 25 * FRAME, FRAME) == 25 * 1280
    assert samples_of(model, 1.00003) == 16000
