"""How the masking rate moves over training."""

from __future__ import annotations

import math

from tokmask_peft.masking.config import TokenMaskConfig


def rate_at(config: TokenMaskConfig, share: float) -> float:
    """Return the masking rate when `share` (0 to 1) of training is done.

    `constant` stays at `p`; the others leave `p_start` at `begin` and reach `p` at `ramp_end`, on a straight line
    (`linear`, `warmup`) or on half a cosine wave (`cosine`).
    """
    if config.schedule == "constant":
        return config.p
    progress = (share - config.begin) / (config.ramp_end - config.begin)
    progress = min(max(progress, 0.0), 1.0)
    if config.schedule == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    # Weighted this way round, both ends are exact.
    return (1.0 - progress) * config.p_start + progress * config.p
