"""One file per `task=` of eval.py: its Settings, check(cfg), run(cfg, ctx) -> Evaluation and table(evaluation).

A new task is its file, its YAML in conf/task, its line in eval.py's TASKS, and its test.
"""
