"""Gold along checkpoints: measured, summarised, compared, drawn."""
