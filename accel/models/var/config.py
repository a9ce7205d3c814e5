"""Configuration of VAR."""

from __future__ import annotations

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from accel.errors import OptionError
from accel.models.cache import Schedule

# side lengths of the published schedules: tokens of the whole sequence -> sides
SIDES: dict[int, list[int]] = {
    680: [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    2240: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32],
    9451: [1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64],
}
OFFICIAL_DEPTHS = (16, 20, 24, 30, 36)


@strict
class VARConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of a VAR and of its tokenizer. The defaults are `var_d16.pth` with `vae_ch160v4096z32.pth`."""

    model_type = "accel_var"

    num_hidden_layers: int = 16
    hidden_size: int = 1024
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    # one condition layer for all blocks plus a learned offset per block, as in d36
    shared_adaln: bool = False
    num_classes: int = 1000
    # whether the class table has one more row for "no class", which guidance needs
    has_null_class: bool = True
    # side lengths, coarse to fine
    schedule: list[int] = field(default_factory=lambda: list(SIDES[680]))
    initializer_range: float = 0.02
    # the tokenizer: codes, and the convolutional encoder and decoder
    codebook_size: int = 4096
    code_width: int = 32
    vae_channels: int = 160
    vae_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    vae_blocks: int = 2

    def __post_init__(self, **kwargs: object) -> None:
        """Checks what the fields must agree on."""
        if self.hidden_size % self.num_attention_heads:
            raise OptionError(f"hidden_size {self.hidden_size} is not a multiple of the {self.num_attention_heads} heads")
        self.scales()
        super().__post_init__(**kwargs)

    def scales(self) -> Schedule:
        """The token maps."""
        return Schedule.of(self.schedule)

    @classmethod
    def official(cls, depth: int) -> VARConfig:
        """Configuration of a published file by its depth: 16, 20, 24, 30 (256 px) or 36 (512 px)."""
        if depth not in OFFICIAL_DEPTHS:
            raise OptionError(f"no published VAR has depth {depth!r}; there are {', '.join(map(str, OFFICIAL_DEPTHS))}")
        return cls(
            num_hidden_layers=depth, hidden_size=64 * depth, num_attention_heads=depth, intermediate_size=256 * depth, shared_adaln=depth == 36,
            schedule=list(SIDES[2240 if depth == 36 else 680]),
        )  # fmt: skip
