"""What can be set, with its defaults; a package so that Hydra finds it where rpo is installed."""
