"""Files to rows to tokens to batches, and which pairs are step k.

Reading order: sources (files), formats (rows), tokenizer (tokens), dataset (a reported, cached data set), batch (layouts),
schedule (steps), answers (files of answers).
"""
