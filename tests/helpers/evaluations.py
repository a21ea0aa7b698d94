"""Evaluations run in this process, and what they leave."""

import json

import eval as evaluation
from rpo import dist
from tests.helpers.runs import settings


def evaluate(run_dir, *more):
    """results.json of an evaluation made in this process."""
    try:
        assert evaluation.evaluate(settings(*more, f"run_dir={run_dir}", name="eval")) == "finished"
    finally:
        dist.shutdown()
    return json.loads((run_dir / "results.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
