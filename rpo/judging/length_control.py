"""AlpacaEval's length-controlled win rate, as if answers were as long as the baseline's (arXiv 2404.04475).

For one model m against the baseline b, over instructions i,

    P(m beats b | i) = sigmoid(phi tanh((len_b - len_m) / s) + psi gamma_i + theta)

with lengths in characters, s the standard deviation of the difference (n-1; 0: the term is 0) and gamma_i the difficulty
of the instruction, known in advance. The rate is the mean over i of that without its first term. The three coefficients
minimise |phi| + |psi| + |theta| + C sum_i w_i CE_i, CE the cross-entropy with the judge's own probability as the label. C is
the one of ten with the least cross-entropy in five-fold cross-validation.

Gamed rows are judgments of the baseline's own answers, rewritten to be verbose or concise. They have weight 0.1 and no theta,
so they fix phi and psi, and a model gains nothing by length. Without them phi and psi depend on the model alone; without
gamma (`minimal`) any prompts will do, and the rate is sigmoid(theta). Neither is the leaderboard's number.

Letters: N instructions, R rows of a fit (gamed ones first, then instructions), K = 3 coefficients (phi, psi, theta),
D bootstrap draws, F folds.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

CS = np.logspace(-4, 4, 10)
FOLDS = 5
GAMED_WEIGHT = 0.1  # 0.2, shared by the verbose and the concise answers
LEAST = 2 * FOLDS  # verdicts below which nothing is fitted
SIDE = 5  # verdicts on answers no longer, and on ones no shorter, below which nothing is fitted without gamed rows
TOO_SURE = 0.01  # points: a smaller standard error is not plausible for verdicts that differ
_AT_ONCE = 8  # draws solved together: their rows stay in the processor's cache
_STEPS = 100  # of Newton's method, at most
_SIGNS = np.array(list(product((-1, 0, 1), repeat=3)))


@dataclass(frozen=True)
class Gamed:
    """Rows of the baseline's gamed answers: length difference over its standard deviation, difficulty, win in [0, 1]."""

    length_R: np.ndarray
    difficulty_R: np.ndarray
    wins_R: np.ndarray


@dataclass(frozen=True)
class Weights:
    """phi, psi, theta, and the C that they were fitted with (None: read from a file)."""

    length: float
    difficulty: float
    model: float
    c: float | None = None


def win_rate(weights: Weights, difficulty_N: np.ndarray) -> float:
    """100 x mean of sigmoid(psi gamma + theta), in percent."""
    return float(100 * _sigmoid(weights.difficulty * difficulty_N + weights.model).mean())


def difference(of_model: Weights, of_other: Weights) -> Weights:
    """The difference between two models fitted against one baseline, whose own weights are 0."""
    return Weights(*(getattr(of_model, name) - getattr(of_other, name) for name in ("length", "difficulty", "model")))


def fit(
    wins_N: np.ndarray, length_N: np.ndarray, difficulty_N: np.ndarray | None = None, gamed: Gamed | None = None
) -> Weights:
    """The weights of one model: `wins_N` in [0, 1] (NaN: no verdict), `length_N` = len_b - len_m in characters.

    A row without a verdict is left out of the fit, not out of s. No `difficulty_N` is the minimal form. Folds are those of
    scikit-learn's GroupKFold (1.9) on one group per row: row r of R is in fold (R - 1 - r) mod 5.
    """
    counts_DN = np.ones((1, len(wins_N)))
    coefs_DK, best_D = _fit(_Rows.of(wins_N, length_N, difficulty_N, gamed), counts_DN)
    return Weights(*map(float, coefs_DK[0]), c=float(CS[best_D[0]]))


