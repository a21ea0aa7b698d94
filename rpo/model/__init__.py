"""A Hugging Face LM as a sharded policy that scores and samples, verified at load.

Reading order: hf (load, check, save), policy, logprobs, attention, probe, shard, sampling, divergence, fingerprint.
"""
