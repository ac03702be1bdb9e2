"""The committed table of what systems take is what their plans say today."""

from pathlib import Path

from tests.benchmarks import resources


def test_the_table_is_that_of_the_plans():
    rows = resources.systems()
    committed = Path(resources.__file__).parent / "results/resources.md"
    assert committed.read_text(encoding="utf-8") == resources.render(rows)
    learnable = {row.experiment: row.learnable for row in rows}
    assert learnable["otter_7b"] > 1.5e9, "as the paper says of Otter"
    assert learnable["minigpt4_7b"] == 1024 * 4096 + 4096, "a linear layer and nothing else"
