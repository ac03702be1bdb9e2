"""Annotation files, a window at a time."""

import csv
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl.data import rows

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)
FREE = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "train.json"


@pytest.fixture
def narrow(monkeypatch):
    """Windows of a few characters, so that every value is cut off somewhere."""
    monkeypatch.setattr(rows, "WINDOW", 3)


def values(path, **options):
    return [row.value for row in rows.rows(path, path.name, **options)]


@pytest.mark.usefixtures("narrow")
@FREE
@given(st.lists(JSON, max_size=5), st.sampled_from([None, 0, 2]), st.booleans())
def test_a_list_is_read_as_json_would_read_it(path, held, indent, ascii_only):
    path.write_text(json.dumps(held, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert values(path) == held


@pytest.mark.usefixtures("narrow")
@FREE
@given(st.dictionaries(st.text(), JSON, max_size=4), JSON, st.dictionaries(st.text(), JSON))
def test_an_object_within_an_object_is_read_whatever_is_beside_it(path, held, before, after):
    whole = {"before": before, "data": held} | {name + "_": value for name, value in after.items()}
    path.write_text(json.dumps(whole))
    found = list(rows.rows(path, "f", within="data", holding="an object"))
    assert {row.key: row.value for row in found} == held
    assert [row.position for row in found] == list(range(len(held)))


@pytest.mark.usefixtures("narrow")
@FREE
@given(JSON, st.data())
def test_a_damaged_file_is_refused_with_file_and_line_exactly_where_json_refuses_it(
    path, held, data
):
    text = json.dumps([held, held], indent=1)
    at = data.draw(st.integers(0, len(text) - 1))
    text = (
        text[:at]
        + data.draw(st.sampled_from(["", "}", "]", '"', "\\", "x", "\n"]))
        + text[at + 1 :]
    )
    path.write_text(text, encoding="utf-8")
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    if isinstance(expected, list):
        assert values(path) == expected
    else:
        with pytest.raises(ValueError, match=r"train\.json:\d+: (is not JSON|must hold a list)"):
            values(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a": oops}]', r":3: is not JSON: Expecting value"),
        ("[\n1,\n\n2\n3]", r":5: is not JSON: Expecting ',' delimiter"),
        ('[1]\n\n"more"', r":3: is not JSON: Extra data"),
        ('[\n"never closed', r":2: is not JSON: Unterminated string"),
        ('{"data": []}', r":1: must hold a list of records, but holds a dict"),
        ('"text"', r":1: must hold a list of records, but holds a str"),
        ("", r":1: is not JSON: Expecting value"),
    ],
)
@pytest.mark.parametrize("window", [1, 4, 1 << 20])
def test_a_fault_is_told_with_its_line(path, text, message, window, monkeypatch):
    monkeypatch.setattr(rows, "WINDOW", window)
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        values(path)


def test_what_a_format_holds_must_be_there(path):
    path.write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"json:1: must hold 'data', as this format has it"):
        values(path, within="data")
    with pytest.raises(ValueError, match=r"json:1: must hold an object of records"):
        values(path, within="images", holding="an object")
    path.write_text("[]")
    with pytest.raises(
        ValueError, match=r"json:1: must hold an object with 'data', but holds a list"
    ):
        values(path, within="data")


def test_a_row_over_the_limit_is_refused_before_it_fills_the_memory(path, monkeypatch):
    monkeypatch.setattr(rows, "WINDOW", 10)
    monkeypatch.setattr(rows, "MAX_ROW", 100)
    path.write_text('["' + "x" * 1000)
    with pytest.raises(ValueError, match="over 100 characters"):
        values(path)


