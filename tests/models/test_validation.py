import pytest
import sacrebleu
import torch

from nemo_emmett.models.validation import Part, count_batch, gather_tallies, validation_metrics


def count(tallies: dict, dataset: str, rows: list[tuple], modality: str = "text") -> None:
    """Rows of (direction, loss, tokens, correct, hypothesis, reference)."""
    columns = list(zip(*rows, strict=True))
    examples = []
    for direction, reference in zip(columns[0], columns[5], strict=True):
        source, target = direction.split("-")
        examples.append({"source_lang": source, "target_lang": target, "target_text": reference})
    numbers = [torch.tensor(column) for column in columns[1:4]]
    count_batch(tallies, dataset, modality, examples, *numbers, list(columns[4]))


FOUR = "one two three four"


def test_losses_are_per_token_and_bleu_is_the_mean_over_directions():
    tallies = {}
    count(tallies, "a", [("en-de", 4.0, 2, 1, FOUR, FOUR), ("de-en", 9.0, 3, 3, "x", FOUR)])
    count(tallies, "a", [("en-de", 2.0, 1, 1, FOUR, FOUR)])
    count(tallies, "b", [("en-de", 5.0, 5, 0, FOUR, FOUR)])
    metrics = validation_metrics(gather_tallies(tallies))
    assert metrics["val_loss_a_en-de"] == pytest.approx(6 / 3)
    assert metrics["val_loss_a_de-en"] == pytest.approx(9 / 3)
    assert metrics["val_loss_a"] == pytest.approx(15 / 6)
    assert metrics["val_acc_a"] == pytest.approx(5 / 6)
    assert metrics["val_bleu_a_en-de"] == pytest.approx(100)
    assert metrics["val_bleu_a_de-en"] == 0
    assert metrics["val_bleu_a"] == pytest.approx(50)
    assert metrics["val_loss"] == pytest.approx((15 / 6 + 1) / 2)
    assert metrics["val_bleu"] == pytest.approx((50 + 100) / 2)


def test_a_set_of_both_modalities_counts_as_two():
    tallies = {}
    for modality, loss in (("text", 1.0), ("audio", 3.0)):
        count(tallies, "dev", [("en-de", loss, 1, 0, "", None)], modality)
    metrics = validation_metrics(tallies)
    assert (metrics["val_loss_dev_text"], metrics["val_loss_dev_audio"], metrics["val_loss"]) == (1.0, 3.0, 2.0)
    assert "val_loss_dev" not in metrics
    assert not any(name.startswith("val_bleu") for name in metrics)


def test_a_batch_without_metadata_has_no_direction():
    tallies = {}
    count_batch(tallies, "dev", "text", None, torch.tensor([2.0]), torch.tensor([4]), torch.tensor([1]), None)
    assert list(tallies) == [Part("dev", "text", None)]
    metrics = validation_metrics(tallies)
    assert metrics == {"val_loss_dev": 0.5, "val_acc_dev": 0.25, "val_loss": 0.5, "val_acc": 0.25}


def test_bleu_has_the_tokeniser_of_the_language_it_is_in():
    hypothesis, reference = "我喜欢绿色的茶", "我喜欢红色的茶"  # one word to 13a, seven to zh
    tallies = {}
    count(tallies, "dev", [("en-zh", 1.0, 1, 1, hypothesis, reference), ("en-de", 1.0, 1, 1, hypothesis, reference)])
    metrics = validation_metrics(tallies)
    expected = sacrebleu.corpus_bleu([hypothesis], [[reference]], tokenize="zh").score
    assert metrics["val_bleu_dev_en-zh"] == pytest.approx(expected)
    assert metrics["val_bleu_dev_en-zh"] > metrics["val_bleu_dev_en-de"] == 0


def test_bleu_has_the_tokeniser_of_a_language_with_a_script():
    hypothesis, reference = "我喜歡綠色的茶", "我喜歡紅色的茶"
    tallies = {}
    example = {"source_lang": "en", "target_lang": "zh-Hant", "target_text": reference}
    numbers = (torch.tensor([1.0]), torch.tensor([1]), torch.tensor([1]))
    count_batch(tallies, "dev", "text", [example], *numbers, [hypothesis])
    expected = sacrebleu.corpus_bleu([hypothesis], [[reference]], tokenize="zh").score
    assert validation_metrics(tallies)["val_bleu_dev_en-zh-Hant"] == pytest.approx(expected)
