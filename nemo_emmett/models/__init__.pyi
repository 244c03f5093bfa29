from .bestow_gpt import BestowGPT as BestowGPT
from .load import load as load
from .salm_gpt import SALMGPT as SALMGPT
from .salm_t5 import SALMT5 as SALMT5

__all__ = ["BestowGPT", "SALMGPT", "SALMT5", "load"]
