"""LoRA that acts on speech alone: text is untouched to the bit, whatever else is in the batch and the model."""

from __future__ import annotations

import copy

import pytest
import torch

from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT, load
from nemo_emmett.models.head import answer_scores, output_layer
from nemo_emmett.modules.gated_lora import GatedLinear

from .backbones import model_config, seeded
from .batches import prompted_batch, rows, with_recordings
from .memorising import MODES, items
from .two_ranks import gradients

MODELS = {"t5": SALMT5, "m2m100": SALMT5, "llama": SALMGPT, "qwen2": BestowGPT}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
GATED = {"lora": LORA, "lora_modality": "audio"}


@pytest.fixture(scope="module", params=MODELS)
def make(request, folder, tiny_asr):
    """Makes the model of a family with further keys in its section; the same random weights each time."""

    return lambda **overrides: seeded(MODELS[request.param], model_config(request.param, folder, tiny_asr, **overrides))


def same_weights(model, other):
    """The other model with this one's speech encoder, adapter and cross-attention, which come after LoRA's draws."""
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(("llm", "embed_tokens"))}
    other.load_state_dict(state, strict=False)
    # torch chooses the kernel of a linear layer by whether its weight is trained (`should_fold` of its matmul).
    return other.requires_grad_(False)


def train(model, batches, steps: int, lr: float = 1e-2) -> None:
    model.configure_optimizers()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        output = model.training_step(batches[step % len(batches)], step)
        loss = output["loss"] if isinstance(output, dict) else output
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def act(model, scale: float = 0.3) -> None:
    """Give the adapters an output, which at first is zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=scale)


def mixed(model) -> dict:
    """Two examples with speech and two of text, in turn, in one batch."""
    locator = model.options.audio_locator_tag
    batch = prompted_batch(
        model, [locator, "one red house", locator, "two"], ["drei bäume", "ein haus", "sechs", "zwei blaue autos"]
    )
    return with_recordings(model, batch, [0.9, 0.5])


def logits_in_generation(model, batch, num_beams: int) -> list[torch.Tensor]:
    """Of each step of the search."""
    found: list[torch.Tensor] = []
    hook = output_layer(model.llm).register_forward_hook(lambda _module, _args, output: found.append(output))
    model.translate_batch(batch, num_beams, max_new_tokens=6)
    hook.remove()
    return found


SPEECH, TEXT = [0, 2], [1, 3]
"""Rows of ``mixed``."""


def test_text_is_the_incoming_models_to_the_bit_after_200_joint_steps_and_after_export(make, tmp_path):
    plain, model = make(), make(**GATED, freeze=["encoder"])
    batch, flat = items(model, MODES["zip"]), mixed(model)
    # One of the families is enough for the number that docs/models.md names.
    train(model, [batch, {"audio": flat}], 200 if model.llm.config.model_type == "t5" else 10)
    exported = tmp_path / "model"
    model.save_pretrained(exported)
    same_weights(model, plain)
    with torch.no_grad():
        expected, expected_mixed = plain(batch["text"])[0], plain(flat)[0].unflatten(0, (4, -1))
        for found in (model, load(exported)):
            assert torch.equal(found(batch["text"])[0], expected)
            of_mixed = found(flat)[0].unflatten(0, (4, -1))
            assert torch.equal(of_mixed[TEXT], expected_mixed[TEXT])
            assert not torch.isclose(of_mixed[SPEECH], expected_mixed[SPEECH]).all()
            assert not torch.isclose(found(batch["audio"])[0], plain(batch["audio"])[0]).all()
            for num_beams in (1, 3):
                logits = [logits_in_generation(one, batch["text"], num_beams) for one in (found, plain)]
                assert len(logits[0]) == len(logits[1]) > 1
                assert all(map(torch.equal, *logits))


def test_speech_is_what_ungated_lora_makes_of_it(make):
    gated, plain = make(**GATED), make(lora=LORA)
    act(gated), act(plain)
    batch = items(gated, MODES["speech"])
    assert torch.equal(gated(batch["audio"])[0], plain(batch["audio"])[0])
    assert list(gated.state_dict()) == list(plain.state_dict())
    for num_beams in (1, 3):
        assert gated.translate_batch(batch["audio"], num_beams) == plain.translate_batch(batch["audio"], num_beams)


def test_in_a_mixed_batch_each_row_is_generated_as_in_a_model_of_its_own(make):
    """Beams repeat rows, and later steps read the cache."""
    gated, plain, lora = make(**GATED), make(), make(lora=LORA)
    act(gated), act(lora)
    same_weights(gated, plain)
    batch = mixed(gated)
    for num_beams in (1, 3):
        found, of_text, of_speech = (
            model.translate_batch(batch, num_beams, max_new_tokens=8) for model in (gated, plain, lora)
        )
        assert [found[i] for i in TEXT] == [of_text[i] for i in TEXT]
        assert [found[i] for i in SPEECH] == [of_speech[i] for i in SPEECH]
        assert [of_text[i] for i in TEXT] != [of_speech[i] for i in TEXT], "the adapter changes nothing here"


def test_an_adapter_that_is_not_finite_does_not_reach_text(make):
    gated, plain = make(**GATED), make()
    for name, parameter in gated.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.constant_(parameter, float("inf"))
    same_weights(gated, plain)
    flat = mixed(gated)
    assert torch.equal(gated(flat)[0].unflatten(0, (4, -1))[TEXT], plain(flat)[0].unflatten(0, (4, -1))[TEXT])


def test_the_adapter_is_not_computed_for_a_batch_of_text(make):
    model = make(**GATED)
    batch = items(model, MODES["zip"])
    runs = []
    for name, module in model.named_modules():
        if name.endswith(".lora_A.default"):
            module.register_forward_hook(lambda *_: runs.append(1))
    model(batch["text"])
    model.translate_batch(batch["text"])
    assert not runs
    model(batch["audio"])
    assert runs


CHECKPOINTED, COMPILED = {"activation_checkpointing": True}, {"compile": {"backend": "eager"}}


# Tracing takes up to 20 s, and the layers are alike in all families.
@pytest.mark.parametrize(
    ("make", "how"), [*((name, CHECKPOINTED) for name in MODELS), ("llama", COMPILED)], indirect=["make"]
)
def test_gradients_are_the_same_where_blocks_are_checkpointed_or_compiled(make, how):
    """What is computed again has the rows of its own forward pass, though text has been in the model since."""
    torch._dynamo.reset()
    plain, other = make(**GATED), make(**GATED, **how)
    found = []
    for model in (plain, other):
        act(model)
        model.train()
        model.perception.spec_augmentation = None
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        batch = {"audio": mixed(model), "text": items(model, MODES["text"])["text"]}
        output = model.training_step(batch, 0)
        (output["loss"] if isinstance(output, dict) else output).backward()
        found.append({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gradients(model).items()})
    assert any(gradient.any() for name, gradient in found[0].items() if ".lora_A." in name)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_microbatches_add_up_to_the_batch(make):
    model = make(**GATED).double()  # sums in another order then differ by less than the bounds below, on any CPU
    act(model)
    batch = {"audio": mixed(model), "text": items(model, MODES["text"])["text"]}

    def step(one):
        output = model.training_step(one, 0)
        (output["loss"] if isinstance(output, dict) else output).backward()

    step(batch)
    whole = gradients(model)
    model.zero_grad()
    with model.one_step(batch):
        for part in model.split_batch(batch, 6):
            step(part)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True, "init_lora_weights": "orthogonal"},
        {"init_lora_weights": False, "lora_dropout": 0.1},
    ],
)
def test_peft_s_variants_leave_text_alone(folder, tiny_asr, options):
    gated = SALMGPT(model_config("llama", folder, tiny_asr, **GATED | {"lora": LORA | options})).eval()
    plain = SALMGPT(model_config("llama", folder, tiny_asr)).eval()
    act(gated)
    same_weights(gated, plain)
    flat = mixed(gated)
    found, expected = (model(flat)[0].unflatten(0, (4, -1)) for model in (gated, plain))
    assert torch.equal(found[TEXT], expected[TEXT])
    assert not torch.isclose(found[SPEECH], expected[SPEECH]).all()


@pytest.mark.parametrize("pack", [False, True])
def test_lora_in_the_output_layer_is_gated_in_training_too(folder, tiny_asr, pack):
    """Answers of unequal lengths, of which padding is left out; each loss is that of the example alone."""
    section = {"lora": LORA | {"target_modules": ["lm_head", "q_proj"]}, "lora_modality": "audio"}
    model = seeded(SALMGPT, model_config("llama", folder, tiny_asr, **section))
    act(model)
    batch = mixed(model)
    batch["answer_lens"][3] -= int(batch["answer_lens"].sum()) % 4  # as many targets as could be shared out evenly
    assert len(set(batch["answer_lens"].tolist())) > 1
    of_tokens = {key: value for key, value in batch.items() if not key.startswith("audio")}
    scores = [answer_scores(model.llm, model.llm_inputs(rows(of_tokens, [n])))[0].sum() for n in TEXT]
    chosen = SPEECH + TEXT if pack else [0, 1, 2, 3]
    order = rows(of_tokens, chosen) | {key: batch[key] for key in ("audios", "audio_lens")}
    if pack:
        sizes = (2, 1000, int(batch["answer_lens"].sum()))
        order |= {"packed_rows": torch.tensor([0, 0, 1, 1]), "packed_sizes": sizes}
    found = answer_scores(model.llm, model.llm_inputs(order))[0].sum(1)
    torch.testing.assert_close(found[[chosen.index(n) for n in TEXT]], torch.stack(scores), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name and ".lora_B." in name:
                parameter.mul_(2.0)
    again = answer_scores(model.llm, model.llm_inputs(order))[0].sum(1)
    assert torch.equal(again[[chosen.index(n) for n in TEXT]], found[[chosen.index(n) for n in TEXT]])
    assert not torch.isclose(again[[chosen.index(n) for n in SPEECH]], found[[chosen.index(n) for n in SPEECH]]).any()


def test_lora_in_the_output_layer_is_gated_too(folder, tiny_asr):
    """Which reads the answers' positions of all rows one after another."""
    section = {"lora": LORA | {"target_modules": ["lm_head", "q_proj"]}, "lora_modality": "audio"}
    gated = SALMGPT(model_config("llama", folder, tiny_asr, **section)).eval()
    plain = SALMGPT(model_config("llama", folder, tiny_asr)).eval()
    act(gated)
    same_weights(gated, plain)
    assert isinstance(gated.llm.get_base_model().lm_head, GatedLinear)
    flat = mixed(gated)
    found, expected = (model(flat)[0].unflatten(0, (4, -1)) for model in (gated, plain))
    assert torch.equal(found[TEXT], expected[TEXT])
    assert not torch.isclose(found[SPEECH], expected[SPEECH]).all()


