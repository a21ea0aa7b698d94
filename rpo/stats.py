"""Means with error bars that know which numbers belong together."""

import numpy as np
from numpy.typing import ArrayLike


def clustered_mean(values: ArrayLike, clusters: ArrayLike, sizes: ArrayLike | None = None) -> dict[str, float | None]:
    """Sum of `values` over sum of `sizes` (default 1 each: the mean), its standard error clustered by prompt, and n.

    SE^2 = G/(G-1) * sum over the G clusters of (sum of values - mean x sizes in the cluster)^2 / (sum of sizes)^2
    (arXiv 2411.00640, with the small-sample factor; the linearised ratio where sizes differ). With one row per cluster
    it is the ordinary standard error. One cluster has no error, no row no value (null).
    """
    values, clusters = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    sizes = np.ones(len(values)) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if not len(values):
        return {"value": None, "se": None, "n": 0}
    mean, num_clusters = values.sum() / sizes.sum(), len(np.unique(clusters))
    sums = np.bincount(clusters, weights=values - mean * sizes)
    se = np.sqrt(num_clusters / (num_clusters - 1) * (sums**2).sum()) / sizes.sum() if num_clusters > 1 else None
    return {"value": float(mean), "se": None if se is None else float(se), "n": len(values)}
