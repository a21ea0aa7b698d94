"""One form of evaluation: every task reads its settings, runs on a context and returns an `Evaluation`.

Read in this order:

    settings     what can be set for any task, and the checks that tasks share
    context      a run folder that an evaluation resumes in; models, reference, answers and judge, opened when asked for
    store        values by key on disk, so that nothing is computed twice
    results      `Item`, `Evaluation`, and the files that every task leaves
    pairing      two models on the same items: differences, and a verdict in words
    judged       what a judge said of two models' answers in both orders
    preference   a policy's log-probs of preference pairs, and the metrics made of them
"""
