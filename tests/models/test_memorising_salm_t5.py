"""SALMT5 memorises translations and generates them, on every family of backbones."""

import pytest

from nemo_emmett.models import SALMT5

from .backbones import ENCODER_DECODERS
from .memorising import MODES, built, check_generation, items, memorise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_what_is_learned_is_said_exactly(name, mode, folder, tiny_asr):
    model = built(SALMT5, name, folder, tiny_asr)
    batch = items(model, MODES[mode])
    memorise(model, batch)
    check_generation(model, batch)
