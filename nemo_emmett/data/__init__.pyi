from .checks import check_data_config as check_data_config
from .config.dataset_config import DatasetConfig as DatasetConfig
from .config.dataset_config import parse_dataset as parse_dataset
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
    "DatasetConfig",
    "MultimodalDataLoader",
    "MultimodalDataModule",
    "SpeechTextDataset",
    "check_data_config",
    "get_multimodal_dataloader",
    "parse_dataset",
    "register_data_types",
]
