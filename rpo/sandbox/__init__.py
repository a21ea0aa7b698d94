"""A program run where it can do no harm: run (from outside), jail (the walls), harness (inside)."""
