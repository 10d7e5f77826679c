"""The Frechet distance of two sets of features, as content-debiased FVD computes it (songweige/content-debiased-fvd).

Letters: N videos, D channels of a feature.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vpo_engine.foreign_files import check_archive

_KEYS = ("raw_mean", "raw_cov", "num_items")
_MOST_BYTES = 1 << 30
"""Bytes of the sums of 11,000 channels; networks for videos have some hundred to some thousand."""


@dataclass
class FeatureSums:
    """Sums over the features of a set: all that the distance needs. They are float64, of float32 features."""

    total: np.ndarray
    """The sum of the features, [D]."""
    products: np.ndarray
    """The sum of their outer products, [D, D]."""
    count: int = 0

    @classmethod
    def empty(cls, width: int) -> FeatureSums:
        """Return the sums of no features with ``width`` channels."""
        return cls(np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureSums:
        """Return the sums of features [N, D]."""
        sums = cls.empty(features.shape[1])
        sums.add(features)
        return sums

    def add(self, features: np.ndarray, most: int | None = None) -> None:
        """Add features [N, D], in order, until there are ``most``. Raise ValueError for one that is not finite."""
        rows = np.asarray(features, dtype=np.float32).astype(np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self.total):
            raise ValueError(f"features must be [N, {len(self.total)}], got {list(rows.shape)}")
        if not np.isfinite(rows).all():
            raise ValueError("a feature is not finite; the network's weights are damaged: fetch them again")
        rows = rows if most is None else rows[: max(0, most - self.count)]
        self.total += rows.sum(axis=0)
        self.products += rows.T @ rows
        self.count += len(rows)

    @property
    def mean(self) -> np.ndarray:
        """Return the mean [D]."""
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """Return the covariance [D, D], divided by N and not by N - 1."""
        return self.products / self.count - np.outer(self.mean, self.mean)

    def write(self, path: Path) -> None:
        """Write an .npz file that ``read`` reads."""
        np.savez(path, raw_mean=self.total, raw_cov=self.products, num_items=self.count)

    @classmethod
    def read(cls, path: Path) -> FeatureSums:
        """Read an .npz file: raw_mean [D] and raw_cov [D, D], which are sums, and num_items.

        Raise ValueError for another file; for a pickle, with the command that converts it.
        """
        if path.suffix in (".pkl", ".pickle") or not zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} is no .npz file. If it is a pickle of cd-fvd, which runs code when it is read, and you trust "
                f"it, convert it once: python -c \"import pickle, numpy; s = pickle.load(open('{path}', 'rb')); "
                f"numpy.savez('{path.with_suffix('.npz')}', **{{k: s[k] for k in {_KEYS}}})\""
            )
        check_archive(path, _MOST_BYTES)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                total, products, count = (np.asarray(arrays[key], dtype=np.float64) for key in _KEYS)
        except Exception as error:  # damaged members can raise nearly anything
            raise ValueError(
                f"{path} must hold {', '.join(_KEYS)}, sums over features as cd-fvd has them ({error}); write it from "
                "the reference videos, or convert it again"
            ) from error
        if total.ndim != 1 or products.shape != (len(total), len(total)) or count.ndim != 0:
            raise ValueError(
                f"{path} holds sums of shapes {list(total.shape)}, {list(products.shape)} and a count of shape "
                f"{list(count.shape)}, expected [D], [D, D] and one number; write it again"
            )
        if not (np.isfinite(total).all() and np.isfinite(products).all()):
            raise ValueError(f"{path} holds numbers that are not finite; write it again")
        if not float(count).is_integer():
            raise ValueError(f"{path}: num_items={count} must be a whole number; write it again")
        return cls(total, products, int(count))


def frechet_distance(first: FeatureSums, second: FeatureSums) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)).

    The trace of the root is the sum of the roots of the eigenvalues of sqrt(C1) C2 sqrt(C1), which are real, also where
    covariances are singular. What rounding makes negative counts as 0. Raise ValueError for sets of fewer than two
    features, and for features of different networks.
    """
    for sums in (first, second):
        if sums.count < 2:
            raise ValueError(
                f"a Frechet distance needs at least 2 videos on each side, got {sums.count}; give more videos"
            )
    if len(first.total) != len(second.total):
        raise ValueError(
            f"features have {len(first.total)} and {len(second.total)} channels; compare features of one network"
        )
    covariances = (first.covariance, second.covariance)
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ covariances[1] @ root)
    apart = float(np.square(first.mean - second.mean).sum())
    spread = float(np.trace(covariances[0]) + np.trace(covariances[1]))
    return max(0.0, apart + spread - 2 * float(np.sqrt(shared.clip(min=0)).sum()))
