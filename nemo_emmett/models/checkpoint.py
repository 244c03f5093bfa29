"""Lightning checkpoints, read as data: one file, or the folder that sharded trainings write (FSDP2)."""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PosixPath
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.futures import Future

from nemo_emmett.errors import Help, ModelError

_STATE, _METADATA = "state_dict", ".metadata"


def read_checkpoint(path: str | Path | BinaryIO, **options: Any) -> dict[str, Any]:
    """Read a Lightning checkpoint of tensors and plain values, which is all that ours hold; no code of it is run.

    Args:
        path: of the file, or the file.
        options: of ``torch.load``.

    Raises:
        ModelError: if it holds other objects, whose unpickling can run code.
    """
    try:
        with torch.serialization.safe_globals([PosixPath]):  # where NeMo's callback saves checkpoints
            return torch.load(path, weights_only=True, **options)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        detail = f"; it names {named[1]}" if named else ""
        raise ModelError(
            f"the checkpoint '{getattr(path, 'name', path)}' is damaged or holds more than tensors and plain "
            f"values{detail}. It is not unpickled, since that can run code. If you trust it, pass "
            "trust_remote_code=True or set model.trust_remote_code: true in the recipe.",
            page=Help.CODE_IN_MODEL,
        ) from error


def read_weights(checkpoint: str | Path, trusted: bool = False) -> dict[str, Tensor]:
    """The weights of a checkpoint by name, on the CPU. No code of the file is run unless it is trusted.

    Args:
        checkpoint: a ``.ckpt`` file, or the folder of a distributed checkpoint.
        trusted: unpickle whatever a file holds.

    Raises:
        ModelError: if it cannot be read or holds no weights.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise ModelError(f"'{path}': there is no such checkpoint.")
    try:
        if path.is_dir():
            return _weights_of_folder(path, trusted)
        how = {"map_location": "cpu", "mmap": True}
        content = torch.load(path, weights_only=False, **how) if trusted else read_checkpoint(path, **how)
    except (OSError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"'{path}' cannot be read as a checkpoint ({reason}); give another one.") from error
    weights = content.get(_STATE) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not weights:
        raise ModelError(f"'{path}' is no checkpoint of a training: it holds no '{_STATE}'; give a .ckpt file.")
    return dict(weights)


def read_rest(checkpoint: str | Path) -> dict[str, Any]:
    """What a checkpoint holds apart from weights, such as counters and the states of callbacks; empty if unreadable."""
    path = Path(checkpoint)
    path = path / "meta.pt" if path.is_dir() else path
    try:
        content = read_checkpoint(path, map_location="meta", **({} if path.name == "meta.pt" else {"mmap": True}))
    except (OSError, RuntimeError, EOFError, KeyError, ModelError):
        return {}
    return {key: value for key, value in content.items() if key != _STATE} if isinstance(content, Mapping) else {}


def _weights_of_folder(path: Path, trusted: bool) -> dict[str, Tensor]:
    """Read in this process alone, whatever processes wrote them."""
    if not (path / _METADATA).is_file():
        raise ModelError(f"'{path}' is no distributed checkpoint: it has no {_METADATA}; give the .ckpt in it.")
    content: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys={_STATE})
    reader = FileSystemReader(path) if trusted else _DataOnlyReader(path)
    try:
        _load_state_dict(content, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:  # a BaseException, which holds those of the ranks
        raise next(iter(error.failures.values()))[0] from error
    if not content.get(_STATE):
        raise ModelError(f"'{path}' is no checkpoint of a training: it holds no '{_STATE}'; give another one.")
    return content[_STATE]


class _DataOnlyReader(FileSystemReader):
    """Reads a distributed checkpoint without running anything: PyTorch's own unpickles its metadata, and all entries
    that are no tensors."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # Here, not in read_metadata, whose errors PyTorch wraps in many lines.
        try:
            with open(path / _METADATA, "rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        except (UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError) as error:
            reason = str(error) or type(error).__name__
            raise ModelError(
                f"the checkpoint '{self.path}' is damaged or holds more than tensors and plain values ({reason}). "
                "It is not unpickled, since that can run code. If you trust it, set model.trust_remote_code: true."
            ) from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read already."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Tensors.

        Raises:
            ModelError: if there is something else among them.
        """
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise ModelError(
                    f"the checkpoint '{self.path}' holds '{item.dest_index.fqn}', which is no tensor. It is not "
                    "unpickled, since that can run code. If you trust it, set model.trust_remote_code: true."
                )
        return super().read_data(plan, planner)


_METADATA_CLASSES = {
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    "torch": ("Size", "device"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata", "StorageMeta"),
        *("Metadata", "MetadataIndex", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.serialization": ("_get_layout",),
}
"""The classes of a distributed checkpoint's metadata."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only the classes of metadata, and PyTorch's types of numbers."""
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise UnpicklingError(f"it names {module}.{name}")


def shared_names(module: torch.nn.Module) -> list[list[str]]:
    """The names of each parameter that has several, such as an output layer tied to the embeddings."""
    names = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [of_parameter for of_parameter in names.values() if len(of_parameter) > 1]


def listed(names: Sequence[str]) -> str:
    """The first of some names, and the number of the others, for messages."""
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def check_fit(weights: Mapping[str, Tensor], model: torch.nn.Module, checkpoint: str | Path) -> None:
    """Refuse weights that are not a model's.

    Raises:
        ModelError: naming a weight that is missing, surplus, or of another shape.
    """
    own = model.state_dict()
    wrong = [*(own.keys() - weights.keys()), *(weights.keys() - own.keys())]
    wrong += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if wrong:
        name = min(wrong)
        there, here = (str(tuple(of[name].shape)) if name in of else "nothing" for of in (weights, own))
        raise ModelError(
            f"'{checkpoint}' is not of the model of the recipe: of '{name}' it holds {there}, the model {here}; give "
            "the recipe that it was trained with (--config)."
        )
