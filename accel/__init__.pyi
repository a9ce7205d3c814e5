# Written by scripts/write_stub.py (make stub): types for the names that are looked up when they are first used.

from accel import vllm as vllm
from accel.errors import AccelError as AccelError
from accel.errors import OptionError as OptionError
from accel.errors import PatchError as PatchError
from accel.errors import UnsupportedError as UnsupportedError
from accel.handle import Handle as Handle
from accel.patches.cake import CAKE as CAKE
from accel.patches.dense import Dense as Dense
from accel.patches.downsample import Downsample as Downsample
from accel.patches.dyvte import DyVTE as DyVTE
from accel.patches.fastervlm import FasterVLM as FasterVLM
from accel.patches.fastv import FastV as FastV
from accel.patches.flexprefill import FlexPrefill as FlexPrefill
from accel.patches.h2o import H2O as H2O
from accel.patches.hack import HACK as HACK
from accel.patches.powerattention import PowerAttention as PowerAttention
from accel.patches.random_blocks import RandomBlocks as RandomBlocks
from accel.patches.random_kv import RandomKV as RandomKV
from accel.patches.random_tokens import RandomTokens as RandomTokens
from accel.patches.snapkv import SnapKV as SnapKV
from accel.patches.streaming import Streaming as Streaming
from accel.patches.streaming_kv import StreamingKV as StreamingKV
from accel.patches.uniform_tokens import UniformTokens as UniformTokens
from accel.patches.vflowopt import VFlowOpt as VFlowOpt
from accel.patching import apply as apply
from accel.protocols import Method as Method
from accel.recipe import Recipe as Recipe

__version__: str
