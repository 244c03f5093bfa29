"""Outputs of a frozen speech encoder, kept on disk for every recording (``model.cache_encoder``).

A recording is encoded alone and without padding, so what is kept does not depend on the batch that it came in, and a
loss is the same to the last bit whether an output was computed or read. The name of a file is a hash of everything that
its content depends on: the samples, the encoder's weights and settings, and the precision.

Shapes: R recordings, N samples, C channels of the encoder, F frames of the encoder, K layers that the adapter reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from nemo.collections.speechlm2.modules.perception import AudioPerceptionModule
from nemo.core import typecheck
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from nemo_emmett.files import atomic_file
from nemo_emmett.modules.evaluation_mode import evaluation_mode

KEY = "model.cache_encoder"
"""In a recipe, for messages."""

_SHORTEST = 0.1
"""Seconds to which a shorter recording is padded: NeMo cannot normalise a single frame."""

_HASH_BYTES = 16

_logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Where outputs are kept if the recipe names no folder: in the user's cache (``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_emmett" / "encoder"


class EncoderCache:
    """Files of tensors, by hash. Several processes may read and write them at once.

    Args:
        folder: is created when the first output is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = self.missing = 0  # recordings since the last `take_share`
        self._is_writable = True

    def take_share(self) -> float | None:
        """The share of recordings since the last call whose outputs were found; None if there were no recordings."""
        number = self.found + self.missing
        share = self.found / number if number else None
        self.found = self.missing = 0
        return share

    def read(self, key: str) -> list[Tensor] | None:
        """The tensors under a key; None if there are none, or their file is damaged."""
        path = self._path(key)
        try:
            tensors = safetensors.torch.load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            self.missing += 1
            if not isinstance(error, FileNotFoundError):
                _logger.warning("%s: '%s' cannot be read (%s); the recording is encoded again.", KEY, path, error)
            return None
        self.found += 1
        return [tensors[str(number)] for number in range(len(tensors))]

    def write(self, key: str, tensors: Iterable[Tensor]) -> None:
        """Keep tensors; where that fails, as on a full disk, warn once and keep nothing from then on."""
        if not self._is_writable:
            return
        content = {str(number): tensor.cpu().contiguous() for number, tensor in enumerate(tensors)}
        try:
            with atomic_file(self._path(key)) as temporary:
                temporary.write_bytes(safetensors.torch.save(content))
        except OSError as error:
            self._is_writable = False
            _logger.warning(
                "%s: '%s' cannot be written to (%s); from now on this process encodes what is not there in each "
                "step. Make room, or give another folder.",
                KEY,
                self.folder,
                error.strerror,
            )

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


