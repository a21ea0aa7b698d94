"""Which files of a directory are data, and of which split."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

# Words in files' names, and the splits that they speak of.
_SPLITS = {"train": "train", "training": "train", "heldout": "held-out"}
_SPLITS |= dict.fromkeys(("test", "tests", "testing", "devtest", "eval", "evals", "evaluation", "unseen"), "test")
_SPLITS |= dict.fromkeys(("validation", "validate", "valid", "val", "dev"), "validation")
# Beside a dataset's files.
_METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}


def below(folder: Path) -> list[Path]:
    """The files in it and below, hidden ones aside; links are followed, and none is there twice."""

    def fail(error: OSError) -> None:
        raise error

    files, seen = [], {os.path.realpath(folder)}
    for at, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = {name: os.path.realpath(os.path.join(at, name)) for name in sorted(folders) if not is_hidden(name)}
        folders[:] = [name for name, path in real.items() if path not in seen]
        seen.update(real.values())
        files += [Path(at, name) for name in names if name[0] != "." and name != "_SUCCESS"]
    return once(files)


def is_hidden(name: str) -> bool:
    """Of a directory: what systems and Spark write beside the data."""
    return name[0] == "." or name in ("_temporary", "_delta_log", "__MACOSX", "__pycache__")


def _nearness(file: Path) -> tuple[int, Path]:
    return len(file.parts), file


def once(files: Iterable[Path]) -> list[Path]:
    """The files in order, of several names for one file (links) the shortest way."""
    return sorted({os.path.realpath(file): file for file in sorted(files, key=_nearness, reverse=True)}.values())


def is_beside(file: Path) -> bool:
    """Whether a file is one that datasets come with: README.md, LICENSE, state.json; not part-00000."""
    return (
        file.suffix.lower() == ".md"
        or file.name in _METADATA
        or (not file.suffix and (file.name.isupper() or not file.is_file()))
    )


def splits_of(part: Path) -> set[str]:
    """The splits that a file's name, or those of the directories that it is in, speak of."""
    text = re.sub("([a-z])([A-Z])", r"\1 \2", str(part))  # MyTestData
    text = re.sub("h[eo]ld[^a-z]?out", "heldout", text.lower())
    return {_SPLITS[word] for each in re.split("[^a-z]+", text) if (word := each.removesuffix("set")) in _SPLITS}
