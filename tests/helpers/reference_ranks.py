"""Reference log-probs of a few rows, scored and then read back; run under torchrun by test_reference.

torchrun --nproc-per-node 2 tests/helpers/reference_ranks.py OUT.pt CACHE_DIR
"""

import sys
from pathlib import Path

import torch

from rpo import dist
from rpo.errors import UserError
from rpo.model import fingerprint, shard
from rpo.model.policy import prepare
from rpo.training import reference
from tests.helpers.models import make_lm
from tests.helpers.rows import make_rows

LENGTHS = [(5, 9, 4), (2, 3, 17), (8, 1, 2), (3, 12, 12), (6, 2, 7), (1, 8, 3), (4, 4, 20)]


def score(cache_dir):
    """Sums and reports of two calls (chunks of 3, 3 and 1 rows: the last has a filler on the second rank), and the error
    of one whose cache can not be written, which only rank 0 sees.
    """
    reference.CHUNK = 3
    device, lm = dist.init(), make_lm().double()
    weights = fingerprint.weights_digest(lm)
    options = {"compute_dtype": torch.float64, "compile": False, "trainable": True}
    policy = prepare(lm, shard.mesh(device, shard.PLAIN), shard.PLAIN, **options)
    how = {"device": device, "layout": "packed"}
    facts = fingerprint.identity(weights, policy, compute_dtype=torch.float64, **how)
    how |= {"name": "train", "budget": 40, "noise_floor": 0.0}
    rows = make_rows(LENGTHS, vocab_size=lm.config.vocab_size)
    results = [reference.score_rows(policy, rows, facts, cache_dir=cache_dir, **how) for _ in range(2)]
    try:
        reference.score_rows(policy, rows, facts, cache_dir=__file__ if dist.is_main() else cache_dir, **how)
    except UserError as error:
        return results, str(error)


if __name__ == "__main__":
    out, cache_dir = sys.argv[1:]
    dist.init()
    torch.save(score(Path(cache_dir) / str(dist.rank())), f"{out}.{dist.rank()}")
    dist.barrier()
    dist.leave(0)
