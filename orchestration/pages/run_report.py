"""What the page of a run says of its training: what it cost against the plan, curves, faults, chats."""

from collections.abc import Callable
from html import escape

from orchestration.pages.page import chat, duration, grid, matrix, note, table
from orchestration.pages.plots import SHARES, Mark, Series, chart, figure, short, thin
from orchestration.plan import PlanError, plan
from orchestration.planning.cost import Cost
from orchestration.records.course import Entry
from orchestration.records.journal import read, seconds
from orchestration.records.record import Record, Run, read_if_there, read_images

UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
EVENTS: dict[str, tuple[Mark, str]] = {
    "start": ("square", "a start"),
    "undone": ("cross", "an update undone"),
}
"""What interrupts a training, how it is marked, and what it is called."""


def cost(record: Record) -> str:
    """Updates, time and money, as planned and as they were."""
    try:
        planned = plan(record.whole)
    except PlanError as error:  # it was trained elsewhere than where its settings say now
        return f"<h2>What it cost</h2>{note(f'There is no plan to compare with: {error}')}"
    columns: list[tuple[str, list[str]]] = []
    price = planned.gpu_hour_price
    if run := record.training:
        hours = run.course.worker_seconds / 3600
        columns += [
            ("training, planned", _planned(planned.run)),
            ("training", _actual(run.course.step, run.seconds, hours, price)),
        ]
    if record.trials and planned.sweep:
        trials = record.trials
        hours = sum(trial.course.worker_seconds for trial in trials) / 3600
        steps = sum(trial.course.step for trial in trials)
        columns += [
            ("sweep, planned", _planned(planned.sweep)),
            (
                "sweep",
                _actual(
                    steps, seconds(read(record.experiment.run_folder / "trials")[0]), hours, price
                ),
            ),
        ]
    names = ("updates", "time", "GPU-hours", "money")
    rows = [(name, [cells[place] for _, cells in columns]) for place, name in enumerate(names)]
    told = (
        "Plans tell at most: full samples, no trial stopped early; evaluations, checkpoints and restarts "
        "come on top. Time begins when the model is loaded. A worker's hour counts as a GPU's."
    )
    return f"<h2>What it cost</h2>{matrix([name for name, _ in columns], rows)}{note(told)}"


def curves(record: Record) -> str:
    """Loss, learning rate, accuracy, throughput and gradient norm of the training."""
    run = _training(record)
    loss = run.curve("train/loss")
    losses = [
        Series(thin(loss, 400), "train, update by update", "c0 faint"),
        Series(thin(loss, 60), "train, smoothed"),
        Series(run.curve("eval/loss"), "held out", "c1", "circle"),
    ]
    accuracies = [
        Series(run.curve(metric), name, look, mark)
        for metric, name, look in SHARES
        for mark in ("", "circle")
    ]
    figures = [
        figure(
            chart(losses, title="loss, nats a token", x="update"),
            [("c0", "train, smoothed"), ("c1 mark", "held out")],
        ),
        figure(
            chart(accuracies, title="held-out answers exactly right", x="update", shares=True),
            [(look, name) for _, name, look in SHARES],
        ),
        *(
            figure(
                chart(
                    [Series(thin(run.curve(metric), 400), title)],
                    title=title,
                    x="update",
                    frame=[(1, 0)],
                )
            )
            for metric, title in (
                ("train/lr", "learning rate"),
                ("throughput/tokens_per_s", "tokens a second"),
                ("train/grad_norm", "norm of the gradient, before clipping"),
            )
        ),
    ]
    return f"<h2>Training</h2>{grid(figures)}"


def course(record: Record) -> str:
    """How the training went: updates over time, and every start, undone update and end."""
    run = _training(record)
    entries = [entry for entry in read(run.folder)[0] if entry["kind"] in TOLD or "step" in entry]
    if not run.course.turns:
        return ""
    began = run.course.turns[0]["time"]
    passed = entries[-1]["time"] - began
    unit, name = next(one for one in UNITS if passed >= 3 * one[0] or one[0] == 1)
    way: list[tuple[float, float]] = []
    marks: dict[str, list[tuple[float, float]]] = {kind: [] for kind in EVENTS}
    rows, step, before = [], 0, ""
    for entry in entries:
        at = (entry["time"] - began) / unit
        if entry["kind"] in TOLD:
            told = TOLD[entry["kind"]](entry, step)
            rows.append(({}, (duration(entry["time"] - began), told, f"{step:,}")))
        if entry["kind"] in marks and not (entry["kind"] == "start" and before == "undone"):
            marks[entry["kind"]].append((at, float(step)))
        step, before = entry.get("step", step), entry["kind"]
        way.append((at, float(step)))
    series = [Series(way[:: max(1, len(way) // 800)], "updates")]
    series += [Series(marks[kind], name, "c1", mark) for kind, (mark, name) in EVENTS.items()]
    drawn = chart(series, title="updates over time", x=name)
    names = [("c1 mark", "■ a start, ✕ an update undone")]
    lost = f"Restarts: {run.course.restarts}; updates undone: {run.course.undone}."
    told = table(("after", "what happened", "at update"), rows)
    return f"<h2>Course</h2>{note(lost)}{grid([figure(drawn, names)])}{told}"


def chats(record: Record) -> str:
    """Held-out chats with the best model that has chatted, and what it answered earlier."""
    if record.speaker is None:
        return ""
    last = read_if_there(record.speaker.folder / "chats.json")
    keys = {key for one in last for key in one["images"]}
    images = read_images(record.prepared, keys) if record.prepared else {}
    earlier = record.speaker.course.chats
    told = "".join(chat(one, images, earlier=_earlier(earlier, one["id"])) for one in last)
    explained = "An answer is right if it is exactly the true one."
    return (
        f"<h2>Held-out chats with {escape(record.speaker.name)}</h2>{note(explained)}"
        f'<div class="chats">{told}</div>'
    )


def _earlier(chats: dict[int, list[dict]], name: str) -> list[tuple[int, list[str]]]:
    """(update, answers round by round) of a conversation, as the model was before its end."""
    return [
        (step, [part["model"] for part in one["rounds"]])
        for step, told in sorted(chats.items())
        for one in told
        if one["id"] == name
    ]


def _start(entry: Entry, step: int) -> str:
    workers = f"with {entry['workers']} workers"
    if not step:
        return f"begins {workers}"
    again = f", {step - entry['step']:,} updates again" if step > entry["step"] else ""
    return f"goes on from update {entry['step']:,} {workers}{again}"


def _planned(cost: Cost) -> list[str]:
    hours = "—" if cost.hours is None else duration(3600 * cost.hours)
    steps = "—" if cost.steps is None else f"{cost.steps:,}"
    return [
        steps,
        hours,
        *("—" if one is None else short(one) for one in (cost.gpu_hours, cost.money)),
    ]


def _actual(steps: int, seconds: float, hours: float, price: float | None) -> list[str]:
    money = "—" if price is None else short(hours * price)
    return [f"{steps:,}", duration(seconds), short(hours), money]


def _training(record: Record) -> Run:
    assert record.training is not None
    return record.training


TOLD: dict[str, Callable[[Entry, int], str]] = {
    "start": _start,
    "undone": lambda entry, step: f"undone: {entry['fault']}",
    "end": lambda entry, step: ": ".join(filter(None, (entry["state"], entry["reason"]))),
}
"""What is told of the lines of a journal that are no metrics, made after so many updates."""

SECTIONS = (curves, course)
"""In the order of the page."""
