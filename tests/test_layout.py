"""Who may import whom: packages in one order, heavy libraries behind doors, files and functions of a size to read."""

import ast
from functools import cache

from tests.helpers.runs import ROOT

# A module imports ground files and packages to its left, and those of its own package.
ORDER = """
    errors text stats config files dist losses sandbox
    data runs model theory judging synthetic training evals overopt reporting tasks
""".split()
DOORS = {
    "pydantic": {"config"},
    "omegaconf": {"config"},
    "wandb": {"runs.log"},
    "hydra": {"training.sweep", "training.memory"},
    "datasets": {"data.sources"},
    "pyarrow": {"data.sources"},
    "openai": {"judging.client"},
    "lm_eval": {"tasks.lm_eval"},
    "matplotlib": {"*.figures", "synthetic.demo", "theory.__main__"},
    "jinja2": {"reporting.render"},
    "scipy": {"stats"},
}


@cache
def imports():
    """(module of rpo, line, what it imports, dotted) of every import statement, those within functions too."""
    found = []
    for path in sorted((ROOT / "rpo").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "rpo").with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(module, node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found += [(module, node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


LEFT_TO_DO = {("judging", "evals"), ("reporting", "tasks"), ("runs", "model")}


def test_imports_point_left():
    """A package imports ground files and packages to its left alone; nothing imports a script."""
    wrong = []
    for module, line, name in imports():
        library, _, rest = name.partition(".")
        assert library not in ("train", "eval"), f"rpo.{module}:{line} imports a script"
        ours, theirs = module.partition(".")[0], rest.partition(".")[0]
        if (
            library == "rpo"
            and ours
            and ours != theirs
            and ORDER.index(theirs) >= ORDER.index(ours)
            and (ours, theirs) not in LEFT_TO_DO
        ):
            wrong.append(f"rpo.{module}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_have_one_door():
    """Only the named modules import pydantic, omegaconf, wandb, hydra, datasets, openai, matplotlib and so on."""
    wrong = []
    for module, line, name in imports():
        doors = DOORS.get(name.partition(".")[0])
        if doors and module not in doors and f"*.{module.rpartition('.')[2]}" not in doors:
            wrong.append(f"rpo.{module}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)
