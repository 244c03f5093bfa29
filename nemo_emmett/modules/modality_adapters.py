"""Modality adapters, between the speech encoder and the language model.

A recipe names one under ``model.perception.modality_adapter._target_``. NeMo's are ``IdentityConnector`` (a linear
layer), ``MultiLayerProjectionConnector`` (of several encoder layers side by side) and ``ConformerEncoder`` (a stack of
conformer layers); here are

- :class:`MLPConnector`: neighbouring frames stacked, then two linear layers;
- :class:`QFormer`: a fixed number of learned queries per recording, NeMo's with the padding masked.

All are modules of NeMo's ``AudioPerceptionModule``, with its layout: channels first.
:func:`check_modality_adapter` checks before training that one fits encoder and language model.

Shapes: B recordings, C channels of the encoder, T frames of the encoder, k frames that become one, H width of the
language model, P queries, L encoder layers that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from nemo.collections.asr.modules import ConformerEncoder
from nemo.collections.speechlm2.modules.perception import AudioPerceptionModule, IdentityConnector, QformerConnector
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.functional import pad

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError
from nemo_emmett.modules.batch import length_mask
from nemo_emmett.typed_config import PositiveWhole, Share

WHERE = "model.perception.modality_adapter"
"""The adapter's place in a recipe, for messages."""

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
"""Activations between the two layers of :class:`MLPConnector`."""


class MLPConnector(nn.Module):
    """Stacks neighbouring frames and maps them to the language model's width by two linear layers.

    Frames beyond a recording's length are zeros before they are stacked, so its last position does not depend on what
    the recording is batched with.

    Args:
        input_dim: width of the speech encoder, C.
        output_dim: width of the language model, H; NeMo fills it in when it loads a pretrained encoder, so that a
            recipe may give null.
        hidden_dim: width between the layers; by default ``output_dim``.
        subsampling_factor: frames that become one position of the language model, k.
        dropout: probability, after the activation.
        activation: one of :data:`ACTIVATIONS`.

    Raises:
        ConfigError: for a value that cannot work.

    Example:
        >>> adapter = MLPConnector(input_dim=16, output_dim=32, subsampling_factor=4)
        >>> embeds, lens = adapter(torch.randn(2, 16, 10), torch.tensor([10, 7]))
        >>> embeds.shape, lens.tolist()
        (torch.Size([2, 32, 3]), [3, 2])
    """

    def __init__(
        self,
        input_dim: PositiveWhole,
        output_dim: PositiveWhole | None,
        hidden_dim: PositiveWhole | None = None,
        subsampling_factor: PositiveWhole = 1,
        dropout: Share = 0.0,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        hidden_dim = output_dim if hidden_dim is None else hidden_dim
        widths = {"input_dim": input_dim, "output_dim": output_dim, "hidden_dim": hidden_dim}
        for key, value in {**widths, "subsampling_factor": subsampling_factor}.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{WHERE}.{key}: {value!r} cannot be; give a whole number from 1.")
        if activation not in ACTIVATIONS:
            suggestion = nearest(str(activation), ACTIVATIONS)
            hint = f"did you mean '{suggestion}'?" if suggestion else f"there are {', '.join(ACTIVATIONS)}."
            raise ConfigError(f"{WHERE}.activation: there is no activation '{activation}'; {hint}")
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.subsampling_factor = subsampling_factor
        self.layers = nn.Sequential(
            nn.Linear(input_dim * subsampling_factor, hidden_dim),
            ACTIVATIONS[activation](),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, output_dim),
        )

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Stack and map.

        Args:
            audio_signal: (B, C, T) what the encoder gives.
            length: (B,) frames of each recording, int64.

        Returns:
            (B, H, ceil(T / k)) embeddings and (B,) their numbers, ceil(length / k).
        """
        stacked, lens_B = stack_frames(audio_signal, length, self.subsampling_factor)
        return self.layers(stacked.transpose(1, 2)).transpose(1, 2), lens_B


def stack_frames(frames_BCT: Tensor, lens_B: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Join each run of ``factor`` frames to one, the last run filled up with zeros.

    Args:
        frames_BCT: (B, C, T); frames beyond a recording's length are ignored.
        lens_B: (B,) frames of each recording.
        factor: frames to join, k.

    Returns:
        (B, k * C, ceil(T / k)) and (B,) lengths.
    """
    batch, channels, frames = frames_BCT.shape
    kept_BCT = frames_BCT.masked_fill(~length_mask(lens_B, frames)[:, None], 0.0)
    filled = pad(kept_BCT, (0, -frames % factor))
    stacked = filled.view(batch, channels, -1, factor).permute(0, 3, 1, 2).flatten(1, 2)
    return stacked, (lens_B + factor - 1) // factor