def test_lines_are_records_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "\u2028"}\n')
    assert values(path) == [{"a": 1}, {"a": "\u2028"}]
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match=r"train\.jsonl:3: is not JSON"):
        values(path)


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@FREE
@given(st.data(), st.sampled_from([".csv", ".tsv"]))
def test_a_table_is_read_as_it_was_written_and_its_values_are_texts(tmp_path, data, ending):
    names = data.draw(st.lists(CELLS, min_size=2, max_size=4, unique=True))
    row = st.lists(CELLS, min_size=1, max_size=5)
    written = data.draw(st.lists(row, max_size=5))
    path = tmp_path / f"table{ending}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter=rows.DELIMITERS[ending], quoting=csv.QUOTE_ALL)
        table.writerows([names, *written])
    assert values(path) == [
        dict(zip(names, cells, strict=True)) if len(cells) == len(names) else cells
        for cells in written
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"csv:1: must begin with the names of its columns"),
        (b"a,a\n1,2\n", r"csv:1: must begin with the names of its columns, each another"),
        (b'a,b\n1,2\n"3,4\n', r"csv:3: is not CSV: unexpected end of data"),
        (b'a,b\n1,2\n"3"4,5\n', r"csv:3: is not CSV: ',' expected after"),
        (b"a,b\n1,\xff\n", r"csv:\d: is not CSV: .*can't decode"),
    ],
)
def test_a_broken_table_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        values(tmp_path / "t.csv")


def test_a_cell_may_hold_an_image(tmp_path):
    (tmp_path / "t.tsv").write_text("image\n" + "A" * 1_000_000 + "\n")
    assert values(tmp_path / "t.tsv") == [{"image": "A" * 1_000_000}]


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_number_that_is_too_long_for_python_is_a_text_and_costs_no_file(tmp_path, ending):
    path, digits = tmp_path / f"t{ending}", "9" * 5000
    path.write_text(f'{{"id": {digits}}}' if ending == ".jsonl" else f'[{{"id": {digits}}}]')
    assert values(path) == [{"id": digits}]


def test_a_table_of_fifty_megabytes_is_read_in_the_memory_of_a_few(tmp_path):
    path = tmp_path / "t.csv"
    line = ",".join(["What? " * 400, "That. " * 450]) + "\n"
    with open(path, "w") as file:
        file.write("question,answer\n")
        file.writelines(line for _ in range(10_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows.rows(path, "f")) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_a_parquet_file_gives_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "PARQUET_ROWS", 2)
    held = [{"q": str(i), "image": {"bytes": b"x", "path": None}} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(held), tmp_path / "x.parquet", row_group_size=3)
    assert values(tmp_path / "x.parquet") == held
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"x\.parquet: is not Parquet"):
        values(tmp_path / "x.parquet")


def test_an_extension_type_is_refused_before_its_code_could_run(tmp_path):
    ran = []

    class Pickled(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.binary(), "tests.pickled")

        def __arrow_ext_serialize__(self):
            return b"a pickle"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type, serialized):
            ran.append(serialized)
            return cls()

    path = tmp_path / "x.parquet"
    column = pa.ExtensionArray.from_storage(Pickled(), pa.array([b"x"]))
    for padding in range(6):  # wherever its name falls within the schema's base64
        pq.write_table(pa.table({"c" * (padding + 1): column}), path)
        pa.register_extension_type(Pickled())
        try:
            with pytest.raises(ValueError, match="extension type; store plain types"):
                values(path)
        finally:
            pa.unregister_extension_type("tests.pickled")
    assert ran == []


@pytest.mark.parametrize("shape", ["list", "object"])
def test_fifty_megabytes_are_read_in_the_memory_of_a_few(path, shape):
    record = json.dumps({"question": "What? " * 400, "answer": "That. " * 450})
    with open(path, "w") as file:
        file.write("[" if shape == "list" else '{"data": {')
        for number in range(10_000):
            file.write("," * bool(number) + ("" if shape == "list" else f'"{number}":') + record)
        file.write("]" if shape == "list" else "}}")
    assert path.stat().st_size > 50e6
    options = {} if shape == "list" else {"within": "data", "holding": "an object"}
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows.rows(path, "f", **options)) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_a_byte_order_mark_is_no_fault(path):
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert values(path) == [1]
