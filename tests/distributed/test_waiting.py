"""Rank 0 may take longer than a collective's timeout: the others wait for it outside of one."""

import subprocess

import pytest

from tests.helpers.runs import command, script_env

pytestmark = pytest.mark.slow

WAITING = """
import sys, time
from pathlib import Path
import torch.distributed as torch_dist
from rpo import dist
from rpo.errors import UserError

dist.init(timeout=2)
order = []
with dist.main_first():
    if dist.is_main():
        time.sleep(5)
        Path(sys.argv[1]).touch()
    order.append(Path(sys.argv[1]).exists())
assert dist.on_main(lambda: time.sleep(5) or "made") == "made"
try:
    with dist.main_first():
        if dist.is_main():
            raise UserError("failed on rank 0")
        raise UserError("failed alike")
except UserError as error:
    order.append(str(error))
began = time.monotonic()
for _ in range(20):
    dist.on_main(int)
assert time.monotonic() - began < 2
sys.stdout.write(f"{dist.rank()} {order}\\n")  # in one piece, or two ranks write into one line
sys.stdout.flush()
dist.leave(0)
"""


def test_rank_0_takes_longer_than_the_timeout(tmp_path):
    """5 seconds under a timeout of 2, in main_first and on_main: the other waits, and fails alike where rank 0 fails."""
    (tmp_path / "waiting.py").write_text(WAITING)
    args = [*command("train.py", ranks=2)[:-1], str(tmp_path / "waiting.py"), str(tmp_path / "made")]
    done = subprocess.run(args, env=script_env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = sorted(done.stdout.splitlines())
    assert lines == ["0 [True, 'failed on rank 0']", "1 [True, 'failed alike']"], done.stdout