def bootstrap(
    wins_N: np.ndarray,
    length_N: np.ndarray,
    difficulty_N: np.ndarray | None = None,
    gamed: Gamed | None = None,
    *,
    draws: int,
    seed: int,
) -> np.ndarray:
    """The rate, in percent, of `draws` resamples of the instructions, each fitted from scratch; shape D, float64.

    s and C are chosen again in every draw, as in the estimate; all copies of an instruction are in one fold, so that no fold
    is tested on its training data. Gamed rows are not resampled: they are the same for all models.
    """
    rows, rng = _Rows.of(wins_N, length_N, difficulty_N, gamed), np.random.default_rng(seed)
    rates = []
    for start in range(0, draws, _AT_ONCE):
        size = min(_AT_ONCE, draws - start)
        counts_DN = rng.multinomial(len(wins_N), np.full(len(wins_N), 1 / len(wins_N)), size=size).astype(np.float64)
        coefs_DK, _ = _fit(rows, counts_DN)
        prob_DN = _sigmoid(coefs_DK[:, 1:2] * rows.difficulty_N + coefs_DK[:, 2:])
        rates.append(100 * (counts_DN * prob_DN).sum(1) / len(wins_N))
    return np.concatenate(rates)


def length_controlled(
    wins_N: np.ndarray,
    length_N: np.ndarray,
    difficulty_N: np.ndarray | None = None,
    gamed: Gamed | None = None,
    *,
    draws: int,
    seed: int,
) -> tuple[dict, Weights | None]:
    """(a cell {"value", "se", "interval", "n"} of the rate in percent, the weights), by `fit` and `bootstrap`.

    se is the standard deviation of the draws, the interval their 2.5% and 97.5% quantiles; both are null if `draws` is 0 or
    the draws do not differ. Nothing is fitted, and all is null, with fewer than 10 verdicts; and, without gamed rows, with
    fewer than 5 on either side of equal length, or if the longer (or the shorter) answer won whenever one did: any rate near
    the middle fits such verdicts. The cell's "note" gives the reason. Identical verdicts have se 0 and no interval.
    """
    judged_N = np.isfinite(wins_N)
    n, shorter, longer = (int(of_N[judged_N].sum()) for of_N in (judged_N, length_N >= 0, length_N <= 0))
    nothing = {"value": None, "se": None, "interval": None, "n": n}
    if n < LEAST:
        return nothing | {"note": f"not fitted: {n} verdicts, fewer than {LEAST}"}, None
    if gamed is None and (few := min(shorter, longer)) < SIDE:
        note = f"not fitted: one side's answers are the longer ones on all but {few} of {n} items"
        return nothing | {"note": note}, None
    if gamed is None and _length_decides_all(wins_N, length_N):
        note = "not fitted: length alone decides every verdict, so none shows what equal length would do"
        return nothing | {"note": note}, None
    weights = fit(wins_N, length_N, difficulty_N, gamed)
    cell = nothing | {"value": win_rate(weights, np.zeros(1) if difficulty_N is None else difficulty_N)}
    if draws:
        rates_D = bootstrap(wins_N, length_N, difficulty_N, gamed, draws=draws, seed=seed)
        low, high = np.quantile(rates_D, [0.025, 0.975])
        se = float(rates_D.std(ddof=1))
        if se < TOO_SURE:  # also if all verdicts are identical
            varied = bool(np.ptp(wins_N[judged_N]))
            return cell | ({"note": "no standard error: the draws do not differ"} if varied else {"se": 0.0}), weights
        cell |= {"se": se, "interval": [float(low), float(high)]}
    return cell, weights


def _length_decides_all(wins_N: np.ndarray, length_N: np.ndarray) -> bool:
    """True if verdicts are 0, 1 or a tie, and every win and loss went to the longer, or every one to the shorter answer."""
    if not np.isin(wins_N[np.isfinite(wins_N)], (0, 0.5, 1)).all():  # probabilities hold more than the winner
        return False
    decided_N = np.isfinite(wins_N) & (wins_N != 0.5)
    won_N, side_N = wins_N[decided_N] > 0.5, np.sign(length_N[decided_N])
    one_sided = all(set(side_N[won_N == won]) in ({-1.0}, {1.0}) for won in (True, False))
    return one_sided and set(side_N[won_N]) != set(side_N[~won_N])


