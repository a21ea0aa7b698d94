"""The theorem of arXiv 2405.16436 on finite bandits, exact.

game         the maximin, the minimax and the loss, each solved
bandits      preference data of finite contextual bandits
closed_forms optima in closed form, and a class for which the theorem fails
checks       what theory says against what the code computes
toy          overoptimisation on a bandit
__main__     python -m rpo.theory: all checks, and their figures
"""
