"""Figures of searches: what they draw lies where its numbers say."""

import re

import pytest

from orchestration.pages.figures import Bar, parallel, terrain, timeline
from orchestration.pages.plots import Series


def numbers(text: str, attribute: str) -> list[float]:
    return [float(value) for value in re.findall(rf'<rect[^>]*\b{attribute}="([\d.]+)"', text)]


def test_a_timeline_has_a_bar_for_each_stretch_of_work_to_scale():
    bars = [
        Bar([(60.0, 120.0), (180.0, 300.0)], "first", "c0", ""),
        Bar([(0.0, 60.0)], "second <b>", "c1", "cross"),
        Bar([], "never begun", "c0", ""),
    ]
    drawn = timeline(bars, title="trials")
    first, again, second = numbers(drawn, "width")
    assert again == pytest.approx(2 * first, abs=0.2)
    assert second == pytest.approx(first, abs=0.2)
    x = numbers(drawn, "x")
    assert x[2] < x[0] < x[1]
    assert drawn.count('class="cross"') == 1
    assert "second &lt;b&gt;" in drawn
    assert "never begun" not in drawn


def test_a_line_of_parallel_coordinates_is_a_trial_and_the_best_is_drawn_last():
    trials = [
        ({"optim.lr": lr, "optim.schedule": name}, loss, f"{name} {lr}")
        for lr, name, loss in ((1e-3, "cosine", 0.5), (1e-1, "wsd", 0.1), (1e-2, "wsd", 0.9))
    ]
    drawn = parallel(trials, metric="eval/loss", sign=1, title="all")
    labels = re.findall("<title>(.*?):", drawn)
    assert labels == ["wsd 0.01", "cosine 0.001", "wsd 0.1"]
    drawn_ways = re.findall('points="(.*?)"', drawn)
    ways = [[tuple(map(float, at.split(","))) for at in way.split()] for way in drawn_ways]
    (_, middle), (_, low), (_, high) = (way[0] for way in ways)
    assert middle == pytest.approx((low + high) / 2, abs=0.2)  # rates stand on a logarithmic axis
    assert ways[0][1] == ways[2][1]
    assert 'class="c1"' in drawn.rpartition("<title>")[2]
    greatest = parallel(trials, metric="eval/accuracy", sign=-1, title="all")
    assert re.findall("<title>(.*?):", greatest)[-1] == "wsd 0.01"


def test_parallel_coordinates_need_two_trials_that_differ():
    alone = [({"optim.lr": 1e-2}, 0.5, "one")]
    assert "fewer than two" in parallel(alone, metric="eval/loss", sign=1, title="all")
    assert "fewer than two" in parallel(alone * 2, metric="eval/loss", sign=1, title="all")


def test_a_map_is_darkest_where_the_loss_is_least_and_its_ridge_and_marks_lie_on_it():
    rates, lengths = (1e-3, 1e-2, 1e-1), (1.0, 4.0)
    losses = {(lr, n): abs(i - 1) + 1 / n for i, lr in enumerate(rates) for n in lengths}
    ridge = [(1e-2, 5e-3, 2e-2), (1e-2, 1e-9, 1e9)]
    seen = Series([(1e-2, 4.0)], "trained", "c2", "circle")
    drawn = terrain(losses, ridge, [seen], title="small")
    cells = re.findall(r'fill="rgb\((\d+), \d+, \d+\)"><title>(.*?) epochs at (.*?):', drawn)
    assert len(cells) == 6
    darkest = min(cells, key=lambda cell: int(cell[0]))
    assert darkest[1:] == ("4", "0.01")
    (x, y), *_ = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)
    way = re.search('<g class="c1"><polyline points="(.*?)"', drawn)
    assert way is not None
    assert way[1].split()[1] == f"{x},{y}"
    assert all(0 <= float(at.split(",")[0]) <= 380 for at in re.findall(r"[\d.]+,[\d.]+", drawn))
