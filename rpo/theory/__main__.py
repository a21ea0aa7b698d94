"""The executable theorem: its checks as a table, and the toy of overoptimisation as four figures.

python -m rpo.theory [FOLDER]      # PNG files go to FOLDER, by default outputs/theory; exits with 1 if a check fails
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from rpo.theory import checks, game, toy

matplotlib.use("Agg")

SEEDS = 40
SIZES = [100 * 2**k for k in range(9)]
BETAS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
ETAS = [0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
STEPS = 3000
DPO, BEST_DPO = "DPO, beta = N^-1/2", "DPO, best beta (oracle)"
RPO, RPO_FIXED, RPO_REF = "RPO, eta = 0.5 N^-1/2", "RPO, eta = 0.1", "RPO, eta = 0.5 N^-1/2, base = ref"
COLORS = {DPO: "C3", BEST_DPO: "C1", RPO: "C0", RPO_FIXED: "C2", RPO_REF: "C4"}
# The rate of theorem 5.3 for beta and eta that fall as N^-1/2; its proof has a fixed base, here it is the chosen law.
SLOPES = {RPO: (-0.65, -0.40), DPO: (-0.10, 0.10)}


def policies(num: int, seeds: int, methods: tuple[str, ...] = tuple(COLORS)) -> dict[str, Tensor]:
    """policy_SA of each method at the exact optimum for N = `num` comparisons."""
    wins, beta = toy.draw(num, seeds), num**-0.5
    solve = {
        DPO: lambda: toy.optimum(toy.game(wins, beta=beta, eta=0.0)),
        BEST_DPO: lambda: max(
            (toy.optimum(toy.game(wins, beta=b, eta=0.0)) for b in (0.01, 0.1, 1.0, 10.0, 100.0)),
            key=lambda policy_SA: float(toy.true_value(policy_SA).mean()),
        ),
        RPO: lambda: toy.optimum(toy.game(wins, beta=beta, eta=0.5 * beta)),
        RPO_FIXED: lambda: toy.optimum(toy.game(wins, beta=beta, eta=0.1)),
        RPO_REF: lambda: toy.optimum(toy.game(wins, beta=beta, eta=0.5 * beta, base="ref")),
    }
    return {method: solve[method]() for method in methods}


def gaps(by_size: dict[int, dict[str, Tensor]], method: str) -> list[tuple[float, float]]:
    """(mean, standard error) over seeds of J(best policy) - J(policy), for every N."""
    return [toy.mean_error(1 - toy.true_value(by_size[num][method])) for num in by_size]


def fitted(by_size: dict[int, dict[str, Tensor]], method: str) -> float:
    """The slope of log(mean gap) against log(N)."""
    return toy.slope(list(by_size), [mean for mean, _ in gaps(by_size, method)])


def grid(seeds: int) -> Tensor:
    """Mean true value at the exact optimum for N = 1000, rows BETAS, columns ETAS."""
    wins = toy.draw(1000, seeds)
    optimum = lambda beta, eta: toy.optimum(toy.game(wins, beta=beta, eta=eta))  # noqa: E731
    return torch.tensor([[float(toy.true_value(optimum(beta, eta)).mean()) for eta in ETAS] for beta in BETAS])


# ---- figures ----------------------------------------------------------------------------------------------------


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_paths(runs: dict[str, dict[str, Tensor]], path: Path) -> Path:
    """True value, mean log-prob of chosen and uncovered mass along training; bands are one standard error."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    titles = {"value": "true value J", "chosen": "mean log pi(chosen)  (nats)"}
    titles |= {"uncovered": "mass on uncovered actions"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for color, (name, run) in zip(("C3", "C0"), runs.items(), strict=True):
            mean, error = run[key].mean(1), run[key].std(1) / run[key].shape[1] ** 0.5
            step = run["step_K"].clamp(min=0.7)  # the start, on a logarithmic axis
            axes.plot(step, mean, color=color, label=name)
            axes.fill_between(step, mean - error, mean + error, color=color, alpha=0.25, lw=0)
        axes.set(xscale="log", xlabel="Adam step", ylabel=title)
    panels[0].axhline(1, color="black", lw=0.8, ls=":")
    panels[0].legend(frameon=False)
    panels[0].set_title(f"N = 1000, beta = 0.1, {len(next(iter(runs.values()))['value'][0])} seeds")
    return _save(figure, path)


def draw_grid(values: Tensor, path: Path) -> Path:
    """True value at the exact optimum over beta and eta; the column eta = 0 is DPO."""
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    image = axes.imshow(values.numpy(), origin="lower", aspect="auto", vmin=-1, vmax=1, cmap="RdYlBu")
    box = {"fc": "white", "alpha": 0.7, "lw": 0}
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, bbox=box)
    axes.set(xlabel="eta (0: DPO)", ylabel="beta")
    axes.set_title("true value at the exact optimum, N = 1000; best policy 1, ref -0.25")
    axes.set_xticks(range(len(ETAS)), [f"{eta:g}" for eta in ETAS])
    axes.set_yticks(range(len(BETAS)), [f"{beta:g}" for beta in BETAS])
    figure.colorbar(image, ax=axes)
    return _save(figure, path)


