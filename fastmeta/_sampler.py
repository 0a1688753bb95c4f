"""Episode index sampler: which examples of which classes form episode ``i``.

Episode ``i`` depends only on ``(seed, i)`` (a counter-based generator, splitmix64), so any episode
can be drawn alone, in any order and by any number of workers, and a run resumes exactly from the
index it stopped at. The C++ twin in ``csrc/host/bindings.cpp`` follows this file line by line and
gives identical indices; it is used when it has been built.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    from fastmeta import _host
except ImportError:  # not built: a pure-Python installation
    _host = None

__all__ = ["host_available", "sample_episodes"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment (Steele, Lea, Flood 2014)

Episodes = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def host_available() -> bool:
    """Whether the compiled sampler is there."""
    return _host is not None


def sample_episodes(
    class_starts: ArrayLike,
    num_episodes: int,
    n_way: int,
    k_shot: int,
    q_query: int,
    seed: int,
    first_episode: int = 0,
    *,
    impl: str = "auto",
) -> Episodes:
    """Draw N-way K-shot episodes from examples grouped by class.

    Class ``c`` owns the positions ``class_starts[c] .. class_starts[c + 1]`` of the grouped order.
    Each episode takes ``n_way`` different classes, and from each of them ``k_shot + q_query``
    different examples, so support and query never share one.

    Args:
        class_starts: int ``[C + 1]``, non-decreasing, first entry 0.
        num_episodes: how many episodes, >= 0.
        n_way: classes per episode, 1 to C.
        k_shot: support examples per class, >= 1.
        q_query: query examples per class, >= 0.
        seed: 0 <= seed < 2**64.
        first_episode: index of the first episode, >= 0: 10 episodes from 5 on equal entries 5 to
            14 of a draw from 0.
        impl: ``"auto"``, ``"python"`` or ``"host"`` (the compiled twin).

    Returns:
        int64 ``classes [E, n_way]`` (class indices), ``support [E, n_way, k_shot]`` and
        ``query [E, n_way, q_query]`` (positions in the grouped order).

    Raises:
        ValueError: a malformed argument, or a class with fewer than ``k_shot + q_query`` examples.
        RuntimeError: ``impl="host"`` without the compiled sampler.
    """
    starts = _checked_starts(class_starts)
    _check_counts(starts, num_episodes, n_way, k_shot, q_query, seed, first_episode)
    if impl not in ("auto", "python", "host"):
        raise ValueError(f"impl must be 'auto', 'python' or 'host', got {impl!r}")
    if impl == "host" and _host is None:
        raise RuntimeError(
            "impl='host' needs the compiled module fastmeta._host, which is not built"
        )
    sample = _sample_python if impl == "python" or _host is None else _host.sample_episodes
    return sample(starts, num_episodes, n_way, k_shot, q_query, seed, first_episode)


def _checked_starts(class_starts: ArrayLike) -> NDArray[np.int64]:
    starts = np.asarray(class_starts)
    if starts.ndim != 1 or starts.size < 2 or starts.dtype.kind not in "iu":
        raise ValueError(
            "class_starts must be an integer array [C + 1] with C >= 1, "
            f"got shape {list(starts.shape)} of dtype {starts.dtype}"
        )
    starts = np.ascontiguousarray(starts, dtype=np.int64)
    if starts[0] != 0 or (np.diff(starts) < 0).any():
        raise ValueError("class_starts must begin with 0 and never decrease")
    return starts


def _check_counts(
    starts: NDArray[np.int64],
    num_episodes: int,
    n_way: int,
    k_shot: int,
    q_query: int,
    seed: int,
    first_episode: int,
) -> None:
    num_classes = starts.size - 1
    for name, value, least in (
        ("num_episodes", num_episodes, 0),
        ("n_way", n_way, 1),
        ("k_shot", k_shot, 1),
        ("q_query", q_query, 0),
        ("first_episode", first_episode, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed must lie in 0 .. 2**64 - 1, got {seed}")
    if n_way > num_classes:
        raise ValueError(f"{n_way}-way episodes need at least {n_way} classes, got {num_classes}")
    sizes = np.diff(starts)
    short = np.flatnonzero(sizes < k_shot + q_query)
    if short.size:
        raise ValueError(
            f"class {short[0]} has {sizes[short[0]]} examples but an episode takes {k_shot} "
            f"support + {q_query} query = {k_shot + q_query} "
            f"({short.size} of {num_classes} classes are too small)"
        )


def _mix(z: int) -> int:
    """splitmix64's output function."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class _Stream:
    """The random numbers of one episode: ``mix(key + n * GOLDEN)`` for n = 1, 2, ..."""

    def __init__(self, seed: int, episode: int) -> None:
        self._state = _mix((_mix((seed + _GOLDEN) & _MASK) + episode) & _MASK)

    def below(self, n: int) -> int:
        """Unbiased integer in 0 .. n - 1, by rejection of the 2**64 mod n smallest values."""
        threshold = ((1 << 64) - n) % n
        while True:
            self._state = (self._state + _GOLDEN) & _MASK
            value = _mix(self._state)
            if value >= threshold:
                return value % n

    def choose(self, n: int, k: int) -> list[int]:
        """k different integers of 0 .. n - 1: Fisher-Yates that stores only the moved entries."""
        moved: dict[int, int] = {}
        chosen = []
        for i in range(k):
            j = i + self.below(n - i)
            chosen.append(moved.get(j, j))
            moved[j] = moved.get(i, i)
        return chosen


def _sample_python(
    starts: NDArray[np.int64],
    num_episodes: int,
    n_way: int,
    k_shot: int,
    q_query: int,
    seed: int,
    first_episode: int,
) -> Episodes:
    classes = np.empty((num_episodes, n_way), dtype=np.int64)
    chosen = np.empty((num_episodes, n_way, k_shot + q_query), dtype=np.int64)
    bounds = starts.tolist()
    for e in range(num_episodes):
        stream = _Stream(seed, first_episode + e)
        for w, c in enumerate(stream.choose(len(bounds) - 1, n_way)):
            classes[e, w] = c
            size = bounds[c + 1] - bounds[c]
            chosen[e, w] = [bounds[c] + i for i in stream.choose(size, k_shot + q_query)]
    support = np.ascontiguousarray(chosen[:, :, :k_shot])
    query = np.ascontiguousarray(chosen[:, :, k_shot:])
    return classes, support, query
