"""The page of a run or a sweep, from synthetic run folders."""

import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from orchestration.compose import load
from orchestration.config import Experiment, validated
from orchestration.pages import side_by_side
from orchestration.pages.page import picture
from orchestration.pages.plots import outline, short
from orchestration.plan import plan
from orchestration.records.journal import Journal, write_json
from orchestration.report import write
from tests.orchestration import browser
from tests.orchestration.sweeps import (
    EPOCHS,
    FAILED,
    HOSTILE,
    RATES,
    STEPS,
    STOPPED,
    loss_of,
    make_sweep,
    run,
    searched,
    trial_name,
)

ROOT = Path(__file__).parents[2]
BEST = {"model.size": "large", "optim.lr": 0.01, "train.epochs": 2}


@pytest.fixture
def experiment(tmp_path, settings) -> Experiment:
    return searched(settings, tmp_path / "runs")


@pytest.fixture
def sweep(experiment, tokenizer) -> Experiment:
    """A sweep with one trial stopped and one failed; the best has chats."""
    make_sweep(experiment, tokenizer)
    return experiment


class Tree(HTMLParser):
    """The tags of a page and the text within each, refusing tags that do not match."""

    VOID = ("meta", "img", "br", "wbr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), []))
        if tag not in self.VOID:
            self.open.append(self.tags[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag: str, attribute: str = "") -> Iterator[tuple[dict[str, str | None], str]]:
        """Attributes and text of the tags of a name, that have an attribute if one is given."""
        for name, attributes, text in self.tags:
            if name == tag and (not attribute or attribute in attributes):
                yield attributes, "".join(text)

    @property
    def text(self) -> str:
        return next(text for _, text in self.all("main"))


def page_of(experiment: Experiment) -> Tree:
    return Tree(Path(write(experiment)["report"]).read_text(encoding="utf-8"))


def test_the_page_asks_no_other_host_for_anything(sweep):
    page = page_of(sweep)
    links = [
        value or ""
        for _, attributes, _ in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster")
    ]
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _, _ in page.tags}
    (style,) = (text for _, text in page.all("style"))
    assert "url(" not in style
    assert "@import" not in style


def test_every_trial_is_shown_once_with_its_true_state(sweep):
    rows = [attributes for attributes, _ in page_of(sweep).all("tr", "data-trial")]
    states = {row["data-trial"]: row["data-state"] for row in rows}
    expected = {
        trial_name(*key): {STOPPED: "stopped", FAILED: "failed"}.get(key, "finished")
        for key in product(("small", "large"), RATES, EPOCHS)
    }
    assert states == expected
    assert len(rows) == len(expected)


def test_a_cell_of_the_heat_map_holds_the_loss_of_its_trial(sweep):
    cells = {
        (a["data-size"], float(a["data-column"] or 0), int(a["data-row"] or 0)): (a, text)
        for a, text in page_of(sweep).all("td", "data-column")
    }
    assert len(cells) == 12
    for (size, lr, epochs), (_, text) in cells.items():
        done = 1 if (size, lr, epochs) in (STOPPED, FAILED) else epochs
        assert text.startswith(f"{loss_of(size, lr, done):.3f}")
    assert "stopped" in cells[STOPPED][1]
    assert "failed" in cells[FAILED][1]
    best = [key for key, (attributes, _) in cells.items() if attributes.get("class") == "best"]
    assert sorted(best) == [("large", 0.01, 2), ("small", 0.01, 2)]


def test_the_trials_of_a_sweep_are_shown_together(sweep):
    page = page_of(sweep)
    charts = {attributes["aria-label"]: text for attributes, text in page.all("svg", "role")}
    began = charts["trials at work"]
    assert began.count(": finished, ") == 10
    assert f"{trial_name(*STOPPED)}: stopped" in began
    ended = trial_name("large", 0.01, 2)
    assert f"{ended}: 0.5" in charts["searched values and what they came to"]
    assert f"{ended}: 0.5, " in charts["eval/loss against cost"]
    changed = [text for attributes, text in page.all("tr", "data-effect")]
    (size,) = (text for text in changed if "model.size" in text)
    assert size.startswith("model.size large against small")
    pairs = [
        (loss_of("large", lr, n), loss_of("small", lr, n))
        for lr, n in product(RATES, EPOCHS)
        if ("small", lr, n) != STOPPED and ("large", lr, n) != FAILED
    ] + [(loss_of("large", STOPPED[1], 2), loss_of("small", STOPPED[1], 1))]
    mean = sum(large / small - 1 for large, small in pairs) / len(pairs)
    assert f"{100 * mean:+.2f} %" in size


def test_trials_that_none_beats_in_all_objectives_stand_apart(sweep):
    for path in (sweep.run_folder / "trials").glob("*/values.json"):
        epochs = json.loads(path.read_text())["train.epochs"]
        Journal(path.parent).metrics(epochs * STEPS, {"train/flops": epochs * 1e12})
    several = {"scheduler": {"kind": "none"}, "tradeoffs": ["train/flops"]}
    settings = sweep.as_dict()
    page = page_of(validated(settings | {"search": settings["search"] | several}))
    rows = {attributes["data-front"]: text for attributes, text in page.all("tr", "data-front")}
    assert list(rows) == [trial_name("large", 0.01, 2), trial_name("large", 0.01, 1)]
    assert rows[trial_name("large", 0.01, 1)].endswith("loss 0.70001.0000 TFLOP")
    charts = {attributes["aria-label"]: text for attributes, text in page.all("svg", "role")}
    drawn = charts["eval/loss against train/flops"]
    assert drawn.count("TFLOP") == 3 + 10 - 2
    assert "min eval/loss, min train/flops" in page.text


def test_the_best_trial_is_judged_by_its_curves_and_others_where_something_is_wrong(sweep):
    text = page_of(sweep).text
    judged = text.partition(f"Verdicts on {trial_name('large', 0.01, 2)}")[2]
    assert "blind to images: no" in judged
    assert "25.0% with those of others" in judged
    verdicts = {one["name"]: one["holds"] for one in write(sweep)["verdicts"]}
    assert verdicts == {"diverged": False, "overfit": False, "blind to images": False}
    blind = sweep.run_folder / "trials" / trial_name("small", 0.01, 1)
    Journal(blind).metrics(STEPS, {"eval/accuracy": 0.26})
    assert f"{trial_name('small', 0.01, 1)}: blind to images" in page_of(sweep).text


def test_a_cell_that_was_never_tried_is_blank(sweep):
    missing = sweep.run_folder / "trials" / trial_name("large", 0.003, 1)
    missing.rename(sweep.run_folder / "elsewhere")
    page = page_of(sweep)
    blank = [a for a, _ in page.all("td", "data-column") if a.get("class") == "blank"]
    assert [(a["data-size"], a["data-column"], a["data-row"]) for a in blank] == [
        ("large", "0.003", "1")
    ]
    assert "Of 12 trials 9 finished, 1 stopped early, 1 failed, 1 not begun" in page.text


def test_the_headline_names_the_best_trial_and_its_numbers(sweep):
    result = write(sweep)
    assert result["best"] == trial_name("large", 0.01, 2)
    assert result["metrics"]["eval/loss"] == 0.5
    assert result["trials"] == {"finished": 10, "stopped": 1, "failed": 1}
    lead = next(a for a in page_of(sweep).all("p") if a[0].get("class") == "lead")[1]
    assert trial_name("large", 0.01, 2) in lead
    for number in ("83.3 %", "23.0 %", "24.0 %", "0.500"):
        assert number in lead


def test_a_failed_trial_is_never_the_best(sweep):
    failed = sweep.run_folder / "trials" / trial_name(*FAILED)
    journal = Journal(failed)
    journal.metrics(2 * STEPS, {"eval/loss": 0.001})
    journal.end("failed", "out of memory")
    assert write(sweep)["best"] == trial_name("large", 0.01, 2)


def test_a_loss_that_is_not_a_number_is_never_the_best(sweep):
    folder = sweep.run_folder / "trials" / trial_name("large", 0.01, 2)
    Journal(folder).metrics(2 * STEPS, {"eval/loss": float("nan")})
    assert write(sweep)["best"] == trial_name("large", 0.003, 2)


def test_a_search_for_the_greatest_accuracy_ranks_by_it(sweep, settings):
    search = sweep.as_dict()["search"] | {"metric": "eval/accuracy"}
    largest = validated(sweep.as_dict() | {"search": search})
    assert write(largest)["best"] == trial_name("large", 0.01, 2)
    assert "eval/accuracy by lr and epochs" in page_of(largest).text


def test_what_data_and_models_say_is_text_and_never_html(sweep):
    page = page_of(sweep)
    assert HOSTILE in page.text
    assert "<em>five</em>" in page.text
    assert "RuntimeError: <b>worker died</b>" in page.text
    assert not {"script", "em"} & {tag for tag, _, _ in page.tags}


def test_sample_chats_show_their_images_and_whether_the_answer_is_right(sweep):
    page = page_of(sweep)
    images = [attributes for attributes, _ in page.all("img")]
    images = [image for image in images if image["alt"].startswith("image ")]
    assert [image["alt"] for image in images] == ["image 1", "image 2", "image 1"]
    assert all(image["class"] == "small" for image in images)
    chats = [text for attributes, text in page.all("article")]
    assert [chat.count("✓ right") for chat in chats] == [1, 1]
    assert [chat.count("✗ wrong") for chat in chats] == [1, 0]
    assert "image 2: not in the prepared data" in chats[1]


def test_data_are_counted_with_what_was_quarantined_and_why(sweep):
    text = page_of(sweep).text
    assert "30 to train, 5 held out" in text
    assert "36 records, 35 used, 1 quarantined: 1 bad_roles" in text


def test_an_epoch_is_drawn_by_its_lengths_and_its_mix(sweep):
    page = page_of(sweep)
    charts = {attributes["aria-label"]: text for attributes, text in page.all("svg", "role")}
    for length in ("tokens", "images", "rounds"):
        assert "chats" in charts[f"{length} a sample, % of samples"]
    mixes = [text for _, text in page.all("figure") if "The mix, by" in text]
    assert [mix.partition("epoch")[2] for mix in mixes] == ["chats100.0%"] * 2


def test_data_that_an_earlier_version_prepared_do_not_keep_the_page_from_being_written(sweep):
    path = Path(sweep.storage.path, "prepared/tiny-0123/manifest.json")
    write_json(path, json.loads(path.read_text()) | {"schema_version": 1})
    text = page_of(sweep).text
    assert "30 to train, 5 held out" in text
    assert "schema_version=1: this version reads" in text


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.integers(1, 50))
def test_the_outline_of_a_histogram_covers_an_area_of_its_samples(counts, width):
    points = outline(counts, width=width)
    area = sum((right - left) * y for (left, y), (right, _) in pairwise(points))
    assert area == pytest.approx(100 * width)
    assert points[0][1] == points[-1][1] == 0


