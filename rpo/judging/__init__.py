"""Asking a judge, and what its words mean.

Reading order: client (one request), judge (cache, cost), prompts, verdicts, length_control; alpaca_files and
mt_bench_files read and write the official forms.
"""