class QFormer(QformerConnector):
    """Learned queries that attend to several encoder layers: each recording becomes P embeddings.

    NeMo's ``QformerConnector`` with two differences: its queries do not attend to padding, so that a recording gives
    the same embeddings in any batch, and the lengths it reports are the number of queries (NeMo 3.0.0 reports
    the language model's width). Its parameters and keys are NeMo's, except ``output_dim``.

    However long, a recording takes P positions, while buckets count ``token_equivalent_duration`` as if it took one
    for each frame of the encoder.

    Args:
        prompt_size: queries, P.
        target_layer_ids: encoder layers that are read, from 0.
        qformer_num_hidden_layers: layers of the Q-Former.
        encoder_config: ``d_model`` (width of the speech encoder, C) and ``encoder_attention_heads`` (heads here).
        llm_config: ``hidden_size``, width of the language model, H; may be left out where ``output_dim`` is given.
        include_final_output: read the encoder's output too.
        output_dim: width of the language model; overrules ``llm_config``. NeMo fills it in when it loads a pretrained
            encoder, so that a recipe may give null.

    Raises:
        ConfigError: for a missing width, no layers to read, or a width that the heads do not divide.
    """

    def __init__(
        self,
        prompt_size: PositiveWhole,
        target_layer_ids: Sequence[int],
        qformer_num_hidden_layers: PositiveWhole,
        encoder_config: DictConfig,
        llm_config: DictConfig | None = None,
        include_final_output: bool = True,
        output_dim: int | None = None,
    ) -> None:
        if output_dim is not None:
            llm_config = DictConfig({"hidden_size": output_dim})
        if llm_config is None:
            raise ConfigError(f"{WHERE}.output_dim: is missing; give the width of the language model.")
        if not target_layer_ids:
            raise ConfigError(f"{WHERE}.target_layer_ids: is empty; name layers of the encoder, counted from 0.")
        width, heads = encoder_config.d_model, encoder_config.encoder_attention_heads
        if width % heads:
            raise ConfigError(
                f"{WHERE}.encoder_config.encoder_attention_heads: {heads} does not divide the width of {width}; give a "
                "divisor of it."
            )
        super().__init__(
            prompt_size=prompt_size,
            target_layer_ids=target_layer_ids,
            qformer_num_hidden_layers=qformer_num_hidden_layers,
            encoder_config=encoder_config,
            llm_config=llm_config,
            include_final_output=include_final_output,
        )

    def forward(self, audio_signal: Sequence[Tensor], length: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Attend to each layer with its queries, and mix the results by learned weights.

        Args:
            audio_signal: L tensors (B, C, T), one of each layer that is read.
            length: L tensors (B,), frames of each recording.

        Returns:
            (B, H, P) embeddings and (B,) their numbers, P each.
        """
        answers = [self._attend(*layer) for layer in zip(self.layer_prompts, audio_signal, length, strict=True)]
        weights_PL = self.layer_weights.softmax(dim=-1)
        mixed_BPC = torch.einsum("lbpc,pl->bpc", torch.stack(answers), weights_PL)
        lens_B = torch.full_like(length[0], self.prompt_size)
        return self.proj(mixed_BPC).transpose(1, 2), lens_B

    def _attend(self, queries_1PC: Tensor, frames_BCT: Tensor, lens_B: Tensor) -> Tensor:
        """(B, P, C) outputs of the queries for one layer."""
        batch, _, frames = frames_BCT.shape
        is_padding_BT = ~length_mask(lens_B, frames)
        # The lowest number, not minus infinity, whose softmax is NaN for a recording without frames.
        bias_BT = torch.zeros_like(is_padding_BT, dtype=frames_BCT.dtype)
        bias_BT = bias_BT.masked_fill(is_padding_BT, torch.finfo(frames_BCT.dtype).min)
        return self.qformer(
            hidden_states=queries_1PC.expand(batch, -1, -1),
            encoder_hidden_states=frames_BCT.transpose(1, 2),
            encoder_attention_mask=bias_BT[:, None, None],
        ).last_hidden_state


def check_modality_adapter(perception: AudioPerceptionModule, llm_width: int) -> None:
    """Check that the modality adapter fits its encoder and a language model.

    Args:
        perception: as NeMo built it.
        llm_width: H.

    Raises:
        ConfigError: if the adapter reads another width than the encoder gives, gives another than the language model
            reads, or is NeMo's ``QformerConnector``, whose lengths cannot be used.
    """
    adapter = perception.modality_adapter
    if type(adapter) is QformerConnector:
        raise ConfigError(
            f"{WHERE}._target_: NeMo's QformerConnector reads padding and does not report its lengths; use "
            f"{QFormer.__module__}.QFormer, which takes the same keys."
        )
    encoder_width = perception.encoder._feat_out
    reads, key = _width_read(perception)
    if reads is not None and reads != encoder_width:
        raise ConfigError(f"{WHERE}.{key}: {reads} is not the width of the speech encoder; write {encoder_width}.")
    gives = _width_given(perception)
    if gives is not None and gives != llm_width:
        raise ConfigError(
            f"{WHERE}: its embeddings are {gives} wide, but the language model reads {llm_width}; write output_dim: "
            f"{llm_width}, or for an IdentityConnector its d_model."
        )


def leave_out_collectives(perception: AudioPerceptionModule) -> None:
    """Turn off the all-reduce of the longest input in all conformers, encoder and adapter.

    FastConformer does it by default: the ranks with speech would wait in it for a rank that has only text.
    """
    for module in perception.modules():
        if isinstance(module, ConformerEncoder):
            module.sync_max_audio_length = False


def _width_read(perception: AudioPerceptionModule) -> tuple[int | None, str]:
    """The width of an adapter's input, where it is known, and its key."""
    adapter = perception.modality_adapter
    if isinstance(adapter, QformerConnector):
        return adapter.encoder_config.d_model, "encoder_config.d_model"
    if isinstance(adapter, ConformerEncoder):
        return adapter._feat_in, "feat_in"
    if hasattr(adapter, "input_dim"):
        return adapter.input_dim, "input_dim"
    return getattr(perception.proj, "in_features", None), "d_model"


def _width_given(perception: AudioPerceptionModule) -> int | None:
    """The width of an adapter's embeddings, where it is known."""
    adapter = perception.modality_adapter
    if isinstance(perception.proj, nn.Linear):
        return perception.proj.out_features
    if isinstance(adapter, QformerConnector):
        return adapter.proj[-1].out_features
    if isinstance(adapter, ConformerEncoder):
        return adapter._feat_out
    if hasattr(adapter, "output_dim"):
        return adapter.output_dim
    return perception.encoder._feat_out if isinstance(adapter, IdentityConnector) else None