def test_a_sweep_and_a_trial_have_pages_by_their_folders(sweep):
    whole = write(sweep.run_folder)
    assert whole["trials"] == {"finished": 10, "stopped": 1, "failed": 1}
    trial = sweep.run_folder / "trials" / trial_name("large", 0.01, 2)
    write_json(trial / "data.json", {"folder": sweep.storage.path + "/prepared/tiny-0123"})
    alone = write(trial)
    assert (alone["training"], alone["trials"]) == ("finished", {})
    again = load(Path(alone["report"]).with_name("experiment.yaml"))
    assert again.identity() == sweep.trial(BEST).identity()
    assert again.run_folder.parent == Path(sweep.storage.path)
    text = Tree(Path(alone["report"]).read_text()).text
    assert "30 to train, 5 held out" in text
    with pytest.raises(ValueError, match="name the folder of a run"):
        write(sweep.run_folder / "trials/ray")


def test_the_course_of_a_training_is_told_turn_by_turn(experiment):
    run(experiment.run_folder, experiment, epochs=1, size="small", lr=0.01, end=None)
    journal = Journal(experiment.run_folder)
    journal.start(identity="", params={}, step=15, steps=40, workers=1)
    journal.metrics(16, {"train/loss": 1.0})
    journal.undone(HOSTILE)
    journal.start(identity="", params={}, step=15, steps=40, workers=1)
    journal.end("failed", "out of memory")
    page = page_of(experiment)
    assert "Restarts: 1; updates undone: 1." in page.text
    (rows,) = (text for _, text in page.all("tbody") if "begins with" in text)
    told = ["begins with 2 workers", "goes on from update 15 with 1 workers, 5 updates again"]
    told += [f"undone: {HOSTILE}", "failed: out of memory"]
    assert [rows.index(turn) for turn in told] == sorted(rows.index(turn) for turn in told)


