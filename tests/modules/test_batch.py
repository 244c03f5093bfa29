"""Batches taken apart: NeMo's flat batch, padding whose id is a token, packing."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.errors import DataError
from nemo_emmett.modules.batch import from_salm_batch, pack, pack_left, padding_mask, split_modalities

PAD = 0


def flat(ids, loss_mask) -> dict:
    none = torch.tensor([])
    return {"input_ids": torch.tensor(ids), "loss_mask": torch.tensor(loss_mask).bool(), "audios": none} | {
        "audio_lens": none
    }


def test_pack_left_drops_and_pads():
    ids = torch.tensor([[0, 0, 7, 8], [1, 2, 3, 0]])
    packed, lens = pack_left(ids, ids > 0, pad_id=PAD)
    assert packed.tolist() == [[7, 8, 0], [1, 2, 3]]
    assert lens.tolist() == [2, 3]
    assert pack(ids, ids > 0, 4, fill=-1).tolist() == [[7, 8, -1, -1], [1, 2, 3, -1]]


def test_only_runs_of_padding_at_the_ends_are_padding():
    ids = torch.tensor([[0, 7, 0, 0, 8, 0], [7, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 7], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]
    assert padding_mask(ids, PAD).int().tolist() == expected


def test_nemo_flat_batch_becomes_context_and_answer():
    batch = flat([[0, 4, 5, 6, 7], [3, 4, 5, 6, 8]], [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]])
    part = from_salm_batch(batch, pad_id=PAD)
    assert part["context_ids"].tolist() == [[4, 5, 0, 0], [3, 4, 5, 6]]
    assert part["answer_ids"].tolist() == [[6, 7], [8, 0]]
    assert part["answer_lens"].tolist() == [2, 1]
    assert not part["context_targets"].any()
    assert list(split_modalities(batch, pad_id=PAD)) == ["text"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_may_end_in_the_padding_token_and_a_context_may_hold_it(side):
    row, mask = [4, PAD, 5, 6, PAD], [0, 0, 0, 1, 1]
    padded = [[PAD] * 2 + row, [0] * 2 + mask] if side == "left" else [row + [PAD] * 2, mask + [0] * 2]
    part = from_salm_batch(flat([padded[0]], [padded[1]]), pad_id=PAD)
    assert part["context_ids"].tolist() == [[4, PAD, 5]]
    assert part["answer_ids"].tolist() == [[6, PAD]]
    assert (part["context_lens"].tolist(), part["answer_lens"].tolist()) == ([3], [2])


def test_earlier_answers_of_a_conversation_are_targets_in_the_context():
    """User 2 3, assistant 4 5, user 6, assistant 7, and a newline, 8, that nobody is asked for."""
    part = from_salm_batch(flat([[2, 3, 4, 5, 6, 7, 8]], [[0, 0, 1, 1, 0, 1, 0]]), pad_id=PAD)
    assert part["context_ids"].tolist() == [[2, 3, 4, 5, 6]]
    assert part["context_targets"].int().tolist() == [[0, 0, 1, 1, 0]]
    assert part["answer_ids"].tolist() == [[7]]


def by_hand(ids: list[int], answers: list[bool]) -> dict[str, list]:
    """One row of a flat batch, token by token."""
    real = [place for place, token in enumerate(ids) if token != PAD or answers[place]]
    end = max((place + 1 for place, answer in enumerate(answers) if answer), default=None)
    if end is None:
        context, answer = list(range(real[0], real[-1] + 1)) if real else [], []
    else:
        start = end
        while start > 0 and answers[start - 1]:
            start -= 1
        context, answer = list(range(min(real), start)), list(range(start, end))
    return {
        "context_ids": [ids[place] for place in context],
        "context_targets": [answers[place] and place != context[0] for place in context],
        "answer_ids": [ids[place] for place in answer],
    }


def test_random_masks_are_taken_apart_as_by_hand():
    torch.manual_seed(0)
    for _ in range(200):
        B, T = int(torch.randint(1, 5, ())), int(torch.randint(1, 12, ()))
        ids, mask = torch.randint(0, 3, (B, T)), torch.rand(B, T) < torch.rand(())
        part = from_salm_batch(flat(ids.tolist(), mask.tolist()), pad_id=PAD)
        for row in range(B):
            expected = by_hand(ids[row].tolist(), mask[row].tolist())
            lens = {"context": int(part["context_lens"][row]), "answer": int(part["answer_lens"][row])}
            for key, values in expected.items():
                n = lens[key.partition("_")[0]]
                assert part[key][row, :n].tolist() == values
                assert not part[key][row, n:].any()
        assert part["context_ids"].shape == part["context_targets"].shape == (B, part["context_lens"].max())


def test_a_batch_of_no_known_form_is_refused():
    with pytest.raises(DataError, match="tokens"):
        split_modalities({"tokens": torch.zeros(1)}, pad_id=PAD)
