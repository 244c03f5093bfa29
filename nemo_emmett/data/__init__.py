"""From files to batches: speech and parallel text, blended by NeMo's samplers, as batches of one modality each.

- :class:`MultimodalDataModule`: drop-in for NeMo's speechlm2 ``DataModule``.
- :func:`get_multimodal_dataloader`: drop-in for NeMo's ``get_lhotse_dataloader_from_config``.
- :class:`SpeechTextDataset`: examples to a batch.
- :func:`check_data_config`: everything about a data config that can be known to be wrong before training.
- :func:`register_data_types`: makes our data types known to NeMo.
- :class:`BadRecords`: the count of what was skipped, and why.

Importing this package imports neither torch nor NeMo; using one of its names does.
"""

from __future__ import annotations

from importlib import import_module

_HOME_OF = {
    "BadRecords": "bad_records",
    "MultimodalDataConfig": "config",
    "MultimodalDataLoader": "dataloader",
    "MultimodalDataModule": "datamodule",
    "SpeechTextDataset": "dataset",
    "check_data_config": "check",
    "get_multimodal_dataloader": "dataloader",
    "register_data_types": "parsers",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
