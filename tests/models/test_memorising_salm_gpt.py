"""SALMGPT memorises translations and generates them, on every family of backbones."""

import pytest

from nemo_emmett.models import SALMGPT

from .backbones import DECODER_ONLY
from .memorising import MODES, built, check_generation, items, memorise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DECODER_ONLY)
def test_what_is_learned_is_said_exactly(name, mode, folder, tiny_asr):
    model = built(SALMGPT, name, folder, tiny_asr)
    batch = items(model, MODES[mode])
    memorise(model, batch)
    check_generation(model, batch)
