"""Regularized Preference Optimization (arXiv 2405.16436) in pure PyTorch."""

from importlib.metadata import version

if tuple(map(int, version("torch").split(".")[:2])) < (2, 10):
    raise ImportError(f"torch {version('torch')} is too old: rpo needs 2.10 or newer; pip install -U torch")
