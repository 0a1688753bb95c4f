"""The episode sampler: its contract, and that the compiled twin gives the same indices."""

import numpy as np
import pytest

from fastmeta._sampler import host_available, sample_episodes

STARTS = np.concatenate([[0], np.cumsum([7, 30, 6, 6, 11, 250, 6])])
# drawn once with seed 1 from three classes of ten
KNOWN_CLASSES = [[0, 1], [0, 1]]
KNOWN_SUPPORT = [[[8], [17]], [[6], [19]]]
KNOWN_QUERY = [[[4, 1], [13, 11]], [[0, 9], [14, 16]]]
IMPLS = ["python", "host"] if host_available() else ["python"]


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_classes_and_disjointness(impl):
    classes, support, query = sample_episodes(STARTS, 40, 5, 2, 4, seed=3, impl=impl)
    assert classes.shape == (40, 5) and support.shape == (40, 5, 2) and query.shape == (40, 5, 4)
    assert classes.dtype == support.dtype == query.dtype == np.int64
    both = np.concatenate([support, query], axis=2)
    for e in range(40):
        assert len(set(classes[e])) == 5
        for w, c in enumerate(classes[e]):
            assert len(set(both[e, w])) == 6
            assert both[e, w].min() >= STARTS[c] and both[e, w].max() < STARTS[c + 1]


@pytest.mark.parametrize("impl", IMPLS)
def test_an_episode_depends_only_on_seed_and_index(impl):
    whole = sample_episodes(STARTS, 20, 3, 1, 2, seed=9, impl=impl)
    part = sample_episodes(STARTS, 6, 3, 1, 2, seed=9, first_episode=11, impl=impl)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[11:17], b)
    other = sample_episodes(STARTS, 20, 3, 1, 2, seed=10, impl=impl)
    assert not np.array_equal(whole[1], other[1])


@pytest.mark.skipif(not host_available(), reason="fastmeta._host is not built")
@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_compiled_twin_is_identical(seed):
    for args in [(50, 5, 1, 3), (1, 7, 6, 0), (0, 2, 1, 1), (30, 1, 1, 0)]:
        a = sample_episodes(STARTS, *args, seed=seed, first_episode=2**40, impl="python")
        b = sample_episodes(STARTS, *args, seed=seed, first_episode=2**40, impl="host")
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_known_indices_never_change():
    """A stored run can only resume exactly if the stream stays what it is."""
    classes, support, query = sample_episodes([0, 10, 20, 30], 2, 2, 1, 2, seed=1)
    assert classes.tolist() == KNOWN_CLASSES
    assert support.tolist() == KNOWN_SUPPORT
    assert query.tolist() == KNOWN_QUERY


@pytest.mark.parametrize("impl", IMPLS)
def test_every_example_is_equally_likely(impl):
    starts = np.array([0, 5, 10, 15, 20])
    n = 20000 if impl == "host" else 4000
    classes, support, query = sample_episodes(starts, n, 2, 1, 1, seed=5, impl=impl)
    p = 1 / 10  # two of four classes, one of five examples
    for drawn in (support, query):
        counts = np.bincount(drawn.ravel(), minlength=20)
        # 5 standard deviations of a binomial count: fails by chance less than once in 10^5
        assert np.abs(counts - n * p).max() < 5 * np.sqrt(n * p * (1 - p))
    assert np.abs(np.bincount(classes.ravel()) - n / 2).max() < 5 * np.sqrt(n / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_starts": [0, 8, 11, 19]}, "class 1 has 3 examples .* 1 support \\+ 4 query = 5"),
        ({"class_starts": [0, 4, 3]}, "never decrease"),
        ({"class_starts": [1, 9]}, "begin with 0"),
        ({"class_starts": [0.0, 9.0]}, "integer array"),
        ({"class_starts": [[0, 9]]}, "shape \\[1, 2\\]"),
        ({"n_way": 4}, "4-way episodes need at least 4 classes, got 3"),
        ({"n_way": 0}, "n_way must be at least 1, got 0"),
        ({"k_shot": 0}, "k_shot must be at least 1, got 0"),
        ({"q_query": -1}, "q_query must be at least 0, got -1"),
        ({"num_episodes": -1}, "num_episodes must be at least 0, got -1"),
        ({"first_episode": -2}, "first_episode must be at least 0, got -2"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 2**64}, "seed must lie in"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)
def test_bad_arguments(change, message):
    args = dict(class_starts=[0, 8, 16, 24], num_episodes=2, n_way=2, k_shot=1, q_query=4, seed=0)
    with pytest.raises(ValueError, match=message):
        sample_episodes(**{**args, **change})
