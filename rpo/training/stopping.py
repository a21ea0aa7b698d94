"""Early stopping on a held-out metric."""

from collections.abc import Sequence

from rpo.config import Stop


def is_over(values: Sequence[float], cfg: Stop) -> bool:
    """Whether the last `patience` of the evaluations' values were none of them better, by more than min_delta, than the
    best before them; a NaN is never better. The same on every rank, as the values are."""
    if cfg.metric is None:
        return False
    sign = 1 if cfg.metric.startswith("max:") else -1
    best, since = float("-inf"), 0
    for value in values:
        if sign * value > best + cfg.min_delta:
            best, since = sign * value, 0
        else:
            since += 1
    return since >= cfg.patience
