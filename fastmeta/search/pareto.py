"""Candidates that no other one beats in every objective."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other point dominates, in the order of their first coordinate.

    A point dominates another if it is at least as large everywhere and larger somewhere; of equal
    points the first counts.

    Args:
        points: Objectives to be maximised, equally many of each point; negate what is a cost.

    Raises:
        ValueError: Points of unequal length.
    """
    if len({len(p) for p in points}) > 1:
        raise ValueError("expected equally many objectives of every point")
    front = []
    for i, p in enumerate(points):
        beaten = any(
            all(b >= a for a, b in zip(p, q, strict=True)) and (tuple(q) != tuple(p) or j < i)
            for j, q in enumerate(points)
            if j != i
        )
        if not beaten:
            front.append(i)
    return sorted(front, key=lambda i: tuple(points[i]))
