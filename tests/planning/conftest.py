"""Recipes with bins, for tiny models and the tiny corpus."""

from __future__ import annotations

import pytest
from omegaconf import DictConfig, OmegaConf

from ..conftest import LANGUAGES


@pytest.fixture
def recipe(salm_t5_config, tiny_corpus) -> DictConfig:
    """Speech in buckets of one dimension, text in buckets of two; their batches take turns."""
    manifests = [str(tiny_corpus / "speech" / f"train.{language}.jsonl") for language in LANGUAGES]
    return OmegaConf.create(
        {
            "seed": 0,
            "model": {"_target_": "salm_t5", "audio_locator_tag": "<|audio|>", **salm_t5_config},
            "data": {
                "train_ds": {
                    "multi_config": True,
                    "sampler_fusion": "round_robin",
                    "seed": 0,
                    "shard_seed": 0,
                    "audio": {
                        "use_bucketing": True,
                        "bucket_duration_bins": [0.6, 1.0],
                        "input_cfg": [{"type": "nemo", "manifest_filepath": path} for path in manifests],
                    },
                    "text": {
                        "use_bucketing": True,
                        "use_multimodal_sampling": True,
                        "bucket_duration_bins": [[8, 6], [8, 9], [12, 9]],
                        "input_cfg": [
                            {
                                "type": "parallel_text",
                                "paths": {c: str(tiny_corpus / "text" / f"train.{c}") for c in LANGUAGES},
                            }
                        ],
                    },
                },
            },
            "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 4},
        }
    )


@pytest.fixture
def text_recipe(recipe) -> DictConfig:
    """The same with text alone, in a dataset without groups."""
    recipe = recipe.copy()
    recipe.data.train_ds = {"seed": 0, "shard_seed": 0, **recipe.data.train_ds.text}
    return recipe
