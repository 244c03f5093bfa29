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
from .io.skipped_records import SkippedRecords as SkippedRecords
from .readers.registry import register_data_types as register_data_types

__all__ = [
    "DatasetConfig",
    "MultimodalDataLoader",
    "MultimodalDataModule",
    "SkippedRecords",
    "SpeechTextDataset",
    "check_data_config",
    "get_multimodal_dataloader",
    "parse_dataset",
    "register_data_types",
]
