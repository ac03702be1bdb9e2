"""Every benchmark runs, at a tiny size, and what it compares computes the same."""

import json
from xml.etree import ElementTree

import pytest
import torch

from dsvl.cache import ImageStore
from dsvl.data.types import Kind
from tests.benchmarks import chatting, mmca, results
from tests.benchmarks.case import ORIGINAL, OURS
from tests.benchmarks.measure import peak_mib
from tests.benchmarks.setting import SIZES, Setting, sample


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(
        SIZES["tiny"], torch.device("cpu"), "fp32", tmp_path_factory.mktemp("checkpoints")
    )


@pytest.mark.parametrize("name", mmca.CASES)
def test_a_rival_that_is_said_to_be_the_same_has_the_same_results_and_gradients(setting, name):
    case = mmca.CASES[name](setting)
    expected, found = case.aligned(case.ways[case.same]()()), case.ways[OURS]()()
    if isinstance(found, str):
        assert found == expected != ""
        return
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_known_image_is_neither_encoded_nor_passed_through_the_decoder_again(setting):
    room, store = chatting.Room(setting), ImageStore(limit_bytes=2**30)

    def ask():
        next(room.chat(store).stream("w5", images=room.pictures))

    calls, tokens = chatting.passes(room.model, ask)
    assert calls == 1
    texts = tokens - chatting.IMAGES * setting.size.image_tokens
    assert texts > 0
    assert chatting.passes(room.model, ask) == (0, texts)


def test_the_sample_that_is_measured_is_15_percent_labelled():
    setting = Setting(SIZES["100m"], torch.device("cpu"), "fp32", None)
    batch = sample(setting, *setting.size.many)
    assert (batch.kinds == Kind.IMAGE).sum() == 8 * 256
    assert abs(batch.targets / batch.kinds.numel() - 0.15) < 0.001


def test_memory_is_what_lives_at_once():
    def run():
        for _ in range(3):
            torch.ones(2**24).mul_(2)

    assert peak_mib(run, torch.device("cpu")) == pytest.approx(64, rel=0.1)


def test_one_command_measures_and_leaves_a_table_and_a_chart(tmp_path, capsys):
    mmca.main(["--only", "loss", "--size", "tiny", "--memory"])
    memory = json.loads(capsys.readouterr().out)
    assert memory.keys() == {ORIGINAL, OURS}

    quick = ["attention-few", "known-images"]
    mmca.main(["--only", *quick, "--size", "tiny", "--json", "--write", str(tmp_path)])
    document = json.loads(capsys.readouterr().out)
    assert [case["name"] for case in document["cases"]] == quick
    for case in document["cases"]:
        assert case["rivals"]
        for rival in case["rivals"].values():
            median, least, most = rival["faster"]
            assert 0 < least <= median <= most
    assert results.table(document) in (tmp_path / "mmca.md").read_text(encoding="utf-8")
    ElementTree.parse(tmp_path / "mmca.svg")
