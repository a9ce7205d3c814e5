"""Infinity: text-to-image next-scale generation. `Infinity.from_original(...)` loads the official files, `Infinity.from_pretrained(...)` our own."""

from transformers import AutoConfig, AutoModel

from accel.models.cache import ScaleCache, Schedule
from accel.models.errors import CheckpointError
from accel.models.infinity.config import InfinityConfig
from accel.models.infinity.model import Infinity, InfinityBlock
from accel.models.infinity.schedules import SCHEDULES, SIZES, schedule_for
from accel.models.infinity.text import TextEncoder, TextFeatures
from accel.models.infinity.tokenizer import BitTokenizer

__all__ = [
    "SCHEDULES", "SIZES", "BitTokenizer", "CheckpointError", "Infinity", "InfinityBlock", "InfinityConfig", "ScaleCache", "Schedule",
    "TextEncoder", "TextFeatures", "schedule_for",
]  # fmt: skip

# so that `AutoModel.from_pretrained` knows our folders; nothing but these two names is added to transformers' tables
AutoConfig.register(InfinityConfig.model_type, InfinityConfig, exist_ok=True)
AutoModel.register(InfinityConfig, Infinity, exist_ok=True)
