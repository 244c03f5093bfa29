"""Placing audio: what NeMo's loop over rows gives, in a fixed number of operations."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from nemo.collections.speechlm2.models.salm import replace_placeholders_and_build_targets
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_emmett.errors import DataError
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.modules.placement import Placed, merge_audio_embeddings

LOCATOR, PAD, H = 9, 0, 4


@dataclass
class Rows:
    """Rows of tokens without any padding, and the recordings of their locators."""

    ids: list[Tensor]
    embeds: list[Tensor]
    is_target: list[Tensor]
    recordings: list[Tensor]

    def padded(self, left: list[int], right: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids, embeds, is_target, mask) with so much padding on either side of each row."""
        B, T = len(self.ids), left[0] + len(self.ids[0]) + right[0]
        ids, embeds = torch.full((B, T), PAD), torch.full((B, T, H), 7.0)
        is_target, mask = torch.zeros(2, B, T, dtype=torch.bool)
        for row, start in enumerate(left):
            place = slice(start, start + len(self.ids[row]))
            ids[row, place], embeds[row, place] = self.ids[row], self.embeds[row]
            is_target[row, place], mask[row, place] = self.is_target[row], True
        return ids, embeds, is_target, mask

    def flush(self, side: str, surplus: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same with all padding on one side: as much as needed, and a surplus."""
        longest = max(len(row) for row in self.ids) + surplus
        padding, none = [longest - len(row) for row in self.ids], [0] * len(self.ids)
        return self.padded(padding, none) if side == "left" else self.padded(none, padding)

    def cut(self, at: list[int]) -> tuple[Rows, Rows]:
        """Contexts and answers."""
        parts = [(self.ids, self.embeds, self.is_target)] * 2
        slices = [[slice(0, n) for n in at], [slice(n, None) for n in at]]
        return tuple(
            Rows(*([row[s] for row, s in zip(rows, where, strict=True)] for rows in part), [])
            for part, where in zip(parts, slices, strict=True)
        )

    def audio(self) -> tuple[Tensor | None, Tensor | None]:
        """The recordings, padded with what must not be seen."""
        if not self.recordings:
            return None, None
        padded = torch.nn.utils.rnn.pad_sequence(self.recordings, batch_first=True, padding_value=8.0)
        return padded, torch.tensor([len(recording) for recording in self.recordings])


def random_rows(draw, vocab: int = 10) -> Rows:
    """1 to 5 rows of up to 8 tokens, some of them empty, with any number of locators, some side by side."""
    ids = [draw(1, vocab, draw(0, 9)) for _ in range(draw(1, 6))]
    if not any(len(row) for row in ids):
        ids[0] = torch.tensor([5])
    recordings = [torch.randn(draw(1, 6), H) for row in ids for token in row if token == LOCATOR]
    is_target = [draw(0, 2, len(row)).bool() for row in ids]
    return Rows(ids, [torch.randn(len(row), H) for row in ids], is_target, recordings)


@pytest.fixture
def draw():
    torch.manual_seed(0)

    def integers(low: int, high: int, size: int | None = None) -> int | Tensor:
        drawn = torch.randint(low, high, () if size is None else (size,))
        return int(drawn) if size is None else drawn

    return integers


def nemo(ids: Tensor, embeds: Tensor, is_target: Tensor, recordings: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    targets = ids.where(is_target, IGNORE_INDEX)
    return replace_placeholders_and_build_targets(ids, embeds, PAD, LOCATOR, recordings, targets)


def targets_in_place(placed: Placed, row: int) -> Tensor:
    """(S,) targets at the positions of the target tokens, as NeMo has them."""
    own = torch.full((placed.mask_LS.shape[1],), IGNORE_INDEX)
    for target, position in zip(placed.targets_BA[row].tolist(), placed.positions_BA[row].tolist(), strict=True):
        if target != IGNORE_INDEX:
            own[position + 1] = target
    return own


# 1,000 random batches together.
@pytest.mark.parametrize("their_padding", ["left", "right"])
@pytest.mark.parametrize("our_padding", ["left", "right"])
def test_rows_are_those_of_nemo(draw, our_padding, their_padding):
    for _ in range(250):
        rows = random_rows(draw)
        theirs, their_targets, their_mask = nemo(*rows.flush(their_padding, draw(0, 3))[:3], rows.recordings)
        contexts, answers = rows.cut([draw(0, len(row) + 1) for row in rows.ids])
        parts = [
            part.flush(side, draw(0, 2)) for part, side in zip((contexts, answers), ("left", "right"), strict=True)
        ]
        ids, embeds, is_target, mask = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
        ids[~mask] = LOCATOR  # ignored where it is padding
        ours = merge_audio_embeddings(
            embeds, ids, mask, *rows.audio(), LOCATOR, is_target_BT=is_target, pad_left=our_padding == "left"
        )
        assert torch.equal(ours.lens_B, their_mask.sum(1))
        assert ours.embeds_LSH.shape[1] == ours.lens_B.max()
        for row, (n, mask) in enumerate(zip(ours.lens_B.tolist(), their_mask, strict=True)):
            kept = slice(len(ours.mask_LS[row]) - n, None) if our_padding == "left" else slice(0, n)
            assert ours.mask_LS[row, kept].all()
            assert torch.equal(ours.embeds_LSH[row, kept], theirs[row, mask])
            expected = their_targets[row, mask]
            expected[:1] = IGNORE_INDEX  # nothing predicts a row's first token
            assert torch.equal(targets_in_place(ours, row)[kept], expected)
        assert not ours.embeds_LSH[~ours.mask_LS].any()
        assert torch.equal(ours.mask_LS.sum(1), ours.lens_B)


def test_left_padded_tensors_are_those_of_nemo_to_the_last_element(draw):
    for _ in range(50):
        rows = random_rows(draw)
        ids, embeds, is_target, mask = rows.flush("left", draw(0, 3))
        theirs, _, their_mask = nemo(ids, embeds, is_target, rows.recordings)
        ours = merge_audio_embeddings(embeds, ids, mask, *rows.audio(), LOCATOR, pad_left=True)
        assert torch.equal(ours.mask_LS, their_mask)
        assert torch.equal(ours.embeds_LSH, theirs * their_mask[..., None])
        assert ours.targets_BA is ours.positions_BA is None


def test_gradients_are_those_of_nemo(draw):
    for _ in range(50):
        rows = random_rows(draw)
        ids, embeds, is_target, mask = rows.flush("left")
        for tensor in (embeds, *rows.recordings):
            tensor.requires_grad_()
        theirs, _, their_mask = nemo(ids, embeds, is_target, rows.recordings)
        audio, audio_lens = rows.audio()
        ours = merge_audio_embeddings(embeds, ids, mask, audio, audio_lens, LOCATOR, pad_left=True).embeds_LSH
        upstream = torch.randn_like(theirs) * their_mask[..., None]
        inputs = [embeds, *rows.recordings]
        expected = torch.autograd.grad(theirs, inputs, upstream)
        found = torch.autograd.grad(ours, inputs, upstream)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_gradients_reach_every_frame_and_token_that_is_placed_and_no_other():
    ids = torch.tensor([[5, LOCATOR, 6], [7, 8, PAD]])
    embeds = torch.randn(2, 3, H, requires_grad=True)
    audio = torch.randn(1, 4, H, requires_grad=True)
    placed = merge_audio_embeddings(embeds, ids, ids != PAD, audio, torch.tensor([2]), LOCATOR)
    placed.embeds_LSH.sum().backward()
    assert embeds.grad[..., 0].tolist() == [[1, 0, 1], [1, 1, 0]]
    assert audio.grad[..., 0].tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("frozen", ["tokens", "speech"])
def test_what_is_frozen_gets_no_gradient(frozen):
    ids, embeds, audio = torch.tensor([[5, LOCATOR]]), torch.zeros(1, 2, H), torch.zeros(1, 2, H)
    (audio if frozen == "tokens" else embeds).requires_grad_()
    merge_audio_embeddings(embeds, ids, ids != PAD, audio, torch.tensor([2]), LOCATOR).embeds_LSH.sum().backward()
    assert (embeds.grad is None, audio.grad is None) == (frozen == "tokens", frozen == "speech")


def test_targets_are_in_order_and_each_has_the_position_before_it():
    """Row 0: 5, three frames, 6, 7. Row 1: 3 is the first of its row; a recording without frames is before 4."""
    ids = torch.tensor([[5, LOCATOR, PAD, 6, 7], [PAD, 3, LOCATOR, 4, PAD]])
    args = (torch.zeros(2, 5, H), ids, ids != PAD, torch.zeros(2, 3, H), torch.tensor([3, 0]), LOCATOR)
    everything = torch.ones_like(ids, dtype=torch.bool)
    placed = merge_audio_embeddings(*args, is_target_BT=everything)
    assert placed.targets_BA.tolist() == [[IGNORE_INDEX, 6, 7], [IGNORE_INDEX, 4, IGNORE_INDEX]]
    assert placed.positions_BA.tolist() == [[0, 3, 4], [0, 0, 0]]
    flush_right = merge_audio_embeddings(*args, is_target_BT=everything, pad_left=True)
    assert flush_right.targets_BA.tolist() == placed.targets_BA.tolist()
    assert flush_right.positions_BA[0].tolist() == [0, 3, 4]
    assert flush_right.positions_BA[1, 1] == 4
    wider = merge_audio_embeddings(*args, is_target_BT=everything, max_targets=4)
    assert wider.targets_BA.tolist() == [[*row, IGNORE_INDEX] for row in placed.targets_BA.tolist()]


def test_speech_takes_the_type_of_the_tokens_and_gives_its_own_to_the_gradient():
    ids, audio = torch.tensor([[5, LOCATOR]]), torch.ones(1, 2, H, dtype=torch.bfloat16, requires_grad=True)
    placed = merge_audio_embeddings(torch.zeros(1, 2, H), ids, ids != PAD, audio, torch.tensor([2]), LOCATOR)
    placed.embeds_LSH.sum().backward()
    assert (placed.embeds_LSH.dtype, audio.grad.dtype) == (torch.float32, torch.bfloat16)
    assert audio.grad.sum() == 2 * H


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("width", [3, 8])
def test_rows_of_any_width_anywhere_in_memory_are_copied(width, offset, dtype):
    def numbers(*shape: int) -> Tensor:
        flat = torch.arange(offset + torch.Size(shape).numel(), dtype=dtype)
        return flat[offset:].view(shape)

    ids, embeds, audio = torch.tensor([[5, LOCATOR, 6]]), numbers(1, 3, width), -numbers(1, width, 2).transpose(1, 2)
    placed = merge_audio_embeddings(embeds, ids, ids != PAD, audio, torch.tensor([2]), LOCATOR).embeds_LSH
    assert torch.equal(placed[0], torch.stack([embeds[0, 0], audio[0, 0], audio[0, 1], embeds[0, 2]]))


@pytest.mark.parametrize("recordings", [0, 2, None])
def test_recordings_that_differ_from_the_locators_are_refused_with_both_counts(recordings):
    ids = torch.tensor([[5, LOCATOR]])
    audio = (None, None) if recordings is None else (torch.zeros(recordings, 1, H), torch.ones(recordings).long())
    with pytest.raises(DataError, match=f"{recordings or 0} recordings but 1 audio locator"):
        merge_audio_embeddings(torch.zeros(1, 2, H), ids, ids != PAD, *audio, LOCATOR)


# How much is done.


class Operations(TorchDispatchMode):
    """The operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """The calls by which the host waits for a tensor's values."""

    READS = frozenset({"tolist", "item", "__int__", "__bool__", "__float__", "__index__", "cpu", "numpy", "nonzero"})

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.READS:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def speech_batch(B: int, device: str = "cpu") -> tuple:
    """A row holds five context tokens, one of them a locator of a recording of two frames, and four answer tokens."""
    ids = torch.arange(1, 10, device=device).repeat(B, 1)
    ids[:, 2] = LOCATOR
    ids[:, -1] = 1
    embeds = torch.zeros(B, 9, H, device=device, requires_grad=True)
    audio = torch.zeros(B, 2, H, device=device, requires_grad=True)
    return embeds, ids, ids > 0, audio, torch.full((B,), 2, device=device), LOCATOR


@pytest.mark.parametrize("pad_left", [True, False])
def test_operations_do_not_depend_on_the_batch_and_the_host_reads_once(pad_left):
    names = {}
    for B in (2, 64):
        batch = speech_batch(B)
        is_target = torch.zeros_like(batch[2])
        is_target[:, 5:] = True
        with Operations() as operations, HostReads() as reads:
            merge_audio_embeddings(*batch, is_target_BT=is_target, pad_left=pad_left).embeds_LSH.sum().backward()
        assert reads.names == ["tolist"]
        names[B] = operations.names
    assert names[2] == names[64]
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}.intersection(names[2])


@pytest.mark.parametrize(("B", "speech"), [(1, True), (3, True), (3, False)])
def test_tensors_without_values_get_the_shapes_of_real_ones(B, speech):
    """In a batch as OOMptimizer makes it: all rows are full, but for one token of padding in the first context."""
    shapes = []
    for mode in (torch.no_grad(), FakeTensorMode()):
        with mode:
            embeds, ids, mask, audio, audio_lens, _ = speech_batch(B)
            if not speech:
                ids, audio, audio_lens = torch.ones_like(ids), None, None
            if B > 1:
                mask[0, 4] = False
            is_target = torch.zeros_like(mask)
            is_target[:, 5:] = True
            placed = merge_audio_embeddings(
                embeds, ids, mask, audio, audio_lens, LOCATOR, is_target_BT=is_target, max_targets=ids.shape[1] - 5
            )
        shapes.append(
            {name: (value.shape, value.dtype) for name, value in vars(placed).items() if torch.is_tensor(value)}
        )
    assert shapes[0] == shapes[1]