# ---- the fit


@dataclass(frozen=True)
class _Rows:
    """The data that all draws share."""

    wins_R: np.ndarray
    weight_R: np.ndarray
    fold_R: np.ndarray
    length_N: np.ndarray
    difficulty_N: np.ndarray
    gamed: Gamed

    @classmethod
    def of(cls, wins_N, length_N, difficulty_N, gamed) -> "_Rows":
        none = np.zeros(0)
        gamed = gamed or Gamed(none, none, none)
        wins_N, length_N = np.asarray(wins_N, np.float64), np.asarray(length_N, np.float64)
        difficulty_N = np.zeros(len(wins_N)) if difficulty_N is None else np.asarray(difficulty_N, np.float64)
        judged_N = np.isfinite(wins_N)
        assert judged_N.sum() >= FOLDS, f"{judged_N.sum()} verdicts for {FOLDS} folds"
        G = len(gamed.wins_R)
        # Only rows that are fitted are numbered for the folds; the others have weight 0 and any fold.
        number_R = np.concatenate([np.arange(G), G + np.cumsum(judged_N) - 1])
        return cls(
            wins_R=np.concatenate([gamed.wins_R, np.where(judged_N, wins_N, 0.5)]),
            weight_R=np.concatenate([np.full(G, GAMED_WEIGHT), judged_N.astype(np.float64)]),
            fold_R=(G + judged_N.sum() - 1 - number_R) % FOLDS,
            length_N=length_N,
            difficulty_N=difficulty_N,
            gamed=gamed,
        )

    def features(self, counts_DN: np.ndarray) -> np.ndarray:
        """Shape (D, R, K). s is of the draw, so the first feature differs between draws."""
        D, N = counts_DN.shape
        G = len(self.gamed.wins_R)
        mean_D1 = counts_DN @ self.length_N[:, None] / N
        s_D1 = np.sqrt((counts_DN * (self.length_N - mean_D1) ** 2).sum(1, keepdims=True) / max(N - 1, 1))
        scaled_DN = np.divide(self.length_N, s_D1, out=np.zeros((D, N)), where=s_D1 > 0)
        X_DRK = np.zeros((D, G + N, 3))
        X_DRK[:, :G, 0], X_DRK[:, G:, 0] = np.tanh(self.gamed.length_R), np.tanh(scaled_DN)
        X_DRK[:, :G, 1], X_DRK[:, G:, 1] = self.gamed.difficulty_R, self.difficulty_N
        X_DRK[:, G:, 2] = 1
        return X_DRK


