"""What of the storage is kept in an object store, and fetched from it where it is missing here.

Work happens in `storage.path`, on a disk that can append, rename, lock and be mapped into memory; the store
named by `storage.remote` has the same names, and a machine that has nothing goes on from it:

- a checkpoint or a prepared set counts once its manifest is there, which comes last and goes first; what is
  fetched must be what the manifest's sha256 says;
- a journal is segments, each named by the time of its first line and its sha256 and never changed: together
  their lines are the journal, in the order of their times, whoever wrote them;
- any other file of a run is put there when it has changed; the later one counts.

Not kept: what Ray, locks and exports leave, and the default tracking store, which journals make anew.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Collection
from math import inf
from pathlib import Path, PurePosixPath
from typing import Any

from dsvl import checkpoint_folder
from dsvl.config import CheckpointConfig
from dsvl.data.folders import discard, link, sha256
from orchestration.records import journal
from orchestration.storing.remote import Found, Remote, each

log = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"(.+)/checkpoints/step-([0-9]{6,})/([^/]+)")
SEGMENT = re.compile(rf"(.+)/{re.escape(journal.NAME)}/[0-9]+-([0-9a-f]{{64}})")
PASSED_OVER = ("ray", "exports", "checkpoints", journal.NAME)
MANY_SEGMENTS = 64
"""More than so many of a journal are put together when a run goes on."""


class Mirror:
    """A storage and its store; a file's key is its path in the storage."""

    def __init__(self, storage: Path, uri: str, *, tracked_here: bool) -> None:
        """`tracked_here` is whether runs are tracked in the storage itself, which no other machine sees."""
        self.remote, self._storage = Remote(uri), storage.absolute()
        self._passed_over = {*PASSED_OVER, *(["mlflow.json"] if tracked_here else [])}
        self._put: dict[Path, int] = {}
        self._lines: dict[Path, set[bytes]] = {}
        self._losses: dict[str, float] = {}

    def key(self, path: Path) -> str:
        """A path of the storage as the store has it."""
        return path.absolute().relative_to(self._storage).as_posix()

    # Runs

    def fetch(self, folder: Path, *, writer: bool = False) -> None:
        """Bring journals and documents of a run, with its trials, up to date, which nobody works on here.

        A `writer`, who is alone, also puts many segments of a journal together.
        """
        found = self.remote.files(self.key(folder))
        segments: dict[Path, list[str]] = {}
        for key in found:
            if of := SEGMENT.fullmatch(key):
                segments.setdefault(self._storage / of[1], []).append(key)
        for run, keys in segments.items():
            self._fetch_journal(run, keys, writer=writer)
        each(lambda key: self._fetch_document(key, found[key]), filter(self._is_document, found))

    def fetch_newest(self, run: Path, *, at_most: float = inf) -> None:
        """Fetch a run's newest whole checkpoint of `at_most` so many updates, if none here is as new.

        Raises:
            ValueError: if there are some, and none is whole, neither here nor there.
        """
        there = {step for step in self.whole(run) if step <= at_most}
        held = checkpoint_folder.held(run / "checkpoints")
        for step in sorted(there | {step for step in held if step <= at_most}, reverse=True):
            if step in held and checkpoint_folder.find_fault(held[step]) is None:
                return
            if step in there and self.fetch_checkpoint(run, step):
                return
        if there and not held:
            raise ValueError(
                f"{self.remote.name}/{self.key(run)}/checkpoints: no checkpoint is whole; restore one, or "
                "remove the run there to train from the beginning"
            )

    def fetch_checkpoint(self, run: Path, step: int) -> bool:
        """Fetch the checkpoint of a step; whether it is there and whole."""
        target = run / "checkpoints" / f"step-{step:06d}"
        key = self.key(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            manifest = self._manifest(run, step)
            digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
            each(
                lambda name: self.remote.fetch(
                    f"{key}/{name}", making / name, sha256=digests[name]
                ),
                digests,
            )
            making.chmod(0o755)  # mkdtemp makes it private
            checkpoint_folder.publish(making, target, manifest)
        except (OSError, RuntimeError, ValueError) as error:
            log.warning("checkpoint %s/%s cannot be fetched: %s", self.remote.name, key, error)
            return False
        finally:
            shutil.rmtree(making, ignore_errors=True)
        log.info("checkpoint %s fetched from %s", target, self.remote.name)
        return True

    def push(
        self, folder: Path, *, retention: CheckpointConfig | None = None, stay: Collection[int] = ()
    ) -> None:
        """Bring the store up to date with a run and its trials.

        With `retention` checkpoints go there that would go here: see `checkpoint_folder.remove_old`.
        """
        held = {
            path.parent: checkpoint_folder.held(path) for path in self._named("checkpoints", folder)
        }
        # In this order: a checkpoint has all lines of its updates, and a result its checkpoint.
        for path in self._named(journal.NAME, folder):
            self._push_journal(path.parent)
        for run, checkpoints in held.items():
            for path in checkpoints.values():
                self._push_checkpoint(path)
            if retention and checkpoints:
                self._retain(run, retention, step=max(checkpoints), stay=stay)
        paths = (path for path in folder.rglob("*") if self._is_document(self.key(path)))
        each(self._push_document, [path for path in paths if path.is_file()])

    def whole(self, run: Path) -> set[int]:
        """The steps whose checkpoints are whole in the store, as far as their files are there."""
        there = self._checkpoints(run).items()
        return {step for step, names in there if checkpoint_folder.MANIFEST in names}

    # Prepared data

    def fetch_prepared(self, folder: Path) -> bool:
        """Bring a prepared set here, and return whether the store has it.

        Files that are here already are not fetched again, nor those that an interrupted fetch has left.
        """
        key = self.key(folder)
        try:
            text = self.remote.read(f"{key}/manifest.json")
        except FileNotFoundError:
            return False
        digests: dict[str, str] = json.loads(text)["files"]
        making = folder.with_name(f".fetching-{folder.name}")
        log.info("data: fetching %s from %s", folder.name, self.remote.name)

        def bring(name: str) -> None:
            target, before = making / name, folder / name
            if target.is_file() and sha256(target) == digests[name]:
                return
            if before.is_file() and sha256(before) == digests[name]:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                link(before, target)
            else:
                self.remote.fetch(f"{key}/{name}", target, sha256=digests[name])

        each(bring, digests)
        (making / "manifest.json").write_bytes(text)
        if folder.exists():
            discard(folder)
        making.rename(folder)
        return True

    def push_prepared(self, folder: Path) -> None:
        """Bring a prepared set there, the manifest last, and features of its images that are here."""
        key, text = self.key(folder), (folder / "manifest.json").read_bytes()
        there = self.remote.files(key)
        if f"{key}/manifest.json" not in there or self.remote.read(f"{key}/manifest.json") != text:
            log.info("data: bringing %s to %s", folder.name, self.remote.name)
            self.remote.remove(f"{key}/manifest.json")
            each(
                lambda name: self.remote.put(folder / name, f"{key}/{name}"),
                json.loads(text)["files"],
            )
            self.remote.write(f"{key}/manifest.json", text)
        files = [path for path in folder.glob("features/*/*.npy") if self.key(path) not in there]
        each(lambda path: self.remote.put(path, self.key(path)), files)

    def fetch_features(self, folder: Path) -> None:
        """Bring the features of a prepared set's images here, as far as the store has them."""
        keys = self.remote.files(f"{self.key(folder)}/features")
        missing = [key for key in keys if not (self._storage / key).is_file()]
        each(lambda key: self.remote.fetch(key, self._storage / key), missing)

    # What these are made of

    def _is_document(self, key: str) -> bool:
        parts = PurePosixPath(key).parts[1:]
        hidden = any(part.startswith(".") for part in parts)
        return bool(parts) and not hidden and not self._passed_over & set(parts)

    def _fetch_document(self, key: str, found: Found) -> None:
        path = self._storage / key
        if path.is_file():
            here = path.stat()
            if found.changed <= here.st_mtime:
                return
            if found.size == here.st_size and self.remote.read(key) == path.read_bytes():
                self._put[path] = here.st_mtime_ns
                return
        self.remote.fetch(key, path)
        self._put[path] = path.stat().st_mtime_ns

    def _push_document(self, path: Path) -> None:
        try:
            changed = path.stat().st_mtime_ns
            if self._put.get(path) != changed:
                self.remote.put(path, self.key(path))
                self._put[path] = changed
        except FileNotFoundError:
            log.debug("%s was removed meanwhile", path)

    def _fetch_journal(self, run: Path, keys: list[str], *, writer: bool) -> None:
        contents = each(self._segment, keys)
        there = [line for content in contents for line in content.splitlines()]
        self._lines[run] = set(there)
        journal.merge(run, there)
        if writer and len(keys) > MANY_SEGMENTS:
            self._write_segment(run, there)
            each(self.remote.remove, keys)

    def _segment(self, key: str) -> bytes:
        content = self.remote.read(key)
        if hashlib.sha256(content).hexdigest() != key[-64:]:
            raise RuntimeError(
                f"{self.remote.name}/{key}: damaged; remove it if it can't be restored"
            )
        return content

    def _push_journal(self, run: Path) -> None:
        there = self._lines.setdefault(run, set())
        if new := [line for line in journal.lines(run)[0] if line not in there]:
            self._write_segment(run, new)
            there.update(new)

    def _write_segment(self, run: Path, lines: list[bytes]) -> None:
        content = b"".join(line + b"\n" for line in lines)
        begun = int(1e6 * json.loads(lines[0])["time"])
        name = f"{begun:017d}-{hashlib.sha256(content).hexdigest()}"
        self.remote.write(f"{self.key(run)}/{journal.NAME}/{name}", content)

    def _named(self, name: str, folder: Path) -> list[Path]:
        """What is so called in a run and its trials."""
        runs = [folder, *folder.glob("trials"), *folder.glob("trials/*")]
        found = [place / name for run in runs for place in (run, run / journal.NOTES)]
        return [path for path in found if path.exists()]

    def _checkpoints(self, run: Path) -> dict[int, set[str]]:
        """Step -> names of the files that are there of its checkpoint, whole or not."""
        found: dict[int, set[str]] = {}
        for key in self.remote.files(f"{self.key(run)}/checkpoints"):
            if of := CHECKPOINT.fullmatch(key):
                found.setdefault(int(of[2]), set()).add(of[3])
        return found

    def _manifest(self, run: Path, step: int) -> dict[str, Any]:
        key = f"{self.key(run)}/checkpoints/step-{step:06d}/{checkpoint_folder.MANIFEST}"
        return checkpoint_folder.checked(self.remote.read(key), step=step)

    def _push_checkpoint(self, path: Path) -> None:
        """Bring a checkpoint there, unless the very same is, or it goes here meanwhile."""
        manifest = path / checkpoint_folder.MANIFEST
        key = self.key(manifest)
        try:
            written, stated = manifest.stat().st_mtime_ns, manifest.read_bytes()
            if self._put.get(manifest) == written:
                return
            try:
                same = self.remote.read(key) == stated
            except FileNotFoundError:
                same = False
            if not same:
                self.remote.remove(key)
                names = json.loads(stated)["files"]
                each(lambda name: self.remote.put(path / name, self.key(path / name)), names)
                self.remote.write(key, stated)
            self._put[manifest] = written
        except FileNotFoundError:
            log.debug("%s was removed while it was brought to the store", path)

    def _retain(
        self, run: Path, config: CheckpointConfig, *, step: int, stay: Collection[int]
    ) -> None:
        there = self._checkpoints(run)
        whole = [one for one, names in there.items() if checkpoint_folder.MANIFEST in names]
        losses = {one: self._loss(run, one) if config.keep_best else inf for one in whole}
        gone = checkpoint_folder.superseded(losses, config, step=step, stay=stay)
        halves = [one for one in there if one not in whole and one != step]
        for one in gone + halves:
            folder = f"{self.key(run)}/checkpoints/step-{one:06d}"
            for name in sorted(there[one], key=checkpoint_folder.MANIFEST.__ne__):
                self.remote.remove(f"{folder}/{name}")

    def _loss(self, run: Path, step: int) -> float:
        place = f"{self.key(run)}/{step}"
        if place not in self._losses:
            self._losses[place] = checkpoint_folder.loss_in(self._manifest(run, step))
        return self._losses[place]