def test_what_a_training_cost_stands_beside_what_was_planned(experiment):
    priced = {"cluster.gpu_hour_price": 3600.0, "cluster.gpu_tflops": 1e-3}
    priced |= {"cluster.workers": 2, "data.sets.chats.records": 240}
    experiment = experiment.with_overrides(priced)
    run(experiment.run_folder, experiment, epochs=2, size="small", lr=0.01, end="finished")
    (table,) = (text for text in tables(page_of(experiment)) if "training, planned" in text[0])
    assert table[0] == ["", "training, planned", "training", "sweep, planned"][:3]
    rows = {row[0]: row[1:] for row in table[1:]}
    planned = plan(experiment).run
    assert rows["updates"] == [f"{planned.steps:,}", "40"]
    assert planned.money is not None
    assert rows["money"][0] == short(planned.money)
    assert float(rows["money"][1]) == pytest.approx(3600 * float(rows["GPU-hours"][1]), rel=0.01)


def tables(page: Tree) -> list[list[list[str]]]:
    """The cells of every matrix of a page, row by row."""
    found: list[list[list[str]]] = []
    for tag, attributes, text in page.tags:
        if tag == "table":
            found.append([])
            wanted = attributes.get("class") == "matrix"
        elif tag == "tr" and found and wanted:
            found[-1].append([])
        elif tag in ("td", "th") and found and wanted:
            found[-1][-1].append("".join(text))
    return [table for table in found if table]


