"""What is beaten by none."""

from math import nan

from hypothesis import given
from hypothesis import strategies as st

from orchestration.searching.front import front

NUMBERS = st.sampled_from([0.0, 1.0, 2.0, 3.0, nan])
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS))


def beats(one, other) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


@given(POINTS)
def test_nobody_beats_the_front_and_it_beats_all_others_that_are_known(points):
    found = [points[at] for at in front(points)]
    assert not any(beats(one, other) for one in points for other in found)
    others = [p for at, p in enumerate(points) if at not in front(points) and nan not in p]
    known = [p for p in others if all(value == value for value in p)]
    assert all(any(beats(one, other) for one in found) for other in known)


@given(st.lists(st.floats(0, 1), min_size=1))
def test_of_one_thing_it_is_the_least(values):
    assert {values[at] for at in front([(value,) for value in values])} == {min(values)}
