"""A tokenizer with more tokens than the embedding table has rows: refused when the model is built, or resized."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AddedToken, AutoConfig, AutoTokenizer

from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT, load

from .backbones import ENCODER_DECODERS, backbone, model_config

LAST = "neuwort"


@pytest.fixture(scope="module")
def larger(folder, tmp_path_factory):
    """``larger(family, *tokens)``: a folder with the family's tokenizer, with words up to beyond the table, then these;
    and the rows of the table."""

    def make(family: str, *tokens: str | AddedToken):
        tokenizer = AutoTokenizer.from_pretrained(backbone(family, folder))
        rows = AutoConfig.from_pretrained(backbone(family, folder)).vocab_size
        highest = max(tokenizer.get_vocab().values())
        tokenizer.add_tokens([f"wort{i}" for i in range(rows - 1 - highest)])
        tokenizer.add_tokens(list(tokens), special_tokens=any(isinstance(token, AddedToken) for token in tokens))
        path = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save_pretrained(path)
        return str(path), rows

    return make


def kind_of(family: str) -> type:
    return SALMT5 if family in ENCODER_DECODERS else SALMGPT


@pytest.mark.parametrize(("kind", "family"), [(SALMT5, "t5"), (SALMGPT, "qwen2"), (BestowGPT, "llama")])
def test_both_sizes_are_told_with_the_key_that_resizes(larger, folder, kind, family) -> None:
    path, rows = larger(family, "mehr", LAST)
    with pytest.raises(ConfigError) as refused:
        kind(model_config(family, folder, tokenizer_path=path))
    assert str(refused.value) == (
        f"model.tokenizer_path: the tokenizer of '{path}' has tokens up to '{LAST}', whose id is {rows + 1}, but the "
        f"embedding table of '{folder / family}' has {rows} rows, not {rows + 2}; set "
        "model.resize_token_embeddings: true to add 2, or take the model's own tokenizer."
    )


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *((SALMT5, family) for family in ("t5", "t5v1_1", "umt5", "m2m100", "mbart")),
        *((SALMGPT, family) for family in ("llama", "qwen2", "gemma3")),
        (BestowGPT, "qwen2"),
    ],
)
def test_resized_it_reads_and_says_all_else_as_before(larger, folder, kind, family, tmp_path) -> None:
    path, rows = larger(family, LAST)
    before = kind(model_config(family, folder)).eval()
    config = model_config(family, folder, tokenizer_path=path, resize_token_embeddings=True)
    model = kind(config).eval()
    assert model.token_embedding.num_embeddings == rows + 1
    assert model.llm.config.vocab_size == rows + 1
    assert model.tokenizer.token_to_id(LAST) == rows

    answers = torch.tensor([[7, 8, 9, 1]])
    batch = {"context_ids": torch.tensor([[6, 5, 9, 8]]), "context_lens": torch.tensor([4])}
    batch |= {"answer_ids": answers, "answer_lens": torch.tensor([4])}
    logits, known = model(batch)[0], before(batch)[0]
    assert logits.shape[-1] == rows + 1
    assert torch.equal(logits[..., :rows], known)
    assert model.training_step(batch, 0) is not None

    said = model.translate([f"one {LAST}", "two"], "en", "de", max_new_tokens=4)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.translate([f"one {LAST}", "two"], "en", "de", max_new_tokens=4) == said
    assert {
        name for name, value in again.state_dict().items() if not torch.equal(value, model.state_dict()[name])
    } == set()


def test_a_table_that_is_large_enough_stays_as_it_is(folder) -> None:
    model = SALMT5(model_config("t5", folder, resize_token_embeddings=True))
    assert model.token_embedding.num_embeddings == len(model.tokenizer.tokenizer) - 1 + 8  # less the locator


@pytest.mark.parametrize(
    ("family", "token"), [("t5", "<image_soft_token>"), ("gemma3", "<image_soft_token>"), ("t5", "<end_of_image>")]
)
def test_special_tokens_that_no_prompt_needs_need_no_row(larger, folder, family, token) -> None:
    """Gemma 3 of one billion parameters has a token for images behind its table; ``end`` is the code of Ende."""
    path, rows = larger(family, AddedToken(token, special=True, normalized=False))
    model = kind_of(family)(model_config(family, folder, tokenizer_path=path)).eval()
    assert model.tokenizer.token_to_id(token) == rows == model.token_embedding.num_embeddings
    model.translate([token], "en", "de", max_new_tokens=2)


@pytest.mark.parametrize(
    ("family", "token"), [("t5", "<fr>"), ("t5", "<mdw>"), ("llama", "[INST]"), ("mbart", "pl_PL")]
)
def test_special_tokens_that_prompts_need_are_told(larger, folder, family, token) -> None:
    path, rows = larger(family, AddedToken(token, special=True, normalized=False))
    with pytest.raises(ConfigError, match=f"up to '{re.escape(token)}', whose id is {rows}"):
        kind_of(family)(model_config(family, folder, tokenizer_path=path))


@pytest.mark.parametrize("prompt_format", ["emmett_t5", "emmett_t5_two_step"])
def test_the_separator_of_two_step_answers_needs_a_row_where_it_is_written(larger, folder, prompt_format) -> None:
    path, rows = larger("t5", AddedToken("<extra_id_0>", special=True, normalized=False))
    make = lambda **keys: SALMT5(model_config("t5", folder, tokenizer_path=path, prompt_format=prompt_format, **keys))  # noqa: E731
    needs_row = prompt_format.endswith("two_step")
    if needs_row:
        with pytest.raises(ConfigError, match="has tokens up to '<extra_id_0>'"):
            make()
    assert make(resize_token_embeddings=True).token_embedding.num_embeddings == rows + needs_row
