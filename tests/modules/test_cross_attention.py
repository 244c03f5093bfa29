"""Cross-attention from text to speech, held against a plain implementation, one utterance at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import DynamicLayer

from nemo_emmett.errors import ConfigError
from nemo_emmett.models.targets import parse_arguments
from nemo_emmett.modules.cross_attention import SpeechCrossAttention

H, WIDTH, HEADS, LAYERS = 16, 24, 4, 2
B, K, FRAMES, T = 3, 2, 5, 6


@pytest.fixture
def attend() -> SpeechCrossAttention:
    """With an output that is no longer zero, as after some training."""
    torch.manual_seed(0)
    module = SpeechCrossAttention(H, LAYERS, HEADS, WIDTH, ffn_ratio=1.5)
    nn.init.normal_(module.project_out.weight)
    return module


def text(seed: int = 1, rows: int = B, positions: int = T) -> Tensor:
    return torch.randn(rows, positions, H, generator=torch.Generator().manual_seed(seed))


def speech(seed: int = 2) -> tuple[Tensor, Tensor]:
    """The first utterance has two recordings, the second one, the third none."""
    frames = torch.tensor([[FRAMES, 2], [3, 0], [0, 0]])
    embeds = torch.randn(B, K, FRAMES, H, generator=torch.Generator().manual_seed(seed))
    return embeds, torch.arange(FRAMES) < frames[..., None]


# A plain implementation: no batch, no fused attention, positions as complex numbers.


def plain(module: SpeechCrossAttention, text_TH: Tensor, recordings: list[Tensor]) -> Tensor:
    if sum(len(frames) for frames in recordings) == 0:
        return text_TH
    frames_SH = torch.cat(recordings)
    places = [[place / 10_000.0 ** (i / (H / 2)) for i in range(H // 2)] for place in range(len(frames_SH))]
    memory_SH = module.memory_norm(frames_SH) + torch.cat([torch.tensor(places).sin(), torch.tensor(places).cos()], 1)
    x = module.project_in(text_TH)
    steps = len(x)
    causal = torch.full((steps, steps), -torch.inf).triu(1)
    for layer in module.layers:
        own = layer.self_attention
        query, key, value = own.query_key_value(layer.self_attention_norm(x)).split(WIDTH, 1)
        x = x + own.out(plain_attention(turned(query), turned(key), value, causal))
        cross = layer.cross_attention
        key, value = cross.key_value(memory_SH).split(WIDTH, 1)
        query = cross.query(layer.cross_attention_norm(x))
        x = x + cross.out(plain_attention(query, key, value, torch.zeros(steps, len(memory_SH))))
        x = x + layer.feed_forward(layer.feed_forward_norm(x))
    return text_TH + module.project_out(module.norm(x))


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    size = WIDTH // HEADS
    heads = zip(query.split(size, 1), key.split(size, 1), value.split(size, 1), strict=True)
    return torch.cat([((q @ k.T) / size**0.5 + bias).softmax(1) @ v for q, k, v in heads], 1)


def turned(x_TW: Tensor) -> Tensor:
    half = WIDTH // HEADS // 2
    angle = torch.arange(len(x_TW))[:, None] * 10_000.0 ** -(torch.arange(half) / half)
    heads = []
    for head in x_TW.split(2 * half, 1):
        product = torch.complex(head[:, :half], head[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        heads += [product.real, product.imag]
    return torch.cat(heads, 1)


def test_results_and_all_gradients_are_those_of_the_plain_implementation(attend) -> None:
    text_BTH, (speech_BKFH, mask_BKF) = text().requires_grad_(), speech()
    speech_BKFH.requires_grad_()
    inputs = [text_BTH, speech_BKFH, *attend.parameters()]
    weights = text(seed=3)

    found = attend(text_BTH, attend.memory(speech_BKFH, mask_BKF))
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    rows = [plain(attend, text_BTH[b], [speech_BKFH[b, k][mask_BKF[b, k]] for k in range(K)]) for b in range(B)]
    expected = torch.stack(rows)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    assert not gradients[1][~mask_BKF].any(), "padding has none"


def test_activation_checkpointing_keeps_less_and_gives_the_same_gradients(attend) -> None:
    def run() -> tuple[int, list[Tensor]]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x
        ):
            found = attend(text(), attend.memory(*speech()))
        return sum(kept), list(torch.autograd.grad(found.square().sum(), list(attend.parameters())))

    kept, gradients = run()
    attend.activation_checkpointing = True
    kept_then, gradients_then = run()
    assert kept_then < 0.6 * kept
    for gradient, before in zip(gradients_then, gradients, strict=True):
        torch.testing.assert_close(gradient, before)


def test_an_utterance_without_speech_gives_its_text_to_the_bit(attend) -> None:
    speech_BKFH, mask_BKF = speech()
    found = attend(text(), attend.memory(speech_BKFH, mask_BKF))
    assert torch.equal(found[2], text()[2])
    nothing = attend(text(), attend.memory(speech_BKFH[:, :, :0], mask_BKF[:, :, :0]))
    assert torch.equal(nothing, text())


def test_a_later_token_changes_no_earlier_output(attend) -> None:
    memory, changed = attend.memory(*speech()), text()
    changed[:, 4] += 1
    before, after = attend(text(), memory), attend(changed, memory)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:2, 5], after[:2, 5]).all()


def test_the_order_of_earlier_tokens_matters(attend) -> None:
    memory = attend.memory(*speech())
    swapped = attend(text()[:, [1, 0, 2, 3, 4, 5]], memory)
    assert not torch.allclose(swapped[:2, 2:], attend(text(), memory)[:2, 2:], atol=1e-4)


def test_the_order_of_frames_and_recordings_matters_and_that_of_utterances_does_not(attend) -> None:
    speech_BKFH, mask_BKF = speech()
    found = attend(text(), attend.memory(speech_BKFH, mask_BKF))
    swapped = attend(text(), attend.memory(speech_BKFH.flip(1), mask_BKF.flip(1)))
    assert not torch.allclose(swapped[0], found[0], atol=1e-4)
    backwards = attend(text(), attend.memory(speech_BKFH[:, :1].flip(2), mask_BKF[:, :1]))
    assert not torch.allclose(backwards[0], attend(text(), attend.memory(speech_BKFH[:, :1], mask_BKF[:, :1]))[0])
    flipped = attend(text().flip(0), attend.memory(speech_BKFH.flip(0), mask_BKF.flip(0)))
    torch.testing.assert_close(flipped.flip(0), found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_text_and_speech_changes_nothing(attend, side) -> None:
    speech_BKFH, mask_BKF = speech()
    expected = attend(text(), attend.memory(speech_BKFH, mask_BKF))
    noise = torch.full((B, 3, H), 7.0)
    mask_BT = torch.cat([torch.zeros(B, 3, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)], 1)
    padded_BTH = torch.cat([noise, text()], 1)
    if side == "right":  # and no mask for it
        padded_BTH, mask_BT = torch.cat([text(), noise], 1), None
    longer = attend.memory(F.pad(speech_BKFH, (0, 0, 0, 4), value=7.0), F.pad(mask_BKF, (0, 4)))
    found = attend(padded_BTH, longer, mask_BT)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 3:] if side == "left" else found[:, :T], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [[T], [3, 1, 1, 1], [1] * T, [2, 3, 1]])
@pytest.mark.parametrize("padded", [False, True])
def test_parts_with_a_cache_equal_the_whole(attend, parts, padded) -> None:
    memory = attend.memory(*speech())
    mask_BT = torch.arange(T) >= torch.tensor([0, 2, 1])[:, None] if padded else None
    expected = attend(text(), memory, mask_BT)
    cache, found, end = [DynamicLayer() for _ in range(LAYERS)], [], 0
    for part in text().split(parts, 1):
        end += part.shape[1]
        found.append(attend(part, memory, mask_BT[:, :end] if padded else None, cache))
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


def test_hypotheses_share_the_memory_of_their_utterance(attend) -> None:
    speech_BKFH, mask_BKF = speech()
    hypotheses = text(rows=4 * B)
    repeated = attend.memory(speech_BKFH.repeat_interleave(4, 0), mask_BKF.repeat_interleave(4, 0))
    found = attend(hypotheses, attend.memory(speech_BKFH, mask_BKF))
    torch.testing.assert_close(found, attend(hypotheses, repeated), rtol=1e-4, atol=1e-5)


def test_a_new_module_adds_nothing_and_learns_in_all_its_parts() -> None:
    torch.manual_seed(0)
    attend = SpeechCrossAttention(H, LAYERS, HEADS, WIDTH)
    optimizer = torch.optim.SGD(attend.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        found = attend(text(), attend.memory(*speech()))
        moved.append(not torch.equal(found, text()))
        optimizer.zero_grad()
        (found - text(seed=5)).square().mean().backward()
        optimizer.step()
    assert moved == [False, True]
    idle = [name for name, parameter in attend.named_parameters() if not parameter.grad.any()]
    assert idle == []


def test_width_is_the_models_unless_given_and_dropout_acts_in_training_only() -> None:
    attend = SpeechCrossAttention(H, num_heads=HEADS, dropout=0.5)
    assert attend.layers[0].self_attention.out.in_features == H
    nn.init.normal_(attend.project_out.weight)
    memory = attend.memory(*speech())
    assert not torch.equal(attend(text(), memory), attend(text(), memory))
    attend.eval()
    assert torch.equal(attend(text(), memory), attend(text(), memory))


def test_it_runs_on_tensors_without_values_and_in_lower_precision(attend) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in (text(), *speech())]
        found = attend(fake[0], attend.memory(*fake[1:]))
        assert found.shape == (B, T, H)
        found.sum().backward()
    attend.zero_grad()
    expected = attend(text(), attend.memory(*speech()))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(text(), attend.memory(*speech()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.3)
    lower = attend.bfloat16()
    assert lower(text().bfloat16(), lower.memory(speech()[0].bfloat16(), speech()[1])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "num_heads: 5 heads do not divide the width 16"),
        ({"num_heads": 16}, "num_heads: 16 heads do not divide the width 16 into even parts"),
        ({"num_layers": 0}, "num_layers: 0"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"ffn_ratio": 0.0}, "ffn_ratio: 0.0"),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_sentence(options, words) -> None:
    with pytest.raises(ConfigError, match=f"model.cross_attention.{words}"):
        SpeechCrossAttention(
            H, **parse_arguments(SpeechCrossAttention, options, "model.cross_attention", ["hidden_size"])
        )
