"""vLLM gives the ids that our own generation gives, on every family of language models and every adapter."""

from __future__ import annotations

import os

import pytest

from nemo_emmett.models import load

from .serving import ADAPTERS, FAMILIES, answers_of, engine, exported, own_answers, requests

ALL = [(family, adapter) for family in FAMILIES for adapter in ADAPTERS]
EACH = [(family, list(ADAPTERS)[number % len(ADAPTERS)]) for number, family in enumerate(FAMILIES)]
COMBINATIONS = ALL if os.environ.get("NEMO_EMMETT_VLLM_COMBINATIONS") == "all" else EACH


@pytest.mark.parametrize(("family", "adapter"), COMBINATIONS)
def test_greedy_ids_are_ours(family, adapter, tmp_path, tiny_asr):
    folder = exported(family, adapter, tmp_path, tiny_asr)
    model, chosen = load(folder), requests(100)
    expected = own_answers(model, chosen)
    assert len({tuple(ids) for ids in expected}) >= 6  # what was memorised, at least
    with engine(folder) as llm:
        assert answers_of(llm, model, chosen) == expected
