"""Asking a judge, and reading its verdicts.

settings     judge.* of an evaluation
client       one request to a server that speaks OpenAI's API
cache        replies on disk, for several processes at once
judge        many requests: cache, cost, concurrency
prompts      what judges are asked
verdicts     what a reply says, both orders, rates
length_control  length-controlled win rates (AlpacaEval 2)
alpaca_files, mt_bench_files  the official file formats
"""
