"""The one-way flow: each module imports only strictly lower layers, and heavy libraries have one door each."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"redact", "jail", "harness"},
    {"config"},
    {"eval_config"},
    {
        "attention",
        "checks",
        "losses",
        "dist",
        "optim",
        "logprobs",
        "grammar",
        "rows",
        "store",
        "stats",
        "bandits",
        "judge_server",
        "svg",
    },
    {
        "page",
        "packing",
        "overopt",
        "answers",
        "closed_forms",
        "theory",
        "eval_checks",
        "verdicts",
        "outputs",
        "judge_prompts",
        "fastchat",
        "length_control",
        "sandbox",
        "gsm8k",
        "paired",
        "judge",
    },
    {
        "models",
        "tokens",
        "metrics",
        "plots",
        "rundir",
        "scaling",
        "selection",
        "groups",
        "theory_checks",
        "toy",
        "alpaca_files",
        "pairwise",
        "findings",
        "report_plots",
    },
    {"checkpoint", "results", "overopt_plots", "data", "score", "generate", "dryrun", "sweep", "theory_page"},
    {"faults", "memory", "reference", "drift", "points", "study", "experiment", "rates", "gather", "answering"},
    {"diagnostics", "gold", "demo", "start", "runs", "batches", "worst"},
    {"rewards", "conclusions"},
    {
        "tasks.pairs",
        "tasks.generate",
        "tasks.gold",
        "tasks.select",
        "tasks.compare",
        "tasks.judge_check",
        "tasks.winrate",
        "tasks.mt_bench",
        "tasks.alpaca_eval",
        "tasks.lm_eval",
        "tasks.mbpp",
    },
    {"tasks.overopt", "report_blocks"},
    {"tasks.report"},
]
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}
DOORS = {
    "omegaconf": {"config"},
    "wandb": {"metrics"},
    "transformers": {"models", "tokens", "data", "generate", "rewards"},
    "tokenizers": {"tokens", "data"},
    "datasets": {"rows"},
    "openai": {"judge_server"},
    "lm_eval": {"tasks.lm_eval"},
    "hydra": {"sweep", "memory"},
    "matplotlib": {"plots", "demo", "overopt_plots", "theory_page"},
}


def modules():
    for path in sorted((ROOT / "rpo").rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(ROOT / "rpo").with_suffix("").parts), path


def imported(path):
    """(top-level package, rpo module or None) of every import statement, lazy ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages = ("rpo", "rpo.tasks")
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module in packages else [node.module]
        for name in names:
            package, _, module = name.partition(".")
            yield package, module if package == "rpo" and module else None


def test_every_module_has_a_layer():
    """No module stands outside the plan."""
    assert {name for name, _ in modules()} == set(LAYER_OF)


def test_imports_point_down():
    """A module imports only strictly lower layers; nothing imports a script."""
    for name, path in modules():
        for package, module in imported(path):
            assert package not in ("train", "eval"), f"{path} imports a script"
            if module is not None:
                assert LAYER_OF[module] < LAYER_OF[name], f"{path} imports rpo.{module}"


def test_heavy_libraries_have_one_door():
    """Only the named modules import omegaconf, wandb, transformers, datasets, hydra and matplotlib."""
    for name, path in modules():
        for package, _ in imported(path):
            assert name in DOORS.get(package, {name}), f"{path} imports {package}"
