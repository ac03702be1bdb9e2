"""Intervals hold the truth about as often as they say, and differences of the same samples are paired."""

import numpy as np

from dsvl.bootstrap import interval, ratio, redrawn


def test_an_interval_of_95_percent_holds_a_true_share_about_as_often():
    random, held = np.random.default_rng(0), 0
    for trial in range(100):
        counts = np.stack([random.random(200) < 0.3, np.ones(200)], axis=1)
        found = interval(float(ratio(counts.sum(0))), ratio(redrawn(counts, seed=trial)))
        held += found["low"] <= 0.3 <= found["high"]
    assert 88 <= held <= 100


def test_equal_samples_of_two_models_are_drawn_alike():
    ours = np.stack([np.arange(50.0), np.ones(50)], axis=1)
    theirs = ours + np.array([1, 0])
    apart = ratio(redrawn(theirs)) - ratio(redrawn(ours))
    assert np.allclose(apart, 1), "a constant difference has no spread"


def test_where_nothing_counts_there_is_no_figure():
    assert np.isnan(ratio(np.zeros(2)))
    found = interval(np.nan, ratio(redrawn(np.zeros((3, 2)))))
    assert np.isnan([found["low"], found["high"]]).all()