def test_images_of_every_set_are_shown_and_large_ones_are_made_smaller(sweep):
    images = [attributes for attributes, _ in page_of(sweep).all("img")]
    assert sum(image["alt"].startswith("chats: ") for image in images) == 3
    Image.new("RGB", (2000, 1000)).save(file := BytesIO(), "PNG")
    large = {"bytes": file.getvalue(), "mime": "image/png", "width": 2000, "height": 1000}
    shown = re.search(r'base64,([^"]*)"', picture("large", large)).group(1)
    assert Image.open(BytesIO(b64decode(shown))).size == (640, 320)


def test_quarantined_records_are_shown_with_their_reason(sweep):
    page = page_of(sweep)
    rows = [text for _, text in page.all("tr") if "chats: bad_roles" in text]
    assert rows == [f"chats: bad_rolesrecordchats.json:35{HOSTILE}"] or HOSTILE in rows[0]


def test_a_chat_shows_what_the_model_answered_earlier(sweep):
    folder = sweep.run_folder / "trials" / trial_name("large", 0.01, 2)
    (first, _) = json.loads((folder / "chats.json").read_text())
    first["rounds"][0]["model"] = "four"
    Journal(folder).chats(STEPS, [first])
    (shown, _) = (text for attributes, text in page_of(sweep).all("article"))
    assert f"update {STEPS}four ✗ wrong" in shown
    assert "modelseven ✓ right" in shown


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (None, "The training of tiny is unfinished: 1 of 2 epochs are done."),
        ("failed", "The training of tiny failed after 1 of 2 epochs: RuntimeError"),
        ("stopped", "The training of tiny was stopped after 1 of 2 epochs."),
        ("finished", "The training of tiny finished."),
    ],
)
def test_a_training_alone_is_told_in_its_true_state(experiment, end, said):
    run(experiment.run_folder, experiment, epochs=1, size="small", lr=0.01, end=end)
    page = page_of(experiment)
    assert said in page.text
    assert "Sweep" not in page.text
    assert len(list(page.all("polyline"))) > 5


def test_a_run_tells_with_what_it_was_made_and_not_with_what_its_page_was(experiment):
    run(experiment.run_folder, experiment, epochs=1, size="small", lr=0.01, end="finished")
    made = {"python": "3.9", "platform": "Plan 9", "host": "far", "commit": "abc", "changed": True}
    write_json(experiment.run_folder / "environment.json", made | {"packages": {"torch": "1.0"}})
    rows = {text for _, text in page_of(experiment).all("tr")}
    assert rows >= {"python3.9 on Plan 9", "machinefar", "torch1.0"}
    assert "commitabc, with changes that are not in it" in rows


