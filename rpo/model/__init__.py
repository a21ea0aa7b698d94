"""A Hugging Face LM as a sharded policy that scores and samples, verified when it is loaded.

In reading order:
    hf           configs checked, weights loaded, built and saved
    stored       what a model's files hold, and what a class leaves in them
    policy       the FSDP root; pairs scored under policy and reference
    logprobs     log-probs of given tokens in tiles, and their sum over a response; the naive form that specifies them
    attention    attention over packed rows
    probe        what is verified at load, and the noise floor
    shard        mesh, activation checkpointing, compile, FSDP2
    sampling     answers
    divergence   KL and entropy of answers
    language_model  that of a multimodal checkpoint, taken out
    fingerprint  what log-probs depend on beside the tokens
"""
