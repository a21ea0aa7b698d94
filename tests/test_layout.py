"""Who may import whom: packages in one order, heavy libraries behind doors, files and functions of a size to read."""

import ast
import subprocess
import sys
from functools import cache

from tests.helpers.runs import ROOT, script_env

# A module imports ground files and packages to its left, and those of its own package.
ORDER = """
    errors text paths stats fields config files dist losses sandbox
    data runs model theory judging synthetic training evals overopt reporting tasks export
""".split()
DOORS = {
    "pydantic": {"config", "fields"},
    "omegaconf": {"config"},
    "wandb": {"runs.log"},
    "hydra": {"training.sweep", "training.memory", "training.command_line", "training.misspelt"},
    "datasets": {"data.sources"},
    "pyarrow": {"data.sources"},
    "openai": {"judging.client"},
    "lm_eval": {"tasks.lm_eval"},
    "matplotlib": {"*.figures", "synthetic.demo", "theory.__main__"},
    "jinja2": {"reporting.render", "data.chat"},
    "scipy": {"stats"},
    "peft": {"model.lora"},
    "bitsandbytes": {"model.four_bit"},
}


def own_modules():
    """All of rpo/ but the links to train.py and eval.py, which a package has copies of."""
    return [path for path in sorted((ROOT / "rpo").rglob("*.py")) if not path.is_symlink()]


@cache
def imports():
    """(module of rpo, line, what it imports, dotted) of every import statement, those within functions too."""
    found = []
    for path in own_modules():
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


def sources():
    return [*own_modules(), ROOT / "train.py", ROOT / "eval.py"]


def test_budget():
    """No file is over 450 lines, no function over 80 but train(), which is at most 210."""
    wrong = []
    for path in sources():
        text = path.read_text()
        wrong += [f"{path}: {text.count(chr(10))} lines"] if text.count("\n") > 450 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                most = 210 if (path.name, node.name) == ("train.py", "train") else 80
                lines = node.end_lineno - node.lineno + 1
                wrong += [f"{path}:{node.lineno} {node.name}: {lines} lines"] if lines > most else []
    assert not wrong, "\n".join(wrong)


def test_a_package_is_a_map():
    """Every package of rpo says in its docstring what is in it, and re-exports nothing."""
    for path in sorted((ROOT / "rpo").rglob("__init__.py")):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) and (len(tree.body) == 1 or path.parent.name == "rpo"), path


def test_tests_import_no_tests():
    """What test modules share is in tests/helpers."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tests."):
                assert node.module.startswith("tests.helpers"), f"{path}:{node.lineno} imports {node.module}"


def test_starting_is_fast():
    """What a script imports before it has read its settings is torch, Hydra and pydantic, not what takes seconds more."""
    slow = ("transformers", "torch._dynamo", "matplotlib", "datasets", "wandb", "openai", "scipy", "pandas", "jinja2")
    code = f"import sys, torch; before = set(sys.modules); import train, eval; print(*(set({slow}) & set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=script_env(), capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stdout + done.stderr[-500:]
