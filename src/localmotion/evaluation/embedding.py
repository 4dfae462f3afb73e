"""How well motion embeddings separate classes: a t-SNE picture and two numbers (kNN accuracy, silhouette).

A t-SNE picture alone can mislead, so kNN accuracy and silhouette are computed on the vectors themselves, not on the
t-SNE.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from localmotion.foreign import needs


def _vectors(vectors: ArrayLike, least: int) -> NDArray[np.float64]:
    x = np.asarray(vectors, dtype=np.float64)
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"needs at least {least} vectors as (n, d), not {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("vectors are not finite")
    return x


def _labels(labels: ArrayLike, n: int) -> NDArray[np.int64]:
    names = np.asarray(labels)
    if names.shape != (n,):
        raise ValueError(f"needs one label a vector: {names.shape} labels for {n} vectors")
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def tsne(vectors: ArrayLike, *, perplexity: float = 30.0, seed: int = 0) -> NDArray[np.float32]:
    """Two-dimensional t-SNE (van der Maaten and Hinton 2008) of (n, d) vectors, n >= 4: (n, 2) float32.

    t-SNE starts from the first two principal components, so equal input and seed give an equal picture. ``perplexity``
    is at most (n - 1) / 3. As usual, vectors are first reduced to 50 principal components. Raises ValueError for fewer
    than 4 vectors and for non-finite ones.
    """
    needs("report", "sklearn", who="t-SNE")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = _vectors(vectors, 4)
    x = x - x.mean(axis=0)
    scale = np.abs(x).max()
    if scale == 0:
        return np.zeros((len(x), 2), dtype=np.float32)  # all vectors are equal: PCA would divide by zero
    x = x / scale
    if x.shape[1] < 2:
        x = np.concatenate([x, np.zeros((len(x), 1))], axis=1)  # (n, 2)
    if x.shape[1] > 50 and len(x) > 50:
        x = PCA(n_components=50, svd_solver="full").fit_transform(x)  # (n, 50)
    start = PCA(n_components=2, svd_solver="full").fit_transform(x)  # (n, 2)
    start = 1e-4 * start / start[:, 0].std()  # the scale of scikit-learn's PCA initialisation
    model = TSNE(
        n_components=2,
        perplexity=min(perplexity, (len(x) - 1) / 3),
        init=start.astype(np.float32),
        learning_rate="auto",
        random_state=seed,
        method="exact" if len(x) < 100 else "barnes_hut",
        n_jobs=1,
    )
    return model.fit_transform(x).astype(np.float32)


def knn_accuracy(vectors: ArrayLike, labels: ArrayLike, *, k: int = 5, groups: ArrayLike | None = None) -> float:
    """Leave-one-out accuracy in [0, 1] of the majority label among the k nearest (Euclidean) vectors.

    ``vectors`` (n, d), ``labels`` (n,). ``groups`` (n,), for example the clip of each window: neighbours of the same
    group do not vote, because windows of one clip are near-copies. If two labels have equal votes, the label of the
    nearer neighbour wins. A vector without any allowed neighbour counts as wrong. Raises ValueError for k < 1, fewer
    than two vectors, or labels or groups of another length.
    """
    x = _vectors(vectors, 2)
    n = len(x)
    y = _labels(labels, n)
    own = np.arange(n) if groups is None else _labels(groups, n)
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    k = min(k, n - 1)
    square = (x * x).sum(axis=1)
    distance = square[:, None] + square[None, :] - 2 * x @ x.T  # (n, n), squared
    distance[own[:, None] == own[None, :]] = np.inf
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]  # (n, k), nearest first
    allowed = np.isfinite(np.take_along_axis(distance, order, axis=1))  # (n, k)
    # A vote weighs 1 plus 2^-rank. The additions sum to less than 1, so they decide only between equal counts.
    weight = allowed * (1.0 + 0.5 ** np.arange(1, k + 1))  # (n, k)
    votes = np.zeros((n, y.max() + 1))  # (n, labels)
    np.add.at(votes, (np.arange(n)[:, None], y[order]), weight)
    return float(((votes.argmax(axis=1) == y) & allowed.any(axis=1)).mean())


def silhouette(vectors: ArrayLike, labels: ArrayLike) -> float:
    """Mean silhouette (Rousseeuw 1987) in [-1, 1] of (n, d) vectors under (n,) labels, Euclidean distance.

    Raises ValueError unless there are at least two labels and fewer labels than vectors.
    """
    needs("report", "sklearn", who="silhouette")
    from sklearn.metrics import silhouette_score

    x = _vectors(vectors, 3)
    y = _labels(labels, len(x))
    if not 2 <= y.max() + 1 < len(x):
        raise ValueError(f"silhouette needs 2..{len(x) - 1} labels, not {y.max() + 1}")
    return float(silhouette_score(x, y))
