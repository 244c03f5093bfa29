"""BestowGPT compared with its language model, and with a plain computation by its own parts."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from nemo_emmett.errors import ConfigError, DataError, ModelError
from nemo_emmett.models import load
from nemo_emmett.models.bestow_gpt import BestowGPT
from nemo_emmett.models.head import LLMInputs, answer_logits
from nemo_emmett.modules.cross_attention import SpeechCrossAttention
from nemo_emmett.modules.loss import IGNORE_INDEX

from .backbones import model_config
from .batches import padded, rows, with_recordings

# It says that a prompt given as embeddings does not count for it, which is what is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size`")

CROSS_ATTENTION = {"num_layers": 2, "num_heads": 4, "width": 24}
# Of each kind of cache: full, sliding windows alone, both in turns with capped logits, both with scaled embeddings.
FAMILIES = ("llama", "mistral", "gemma2", "gemma3")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
LOC = -1  # replaced by the locator below
NEW_TOKENS = 8


def build(name: str, folder, asr, **overrides) -> BestowGPT:
    """In evaluation mode, with layers whose output is not zero."""
    torch.manual_seed(0)
    section = model_config(name, folder, asr, cross_attention=CROSS_ATTENTION, **overrides)
    model = BestowGPT(section).eval()
    nn.init.normal_(model.cross_attention.project_out.weight, std=0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.match(r"llm\..*layers\.", name) and parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def model(folder, tiny_asr) -> BestowGPT:
    return build("llama", folder, tiny_asr)


@pytest.fixture(scope="module", params=FAMILIES)
def of_family(request, folder, tiny_asr) -> BestowGPT:
    return build(request.param, folder, tiny_asr)


def batch_of(model, contexts: list[list[int]], answers: list[list[int]], seconds: list[float] = ()) -> dict:
    """Contexts in which ``LOC`` marks the locator, and a recording for each."""
    contexts = [[model.audio_locator_id if token == LOC else token for token in row] for row in contexts]
    batch = dict(zip(("context_ids", "context_lens"), padded(contexts, model.pad_id), strict=True))
    batch |= dict(zip(("answer_ids", "answer_lens"), padded(answers, model.pad_id), strict=True))
    return with_recordings(model, batch, seconds) if seconds else batch


# Two recordings in the first example, one in the second, none in the third.
CONTEXTS = [[5, LOC, 6, LOC, 7], [LOC, 8], [9, 10, 11, 12]]
TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
ANSWERS = [[20, 21], [22, 23, 24], [25]]
SECONDS = [0.5, 0.8, 0.6]
OWN_RECORDINGS = [[0, 1], [2], []]


@pytest.fixture
def speech(model) -> dict:
    return batch_of(model, CONTEXTS, ANSWERS, SECONDS)


def one_recording_each(model) -> dict:
    """Prompts of different lengths, long enough to leave a sliding window of 16 while they are answered."""
    contexts = [[30 + i for i in range(5)] + [LOC, 40, 41], [LOC] + [50 + i for i in range(13)], [60, LOC]]
    return batch_of(model, contexts, ANSWERS, SECONDS)


# The plainest way: one hypothesis at a time, from its first token on, without padding or caches.


def memories(model, batch: dict, own_recordings: list[list[int]]) -> list:
    frames_RFH, lens_R = model.encode_speech(batch["audios"], batch["audio_lens"])
    found = []
    for recordings in own_recordings:
        F = frames_RFH.shape[1]
        own = torch.tensor(recordings, dtype=torch.long)
        mask_KF = torch.arange(F) < lens_R[own][:, None]
        found.append(model.cross_attention.memory(frames_RFH[own][None], mask_KF[None]))
    return found


def plain_logits(model, ids: list[int], memory) -> Tensor:
    embeds = model.cross_attention(model.embed_tokens(torch.tensor([ids])), memory)
    return model.llm(inputs_embeds=embeds, use_cache=False).logits[0]


def plain_search(model, text: list[int], memory, num_beams: int, ends: list[int]) -> list[int]:
    """The best of the answers of just ``NEW_TOKENS`` different tokens."""
    beams = [(0.0, [])]
    for _ in range(NEW_TOKENS):
        longer = []
        for score, said in beams:
            log_probs = plain_logits(model, text + said, memory)[-1].log_softmax(0)
            log_probs[ends + said] = -torch.inf
            best = log_probs.topk(num_beams)
            longer += [
                (score + p, [*said, t]) for p, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(longer, key=lambda beam: -beam[0])[:num_beams]
    return beams[0][1]


def generated(model, batch: dict, **options) -> list[list[int]]:
    """Answers of a fixed length that say nothing twice, as random models would; else hypotheses hardly differ."""
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "no_repeat_ngram_size": 1}
    settings |= {"do_sample": False, "eos_token_id": ends(model), "pad_token_id": model.pad_id}
    with torch.no_grad():
        return model.generate_answers(batch, **(settings | options)).tolist()


def ends(model) -> list[int]:
    return [model.tokenizer.eos_id]


# Training


def test_answers_are_predicted_from_texts_without_locators_and_from_their_own_recordings(model, speech) -> None:
    logits_BAV, targets_BA = model(speech)
    assert targets_BA.tolist() == [[20, 21, -100], [22, 23, 24], [25, -100, -100]]
    for b, memory in enumerate(memories(model, speech, OWN_RECORDINGS)):
        answer = ANSWERS[b]
        expected = plain_logits(model, TEXTS[b] + answer, memory)[-len(answer) - 1 : -1]
        torch.testing.assert_close(logits_BAV[b, : len(answer)], expected, rtol=1e-4, atol=1e-4)


def test_the_language_models_sequence_is_as_long_as_its_text(model, speech) -> None:
    inputs = model.llm_inputs(speech)
    assert list(inputs.kwargs) == ["inputs_embeds"]
    assert inputs.kwargs["inputs_embeds"].shape[1] == 5 - 1  # nothing is predicted from the last token
    assert inputs.positions_BA.tolist() == [[2, 3, 0], [0, 1, 2], [3, 0, 0]]


def test_speech_is_listened_to_and_so_is_the_order_of_recordings(model, speech) -> None:
    logits = model(speech)[0]
    louder = model(speech | {"audios": speech["audios"].flip(1)})[0]
    assert not torch.allclose(louder[:2], logits[:2], atol=1e-3)
    assert torch.equal(louder[2, 0], logits[2, 0]), "an example without speech attends to none"
    swapped = speech | {"audios": speech["audios"][[1, 0, 2]], "audio_lens": speech["audio_lens"][[1, 0, 2]]}
    assert not torch.allclose(model(swapped)[0][0], logits[0], atol=1e-3)


def test_earlier_turns_are_trained_on_where_the_batch_says_so(model, speech) -> None:
    is_turn = torch.tensor([[True, True, True, False, False], [False] * 5, [False, True, False, True, False]])
    inputs = model.llm_inputs(speech | {"context_targets": is_turn})
    # The very first token is predicted by nothing, and a locator is nothing to predict.
    assert inputs.targets_BA.tolist() == [[-100, 6, 20, 21], [22, 23, 24, -100], [10, 12, 25, -100]]
    assert inputs.positions_BA.tolist() == [[0, 0, 2, 3], [0, 1, 2, 0], [0, 2, 3, 0]]


def test_a_new_model_has_the_outputs_of_its_language_model(folder, tiny_asr) -> None:
    model = BestowGPT(model_config("llama", folder, tiny_asr, cross_attention=CROSS_ATTENTION)).eval()
    with_speech = model(batch_of(model, CONTEXTS, ANSWERS, SECONDS))
    text_only = model(batch_of(model, TEXTS, ANSWERS))
    assert torch.equal(with_speech[0], text_only[0])
    assert torch.equal(with_speech[1], text_only[1])


def test_text_goes_past_the_cross_attention_to_the_bit(of_family) -> None:
    model = of_family
    inputs = model.llm_inputs(batch_of(model, TEXTS, ANSWERS))
    reference = AutoModelForCausalLM.from_pretrained(model.options.pretrained_llm, dtype=torch.float32).eval()
    reference.model.layers.load_state_dict(model.llm.model.layers.state_dict())
    sequences = [text + answer for text, answer in zip(TEXTS, ANSWERS, strict=True)]
    ids_BT, _ = padded(sequences, model.pad_id)
    expected = answer_logits(
        reference, LLMInputs({"input_ids": ids_BT[:, :-1]}, inputs.targets_BA, inputs.positions_BA)
    )
    found = answer_logits(model.llm, inputs)
    assert torch.equal(found[inputs.targets_BA != IGNORE_INDEX], expected[inputs.targets_BA != IGNORE_INDEX])


def test_text_gives_the_cross_attention_no_gradient_and_speech_gives_it_to_all_of_it(model, speech) -> None:
    model.training_step({"text": batch_of(model, TEXTS, ANSWERS)}, 0).backward()
    parts = dict(model.cross_attention.named_parameters()) | dict(model.perception.named_parameters())
    assert all(parameter.grad is None for parameter in parts.values())
    model.training_step({"audio": speech}, 0).backward()
    idle = [name for name, parameter in model.cross_attention.named_parameters() if not parameter.grad.any()]
    model.zero_grad()
    assert idle == []


def test_a_batch_is_planned_on_tensors_without_values(model, speech) -> None:
    one_each = one_recording_each(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: mode.from_tensor(value) for key, value in one_each.items()}
        inputs = model.llm_inputs(fake)
    assert inputs.kwargs["inputs_embeds"].shape == (3, 14 + 3 - 1 - 1, 32)
    assert inputs.targets_BA.shape == (3, 3)


def test_the_host_reads_the_device_once(model, speech, monkeypatch) -> None:
    frames = model.encode_speech(speech["audios"], speech["audio_lens"])
    monkeypatch.setattr(model, "encode_speech", lambda *_: frames)
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero"):
        read = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *args, n=name, r=read: (reads.append(n), r(*args))[1])
    model.llm_inputs(speech)
    assert reads == ["tolist"]


# Generation


def test_greedy_answers_are_the_likeliest_token_after_token(of_family) -> None:
    model = of_family
    batch = one_recording_each(model)
    found = generated(model, batch)
    assert len({tuple(answer) for answer in found}) == 3, "prompts and recordings differ, so should the answers"
    texts = [[*range(30, 35), 40, 41], list(range(50, 63)), [60]]
    with torch.no_grad():
        for text, memory, answer in zip(texts, memories(model, batch, [[0], [1], [2]]), found, strict=True):
            logits = plain_logits(model, text + answer, memory)[len(text) - 1 : -1]
            for step in range(NEW_TOKENS):
                logits[step, ends(model) + answer[:step]] = -torch.inf
            assert logits.argmax(1).tolist() == answer


def test_four_beams_find_what_a_search_without_caches_finds(of_family) -> None:
    model = of_family
    batch = one_recording_each(model)
    found = generated(model, batch, num_beams=4)
    texts = [[*range(30, 35), 40, 41], list(range(50, 63)), [60]]
    with torch.no_grad():
        for text, memory, answer in zip(texts, memories(model, batch, [[0], [1], [2]]), found, strict=True):
            assert plain_search(model, text, memory, 4, ends(model)) == answer


@pytest.mark.parametrize("num_beams", [1, 4])
def test_batched_and_one_by_one_are_the_same(of_family, num_beams) -> None:
    model = of_family
    batch = one_recording_each(model)
    alone = [generated(model, rows(batch, [i]), num_beams=num_beams)[0] for i in range(3)]
    assert generated(model, batch, num_beams=num_beams) == alone


def test_several_recordings_and_none_are_answered_together(model, speech) -> None:
    found = generated(model, speech)
    for text, memory, answer in zip(TEXTS, memories(model, speech, OWN_RECORDINGS), found, strict=True):
        assert plain_search(model, text, memory, 1, ends(model)) == answer
    text_only = batch_of(model, TEXTS, ANSWERS)
    assert generated(model, text_only)[2] == found[2]


def test_either_side_may_be_padded(model) -> None:
    batch = one_recording_each(model)
    contexts = [ids[:n] for ids, n in zip(batch["context_ids"], batch["context_lens"], strict=True)]
    answers = []
    for side in ("left", "right"):
        prompts = nn.utils.rnn.pad_sequence(contexts, True, padding_value=model.pad_id, padding_side=side)
        answers.append(
            model.generate(prompts, batch["audios"], batch["audio_lens"], max_new_tokens=NEW_TOKENS).tolist()
        )
    assert answers[0] == answers[1]


def test_sampling_answers_each_prompt_as_often_as_asked(model) -> None:
    batch = one_recording_each(model)
    greedy = generated(model, batch)
    sampled = generated(model, batch, do_sample=True, top_k=1, num_return_sequences=2)
    assert sampled == [answer for answer in greedy for _ in range(2)]
    torch.manual_seed(0)
    assert generated(model, batch, do_sample=True, top_k=0, temperature=2.0) != greedy


@pytest.mark.parametrize("num_beams", [1, 4])
def test_speech_is_encoded_once_however_long_the_answer(model, num_beams, monkeypatch) -> None:
    calls = []
    encode, memory = model.encode_speech, SpeechCrossAttention.memory
    monkeypatch.setattr(model, "encode_speech", lambda *args: (calls.append("encode"), encode(*args))[1])
    monkeypatch.setattr(SpeechCrossAttention, "memory", lambda *args: (calls.append("memory"), memory(*args))[1])
    generated(model, one_recording_each(model), num_beams=num_beams)
    assert calls == ["encode", "memory"]


def test_nothing_is_left_behind_by_generation(model, speech) -> None:
    before = model(speech)[0]
    generated(model, speech)
    assert torch.equal(model(speech)[0], before)
    assert not hasattr(model.llm.model, "embed_tokens")


def test_lora_trains_and_generates(folder, tiny_asr) -> None:
    model = build("llama", folder, tiny_asr, lora=LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they begin at zero
            nn.init.normal_(parameter, std=0.1)
    batch = one_recording_each(model)
    with torch.no_grad():
        text, memory = [60], memories(model, batch, [[2]])[0]
        assert plain_search(model, text, memory, 4, ends(model)) == generated(model, batch, num_beams=4)[2]


# Folders and wrong use


def test_an_exported_folder_gives_the_same_logits(model, speech, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, BestowGPT)
    assert torch.equal(again(speech)[0], model(speech)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_head": 4}, "cross_attention.num_head: there is no such key; did you mean 'num_heads'"),
        ({"window": 4}, "cross_attention.window: there is no such key; use num_layers"),
        ({"num_heads": 5}, "cross_attention.num_heads: 5 heads do not divide the width 32"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(folder, options, words) -> None:
    with pytest.raises(ConfigError, match=words):
        BestowGPT(model_config("llama", folder, cross_attention=options))


def test_a_surplus_recording_is_refused_with_both_counts(model, speech) -> None:
    speech["context_ids"][0, 1] = 5
    with pytest.raises(DataError, match="3 recordings but 2 audio locator"):
        model(speech)


def test_a_cache_of_a_fixed_size_is_refused(folder, tiny_asr) -> None:
    model = build("llama", folder, tiny_asr)
    with pytest.raises(ModelError, match="leave `past_key_values`"):
        generated(model, one_recording_each(model), cache_implementation="static")


def test_an_encoder_decoder_is_refused(folder) -> None:
    with pytest.raises(ModelError, match="BestowGPT is built on a decoder-only model"):
        BestowGPT(model_config("t5", folder))
