"""What users give as files, models and data sets, made independent of the folder that a command starts in."""

import glob
import os
from typing import Any


def resolved(spec: Any, *, follow: bool = False) -> Any:
    """Local paths made absolute, so that a run's config.yaml means the same from any folder; names stay as they are.

    Links are followed for models, which a run may have made; not for files, whose own name says what they are.
    """
    if isinstance(spec, list):
        return [resolved(item, follow=follow) for item in spec]
    if isinstance(spec, dict):  # a part of a mixture
        return spec | {"path": resolved(spec["path"])}
    if not spec or spec == "gold":
        return spec
    path = os.path.expanduser(spec)
    if os.path.exists(path):
        return os.path.realpath(path) if follow else os.path.abspath(path)
    folder, colon, split = path.rpartition(":")
    if os.path.isdir(folder):  # of a dataset, of which one split is named
        return os.path.abspath(folder) + colon + split
    return os.path.abspath(path) if glob.glob(path, recursive=True) else spec


def expanded(spec: str | list[str] | None) -> str | list[str] | None:
    """Each pattern of local folders (outputs/*/model) as those that it matches; one folder of one pattern is a string."""
    if isinstance(spec, list):
        parts = map(expanded, spec)
        return [path for part in parts for path in (part if isinstance(part, list) else [part])]
    found = sorted(glob.glob(os.path.expanduser(spec), recursive=True)) if spec and glob.has_magic(spec) else []
    return spec if not found else found[0] if len(found) == 1 else found


def part_of_mixture(part: dict[str, Any]) -> dict[str, Any]:
    """{path, weight}; without a weight it is 1. Raises ValueError for anything else."""
    path, weight = part.get("path"), part.get("weight", 1)
    is_known = part.keys() <= {"path", "weight"} and isinstance(path, str)
    if not is_known or type(weight) not in (int, float) or not 0 < weight < 1e4:
        raise ValueError("not a part of a mixture")
    return {"path": path, "weight": weight}
