"""What can be set for a run: frozen groups of keys, filled once from Hydra's composed YAML and checked.

Types and ranges stand at the field; what two keys must not say together stands in the group that holds both. Values live in
`conf/*.yaml` alone: no group has a default, so what a run used is what its `config.yaml` says. This is the only module
that imports omegaconf, and only to convert: the library is usable without it.
"""


class UserError(ValueError):
    """What a user can mend: the scripts print it as one line, without a traceback, and exit with 2."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)
