"""Files to rows to tokens to batches, and which pairs belong to step k.

In reading order:
    directories  which files of a directory are data
    sources      files and data sets to raw rows with their line numbers
    row_errors   what is wrong with a row
    messages     one message in any notation, and messages that a text holds as JSON
    formats      a raw row, whichever form it has, to an Example
    chat         what a chat template renders, and what it leaves out
    tokenizer    texts to ids: BOS, end of turn, the border between prompt and response
    parts        tokenising that takes long: kept on disk, seen on screen
    repeats      rows that say the same as others, or the opposite
    dataset      tokenised rows, cached and reported: Rows, Splits
    batch        rows to a Batch, padded or packed
    schedule     which rows make up step k, and how ranks and micro-batches divide them
    loader       a step's batches, one step ahead in a thread
    answers      files of answers, for evaluation
"""
