"""What is made up is read as it was made, by the readers and settings of the originals."""

import json
from collections import Counter
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pydantic import TypeAdapter

from dsvl.config import SetConfig
from dsvl.data.readers import read
from dsvl.data.sources import BadImage, Images
from dsvl.data.split import Links, assign_split
from dsvl.data.types import Conversation, Rejected
from orchestration.compose import load
from tests.benchmarks import raw
from tests.benchmarks.made_up import Pictures
from tests.benchmarks.nine_sets import NineSets

ROOT = Path(__file__).parents[2]
BLEND = yaml.safe_load((ROOT / "configs/data/llava_otter_blend.yaml").read_text())["data"]["sets"]
SETS = load(ROOT / "configs/experiment/visualchat_13b_set2.yaml").data.sets | {
    name: TypeAdapter(SetConfig).validate_python(config) for name, config in BLEND.items()
}
SCALE = 0.002


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of raw data, and what it has to come to."""
    folder, sets = tmp_path_factory.mktemp("raw"), NineSets(SCALE)
    raw.write(folder, sets, edge=64)
    return folder, sets.expected()


def records(folder: Path, source: str) -> list[Conversation | Rejected]:
    return list(read(source, config=SETS[source], root=folder, max_images=8, seed=0))


def becomes(folder: Path, config: SetConfig, found: list[Conversation | Rejected]) -> dict:
    """What the records of a set come to, with all of their images opened."""
    images = Images(folder / config.images)
    kept, merged, dropped = 0, 0, Counter()
    for record in found:
        if isinstance(record, Rejected):
            dropped[record.reason] += 1
            continue
        try:
            for image in record.images:
                Image.open(BytesIO(images.read(image.path)), formats=["JPEG"]).load()
        except BadImage as bad:
            dropped[bad.reason] += len(record.records)
        else:
            kept += 1
            merged += len(record.merged)
    raw_records = kept + merged + dropped.total()
    return {"raw": raw_records, "used": kept, "merged": merged, "dropped": dict(dropped)}


@pytest.mark.parametrize("source", SETS)
def test_every_set_comes_to_what_it_was_made_for(made, source):
    folder, expected = made
    wanted = {name: n for name, n in expected[source].items() if name != "joinable"}
    assert becomes(folder, SETS[source], records(folder, source)) == wanted
    assert wanted["used"] > 0


def test_there_is_no_other_set(made):
    assert made[1].keys() == SETS.keys()


def test_at_full_size_the_sets_have_the_records_that_their_settings_tell():
    expected = NineSets().expected()
    assert {name: found["used"] for name, found in expected.items()} == {
        name: config.records for name, config in SETS.items()
    }
    # as in table 1, where 48,869 of CGD's 70,940 pairs are joined with LLaVA's conversations
    assert expected["llava_otter_blend"]["joinable"] == pytest.approx(48_869, rel=0.002)


def test_pairs_of_cgd_begin_with_pictures_of_llava_as_counted(made):
    folder, expected = made
    shown = {
        source: [r.images for r in records(folder, source) if isinstance(r, Conversation)]
        for source in ("llava", "llava_dial", "otter_mimicit_cgd")
    }
    known = {*shown["llava"], *shown["llava_dial"]}
    begin = sum(pair[:1] in known for pair in shown["otter_mimicit_cgd"])
    assert begin == expected["llava_otter_blend"]["joinable"]


def test_no_two_pictures_have_the_same_bytes(made):
    folder, _ = made
    files = list(folder.rglob("*.jpg"))
    coded = [json.loads(path.read_text()) for path in folder.glob("MIMIC-IT/*[A-Z].json")]
    assert len(coded) == 4
    texts = [text for held in coded for text in held.values()]
    digests = {sha256(path.read_bytes()).digest() for path in files} | set(texts)
    assert len(digests) == len(files) + len(texts) > 1000


def test_all_is_written_alike_a_second_time(made, tmp_path):
    folder, _ = made
    raw.write(tmp_path, NineSets(SCALE), edge=64)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert [(tmp_path / name).read_bytes() for name in names] == [
        (folder / name).read_bytes() for name in names
    ]


def test_pairs_of_cgd_percolate_only_if_asked_to():
    def straddling(sets: NineSets) -> float:
        """Share of the pairs that a split has to drop."""
        pairs = sets.pairs
        links = [Links("cgd", f"record {n}", tuple(map(str, pair))) for n, pair in enumerate(pairs)]
        sides = assign_split(links, declared={"cgd": "auto"}, eval_fraction=0.1, seed=0).sides
        return sides.count("straddles_split") / len(sides)

    assert straddling(NineSets(0.1)) == 0
    assert straddling(NineSets(0.1, percolate=True)) > 0.1


def test_a_picture_has_the_edge_that_is_asked_for():
    assert Image.open(BytesIO(Pictures(200)("any"))).size == (200, 150)