def test_a_run_that_has_only_begun_has_a_page(experiment):
    run(experiment.run_folder, experiment, epochs=0, size="small", lr=0.01, end=None)
    assert "It has not been evaluated yet." in page_of(experiment).text


def test_a_sweep_whose_trials_have_not_ended_has_a_page(experiment):
    values = {"model.size": "small", "optim.lr": 0.01, "train.epochs": 2}
    folder = experiment.run_folder / "trials" / trial_name("small", 0.01, 2)
    run(folder, experiment.trial(values), epochs=1, size="small", lr=0.01, end=None)
    write_json(folder / "values.json", values)
    assert write(experiment)["best"] is None
    assert "Of 12 trials 1 unfinished, 11 not begun" in page_of(experiment).text


def test_a_trial_that_goes_on_after_a_failure_is_unfinished(sweep):
    folder = sweep.run_folder / "trials" / trial_name(*FAILED)
    Journal(folder).start(identity="", params={}, step=STEPS)
    assert write(sweep)["trials"]["unfinished"] == 1


def test_a_search_over_words_alone_has_a_table_and_no_heat_map(experiment, settings):
    space = {"optim.schedule": {"kind": "grid", "values": ["cosine", "linear"]}}
    storage = experiment.as_dict()["storage"]
    words = validated(settings | {"storage": storage, "search": {"space": space}})
    for schedule in ("cosine", "linear"):
        folder = words.run_folder / f"trials/schedule={schedule}"
        values = {"optim.schedule": schedule}
        run(folder, words.trial(values), epochs=2, size="small", lr=0.01, end="finished")
        write_json(folder / "values.json", values)
    page = page_of(words)
    assert len(list(page.all("tr", "data-trial"))) == 2
    assert not list(page.all("td", "data-column"))
    assert "The trials vary no number" in page.text


def test_the_experiment_beside_the_page_is_the_experiment(sweep):
    page = page_of(sweep)
    path = sweep.run_folder / "experiment.yaml"
    assert load(path) == sweep
    assert f"dsvl sweep {path} name=tiny-again" in page.text


def test_a_folder_without_any_run_is_refused(experiment):
    with pytest.raises(FileNotFoundError, match="train or sweep first"):
        write(experiment)


def test_a_report_on_the_run_of_another_experiment_is_refused(experiment):
    run(experiment.run_folder, experiment, epochs=1, size="small", lr=0.01, end="finished")
    with pytest.raises(ValueError, match=r"optim\.lr .*; set these fields back, or give"):
        write(experiment.with_overrides({"optim.lr": 0.5}))


@pytest.mark.slow
@pytest.mark.skipif(browser.PROGRAM is None, reason="needs Chromium (Debian: chromium)")
def test_pages_in_a_real_browser_ask_for_nothing_and_can_be_read_wide_and_narrow(sweep, tmp_path):
    run(sweep.run_folder, sweep, epochs=2, size="small", lr=0.01, end="finished")
    pages = [Path(write(sweep)["report"]), tmp_path / "comparison.html"]
    side_by_side.write([sweep.run_folder], pages[1])
    for page, width, dark in product(pages, (1400, 390), (False, True)):
        picture = tmp_path / f"{page.stem}-{width}{'-dark' * dark}.png"
        seen = browser.look(page, picture, width=width, dark=dark)
        assert seen.requests == [page.as_uri()]
        assert seen.complaints == []
        assert (seen.wider, seen.overlap, seen.cut) == (0, [], [])
        assert seen.least >= 10
        assert Image.open(picture).size == (width, seen.height)


def test_the_report_needs_neither_torch_nor_ray(sweep, tmp_path):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(sweep.as_dict()))
    code = (
        "import json, sys; from orchestration.config import validated; "
        "from orchestration.report import write; "
        f"write(validated(json.load(open({str(settings)!r})))); "
        "assert not {'torch', 'ray', 'mlflow', 'matplotlib'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
