"""Regularized Preference Optimization (arXiv 2405.16436) in pure PyTorch.

Packages, each importing only those before it: data, runs, model, theory, judging, synthetic, training, evals, overopt,
reporting, tasks; before them the files beside this one, losses.py first to read. train.py and eval.py are the scripts.
"""

from importlib.metadata import version

if tuple(map(int, version("torch").split(".")[:2])) < (2, 11):
    raise ImportError(f"torch {version('torch')} is too old: rpo needs 2.11 or newer; pip install -U torch")
