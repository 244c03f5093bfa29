"""Where long recordings are cut; see :mod:`nemo_emmett.audio_chunks`, which models use as well."""

from nemo_emmett.audio_chunks import cut_into_chunks, cut_windows, join_translations

__all__ = ["cut_into_chunks", "cut_windows", "join_translations"]
