"""The course of a run: its starts, faults, progress and cost, as the lines of its journal tell them."""

from dataclasses import dataclass, field
from typing import Any

from orchestration.records.journal import passed

Entry = dict[str, Any]


@dataclass
class Course:
    """What the lines of a journal, added one after another, come to."""

    turns: list[Entry] = field(default_factory=list)
    """Its starts, updates undone and ends."""
    chats: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Held-out conversations, by the update after which the model continued them."""
    latest: dict[str, float] = field(default_factory=dict)
    """The last of each metric."""
    step: int = 0
    """Updates that the model has had; of a sweep, trials with a result."""
    told: float | None = None
    """When the last line was written."""
    seconds: float = 0.0
    """With work, from each start to the last line before the next one."""
    worker_seconds: float = 0.0
    """The same for every worker."""

    def add(self, entry: Entry) -> None:
        """The journal's next line."""
        if self.told is not None:
            worked = passed(self.told, entry)
            self.seconds += worked
            self.worker_seconds += worked * self.workers
        self.told = entry["time"]
        match entry["kind"]:
            case "metrics":
                self.latest |= entry["metrics"]
                self.step = entry["step"]
            case "chats":
                self.chats[entry["step"]] = entry["chats"]
            case "start":
                self.turns.append(entry)
                self.step = entry["step"]
            case "undone" | "end":
                self.turns.append(entry)

    @property
    def start(self) -> Entry:
        """The last start; empty before the first."""
        return next((turn for turn in reversed(self.turns) if turn["kind"] == "start"), {})

    @property
    def end(self) -> Entry:
        """How it ended, unless it has not, or has started again since."""
        last = self.turns[-1] if self.turns else {}
        return last if last.get("kind") == "end" else {}

    @property
    def steps(self) -> int | None:
        """Updates of the whole run, or trials of a sweep; None where they are not known."""
        return self.start.get("steps") or None

    @property
    def workers(self) -> int:
        """How many the last start had."""
        return self.start.get("workers", 0)

    @property
    def undone(self) -> int:
        """How often it went back to a checkpoint because of an update."""
        return sum(turn["kind"] == "undone" for turn in self.turns)

    @property
    def restarts(self) -> int:
        """How often it began again otherwise: workers were lost, or it was interrupted."""
        starts = sum(turn["kind"] == "start" for turn in self.turns)
        return max(0, starts - 1 - self.undone)

    @property
    def pace(self) -> float | None:
        """Seconds an update since the last start, evaluations and checkpoints included."""
        if self.told is None or self.step <= self.start.get("step", 0):
            return None
        return (self.told - self.start["time"]) / (self.step - self.start["step"])
