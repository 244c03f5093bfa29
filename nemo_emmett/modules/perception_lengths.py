"""How many positions of the language model a recording takes, without encoding it.

The numbers are those that NeMo's ``AudioPerceptionModule`` returns with its embeddings, by the length functions of its
own parts, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nemo.collections.asr.modules import ConformerEncoder
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling, SubsamplingReductionModule, calc_length
from nemo.collections.speechlm2.modules.perception import (
    AudioPerceptionModule,
    IdentityConnector,
    MultiLayerProjectionConnector,
    QformerConnector,
)
from nemo.collections.speechlm2.parts.encoder_chunking import (
    _get_chunk_size_samples,
    _get_min_chunk_size_samples,
    _split_audio_into_chunks,
)
from torch import Tensor, nn

from nemo_emmett.errors import ModelError
from nemo_emmett.modules.modality_adapters import MLPConnector


class PerceptionLengths:
    """Counts positions of the language model.

    Attributes:
        sampling_rate: samples per second of recordings.
        shortest: fewest samples of a recording: of fewer, the features cannot be normalised.

    Args:
        perception: whose weights are not read; they may be fake tensors.
        chunk_seconds: longer recordings are encoded in chunks of so many seconds; None: each at once.

    Raises:
        ModelError: for a part whose lengths are not known.

    Example:
        >>> PerceptionLengths(model.perception)([16000, 32000])
        [13, 25]
    """

    def __init__(self, perception: AudioPerceptionModule, chunk_seconds: float | None = None) -> None:
        self.perception = perception
        self.sampling_rate = int(perception.preprocessor.featurizer.sample_rate)
        self.shortest = _get_min_chunk_size_samples(perception)
        chunk = _get_chunk_size_samples(chunk_seconds, self.sampling_rate)
        self.chunk = None if chunk is None else max(chunk, self.shortest)
        self([self.shortest])  # raises for unknown parts

    def __call__(self, samples: Sequence[int]) -> list[int]:
        """Positions of each recording, by its number of samples."""
        return [self._of_recording(number) for number in samples]

    def most_samples(self, positions: int) -> int:
        """The most samples, up to an hour, that take no more than so many positions; 0 if there are none."""
        low, high = 0, 3600 * self.sampling_rate
        while low < high:
            middle = (low + high + 1) // 2
            fits = middle < self.shortest or self._of_recording(middle) <= positions
            low, high = (middle, high) if fits else (low, middle - 1)
        return low if low >= self.shortest else 0

    def _of_recording(self, samples: int) -> int:
        if self.chunk is None or samples <= self.chunk:
            return int(self._of_chunks([samples]).sum())
        empty = torch.empty(1, 0)
        _, chunks, _ = _split_audio_into_chunks(empty, [samples], self.chunk, self.shortest)
        return int(self._of_chunks(chunks).sum())

    def _of_chunks(self, samples: Sequence[int]) -> Tensor:
        """(R,) positions of recordings that are encoded at once."""
        lens_R = self.perception.preprocessor.featurizer.get_seq_len(torch.tensor(samples))
        return _adapted(self.perception.modality_adapter, _encoded(self.perception.encoder, lens_R))


def _adapted(adapter: nn.Module, lens_R: Tensor) -> Tensor:
    if isinstance(adapter, QformerConnector):
        return torch.full_like(lens_R, adapter.prompt_size)
    if isinstance(adapter, MLPConnector):
        return -(-lens_R // adapter.subsampling_factor)
    if isinstance(adapter, ConformerEncoder):
        return _encoded(adapter, lens_R)
    if isinstance(adapter, (IdentityConnector, MultiLayerProjectionConnector)):
        return lens_R
    raise _unknown(adapter)


def _encoded(encoder: nn.Module, lens_R: Tensor) -> Tensor:
    if not isinstance(encoder, ConformerEncoder):
        raise _unknown(encoder)
    if not isinstance(encoder.pre_encode, nn.Linear):
        lens_R = _subsampled(encoder.pre_encode, lens_R)
    if encoder.reduction_subsampling is not None:
        lens_R = _subsampled(encoder.reduction_subsampling, lens_R)
    return lens_R.long()


def _subsampled(part: nn.Module, lens_R: Tensor) -> Tensor:
    if isinstance(part, SubsamplingReductionModule):
        if part.reduction == "striding":
            return _subsampled(part.reduction_enc, lens_R)
        return calc_length(lens_R, part.padding, part.kernel_size, part.stride, False, part._sampling_num)
    if not isinstance(part, ConvSubsampling):
        # StackingSubsampling's lengths depend on what a recording is batched with.
        raise _unknown(part)
    paddings = part._left_padding + part._right_padding
    return calc_length(lens_R, paddings, part._kernel_size, part._stride, part._ceil_mode, part._sampling_num)


def _unknown(part: nn.Module) -> ModelError:
    return ModelError(
        f"model.perception: how many frames {type(part).__name__} gives for a recording is not known before it is "
        "encoded, which vLLM needs; serve the model with `nemo-emmett serve`."
    )
