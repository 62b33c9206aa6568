"""What a dVAE is made of, the sizes that have a name, and the schedules of its training."""

import dataclasses
import math
from dataclasses import dataclass

from beit_fast.checks import Count, FieldError, Natural, NonNegative, check_fields

NUM_GROUPS = 4  # of residual blocks, in the encoder as in the decoder
STRIDE = 2 ** (NUM_GROUPS - 1)  # pixels a token, on each side


@dataclass(frozen=True, kw_only=True)
class DvaeConfig:
    """Widths of a dVAE; the defaults are DALL-E's (53.8 M parameters encode, 43.8 M decode)."""

    vocab_size: Count = 8192
    encoder_width: Count = 256  # channels of group 1; doubled by each further group
    decoder_width: Count = 256  # channels of group 4; each group before has twice as many
    decoder_input_width: Count = 128  # channels of the code embedding
    blocks_per_group: Count = 2

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("encoder_width", "decoder_width"):
            if (width := getattr(self, name)) % 4:
                raise FieldError(
                    name,
                    f"is {width}: residual blocks work at a quarter of their width, so choose a "
                    "multiple of 4",
                )


_VARIANTS = {f"dvae_{size}": DvaeConfig(vocab_size=size) for size in (1024, 2048, 4096, 8192)}


def dvae_config(name: str, **overrides: int) -> DvaeConfig:
    """Config of a named dVAE: dvae_1024, dvae_2048, dvae_4096, dvae_8192 (DALL-E's own).

    `dvae_config("dvae_1024", encoder_width=128)` replaces fields. Raises ValueError for a name
    that is not listed.
    """
    if name not in _VARIANTS:
        raise ValueError(f"there is no dVAE named {name!r}: choose one of {', '.join(_VARIANTS)}")
    return dataclasses.replace(_VARIANTS[name], **overrides)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """From `start` to `end` along half a cosine in `num_steps` steps, and `end` from there on.

    A linear schedule of the temperature tended to diverge (arXiv:2102.12092, appendix A.2).
    """

    start: NonNegative
    end: NonNegative
    num_steps: Natural

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, step: int) -> float:
        """Value at `step`, counted from 0."""
        if step >= self.num_steps:
            return self.end
        return self.end + 0.5 * (self.start - self.end) * (
            1 + math.cos(math.pi * step / self.num_steps)
        )
