"""Which adapter a model gets, and models of which nothing but a schema is known."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from nemo.core.neural_types import AudioSignal, LabelsType, LengthsType, MaskType, NeuralType, VoidType

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.adapters import Extent, SchemaAdapter, adapter_for, register_adapter, registry
from nemo_emmett.oomptimizer.buckets import Shape

from .steps import CPU

IDS, LENGTHS = NeuralType(("B", "T"), LabelsType()), NeuralType(("B",), LengthsType())


class Translator(torch.nn.Module):
    """Reads and writes text."""

    schema: ClassVar = {
        "cls": dict,
        "inputs": [
            {"name": "source", "type": IDS, "seq_length": "input", "vocab_size": 11},
            {"name": "source_lens", "type": LENGTHS, "seq_length": "input"},
            {"name": "target", "type": IDS, "seq_length": "output", "vocab_size": 7},
            {"name": "mask", "type": NeuralType(("B", "T"), MaskType()), "seq_length": "output"},
            {"name": "examples", "type": "constant", "value": "batch"},
            {"name": "seed", "type": "constant", "value": 5},
            {"name": "notes", "type": "dummy"},
        ],
    }

    @property
    def oomptimizer_schema(self) -> dict:
        return self.schema


class Recogniser(Translator):
    """Reads speech; its batch is a tuple."""

    sampling_rate = 8000
    schema: ClassVar = {
        "cls": tuple,
        "inputs": [
            {"type": NeuralType(("B", "T"), AudioSignal()), "seq_length": "input"},
            {"type": LENGTHS, "seq_length": "input"},
            {"type": IDS, "seq_length": "output", "vocab_size": 7},
        ],
    }


@pytest.fixture(autouse=True)
def forget_registrations(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_registered", [])


def test_every_input_of_a_schema_is_made() -> None:
    adapter = adapter_for(Translator())
    batch = adapter.synthetic_batch(Shape("text", 0.0, 9, 4), 3, CPU)
    assert batch["source"].shape == (3, 9)
    assert set(batch["source"].flatten().tolist()) <= set(range(11))
    assert batch["source_lens"].tolist() == [9, 9, 9]
    assert batch["target"].shape == (3, 4)
    assert batch["mask"].shape == (3, 4)
    assert batch["mask"].all()
    assert batch["examples"].tolist() == [3]
    assert batch["seed"].tolist() == [5]
    assert batch["notes"].numel() == 0
    assert adapter.extents(batch) == [Extent("text", 3, 0.0, 9, 4)]  # the target's length is its width


def test_seconds_become_samples_at_the_models_rate() -> None:
    adapter = adapter_for(Recogniser())
    batch = adapter.synthetic_batch(Shape("audio", 1.5, 0, 4), 2, CPU)
    assert isinstance(batch, tuple)
    assert batch[0].shape == (2, 12000)
    assert batch[1].tolist() == [12000, 12000]
    assert adapter.extents(batch) == [Extent("audio", 2, 1.5, 0, 4)]


def test_no_random_state_is_touched_and_a_batch_can_be_had_again() -> None:
    adapter, shape = adapter_for(Recogniser()), Shape("audio", 1.5, 0, 4)
    before = torch.get_rng_state()
    first = adapter.synthetic_batch(shape, 2, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, adapter.synthetic_batch(shape, 2, CPU)))


def test_a_model_of_which_only_the_schema_is_known_is_not_split() -> None:
    adapter = adapter_for(Translator())
    assert type(adapter) is SchemaAdapter
    assert not adapter.can_split
    for attempt in (lambda: adapter.split_batch({}, 2), lambda: adapter.loss_weight({}, {})):
        with pytest.raises(ConfigError, match="how the loss of Translator weighs its examples is not known"):
            attempt()


def test_what_is_registered_last_comes_first() -> None:
    class Mine(SchemaAdapter):
        pass

    class MineOfOne(SchemaAdapter):
        pass

    special = Recogniser()
    register_adapter(Translator, Mine)
    assert type(adapter_for(special)) is Mine
    register_adapter(lambda model: model is special, MineOfOne)
    assert type(adapter_for(special)) is MineOfOne
    assert type(adapter_for(Recogniser())) is Mine


def test_a_model_without_a_schema_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no `oomptimizer_schema`.*register_adapter"):
        adapter_for(torch.nn.Linear(1, 1))


def test_a_registered_model_needs_no_schema() -> None:
    class Plain(SchemaAdapter):
        def __init__(self, model: object) -> None:
            self.model = model

    register_adapter(torch.nn.Linear, Plain)
    assert type(adapter_for(torch.nn.Linear(1, 1))) is Plain


@pytest.mark.parametrize("content", [None, {}, {"cls": dict, "inputs": []}, [("audio", 1)]])
def test_a_schema_of_another_form_is_refused(content: object) -> None:
    model = Translator()
    model.schema = content
    with pytest.raises(ConfigError, match="a dict with `cls` and `inputs` is needed"):
        adapter_for(model)


def test_a_schema_that_cannot_be_had_is_refused() -> None:
    class Unfinished(torch.nn.Module):
        @property
        def oomptimizer_schema(self) -> dict:
            raise NotImplementedError("later")

    with pytest.raises(ConfigError, match=r"Unfinished cannot be read.*NotImplementedError: later"):
        adapter_for(Unfinished())


def test_an_unknown_type_is_refused() -> None:
    model = Translator()
    model.schema = {
        "cls": dict,
        "inputs": [{"name": "x", "type": NeuralType(("B",), VoidType()), "seq_length": "input"}],
    }
    with pytest.raises(ConfigError, match=r"Translator has an input .*of which no random example can be made"):
        adapter_for(model).synthetic_batch(Shape("text", 0.0, 2, 2), 1, CPU)


def test_a_model_that_hides_its_sampling_rate_is_refused() -> None:
    class Silent(Recogniser):
        sampling_rate = None

    with pytest.raises(ConfigError, match="Silent does not define the samples per second of its speech"):
        adapter_for(Silent()).synthetic_batch(Shape("audio", 1.0, 0, 2), 1, CPU)


def test_a_vocabulary_of_special_tokens_is_refused() -> None:
    model = Translator()
    model.pad_id = 0
    model.schema = {"cls": dict, "inputs": [{"name": "x", "type": IDS, "seq_length": "input", "vocab_size": 1}]}
    with pytest.raises(ConfigError, match="a vocabulary of 1 holds nothing but special tokens"):
        adapter_for(model).synthetic_batch(Shape("text", 0.0, 2, 2), 1, CPU)
