"""Stands in for pydantic on a machine that has none: a group of settings is then a plain dataclass, unchecked.

Imported before anything of rpo. Only for benchmarks, which make their settings themselves.
"""

import dataclasses
import importlib.util
import sys
import types


def _nothing(name: str) -> type:
    return type(name, (Exception,), {"__init__": lambda self, *args, **kwargs: None})


if not importlib.util.find_spec("pydantic"):
    stand_in = types.ModuleType("pydantic")
    for name in ("AfterValidator", "BeforeValidator", "ConfigDict", "Field", "ValidationError"):
        setattr(stand_in, name, _nothing(name))
    stand_in.model_validator = lambda **_: lambda method: method
    stand_in.dataclasses = types.SimpleNamespace(dataclass=lambda config, **how: dataclasses.dataclass(**how))
    sys.modules["pydantic"] = stand_in
