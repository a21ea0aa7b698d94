"""What a run leaves on disk, written and read back.

In reading order:
    folder       where a run is, that it is its own, how it ended, what it ran on: RunFolder
    log          metrics.jsonl, samples.jsonl and wandb: RunLog
    state        all that the next update depends on: TrainState
    checkpoint   that state on disk, whole or not at all: Checkpoint, Checkpoints
    process      signals and exit codes
    catalog      the runs below a folder
    groups       runs that differ in their seeds alone
"""
