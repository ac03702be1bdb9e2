"""Figures of a page as PNGs: all of them, with what is written on them."""

from pathlib import Path

import numpy as np
from PIL import Image

from orchestration.pages import pictures
from orchestration.pages.plots import Cell, Series, chart, figure, heat, legend

LINE = [Series([(1, 1.0), (2, 3.0)], "a line", "c1")]


def drawn(page: str, folder: Path) -> dict[str, np.ndarray]:
    """Name -> pixels."""
    written = pictures.write(page, folder / "figures")
    return {path.name: np.asarray(Image.open(path).convert("RGB")) for path in written}


def has(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((pixels == colour).all(-1).any())


def test_every_chart_is_drawn_in_its_colours_with_its_legend_below(tmp_path):
    plain = chart(LINE, title="loss, nats", x="update")
    page = f"<h2>One</h2>{figure(plain, [('c1', 'a'), ('c1', 'b')])}<h2>Two</h2>{plain}"
    found = drawn(page, tmp_path)
    assert list(found) == ["loss-nats.png", "loss-nats-2.png"]
    with_legend, alone = found.values()
    rows = pictures.ZOOM * 2 * pictures.ROW
    assert with_legend.shape == (alone.shape[0] + rows, *alone.shape[1:])
    assert has(alone, (192, 74, 0))
    below = with_legend[alone.shape[0] :]
    assert (below < 128).any(), "names are written"


def test_a_legend_above_charts_goes_with_each_of_them_and_ends_with_its_section(tmp_path):
    one, two = (chart(LINE, title=title, x="") for title in ("one", "two"))
    page = (
        f"<h3>A</h3>{legend([('c1', 'a')])}{one}{two}<h3>B</h3>{chart(LINE, title='three', x='')}"
    )
    heights = {name: pixels.shape[0] for name, pixels in drawn(page, tmp_path).items()}
    assert heights["one.png"] == heights["two.png"]
    assert heights["one.png"] == heights["three.png"] + pictures.ZOOM * pictures.ROW


def test_a_title_is_written_whatever_it_says(tmp_path):
    blank, said = (
        chart(LINE, title=title, x="") for title in (" ", "&<script> “loss” of 7 & more")
    )
    found = list(drawn(blank + said, tmp_path).values())
    top = 2 * 20
    assert (found[0][:top] == 255).all()
    assert (found[1][:top] < 128).any()


def test_a_heat_map_is_drawn_with_the_colour_of_every_cell(tmp_path):
    cells = {
        (1.0, 0.1): Cell(2.0),
        (1.0, 0.2): Cell(1.0, note="stopped", best=True),
        (2.0, 0.1): Cell(None),
    }
    found = drawn(heat(cells, caption="small", names=("epochs", "lr"), scale=[2.0, 1.0]), tmp_path)
    pixels = found["map-small.png"]
    assert has(pixels, (226, 238, 249))
    assert has(pixels, (8, 48, 107))
