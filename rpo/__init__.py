"""Regularized Preference Optimization (arXiv 2405.16436) in pure PyTorch."""
