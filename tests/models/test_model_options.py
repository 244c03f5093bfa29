"""Options of the `model` section that all models share: freezing, LoRA, checkpointing, compilation, smoothing."""

import copy
import json

import pytest
import torch
from torch._dynamo.utils import counters

from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.models.transformer_blocks import is_chosen, transformer_blocks

from ..oomptimizer.fits import Data, trainer_with
from .backbones import model_config, seeded
from .memorising import MODES, items

MODELS = {"t5": SALMT5, "llama": SALMGPT, "qwen2": BestowGPT}
LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.fixture(scope="module", params=MODELS)
def make(request, folder, tiny_asr):
    """Makes the model of a family with further keys in its section; the same random weights each time."""

    return lambda **overrides: seeded(MODELS[request.param], model_config(request.param, folder, tiny_asr, **overrides))


def step(model, batch) -> torch.Tensor:
    output = model.training_step(batch, 0)
    loss = output["loss"] if isinstance(output, dict) else output
    model.zero_grad()
    loss.backward()
    return loss.detach()


def trainable(model) -> set[str]:
    model.configure_optimizers()
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_with_a_frozen_language_model_the_speech_encoder_is_trained(make):
    model = make(freeze=["llm"])
    assert trainable(model)
    assert not [name for name in trainable(model) if name.startswith(("llm", "embed_tokens"))]
    # Text alone trains nothing then, and must not stop the training.
    assert step(model, items(model, MODES["text"])) > 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    step(model, items(model, MODES["zip"]))
    # The output of BESTOW's layers starts at zero, so they are trained before the encoder is.
    assert any(
        p.grad.any()
        for name, p in model.named_parameters()
        if name.startswith(("perception", "cross_att")) and p.grad is not None
    )


def test_with_a_frozen_encoder_adapter_and_language_model_are_trained(make):
    names = trainable(make(freeze=["encoder"]))
    assert not [name for name in names if name.startswith(("perception.encoder", "perception.preprocessor"))]
    assert "perception.proj.weight" in names
    assert [name for name in names if name.startswith("llm")]


def test_lora_trains_its_adapters_instead_of_the_language_model(make):
    model = make(lora=LORA)
    names = trainable(model)
    of_llm = [name for name in names if name.startswith(("llm", "embed_tokens"))]
    assert of_llm
    assert all(".lora_" in name for name in of_llm)
    step(model, items(model, MODES["zip"]))
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_B" in name)


def test_layers_that_peft_copies_are_trained_as_well(make):
    names = trainable(make(lora=LORA | {"modules_to_save": ["lm_head"]}))
    assert [name for name in names if "lm_head.modules_to_save." in name]
    assert not [name for name in names if "lm_head.original_module." in name]


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [5]}, {"target_modules": ["embed_tokens"]}],
)
def test_embeddings_that_peft_does_not_reach_are_refused(folder, options):
    with pytest.raises(ConfigError, match="SALMGPT keeps its token embeddings outside of the language model"):
        SALMGPT(model_config("llama", folder, lora=LORA | options))


@pytest.mark.parametrize("empty", ["answers of no width", "padding alone", "no column"])
def test_a_batch_without_answers_is_a_step_in_which_nothing_is_trained(make, empty):
    model = make()
    batch = items(model, MODES["zip"])
    alone = step(model, {"audio": batch["audio"]})
    text, none = batch["text"], torch.zeros(2, dtype=torch.long)
    text |= {"answer_lens": none, "answer_ids": text["answer_ids"][:, :0]} if "width" in empty else {}
    text |= {"answer_lens": none, "context_lens": none} if empty == "padding alone" else {}
    if empty == "no column":
        text |= {f"{part}_lens": none for part in ("context", "answer")}
        text |= {f"{part}_ids": text[f"{part}_ids"][:, :0] for part in ("context", "answer")}
    torch.testing.assert_close(step(model, batch), alone)
    assert step(model, {"text": text}) == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_what_the_recipe_wants_trained_beside_lora_is_trained(make):
    names = trainable(make(lora=LORA, prevent_freeze_params=[r"^llm\..+norm.+$"]))
    of_llm = [name for name in names if name.startswith(("llm", "embed_tokens")) and ".lora_" not in name]
    assert of_llm
    assert all("norm" in name for name in of_llm)


