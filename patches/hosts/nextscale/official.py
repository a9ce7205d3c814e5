"""The VAR class of the public repository FoundationVision/VAR, known by its attributes and never imported.

As of November 2025 its generation tells every attention module `kv_caching(True)`, calls the blocks once per scale without a mask, and ends with
`kv_caching(False)`; each module keeps keys and values on itself. Here the first module's `kv_caching(True)` asks the door for a cache, all modules
attend through that, and nothing is kept on them. Loops of one's own that follow the same order, as in its editing demo, work too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.errors import AccelError, PatchError, UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.bound import replace_method
from accel.patches.hosts.identity import fingerprint
from accel.patches.hosts.nextscale.door import Door
from accel.protocols import ModelInfo

if TYPE_CHECKING:
    from accel.patches.hosts.nextscale.cache import CompressedCache

MODEL = ("autoregressive_infer_cfg", "patch_nums", "blocks", "class_emb", "num_classes", "vae_proxy")
ATTENTION = (
    "mat_qkv", "q_bias", "zero_k_bias", "v_bias", "num_heads", "head_dim", "attn_l2_norm", "scale", "proj", "proj_drop", "attn_drop", "caching",
    "kv_caching",
)  # fmt: skip
# what two implementations of the same attention may differ by, relative to the largest output
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_IN_HALF = 3e-2


def matches(base: Any) -> bool:
    """Whether a model has the attributes of the class, and in every block an attention module with those of its attention."""
    if not isinstance(base, nn.Module) or not all(hasattr(base, name) for name in MODEL):
        return False
    blocks = base.blocks
    return isinstance(blocks, nn.ModuleList) and len(blocks) > 0 and all(_is_attention(getattr(block, "attn", None)) for block in blocks)


def _is_attention(module: Any) -> bool:
    has_all = isinstance(module, nn.Module) and all(hasattr(module, name) for name in ATTENTION)
    # a relative that rotates its keys is given more than this
    return has_all and list(inspect.signature(type(module).forward).parameters) == ["self", "x", "attn_bias"]


def describe(base: Any) -> ModelInfo:
    """Sizes from the first block. The family is that of our VAR, the same transformer: what was calibrated on one holds for the other."""
    from accel.models.cache import Schedule

    attn, n_layers = base.blocks[0].attn, len(base.blocks)
    weight = attn.mat_qkv.weight
    return ModelInfo(
        family="accel_var", n_layers=n_layers, n_heads=attn.num_heads, n_kv_heads=attn.num_heads, head_dim=attn.head_dim,
        layer_types=("full_attention",) * n_layers, device=weight.device.type, dtype=str(weight.dtype).removeprefix("torch."),
        hidden_size=weight.shape[1], scale_shapes=Schedule.of(base.patch_nums).sizes, fingerprint=partial(_fingerprint, base),
    )  # fmt: skip


def _fingerprint(base: Any) -> str:
    """That of our VAR with the same weights; where our VAR cannot have them (PEFT, no normalised queries), one of their own."""
    from accel.models.var import VAR

    try:
        ours = VAR.from_original(base.state_dict(), base.vae_proxy[0].state_dict(), schedule=base.patch_nums, num_classes=base.num_classes)
    except AccelError:
        return fingerprint(base, "official_var")
    return fingerprint(ours)


def attach(base: Any, door: Door, handle: Handle) -> None:
    """Brings generations to the door's caches. On the model `autoregressive_infer_cfg` changes, and on its attention `forward` and `kv_caching`."""
    modules = [block.attn for block in base.blocks]
    _check_attention(modules[0])
    generation = Generation(base, modules, door)
    replace_method(base, "autoregressive_infer_cfg", generation.run, handle)
    for layer, module in enumerate(modules):
        replace_method(module, "kv_caching", partial(generation.kv_caching, layer), handle)
        replace_method(module, "forward", partial(generation.attention, layer), handle)


