"""One page of runs and evaluations."""
