"""Gold reward along a run's checkpoints: measured, summarised, compared, drawn.

measure      every checkpoint answers the same prompts
rewards      what an answer is worth
curve        peak, drop and verdict of one run
best_of_n    best-of-n of the reference, as a yardstick
scaling_laws Gao et al.'s two laws
study        groups of seeds
selection    which checkpoint to take
figures      the figures
experiment   python -m rpo.overopt.experiment: the study of docs/OVEROPTIMIZATION.md
"""
