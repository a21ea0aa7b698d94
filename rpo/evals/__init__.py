"""One form of evaluation: every task reads its settings, runs on a context and returns an `Evaluation`.

Read in this order:

    settings     what can be set for any task, and the checks that tasks share
    context      a run folder that an evaluation resumes in; models, reference, answers and judge, opened when asked for
    results      `Item`, `Evaluation`, and the files that every task leaves
    pairing      two models on the same items: differences, and a verdict in words
    preference   a policy's log-probs of preference pairs, and the metrics made of them
"""
