"""What train.py is made of besides the loop.

Reading order: prepare, reference, optim, meter, guards, gradients, sweep, memory (with trace), figures.
"""
