"""The plugin by which vLLM serves the folder of a SALMGPT (docs/how-to/serve_vllm.md).

vLLM calls :func:`register` by the entry point ``vllm.general_plugins`` in each of its processes. Modules, in the order
in which vLLM uses them:

- ``config``: the folder's ``config.json`` as vLLM's config, with the language model's own config; ``parts``: what is
  built from it.
- ``processing``: recordings of a request, and how many positions each takes.
- ``speech_to_text``: prompts of ``/v1/audio/translations`` and ``/v1/audio/transcriptions``.
- ``model``: our speech encoder and adapter, with vLLM's language model; ``weights``: names and LoRA.
"""

from __future__ import annotations

from types import ModuleType


def register() -> None:
    """Add our config and model to vLLM's registries; neither NeMo nor the model's module is imported."""
    import wrapt
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from nemo_emmett.serving.vllm.config import SERVED, ExportedConfig

    _CONFIG_REGISTRY[ExportedConfig.model_type] = ExportedConfig
    if SERVED not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(SERVED, "nemo_emmett.serving.vllm.model:SpeechTextForCausalLM")
    wrapt.register_post_import_hook(_hide_private_names, "llvmlite.binding.ffi")


def _hide_private_names(ffi: ModuleType) -> None:
    """Make llvmlite's library object have no ``__dict__``.

    It answers any name with a C function. On a CPU without Triton, vLLM (0.32 at least) reads ``vars()`` of everything
    in all modules and takes it for a dict; NeMo imports llvmlite.
    """
    kind = type(ffi.lib)
    look_up = kind.__getattr__
    if getattr(look_up, "hides_private_names", False):
        return

    def find(self: object, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(self, name)

    find.hides_private_names = True
    kind.__getattr__ = find
