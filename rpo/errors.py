"""What can be set for a run: frozen dataclasses, filled once from Hydra's composed YAML and checked for types.

Values live in `conf/*.yaml` alone: no dataclass here has a default, so what a run used is what its
`config.yaml` says. This is the only module that imports omegaconf, and only to convert: the library is usable
without it.
"""


class UserError(ValueError):
    """What a user can mend: the scripts print it as one line, without a traceback, and exit with 2."""