class CachedPerception(AudioPerceptionModule):
    """NeMo's ``AudioPerceptionModule`` whose preprocessor and encoder are frozen, with their outputs kept on disk.

    Made by :meth:`of`. Modality adapter and projection are computed, and trained, as ever.
    """

    cache: EncoderCache
    is_measured: bool = False
    """All recordings are encoded as one batch and the disk is left alone: OOMptimizer measures made-up recordings, and
    counts at least the memory that a step needs."""

    _identity: str | None = None

    @classmethod
    def of(cls, perception: AudioPerceptionModule, folder: Path) -> CachedPerception:
        """Turn a module into one with a cache, its parameters and their names unchanged.

        Args:
            perception: changed in place; without ``spec_augment``, which would have to come before the encoder.
            folder: of the cache.
        """
        assert type(perception) is AudioPerceptionModule
        assert perception.spec_augmentation is None
        perception.__class__ = cls  # NeMo's function that loads the weights makes its own class
        perception.cache = EncoderCache(folder)
        return perception

    @typecheck.disable_checks()
    def forward(self, input_signal: Tensor, input_signal_length: Tensor) -> tuple[Tensor, Tensor]:
        """Encode recordings.

        Args:
            input_signal: (R, N).
            input_signal_length: (R,) samples.

        Returns:
            (R, T, H) embeddings, padded, and the (R,) number of each.
        """
        with torch.no_grad(), evaluation_mode(self.preprocessor), evaluation_mode(self.encoder):
            if self.is_measured:
                layers, lens = self._layers(input_signal, input_signal_length)
            else:
                layers, lens = self._kept_layers(input_signal, input_signal_length)
        if "encoder_multilayer" in self._modules:
            encoded, encoded_lens = self.modality_adapter(audio_signal=layers, length=[lens] * len(layers))
        else:
            encoded, encoded_lens = self.modality_adapter(audio_signal=layers[0], length=lens)
        return self.proj(encoded.transpose(1, 2)), encoded_lens

    def _layers(self, audios_RN: Tensor, lens_R: Tensor) -> tuple[list[Tensor], Tensor]:
        """(R, C, F) of each of the K layers that the adapter reads, and (R,) frames."""
        features, feature_lens = self.preprocessor(input_signal=audios_RN, length=lens_R)
        if "encoder_multilayer" in self._modules:
            layers, lens = self.encoder_multilayer(audio_signal=features, length=feature_lens)
            return list(layers), lens[0]
        layer, lens = self.encoder(audio_signal=features, length=feature_lens)
        return [layer], lens

    def _kept_layers(self, audios_RN: Tensor, lens_R: Tensor) -> tuple[list[Tensor], Tensor]:
        """As :meth:`_layers`, read from the cache, or computed and written to it."""
        # Hashing needs the samples on the CPU: the step waits for the device here.
        recordings = [samples[:length] for samples, length in zip(audios_RN.cpu(), lens_R.tolist(), strict=True)]
        setting = self._setting(audios_RN)
        outputs = [self._output(samples, setting, audios_RN.device) for samples in recordings]
        # Frames come last, and padding goes there.
        layers = [pad_sequence([one.T for one in of_layer], True).mT for of_layer in zip(*outputs, strict=True)]
        return layers, torch.tensor([output[0].shape[1] for output in outputs], device=audios_RN.device)

    def _output(self, samples_N: Tensor, setting: str, device: torch.device) -> Sequence[Tensor]:
        """(C, F) of each layer, of one recording."""
        key = _hash([setting.encode(), _bytes(samples_N)])
        if (kept := self.cache.read(key)) is not None:
            return [layer.to(device) for layer in kept]
        length = len(samples_N)
        shortest = int(_SHORTEST * self.preprocessor.featurizer.sample_rate)
        audios_1N = pad(samples_N, (0, max(0, shortest - length)))[None].to(device)
        layers, lens = self._layers(audios_1N, torch.tensor([length], device=device))
        frames = int(lens[0])
        output = [layer[0, :, :frames] for layer in layers]
        self.cache.write(key, output)
        return output

    def _setting(self, audios_RN: Tensor) -> str:
        """What all outputs depend on: encoder, device and precision."""
        if self._identity is None:
            self._identity = self._hash_of_encoder()
        kind = audios_RN.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else audios_RN.dtype
        return f"{self._identity} {kind} {precision}"

    def _hash_of_encoder(self) -> str:
        adapter = self.cfg.modality_adapter
        read = [adapter.get("target_layer_ids"), adapter.get("include_final_output")]
        config = [self.cfg.preprocessor, self.cfg.encoder, *read]
        plain = [OmegaConf.to_container(one, resolve=True) if OmegaConf.is_config(one) else one for one in config]
        parts: list[bytes | memoryview] = [json.dumps(plain, sort_keys=True, default=str).encode()]
        for part in (self.preprocessor, self.encoder):
            # Not of `state_dict`, which would shard an FSDP2 model again in the middle of its forward pass.
            for name, tensor in (*part.named_parameters(), *_kept_buffers(part)):
                parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), _bytes(tensor)]
        return _hash(parts)

    # Other weights, or the same in another type, give other outputs.

    def _apply(self, *args: Any, **kwargs: Any) -> CachedPerception:
        self._identity = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._identity = None
        super()._load_from_state_dict(*args, **kwargs)


def _kept_buffers(part: Module) -> Iterator[tuple[str, Tensor]]:
    """Those that a checkpoint holds; others follow from the settings, and positions grow with the longest input."""
    for place, module in part.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{place}.{name}", buffer


def _bytes(tensor: Tensor) -> memoryview:
    # A copy: NumPy would pin the memory that FSDP2 frees after the forward pass.
    copied = tensor.detach().to("cpu", copy=True)
    return memoryview(copied.contiguous().flatten().view(torch.uint8).numpy())


def _hash(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
