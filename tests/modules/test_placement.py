import pytest
import torch
from nemo.collections.speechlm2.models.salm import replace_placeholders_and_build_targets

from nemo_emmett.errors import DataError
from nemo_emmett.modules.batch import from_salm_batch, pack_left, split_modalities
from nemo_emmett.modules.placement import place_audio

LOCATOR, PAD, H = 9, 0, 3


def random_batch(seed: int):
    """Rows of ids 1 to 9 (9 is the locator), right-padded, with a recording of 1 to 5 frames for each locator."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *size: torch.randint(low, high, size, generator=rng)  # noqa: E731
    rows = [draw(1, 10, int(draw(1, 7))) for _ in range(int(draw(1, 6)))]
    rows[0][0] = LOCATOR
    lens = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    num_recordings = sum(int((row == LOCATOR).sum()) for row in rows)
    frames = int(draw(1, 6))
    audio = torch.randn(num_recordings, frames, H, generator=rng)
    return ids, lens, torch.randn(*ids.shape, H, generator=rng), audio, draw(1, frames + 1, num_recordings)


@pytest.mark.parametrize("seed", range(100))
def test_place_audio_equals_nemo(seed):
    ids, lens, embeds, audio, audio_lens = random_batch(seed)
    placed, mask = place_audio(embeds, ids, lens, audio, audio_lens, LOCATOR)
    theirs, _, their_mask = replace_placeholders_and_build_targets(
        ids, embeds, PAD, LOCATOR, [row[:n] for row, n in zip(audio, audio_lens, strict=True)]
    )
    # NeMo pads on the left, here it is on the right: the rows' contents must agree.
    for ours, our_mask, nemo, nemo_mask in zip(placed, mask, theirs, their_mask, strict=True):
        assert torch.equal(ours[our_mask], nemo[nemo_mask])
        assert not ours[~our_mask].any()
        assert our_mask.sum() == our_mask.int().cumprod(0).sum()


def test_gradients_reach_every_frame_and_token_that_is_placed_and_no_other():
    ids = torch.tensor([[5, LOCATOR, 6], [7, 8, PAD]])
    embeds = torch.randn(2, 3, H, requires_grad=True)
    audio = torch.randn(1, 4, H, requires_grad=True)
    placed, _ = place_audio(embeds, ids, torch.tensor([3, 2]), audio, torch.tensor([2]), LOCATOR)
    placed.sum().backward()
    assert embeds.grad[..., 0].tolist() == [[1, 0, 1], [1, 1, 0]]
    assert audio.grad[..., 0].tolist() == [[1, 1, 0, 0]]


def test_a_surplus_recording_is_refused_with_both_counts():
    ids = torch.tensor([[5, LOCATOR]])
    with pytest.raises(DataError, match="2 recordings but 1 audio locator"):
        place_audio(torch.zeros(1, 2, H), ids, torch.tensor([2]), torch.zeros(2, 1, H), torch.tensor([1, 1]), LOCATOR)


def test_pack_left_drops_and_pads():
    ids = torch.tensor([[0, 0, 7, 8], [1, 2, 3, 0]])
    packed, lens = pack_left(ids, ids > 0, pad_id=0)
    assert packed.tolist() == [[7, 8, 0], [1, 2, 3]]
    assert lens.tolist() == [2, 3]


def test_nemo_flat_batch_becomes_context_and_answer():
    flat = {
        "input_ids": torch.tensor([[0, 4, 5, 6, 7], [3, 4, 5, 6, 8]]),
        "loss_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool),
        "audios": torch.tensor([]),
        "audio_lens": torch.tensor([]),
    }
    batch = from_salm_batch(flat, pad_id=0)
    assert batch["context_ids"].tolist() == [[4, 5, 0, 0], [3, 4, 5, 6]]
    assert batch["answer_ids"].tolist() == [[6, 7], [8, 0]]
    assert batch["answer_lens"].tolist() == [2, 1]
    assert list(split_modalities(flat, pad_id=0)) == ["text"]


def test_a_batch_of_no_known_form_is_refused():
    with pytest.raises(DataError, match="tokens"):
        split_modalities({"tokens": torch.zeros(1)}, pad_id=0)