class Generation:
    """The generation that runs on a model, at most one: its class keeps no two apart either. Nothing of it outlives the call."""

    def __init__(self, base: Any, modules: list[Any], door: Door) -> None:
        self.base, self.modules, self.door = base, modules, door
        self.cache: CompressedCache | None = None
        self._is_guided = False

    def run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In front of `autoregressive_infer_cfg`, which always doubles the rows for guidance."""
        self._is_guided = True
        try:
            return original(*args, **kwargs)
        finally:
            self._is_guided = False
            self._end()

    def kv_caching(self, layer: int, original: Callable[[bool], None], enable: bool) -> None:
        """In front of `kv_caching`: the modules keep nothing on themselves, unless the generation begins while the method is paused."""
        original(enable and not self.door.is_on)
        if layer == 0:
            self._end()
            if enable and self.door.is_on:
                self._begin()

    def attention(self, layer: int, original: Callable[..., Tensor], x: Tensor, attn_bias: Tensor | None) -> Tensor:
        """In front of an attention module's `forward`."""
        if attn_bias is not None:
            if self.door.is_on:
                raise self.door.refusal("a teacher-forced pass computes all scales at once")
        elif self.cache is not None:
            return self._attend(self.cache, layer, x)
        # a generation that began while the method was paused ends as it began
        elif self.door.is_on and not self.modules[layer].caching:
            raise self.door.refusal("outside a generation nothing tells the scales apart")
        return original(x, attn_bias)

    def _begin(self) -> None:
        from accel.models.cache import Schedule

        if any(module.training and module.attn_drop for module in self.modules):
            raise PatchError(f"this {type(self.base).__name__} is in training mode and would drop attention at random; call eval() on it first")
        self.cache = self.door.cache(Schedule.of(self.base.patch_nums), is_guided=self._is_guided)

    def _end(self) -> None:
        if self.cache is not None:
            self.cache.release()
            self.cache = None

    def _attend(self, cache: CompressedCache, layer: int, x: Tensor) -> Tensor:
        if layer == 0:
            cache.begin(cache.scale + 1)
        n, sides = cache.schedule.tokens[cache.scale], list(self.base.patch_nums)
        if x.shape[1] != n:
            raise PatchError(f"scale {cache.scale} of the schedule {sides} has {n} tokens, and block {layer} was given {x.shape[1]}")
        return _with_hook(self.modules[layer], partial(_attention, cache=cache, layer=layer), x)


def _attention(module: Any, x: Tensor, *, cache: Any, layer: int) -> Tensor:
    """What the module computes of x (b, n, C), with keys and values in the cache; flash-attention and xformers are left out."""
    bias = torch.cat([module.q_bias, module.zero_k_bias, module.v_bias])
    # (b, n, 3C) -> three of (b, H, n, d)
    projected = F.linear(x, module.mat_qkv.weight, bias).reshape(*x.shape[:2], 3, module.num_heads, -1)
    q, k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)
    if module.attn_l2_norm:
        temperature = module.scale_mul_1H11.clamp_max(module.max_scale_mul).exp()
        q, k = F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1)
    cache.softmax_scale = float(module.scale)
    # norms are fp32 under autocast; the product casts them back, and the cache need not hold them at twice the size
    out = cache.attend(layer, q.to(v.dtype), k.to(v.dtype), v)
    return module.proj_drop(module.proj(out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def _with_hook(module: Any, call: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
    """`call(module, x)` between the two halves of a hook of accelerate, which stand in the `forward` that was replaced."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return call(module, x)
    [x], _ = hook.pre_forward(module, x)
    return hook.post_forward(module, call(module, x))  # type: ignore[no-any-return]


class _Whole:
    """Attention to the newest entries alone."""

    softmax_scale = 1.0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale)


@torch.no_grad()
def _check_attention(module: Any) -> None:
    """Raises where the module computes something else than the published attention: attributes of the same names prove nothing."""
    weight = module.mat_qkv.weight
    is_random = module.training and (module.attn_drop or not isinstance(module.proj_drop, nn.Identity))
    if weight.device.type == "meta" or is_random:
        return
    # shares the weights; what an aborted generation may have left on the module is not read and stays
    probe = copy.copy(module)
    probe.kv_caching(False)
    x = torch.randn(1, 5, weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
    expected, got = type(module).forward(probe, x, None).float(), _attention(probe, x, cache=_Whole(), layer=0).float()
    allowed = TOLERANCE.get(weight.dtype, TOLERANCE_IN_HALF) * expected.abs().max()
    if not (expected - got).abs().max() <= allowed:
        raise UnsupportedError(
            f"{type(module).__name__} has the attributes of the published VAR's attention but computes something else",
            ["use the published class, or load its weights with accel.models.var.VAR.from_original"],
        )