def test_a_folder_with_lora_translates_the_same(make, tmp_path):
    model = make(lora=LORA, max_new_tokens=5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(str(tmp_path)).eval()
    batch = items(model, MODES["text"])["text"]
    assert again.translate_batch(batch) == model.translate_batch(batch)


@pytest.mark.parametrize("share", [True, 0.5])
def test_activation_checkpointing_changes_no_name_no_loss_and_no_gradient(make, share):
    plain, saving = make(), make(activation_checkpointing=share)
    assert list(saving.state_dict()) == list(plain.state_dict())
    batch = items(plain, MODES["zip"])
    plain.train(), saving.train()
    for model in (plain, saving):
        model.perception.spec_augmentation = None
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    blocks = [*transformer_blocks(saving.llm), *saving.perception.encoder.layers]
    calls = [0] * len(blocks)

    def count(number: int) -> None:
        calls[number] += 1

    for number, block in enumerate(blocks):
        linear = next(module for module in block.modules() if isinstance(module, torch.nn.Linear))
        linear.register_forward_hook(lambda *_, number=number: count(number))
    torch.testing.assert_close(step(saving, batch), step(plain, copy.deepcopy(batch)))
    # A block of the language model is passed by speech and by text, a layer of the encoder by speech.
    whole = [2] * len(transformer_blocks(saving.llm)) + [1] * len(saving.perception.encoder.layers)
    again = {number for number, called in enumerate(calls) if called == 2 * whole[number]}
    assert all(calls[number] == whole[number] for number in {*range(len(blocks))} - again)
    of_llm = len(transformer_blocks(saving.llm))
    kept = {
        number for number in range(len(blocks)) if not is_chosen(number - of_llm * (number >= of_llm), float(share))
    }
    assert again == {*range(len(blocks))} - kept
    expected = dict(plain.named_parameters())
    for name, parameter in saving.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "")  # which torch leaves out of state dicts
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_gradients_are_clipped_for_a_fused_optimizer_too(make, tmp_path, precision):
    """Lightning refuses it under any mixed precision, with or without a loss scale."""
    norms: dict[bool, list[list[float]]] = {False: [], True: []}
    for fused in (False, True):
        model = make(optimizer={"_target_": "torch.optim.AdamW", "lr": 1e-4, "fused": fused})
        del model.log
        model.on_before_zero_grad = lambda _, model=model, fused=fused: norms[fused].append(
            [p.grad.float().norm().item() for p in model.parameters() if p.grad is not None]
        )
        trainer = trainer_with(tmp_path, precision=precision, gradient_clip_val=0.01)
        trainer.fit(model, datamodule=Data({}, [items(model, MODES["zip"])] * 3))
    for plain, of_fused in zip(norms[False], norms[True], strict=True):
        assert sum(norm**2 for norm in of_fused) ** 0.5 == pytest.approx(0.01 * bool(of_fused), rel=1e-2)
        assert of_fused == pytest.approx(plain, rel=0.05, abs=1e-5)
    assert any(norms[True])


def test_compiled_blocks_give_the_same_loss(make):
    # The backend that runs what was traced as it is: a compiler would take longer than all the rest.
    compiled, plain = make(compile={"backend": "eager"}), make()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    batch = items(plain, MODES["zip"])
    torch.testing.assert_close(step(compiled, batch), step(plain, batch))


def test_generation_goes_round_the_compiled_blocks(make):
    model = make(compile={"backend": "eager"}, max_new_tokens=3)
    batch = items(model, MODES["text"])
    torch._dynamo.reset()
    counters.clear()
    model.translate_batch(batch["text"])
    assert counters["stats"]["unique_graphs"] == 0
    step(model, batch)
    assert counters["stats"]["unique_graphs"] > 0


def test_the_smoothed_loss_is_pytorchs(make):
    model = make(label_smoothing=0.3)
    batch = items(model, MODES["text"])
    logits, targets = model(batch["text"])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.3)
    torch.testing.assert_close(step(model, batch), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"freeze": ["decoder"]}, "model.freeze.0: 'decoder' cannot be used; give 'llm' or 'encoder'."),
        ({"loss_implementation": "ligr"}, "model.loss_implementation"),
        ({"label_smoothing": 1.5}, "model.label_smoothing: 1.5"),
        ({"lora": {"rank": 4}}, "model.lora.rank: there is no such key"),
        ({"freeze": "llm"}, "model.freeze: 'llm' cannot be used; give a list, each item 'llm' or 'encoder'."),
        ({"freeze_params": "^llm"}, "model.freeze_params: '^llm' cannot be used; give a list"),
        ({"label_smoothing": "0,1"}, "model.label_smoothing: '0,1' cannot be used; give a number from 0 to 1."),
        ({"modality_loss_weights": {"audio": None}}, "model.modality_loss_weights.audio: None cannot be"),
        ({"modality_loss_weights": {"text": -1}}, "model.modality_loss_weights.text: -1 cannot be"),
        ({"max_new_tokens": 0}, "model.max_new_tokens: 0 cannot be"),
        ({"encoder_chunk_size_seconds": 0}, "model.encoder_chunk_size_seconds: 0 cannot be"),
        ({"lora": LORA | {"bias": "lora_only"}}, "model.lora.bias: 'lora_only' is not possible"),
        ({"lora": {"target_modules": ["nowhere"]}}, "the linear layers of this language model are"),
    ],
)
def test_mistakes_get_one_sentence(make, change, sentence):
    with pytest.raises(ConfigError) as refused:
        make(**change)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "adapter",
    [
        {"_target_": "nemo_emmett.modules.modality_adapters.MLPConector"},
        {"_target_": "nemo_emmett.modules.modality_adapters.MLPConnector", "input_dim": 32, "depth": 3},
    ],
)
def test_a_modality_adapter_that_cannot_be_built_gets_one_sentence(make, adapter):
    with pytest.raises(ConfigError, match=r"model\.perception\.modality_adapter\.(_target_|depth): ") as refused:
        make(perception={"modality_adapter": adapter})
    assert "\n" not in str(refused.value)


def test_cross_attention_is_refused_where_it_means_nothing(folder):
    with pytest.raises(ConfigError, match=r"model\.cross_attention: SALMGPT has no such layers"):
        SALMGPT(model_config("llama", folder, cross_attention={"num_layers": 1}))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_computed_as_asked(make, implementation):
    model = make(attn_implementation=implementation)
    assert model.llm.config._attn_implementation == implementation


def test_attention_that_is_not_there_is_refused(make):
    with pytest.raises(ConfigError, match=r"^model.attn_implementation: flash_attention_2 is not possible \(.+\); "):
        make(attn_implementation="flash_attention_2")
    with pytest.raises(ConfigError, match=r"^model.attn_implementation: .*someone/kernel"):
        make(attn_implementation="someone/kernel")


def test_the_folder_does_not_name_the_attention_of_the_training(make, tmp_path):
    make(attn_implementation="eager").save_pretrained(tmp_path / "model")
    assert "attn_implementation" not in json.loads((tmp_path / "model" / "config.json").read_text())