def test_it_is_never_merged_and_never_guessed(folder, tiny_asr, tmp_path):
    model = SALMGPT(model_config("llama", folder, tiny_asr, **GATED)).eval()
    with pytest.raises(ModelError, match="cannot be merged"):
        copy.deepcopy(model).llm.merge_and_unload()
    with pytest.raises(ModelError, match="which examples have speech is not known"):
        model(model.embed(torch.tensor([[1, 2]])))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lora": None}, "model.lora_modality: audio needs LoRA to act, and the recipe has no model.lora; add it"),
        ({"perception": None}, "model.lora_modality: audio needs speech to act on"),
        ({"compile": True, "activation_checkpointing": True}, "model.compile: is not possible together with"),
        ({"objectives": {"retention": {}}}, "model.objectives.retention: trains nothing with model.lora_modality"),
        ({"lora_modality": "speech"}, "model.lora_modality: 'speech' cannot be used; give 'all' or 'audio'."),
        ({"prevent_freeze_params": [r"^llm\..+norm.+$"]}, "model.prevent_freeze_params: trains 'llm."),
        ({"prevent_freeze_params": [r"^embed_tokens\..+$"]}, "trains 'embed_tokens.weight', which text uses"),
        ({"lora": LORA | {"modules_to_save": ["lm_head"]}}, "model.lora.modules_to_save: ['lm_head'] trains copies"),
        ({"lora": LORA | {"trainable_token_indices": [5]}}, "model.lora.trainable_token_indices: [5] trains"),
        ({"lora": LORA | {"init_lora_weights": "pissa"}}, "model.lora.init_lora_weights: 'pissa' changes weights"),
        ({"lora": LORA | {"init_lora_weights": "pissa_niter_4"}}, "'pissa_niter_4' changes weights"),
        ({"lora": LORA | {"init_lora_weights": "olora"}}, "'olora' changes weights"),
        ({"lora": LORA | {"layer_replication": [[0, 2], [1, 2]]}}, "model.lora.layer_replication"),
    ],
)
def test_what_would_change_text_is_refused_in_one_sentence(folder, tiny_asr, change, sentence):
    with pytest.raises(ConfigError) as refused:
        SALMGPT(model_config("llama", folder, tiny_asr, **GATED | change))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_lora_in_embeddings_is_refused(folder, tiny_asr):
    section = GATED | {"lora": LORA | {"target_modules": ["shared"]}}
    with pytest.raises(ConfigError, match="LoRA in 'shared' cannot act on some examples of a batch alone"):
        SALMT5(model_config("t5", folder, tiny_asr, **section))
