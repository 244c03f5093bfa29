"""Each family of encoder-decoders: what its decoder reads in training, and how it is begun in generation."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.models import SALMT5, load
from nemo_emmett.prompts.instruction import translation_turns
from nemo_emmett.prompts.request import Request

from .backbones import ENCODER_DECODERS, PROMPT_FORMAT, model_config
from .batches import prompted_batch

PAIRS = [("one red house", "ein rotes haus"), ("six", "sechs"), ("four old doors", "vier alte türen")]
WITH_LANGUAGE_TOKENS = {
    "m2m100": ("__de__", "__en__"),
    "nllb": ("deu_Latn", "eng_Latn"),
    "mbart": ("de_DE", "en_XX"),
    "mbart50": ("de_DE", "en_XX"),
}
WITH_OUTPUT_LAYER_OF_THEIR_OWN = ["t5v1_1", "mt5", "umt5", "ul2"]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """``model_of(family)``: a text-only SALM-T5 in evaluation mode, made once."""
    folder, made = tmp_path_factory.mktemp("backbones"), {}

    def make(family: str) -> SALMT5:
        if family not in made:
            config = model_config(family, folder)
            config.pop("prompt_format")
            made[family] = livelier(SALMT5(config).eval())
        return made[family]

    return make


def livelier(model: SALMT5) -> SALMT5:
    """With weights so large that answers are not one token again and again."""
    torch.manual_seed(0)
    for parameter in model.llm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(params=list(ENCODER_DECODERS))
def family(request) -> str:
    return request.param


@pytest.fixture(params=list(WITH_LANGUAGE_TOKENS))
def family_with_language_tokens(request) -> str:
    return request.param


def padded(rows: list, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    return pad_sequence(rows, batch_first=True, padding_value=pad_id), torch.tensor([len(row) for row in rows])


def batch_of(model: SALMT5, pairs=PAIRS, source_lang: str = "en", target_lang: str = "de") -> dict:
    """A batch as the data pipeline makes it with the model's prompt format."""
    requests = [Request(i, source, source_lang, target_lang, target, {}) for i, (source, target) in enumerate(pairs)]
    encoded = model._prompt_formatter().encode_requests(requests)
    context_ids, context_lens = padded([one["context_ids"] for one in encoded], model.pad_id)
    answer_ids, answer_lens = padded([one["answer_ids"] for one in encoded], model.pad_id)
    return {
        "context_ids": context_ids,
        "context_lens": context_lens,
        "answer_ids": answer_ids,
        "answer_lens": answer_lens,
        "examples": [{"target_lang": target_lang}] * len(pairs),
    }


def for_hugging_face(model: SALMT5, batch: dict) -> dict:
    positions = torch.arange(batch["context_ids"].shape[1])
    mask = (positions < batch["context_lens"][:, None]).long()
    return {"input_ids": batch["context_ids"], "attention_mask": mask}


def token(model: SALMT5, text: str) -> int:
    return model.tokenizer.tokenizer.convert_tokens_to_ids(text)


# Training


def test_a_model_that_is_told_no_format_takes_its_familys(model_of, family) -> None:
    assert model_of(family).data_defaults["prompt_format"] == PROMPT_FORMAT[family]


def test_the_decoder_reads_what_hugging_face_makes_of_labels(model_of, family) -> None:
    model = model_of(family)
    batch = batch_of(model)
    positions = torch.arange(batch["answer_ids"].shape[1])
    labels = batch["answer_ids"].masked_fill(positions >= batch["answer_lens"][:, None], -100)
    read = []
    hook = model.llm.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        theirs = model.llm(**for_hugging_face(model, batch), labels=labels)
        logits, targets = model(batch)
    hook.remove()
    assert torch.equal(read[0], read[1])
    assert torch.equal(targets, labels)
    torch.testing.assert_close(logits, theirs.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits.argmax(-1), theirs.logits.argmax(-1))
    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert ours.item() == pytest.approx(theirs.loss.item(), rel=1e-5)


