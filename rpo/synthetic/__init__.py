"""The embedded task (data=gold): pairs that only partly reveal a known reward.

grammar      prompts, a corpus, and the gold reward
task         the task's files, made on first use; gold and KL of a policy
demo         python -m rpo.synthetic.demo: the table and picture of README
"""