def _fit(rows: _Rows, counts_DN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coefficients (D, K), index of the chosen C in CS (D)) with each instruction repeated `counts_DN` times."""
    D = len(counts_DN)
    X_DRK = rows.features(counts_DN)
    present_DR = np.concatenate([np.ones((D, len(rows.gamed.wins_R))), counts_DN], axis=1)
    present_DR = present_DR * (rows.weight_R > 0)
    held_DFR = present_DR[:, None] * (rows.fold_R == np.arange(FOLDS)[:, None])
    train_DFR = (present_DR[:, None] - held_DFR) * rows.weight_R
    coefs_DFK, path, score_CD = np.zeros((D, FOLDS, 3)), [], np.zeros((len(CS), D))
    for i, c in enumerate(CS):  # each starts from the last solution
        coefs_DFK = _minimise(X_DRK, rows.wins_R, c * train_DFR, coefs_DFK)
        path.append(coefs_DFK)
        loss_DFR = _losses(coefs_DFK @ X_DRK.swapaxes(1, 2), rows.wins_R)[0]
        size_DF = np.maximum(held_DFR.sum(2), 1)  # an empty fold counts 0
        score_CD[i] = ((held_DFR * rows.weight_R * loss_DFR).sum(2) / size_DF).mean(1)
    best_D = score_CD.argmin(0)  # of equal ones the strongest penalty, as in scikit-learn
    start_D1K = np.stack([path[best_D[d]][d, :1] for d in range(D)])
    weight_D1R = (CS[best_D][:, None] * present_DR * rows.weight_R)[:, None]
    return _minimise(X_DRK, rows.wins_R, weight_D1R, start_D1K)[:, 0], best_D


def _minimise(X_DRK: np.ndarray, wins_R: np.ndarray, weight_DFR: np.ndarray, start_DFK: np.ndarray) -> np.ndarray:
    """argmin over coefficients of sum |coef| + sum_R weight x CE, shape (D, F, K), by Newton steps with an L1 model."""
    XX_DRKK = (X_DRK[..., :, None] * X_DRK[..., None, :]).reshape(*X_DRK.shape[:2], -1)

    def at(coefs_DFK):
        loss_DFR, prob_DFR = _losses(coefs_DFK @ X_DRK.swapaxes(1, 2), wins_R)
        value_DF = np.abs(coefs_DFK).sum(2) + (weight_DFR * loss_DFR).sum(2)
        gradient_DFK = (weight_DFR * (prob_DFR - wins_R)) @ X_DRK
        curvature_DFKK = ((weight_DFR * (prob_DFR * (1 - prob_DFR))) @ XX_DRKK).reshape(*coefs_DFK.shape, -1)
        return value_DF, gradient_DFK, curvature_DFKK

    coefs, (value, gradient, curvature) = start_DFK, at(start_DFK)
    for _ in range(_STEPS):  # all of them only for nearly collinear features, where the minimum is a line
        step = _minimum_of_model(coefs, gradient, curvature) - coefs
        share = np.ones(value.shape)
        while (worse := (now := at(coefs + share[..., None] * step))[0] > value + 1e-10 * value).any():
            share[worse] /= 2
            assert share.min() > 1e-12, f"no descent from {coefs[worse]} along {step[worse]}"
        gain, coefs, (value, gradient, curvature) = value - now[0], coefs + share[..., None] * step, now
        # The remaining error is of the order of the Newton step's square.
        if np.abs(step).max() < 1e-7 or (gain < 1e-11 * value).all():
            break
    return coefs


def _minimum_of_model(coefs: np.ndarray, gradient: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """argmin of |u| + gradient . (u - coefs) + (u - coefs)' curvature (u - coefs) / 2, exact for any correlation of features.

    For given signs the minimum is linear; this takes the best of the 27 choices of three signs.
    """
    damped = curvature * (1 + 1e-9 * np.eye(3)) + 1e-12 * np.eye(3)  # never singular
    free = _SIGNS != 0
    among_free = damped[..., None, :, :] * (free[:, :, None] & free[:, None, :]) + np.eye(3) * ~free[:, None]
    start = coefs[..., None, :]
    to_zero = np.where(free, 0, -start)
    rest = -gradient[..., None, :] - _SIGNS - to_zero @ damped
    step = np.linalg.solve(among_free, np.where(free, rest, to_zero)[..., None])[..., 0]
    u = np.where(free, start + step, 0)
    value = np.abs(u).sum(-1) + ((gradient[..., None, :] + step @ damped / 2) * step).sum(-1)
    return np.take_along_axis(u, value.argmin(-1)[..., None, None], -2)[..., 0, :]


def _losses(logit: np.ndarray, wins_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cross-entropy in nats with soft labels, probability), elementwise."""
    decay = np.exp(-np.abs(logit))
    prob = np.where(logit >= 0, 1, decay) / (1 + decay)
    return np.log1p(decay) + np.abs(logit) * np.where(logit >= 0, 1 - wins_R, wins_R), prob


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