def test_the_loss_of_a_step_is_that_of_hugging_face(model_of, family) -> None:
    model = model_of(family)
    model.log = lambda *args, **kwargs: None
    batch = batch_of(model)
    positions = torch.arange(batch["answer_ids"].shape[1])
    labels = batch["answer_ids"].masked_fill(positions >= batch["answer_lens"][:, None], -100)
    with torch.no_grad():
        expected = model.llm(**for_hugging_face(model, batch), labels=labels).loss.item()
        assert model.training_step({"text": batch}, 0).item() == pytest.approx(expected, rel=1e-5)


# Generation


def test_generation_is_that_of_hugging_face_without_what_the_decoder_is_begun_with(model_of, family) -> None:
    model = model_of(family)
    batch = batch_of(model)
    begun = {}
    if family in WITH_LANGUAGE_TOKENS:
        german = token(model, WITH_LANGUAGE_TOKENS[family][0])
        begun = {"decoder_start_token_id": german} if family == "mbart" else {"forced_bos_token_id": german}
    width = 2 if "forced_bos_token_id" in begun else 1
    plain = {"num_beams": 1, "do_sample": False, "forced_eos_token_id": None, "early_stopping": False}
    theirs = model.llm.generate(**for_hugging_face(model, batch), max_new_tokens=6 + width - 1, **plain, **begun)
    ours = model.generate(batch["context_ids"], target_lang="de", max_new_tokens=6)
    assert ours.tolist() == theirs[:, width:].tolist()
    assert ours.shape[1] == 6


def test_a_batch_may_ask_for_several_languages(model_of, family_with_language_tokens) -> None:
    model = model_of(family_with_language_tokens)
    batch = batch_of(model, [PAIRS[0], PAIRS[0]])
    both = model.generate(batch["context_ids"], target_lang=["de", "en"], max_new_tokens=5, num_beams=3)
    for row, language in zip(both, ("de", "en"), strict=True):
        alone = model.generate(batch["context_ids"][:1], target_lang=language, max_new_tokens=5, num_beams=3)
        assert row[: alone.shape[1]].tolist() == alone[0].tolist()
    assert both[0].tolist() != both[1].tolist()


def test_the_language_is_that_of_the_batch_the_turn_or_the_argument(model_of, family_with_language_tokens) -> None:
    model = model_of(family_with_language_tokens)
    batch = batch_of(model, [PAIRS[0]])
    expected = model.generate(batch["context_ids"], target_lang="de", max_new_tokens=5).tolist()
    (text,) = model.tokenizer.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert model.translate_batch(batch, max_new_tokens=5) == [text.strip()]
    (turn,) = translation_turns(model._prompt_formatter(), PAIRS[0][0], "de", "en")
    turn["slots"]["target_lang"] = "de"
    assert model.generate([[turn]], max_new_tokens=5).tolist() == expected
    turn["slots"]["target_lang"] = "en"
    assert model.generate([[turn]], max_new_tokens=5).tolist() != expected
    assert model.generate([[turn]], target_lang="de", max_new_tokens=5).tolist() == expected
    assert model.translate([PAIRS[0][0]], "en", "de", max_new_tokens=5) == [text.strip()]


def test_what_the_caller_begins_the_decoder_with_holds(model_of, family_with_language_tokens) -> None:
    model = model_of(family_with_language_tokens)
    batch = batch_of(model, [PAIRS[0], PAIRS[1]])
    contexts, english = batch["context_ids"], token(model, WITH_LANGUAGE_TOKENS[family_with_language_tokens][1])
    expected = model.generate(contexts, target_lang="en", max_new_tokens=5).tolist()
    start = [english] if family_with_language_tokens == "mbart" else [2, english]
    begun = torch.tensor([start, start])
    assert model.generate(contexts, decoder_input_ids=begun, max_new_tokens=5).tolist() == expected
    if family_with_language_tokens == "mbart":
        assert model.generate(contexts, decoder_start_token_id=english, max_new_tokens=5).tolist() == expected
    else:
        assert model.generate(contexts, forced_bos_token_id=english, max_new_tokens=5).tolist() == expected


