"""VAR: class-conditional next-scale image generation. `VAR.from_original(...)` loads the official files, `VAR.from_pretrained(...)` our own."""

from transformers import AutoConfig, AutoModel

from accel.models.cache import ScaleCache, Schedule
from accel.models.errors import CheckpointError
from accel.models.var.config import VARConfig
from accel.models.var.model import VAR, VARBlock
from accel.models.var.tokenizer import VARTokenizer

__all__ = ["VAR", "CheckpointError", "ScaleCache", "Schedule", "VARBlock", "VARConfig", "VARTokenizer"]

# so that `AutoModel.from_pretrained` knows our folders; nothing but these two names is added to transformers' tables
AutoConfig.register(VARConfig.model_type, VARConfig, exist_ok=True)
AutoModel.register(VARConfig, VAR, exist_ok=True)
