"""A context whose answers and judge are plain functions, for tasks that ask for little else."""

import json

from rpo.evals.context import identity_of
from rpo.evals.store import Store


class StubContext:
    """Writes into `run_dir`; `answer(path, conversations, sampling)` and `ask(requests)` stand for models and a judge."""

    def __init__(self, run_dir, *, answer=None, ask=None, device=None):
        self.run_dir, self.device = run_dir, device
        self._answer, self._ask = answer, ask

    def begin(self):
        self.run_dir.mkdir(exist_ok=True)

    def answer(self, path, conversations, sampling):
        return self._answer(path, conversations, sampling)

    def ask(self, requests):
        return self._ask(requests)

    def store(self, name):
        return Store(self.run_dir / f"{name}.jsonl")

    def identity(self, path):
        return identity_of(path, None)

    def write_report(self, report):
        (self.run_dir / "data_report.json").write_text(json.dumps(report))
