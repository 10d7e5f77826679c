"""Quantiles of Student's t, which bounds of means and of differences are made of."""

from __future__ import annotations

import functools
import math


@functools.lru_cache(maxsize=1024)
def student_t_quantile(probability: float, degrees: int) -> float:
    """Return x with P(T <= x) = probability for Student's t with ``degrees`` >= 1 degrees of freedom.

    x is found by bisection of the distribution function, a regularised incomplete beta function (Abramowitz and
    Stegun 26.7.1), with a relative error of about 1e-10.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"need 0 < probability < 1 and degrees >= 1, got {probability} and {degrees}")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while _student_t_cdf(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _student_t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_t_cdf(x: float, degrees: int) -> float:
    """Return P(T <= x) for x >= 0."""
    if x == 0:
        return 0.5
    return 1 - 0.5 * _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + x * x))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return I_x(a, b) from its continued fraction (Abramowitz and Stegun 26.5.8) by Lentz's method."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    scale = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny = 1e-300
    numerator, denominator = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = denominator
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            denominator = 1 / ((1 + coefficient * denominator) or tiny)
            numerator = (1 + coefficient / numerator) or tiny
            fraction *= numerator * denominator
        if abs(numerator * denominator - 1) < 1e-15:
            return scale * fraction / a
    raise AssertionError(f"incomplete beta did not converge at a={a}, b={b}, x={x}")