def draw_rates(by_size: dict[int, dict[str, Tensor]], path: Path) -> Path:
    """Suboptimality against N with fitted slopes; bars are one standard error."""
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    sizes = list(by_size)
    for method in (DPO, BEST_DPO, RPO, RPO_FIXED):
        mean, error = zip(*gaps(by_size, method), strict=True)
        label = f"{method}: slope {fitted(by_size, method):+.2f}"
        axes.errorbar(sizes, mean, error, color=COLORS[method], marker="o", ms=4, capsize=2, label=label)
    axes.plot(sizes, [4 * num**-0.5 for num in sizes], color="black", lw=0.8, ls=":", label="N^-1/2")
    axes.set(xscale="log", yscale="log", xlabel="comparisons N", ylabel="J(best) - J(policy)")
    axes.set_title("The instance changes with N: rare actions are met about twice, whatever N")
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def draw_uncovered(by_size: dict[int, dict[str, Tensor]], path: Path) -> Path:
    """Mass on rare and on never compared actions at the optimum against N, and the theoretical cap on the rare ones."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    sizes = list(by_size)
    most = max(float(by_size[num][method][:, toy.NEVER].sum(-1).mean()) for num in sizes for method in (DPO, RPO))
    never = f"never compared (3 actions); DPO and RPO at most {most:.0e}"
    parts = ("rarely compared (20 actions)", toy.RARE), (never, toy.NEVER)
    for axes, (title, part) in zip(panels, parts, strict=True):
        for method in (DPO, RPO, RPO_REF):
            masses = [toy.mean_error(by_size[num][method][:, part].sum(-1)) for num in sizes]
            mean, error = zip(*masses, strict=True)
            axes.errorbar(sizes, mean, error, color=COLORS[method], marker="o", ms=4, capsize=2, label=method)
        axes.set(xscale="log", yscale="log", ylim=(1e-5, 1.5), xlabel="comparisons N", title=title)
    limits = []
    for num in sizes:
        played = toy.game(toy.draw(num, len(by_size[num][RPO])), beta=num**-0.5, eta=0.5 * num**-0.5)
        limits.append(float(game.cap(played)[:, 0, toy.RARE].sum(-1).mean()))
    panels[0].plot(sizes, limits, color="black", lw=0.8, ls=":", label="(1 + 1/eta) x frequency as chosen")
    panels[0].set_ylabel("probability mass at the optimum")
    panels[0].legend(frameon=False, fontsize=8)
    return _save(figure, path)


# ---- text -------------------------------------------------------------------------------------------------------


def check_table(every: list[checks.Check]) -> str:
    """One line per check: what, theory, computed and difference where they differ most."""
    lines = [f"{'what':50}{'theory':>17}{'computed':>17}{'difference':>12}{'at most':>9}"]
    for c in every:
        verdict = "" if c.holds else "  FAILS"
        numbers = f"{c.theory:17.10g}{c.computed:17.10g}{c.difference:12.1e}{c.tolerance:9.0e}"
        lines.append(f"{c.what:50}{numbers}{verdict}")
    return "\n".join(lines)


def rate_table(by_size: dict[int, dict[str, Tensor]]) -> str:
    """Mean gap +- standard error for each N and method, and the fitted slopes."""
    lines = []
    for method in COLORS:
        lines.append(f"{method}: slope {fitted(by_size, method):+.3f}")
        lines.append("  " + "  ".join(f"{mean:.3g}+-{error:.1g}" for mean, error in gaps(by_size, method)))
    return "\n".join(lines)


def path_table(runs: dict[str, dict[str, Tensor]]) -> str:
    """True value at the start, at its peak and at the end, and the chosen log-prob at the start and the end."""
    lines = []
    for name, run in runs.items():
        mean_K, chosen_K = run["value"].mean(1), run["chosen"].mean(1)
        end, error = toy.mean_error(run["value"][-1])
        peak = int(mean_K.argmax())
        values = (
            f"J {mean_K[0]:.2f} -> {mean_K[peak]:.2f} at step {int(run['step_K'][peak])} -> {end:.3f} +- {error:.3f}"
        )
        lines.append(f"{name:16}{values}; log pi(chosen) {chosen_K[0]:.2f} -> {chosen_K[-1]:.2f} nats")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rpo.theory", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/theory"), help="where the PNG files go")
    folder = parser.parse_args().folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: {folder}: {error.strerror}; give a writable folder")
    torch.set_num_threads(1)  # the tables are small: two threads on a busy machine only wait for each other
    every = checks.golden() + checks.equivalence(checks.random_games()) + checks.nonconvex()
    print(check_table(every))
    if failed := [check.what for check in every if not check.holds]:
        sys.exit(f"error: {'; '.join(failed)}: the loss is not the one of the theorem")

    wins = toy.draw(1000, SEEDS)
    names = {"DPO": 0, "RPO, eta = 0.1": 0.1}
    runs = {name: toy.train(toy.game(wins, beta=0.1, eta=eta), STEPS) for name, eta in names.items()}
    print(f"\nOveroptimisation along training: N = 1000, beta = 0.1, {SEEDS} seeds, Adam\n{path_table(runs)}")
    by_size = {num: policies(num, SEEDS) for num in SIZES}
    print("\nJ(best) - J(policy) at the exact optimum; the instance changes with N, as in a worst case")
    print(f"N = {', '.join(map(str, SIZES))}; {SEEDS} seeds, +- one standard error\n{rate_table(by_size)}")
    values = grid(SEEDS)
    print(f"\nBest true value on the grid, N = 1000: DPO {values[:, 0].max():.3f}, RPO {values[:, 1:].max():.3f}\n")
    for path in (
        draw_paths(runs, folder / "paths.png"),
        draw_rates(by_size, folder / "rates.png"),
        draw_grid(values, folder / "beta_eta.png"),
        draw_uncovered(by_size, folder / "uncovered.png"),
    ):
        print(path.resolve())

    for method, (low, high) in SLOPES.items():
        if not low <= (slope := fitted(by_size, method)) <= high:
            sys.exit(f"error: {method}: slope {slope:.3f}, expected within [{low}, {high}]")


if __name__ == "__main__":
    main()
