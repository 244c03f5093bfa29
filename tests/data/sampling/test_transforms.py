"""The pipeline gives the examples of NeMo's own lazy chain, and the same ones in each run."""

from __future__ import annotations

import pytest
from lhotse import CutSet
from nemo.collections.common.data.lhotse.dataloader import (
    get_lhotse_sampler_from_config,
    make_structured_with_schema_warnings,
)
from omegaconf import OmegaConf

from nemo_emmett.data.readers.registry import register_data_types
from nemo_emmett.data.sampling.transforms import TransformPipeline
from nemo_emmett.prompts.translation import register_prompt_formats

from ..conftest import LOCATOR


@pytest.fixture
def config(speech):
    """NeMo's config of eight recordings of 0.5 s to 4 s."""

    def make(**keys):
        manifest = speech(8, target_lang="de", audio_locator_tag=LOCATOR)
        settings = {
            "input_cfg": [{"type": "nemo", "manifest_filepath": str(manifest)}],
            "batch_size": 4,
            "shard_seed": 0,
            "prompt_format": "emmett_t5",
            **keys,
        }
        return make_structured_with_schema_warnings(OmegaConf.create(settings))

    register_data_types()
    register_prompt_formats()
    return make


def examples_of(config, tokenizer) -> tuple[list, list]:
    """The recordings as they are read, and as they leave NeMo's own chain."""
    from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config

    read, _ = read_cutset_from_config(config)
    sampler, _ = get_lhotse_sampler_from_config(config, 0, 1, tokenizer)
    return list(read), list(sampler.cuts[0])


def facts(cuts) -> list:
    return [(cut.id, cut.duration, cut.context_ids.tolist(), cut.answer_ids.tolist()) for cut in cuts]


@pytest.mark.parametrize(
    "keys",
    [{}, {"max_duration": 1.2}, {"max_tps": 2.0}, {"bucket_duration_bins": [0.9, 2.0], "bucket_batch_size": [2, 1]}],
    ids=["plain", "max_duration", "max_tps", "buckets"],
)
def test_it_gives_what_nemos_chain_gives(config, tokenizer, keys):
    read, expected = examples_of(config(**keys), tokenizer)
    pipeline = TransformPipeline(config(**keys), tokenizer)
    assert facts(pipeline.run(read, [0])) == facts(expected)
    assert pipeline.filtered[""] == len(expected)
    assert pipeline.filtered.total() == len(read)
    assert set(pipeline.filtered) <= {"", "min_duration, max_duration", "min_tps, max_tps", "bucket_duration_bins"}


def test_speed_perturbation_gives_each_recording_at_three_speeds(config, tokenizer):
    read, _ = examples_of(config(), tokenizer)
    ran = TransformPipeline(config(perturb_speed=True), tokenizer).run(read, [0])
    expected = {f"{cut.id}{suffix}" for cut in read for suffix in ("", "_sp0.9", "_sp1.1")}
    assert {cut.id for cut in ran} == expected
    assert len(ran) == 24


def test_random_stages_draw_by_the_seed_of_the_call(config, tokenizer, speech):
    noise = str(speech(3, name="noise.json"))
    read, _ = examples_of(config(), tokenizer)
    pipeline = TransformPipeline(config(noise_path=noise, noise_mix_prob=0.5), tokenizer)

    def mixed(seed):
        return [
            [(track.cut.recording_id, track.snr) for track in cut.tracks[1:]] if hasattr(cut, "tracks") else None
            for cut in pipeline.run(read, [seed])
        ]

    assert mixed(1) == mixed(1)
    drawn = [mixed(seed) for seed in range(20)]
    assert any(cut != drawn[0] for cut in drawn)
    share = sum(cut is not None for run in drawn for cut in run) / 160
    assert 0.35 < share < 0.65


def test_transforms_of_whole_batches_draw_by_the_seed_of_the_call(config, tokenizer):
    read, _ = examples_of(config(), tokenizer)
    pipeline = TransformPipeline(config(clipping_enabled=True, clipping_prob=0.5), tokenizer)
    cuts = pipeline.run(read, [0])

    def clipped(seed):
        return [bool(cut.recording.transforms) for cut in pipeline.transform_batch(CutSet(cuts), [seed])]

    assert clipped(3) == clipped(3)
    assert len({tuple(clipped(seed)) for seed in range(10)}) > 1
