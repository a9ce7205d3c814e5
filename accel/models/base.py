"""What VAR and Infinity have in common as Hugging Face models: where caches come from, how weights start, what official files are turned into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from accel.models.blocks import FusedQKV, ScaleAttention, ScaleEmbedding
from accel.models.cache import ScaleCache, Schedule, TeacherForced
from accel.models.checkpoints import load_exact
from accel.models.errors import CheckpointError


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: the device accelerate brings its weights to, else the one they are on."""
    planned = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if planned is None else torch.device(planned)


@dataclass
class NextScaleOutput(ModelOutput):  # type: ignore[misc]
    """Result of a teacher-forced pass: mean cross-entropy, and logits of all scales."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class NextScaleModel(PreTrainedModel):  # type: ignore[misc]
    """Base of the next-scale models. `new_cache` is the door for cache compression: see `accel.models.cache`."""

    base_model_prefix = ""
    _skip_keys_device_placement = ("cache",)
    # temperatures (an exponent), the running map of codes and the condition vectors are tiny and lose most by rounding
    _keep_in_fp32_modules_strict = ("log_scale", "quantizer", "shared_ada", "gss")

    def new_cache(self, schedule: Schedule, *, is_guided: bool = False, teacher_forced: bool = False) -> ScaleCache:
        """A cache for one generation. With `is_guided` the rows are the images' conditional halves, then their unconditional halves.

        Hosts replace this method. One that changes what attention sees must refuse `teacher_forced`, where all scales are computed at once.
        """
        return TeacherForced(schedule) if teacher_forced else ScaleCache(schedule)

    def default_schedule(self) -> Schedule:
        """The scales that `generate` goes through where it is not told otherwise."""
        raise NotImplementedError(f"{type(self).__name__} does not say which scales it generates")

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, FusedQKV):
            init.normal_(module.weight, std=std)
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, ScaleAttention):
            init.constant_(module.log_scale, 1.386294361)
        elif isinstance(module, ScaleEmbedding):
            for table in (module.start, module.level, module.position):
                if table is not None:
                    init.normal_(table, std=std)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but weights that are missing or do not fit raise instead of starting at random, and so does another kind of model."""
        cls._require_own_kind(*args, **kwargs)
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"{args[0] if args else cls.__name__}: a weights file is truncated or damaged ({error})") from error
        faults = {kind: sorted(str(key) for key in info[kind]) for kind in ("missing_keys", "unexpected_keys") if info[kind]}
        if faults:
            raise CheckpointError(
                f"incomplete or wrong checkpoint for {cls.__name__}: " + "; ".join(f"{kind} {keys[:6]}" for kind, keys in faults.items())
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _require_own_kind(cls, source: Any = None, *args: Any, **kwargs: Any) -> None:
        """Raises where the configuration that lies beside the weights is another model's: transformers would only warn."""
        if source is None:
            return
        found, _ = cls.config_class.get_config_dict(source, **{key: value for key, value in kwargs.items() if key != "config"})
        kind, own = found.get("model_type"), cls.config_class.model_type
        if kind != own:
            what = f"a model of type {kind!r}" if kind else "no configuration of a model"
            raise CheckpointError(f"{source} holds {what}, and {cls.__name__} reads the type {own!r}; official files are read by from_original")

    @classmethod
    def _from_renamed(cls, config: Any, state: Mapping[str, Tensor], *, dtype: torch.dtype | None, device: torch.device | str | None) -> Self:
        """The model with exactly these weights, in `dtype` but for the parts that stay in fp32."""
        with torch.device("meta"):
            model = cls(config)
        load_exact(model, state)
        for name, parameter in model.named_parameters():
            kept = dtype in (torch.float16, torch.bfloat16) and any(part in name for part in cls._keep_in_fp32_modules_strict)
            wanted = parameter.dtype if dtype is None else torch.float32 if kept else dtype
            parameter.data = parameter.data.to(device=device, dtype=wanted)
        model.config.dtype = dtype or next(model.parameters()).dtype
        return model.eval()  # type: ignore[no-any-return]
