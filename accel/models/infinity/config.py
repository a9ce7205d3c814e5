"""Configuration of Infinity."""

from __future__ import annotations

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from accel.errors import OptionError
from accel.models.infinity.schedules import SIZES


@strict
class InfinityConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of an Infinity and of its tokenizer. The defaults are Infinity-2B."""

    model_type = "accel_infinity"

    num_hidden_layers: int = 32
    hidden_size: int = 2048
    num_attention_heads: int = 16
    intermediate_size: int = 8192
    # width and greatest length of the text features (flan-t5-xl); heads of the pooling over them
    text_width: int = 2048
    text_tokens: int = 512
    pool_heads: int = 16
    # rows of the scale table: the greatest number of scales
    max_scales: int = 15
    # bits per token, and per cell of the tokenizer's map: equal, or four times as many where a token stands for 2×2 cells
    code_bits: int = 32
    tokenizer_bits: int = 32
    # what `generate` makes when it is not told
    default_size: str = "1M"
    rope_base: float = 10000.0
    # RoPE coordinates are stretched to the last map of the 1M schedule ("longest") or of the schedule in use ("own")
    rope_extent: str = "longest"
    initializer_range: float = 0.02
    # the tokenizer's convolutional decoder
    vae_channels: int = 128
    vae_multipliers: list[int] = field(default_factory=lambda: [1, 2, 4, 4, 4])
    vae_blocks: int = 2

    def __post_init__(self, **kwargs: object) -> None:
        """Checks what the fields must agree on."""
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 4:
            raise OptionError(f"hidden_size {self.hidden_size} over {self.num_attention_heads} heads is no multiple of 4, which RoPE in 2-D needs")
        if self.hidden_size % self.pool_heads:
            raise OptionError(f"hidden_size {self.hidden_size} is not a multiple of the {self.pool_heads} pooling heads")
        if self.code_bits not in (self.tokenizer_bits, 4 * self.tokenizer_bits):
            raise OptionError(f"code_bits must be tokenizer_bits or four times as many, got {self.code_bits} and {self.tokenizer_bits}")
        if self.default_size not in SIZES:
            raise OptionError(f"no size {self.default_size!r}; there are {', '.join(SIZES)}")
        if self.rope_extent not in ("longest", "own"):
            raise OptionError(f"rope_extent must be 'longest' or 'own', got {self.rope_extent!r}")
        super().__post_init__(**kwargs)

    @property
    def is_patchified(self) -> bool:
        """Whether a token stands for 2×2 cells of the tokenizer's map."""
        return self.code_bits != self.tokenizer_bits

    @classmethod
    def official(cls, name: str) -> InfinityConfig:
        """Configuration of a published model: "125M", "2B" or "8B"."""
        if name == "2B":
            return cls()
        if name == "8B":
            return cls(
                num_hidden_layers=40, hidden_size=3584, num_attention_heads=28, intermediate_size=14336, code_bits=56, tokenizer_bits=14,
                vae_multipliers=[1, 2, 4, 4],
            )  # fmt: skip
        if name == "125M":
            return cls(
                num_hidden_layers=12, hidden_size=768, num_attention_heads=8, intermediate_size=3072, code_bits=16, tokenizer_bits=16,
                default_size="0.06M",
            )  # fmt: skip
        raise OptionError(f"no published Infinity is called {name!r}; there are 125M, 2B, 8B")
