"""What train.py is made of besides the loop.

In reading order:
    prepare      everything before the loop: machine, rows, policy, reference; what of it cells share
    reference    the reference's log-probs, cached on disk
    optim        AdamW, schedule, clipping
    meter        metrics and throughput
    held_out     evaluation and samples while a run trains
    guards       hangs, out of memory, numbers that are not finite
    gradients    the two terms' gradients
    command_line  overrides that Hydra would misread
    sweep        Hydra's multirun: `shared`, the rule by which cells reuse; failed cells, the table
    memory       python -m rpo.training.memory: what a step takes of a GPU (with trace)
    figures      a run's curves
"""
