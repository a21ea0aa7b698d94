"""Closed forms of RPO's optimum: one compared pair among any actions, and a class for which the theorem fails."""

import math

from rpo.errors import UserError
from rpo.theory.bandits import number


def compared_pair(*, p: float, base: tuple, ref: tuple, beta: float, eta: float) -> tuple[float, tuple[float, float]]:
    """(r_w - r_l, (pi_w, pi_l)) at the optimum of one prompt where only w and l were compared and w won a share p.

    The root of   eta (base_l s(z) - base_w s(-z)) + (1 - p) s(D) - p s(-D) = 0,   z = D / beta + log(ref_w / ref_l)

    with s the sigmoid; pi_w = (base_w + base_l) s(z), any third action keeps base's mass. Two actions: base_w + base_l = 1;
    then with beta = 1 and ref = 1/2 it is pi_w = (p + eta base_w) / (1 + eta), additive smoothing. On several prompts
    replace eta by eta d0(x) N / N(x). Raises UserError outside p in [0, 1], base >= 0 and ref > 0 with sums <= 1,
    beta > 0, eta > 0, and where no finite root exists (the same side wins everything and has all of base).
    """
    p, beta, eta = number("p", p, 0.0, 1.0, closed=True), number("beta", beta, 0.0), number("eta", eta, 0.0)
    for name, pair in (("base", base), ("ref", ref)):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UserError(f"{name}={pair}: expected the two numbers of the winner and the loser")
        for value in pair:
            number(name, value, 0.0, 1.0, closed=name == "base")
        if not 0 < sum(pair) <= 1 + 1e-9:
            raise UserError(f"{name}={pair}: sums to {sum(pair):g}; expected a sum in ]0, 1]")
    (base_w, base_l), offset = base, math.log(ref[0]) - math.log(ref[1])
    if (p == 1 and base_l == 0) or (p == 0 and base_w == 0):
        raise UserError(f"p={p:g}, base={base}: the root is infinite; give the side that never wins base > 0")

    def s(z: float) -> float:
        return 1 / (1 + math.exp(-z)) if z > -700 else 0.0

    def slope(delta: float) -> float:
        z = delta / beta + offset
        return eta * (base_l * s(z) - base_w * s(-z)) + (1 - p) * s(delta) - p * s(-delta)

    low, high = -1.0, 1.0
    while slope(low) > 0:
        low *= 2
    while slope(high) < 0:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    z, mass = high / beta + offset, base_w + base_l
    return high, (mass * s(z), mass * s(-z))


def nonconvex_gap(*, reward: float, beta: float, eta: float) -> tuple[float, float, float]:
    """(minimax, maximin, minimax policy's larger share) for the two-element class {(c, 0), (0, c)}, c = `reward`.

    Two actions, ref = base = 1/2, one win each. The class is not convex, and the orders of play disagree by
    eta beta log cosh(c / (2 beta)): maximin keeps the uniform policy, minimax commits to one side with s(c / beta).
    A network's implied rewards are no convex class either: there the theorem is a motivation, not a proof.
    """
    c, beta, eta = (number(n, v, 0.0) for n, v in (("reward", reward), ("beta", beta), ("eta", eta)))

    def log_cosh(z: float) -> float:
        return z + math.log1p(math.exp(-2 * z)) - math.log(2)

    maximin_value = math.log(2) + log_cosh(c / 2)
    return maximin_value + eta * beta * log_cosh(c / (2 * beta)), maximin_value, 1 / (1 + math.exp(-c / beta))
