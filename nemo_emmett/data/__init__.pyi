from .config.schema import MultimodalDataConfig as MultimodalDataConfig
from .config.validation import check_data_config as check_data_config
from .dataloader import (
    MultimodalDataLoader as MultimodalDataLoader,
)
from .dataloader import (
    get_multimodal_dataloader as get_multimodal_dataloader,
)
from .datamodule import MultimodalDataModule as MultimodalDataModule
from .dataset import SpeechTextDataset as SpeechTextDataset
from .io.skipped_records import BadRecords as BadRecords
from .readers.registry import register_data_types as register_data_types

__all__ = [
    "BadRecords",
    "MultimodalDataConfig",
    "MultimodalDataLoader",
    "MultimodalDataModule",
    "SpeechTextDataset",
    "check_data_config",
    "get_multimodal_dataloader",
    "register_data_types",
]