def test_a_language_that_is_needed_and_not_known_is_one_sentence(model_of, family) -> None:
    model = model_of(family)
    contexts = batch_of(model)["context_ids"]
    if family not in WITH_LANGUAGE_TOKENS:
        assert model.generate(contexts, max_new_tokens=3).shape == (3, 3)
        return
    with pytest.raises(ConfigError) as refused:
        model.generate(contexts, max_new_tokens=3)
    assert str(refused.value) == (
        f"prompt_format {PROMPT_FORMAT[family]}: an answer begins with its language's token, but the language is not "
        "known; give `target_lang`, such as 'de', to generate or in the slots of the user's turn."
    )
    with pytest.raises(ConfigError, match="no token for the language 'la'"):
        model.generate(contexts, target_lang="la")


def test_a_row_does_not_depend_on_what_it_is_padded_with(model_of, family) -> None:
    model = model_of(family)
    batch = batch_of(model)
    for side in ("right", "left"):
        rows = batch["context_ids"]
        if side == "left":
            shifts = rows.shape[1] - batch["context_lens"]
            rows = torch.stack([row.roll(int(shift)) for row, shift in zip(rows, shifts, strict=True)])
        together = model.generate(rows, target_lang="de", max_new_tokens=5)
        for row, n, answer in zip(batch["context_ids"], batch["context_lens"], together, strict=True):
            alone = model.generate(row[None, : int(n)], target_lang="de", max_new_tokens=5)[0]
            assert alone.tolist() == answer[: len(alone)].tolist()


def test_what_is_longer_than_mbart_has_positions_for_is_one_sentence(model_of) -> None:
    model = model_of("mbart")
    longest = model.llm.config.max_position_embeddings
    ids = torch.full((2, longest + 1), token(model, "</s>"))
    assert model.encoder_inputs({"context_ids": ids, "context_lens": torch.tensor([longest, 3])}).lens_B[0] == longest
    with pytest.raises(DataError, match=f"an example is {longest + 1} tokens long, .* reads at most {longest}; lower"):
        model.encoder_inputs({"context_ids": ids, "context_lens": torch.tensor([longest + 1, 3])})


def test_speech_behind_a_language_token(tmp_path, tiny_asr, tiny_corpus) -> None:
    model = SALMT5(model_config("m2m100", tmp_path, tiny_asr)).eval()
    path = tiny_corpus / "audio" / "en-0.wav"
    (translation,) = model.translate([path], "en", "de", max_new_tokens=5)
    (turn,) = translation_turns(model._prompt_formatter(), model.audio_locator_tag, "de", "en")
    ids = model.generate([[turn | {"audio": str(path)}]], target_lang="de", max_new_tokens=5)
    assert model.tokenizer.tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip() == translation


# Export


@pytest.mark.parametrize("family", WITH_OUTPUT_LAYER_OF_THEIR_OWN)
def test_an_output_layer_of_its_own_survives_the_export(model_of, family, tmp_path) -> None:
    model = model_of(family)
    assert not torch.equal(model.llm.lm_head.weight, model.llm.shared.weight)
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(loaded.llm.lm_head.weight, model.llm.lm_head.weight)
    assert torch.equal(loaded.llm.shared.weight, model.llm.shared.weight)
    assert loaded.llm.encoder.embed_tokens.weight is loaded.llm.shared.weight
    batch = batch_of(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch)[0], model(batch)[0], rtol=0, atol=0)


def test_a_tied_output_layer_stays_tied(model_of, tmp_path) -> None:
    model = model_of("t5")
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.llm.lm_head.weight is loaded.llm.shared.weight
    again = SALMT5(dict(model.cfg)).eval()
    again.load_state_dict(model.state_dict())
    assert again.llm.lm_head.weight is again.llm.shared.weight


@pytest.mark.parametrize(
    "lora", [{"target_modules": ["lm_head"]}, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}]
)
def test_an_output_layer_of_its_own_survives_export_behind_peft(tmp_path, lora):
    model = SALMT5(model_config("t5v1_1", tmp_path / "backbones", lora={"r": 2} | lora)).eval()
    model.save_pretrained(tmp_path / "exported")
    batch = prompted_batch(model, ["one red house"], ["ein haus"])
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "exported")(batch)[0], model(batch)[0])


def test_a_locator_in_an_answer_is_refused(tmp_path):
    model = SALMT5(model_config("mbart", tmp_path)).eval()
    batch = prompted_batch(model, ["one red house"], ["ein <|audio|>"])
    with pytest.raises(DataError, match="0 recordings but 1 audio locator tokens"):
        model(batch)
