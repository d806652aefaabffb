from datetime import date, datetime
from pathlib import Path

import polars as pl
import pytest

from data.schemas import InputError
from data.sources.tables import Tables, TablesConfig

INTERACTIONS = pl.DataFrame(
    {"user_id": ["007", "7", "007"], "item_id": ["b", "a", "01"], "timestamp": [20, 10, 5], "extra": [1, 2, 3]}
)
ITEMS = pl.DataFrame({"item_id": ["01", "a", "b"], "name": ["One", None, "B"], "colour": ["red", "blue", None]})


def write(frame: pl.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        frame.write_csv(path)
    elif path.suffix == ".tsv":
        frame.write_csv(path, separator="\t")
    elif path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_ndjson(path)
    return path


def read(folder: Path, frame: pl.DataFrame = INTERACTIONS, suffix: str = ".csv", **config):
    write(frame, folder / f"log{suffix}")
    return Tables(TablesConfig(interactions=f"log{suffix}", **config)).read(folder)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl", ".ndjson"])
def test_every_kind_of_file(tmp_path, suffix):
    write(ITEMS, tmp_path / f"items{suffix}")
    config = {"items": f"items{suffix}", "title_column": "name", "text_columns": ("colour",)}
    tables = read(tmp_path, suffix=suffix, **config)
    # Sorted by time, keys with their leading zeros: "007" and "7" are two users.
    assert tables.interactions.rows() == [("007", "01", 5), ("7", "a", 10), ("007", "b", 20)]
    assert tables.items.select("item_key", "title", "category", "colour").rows() == [
        ("01", "One", None, "red"),
        ("a", None, None, "blue"),
        ("b", "B", None, None),
    ]


def test_columns_by_other_names_and_lists(tmp_path):
    log = pl.DataFrame({"who": [1, 2], "what": [10, 11]})
    pl.DataFrame({"what": [11, 10], "path": [["A", "B"], ["A"]], "tags": [["x", "y"], None]}).write_parquet(
        tmp_path / "items.parquet"
    )
    columns = {"user_column": "who", "item_column": "what", "time_column": None}
    described = {"items": "items.parquet", "category_column": "path", "text_columns": ("tags",)}
    tables = read(tmp_path, log, ".parquet", **columns, **described)
    assert tables.interactions.rows() == [("1", "10", 0), ("2", "11", 1)]
    assert tables.items.rows() == [("11", None, "A > B", "x, y"), ("10", None, "A", None)]


def test_items_are_optional(tmp_path):
    tables = read(tmp_path)
    assert tables.items.rows() == [("01", None, None), ("a", None, None), ("b", None, None)]
    assert Tables(TablesConfig(interactions="log.csv")).text_template == ("Item {item_key}.",)


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        ([2.75, 2.25, 1.5], [1, 2, 2]),
        ([date(1970, 1, 3), date(1970, 1, 2), date(1970, 1, 1)], [0, 86_400, 172_800]),
        ([datetime(1970, 1, 1, 0, 0, 1, 900), datetime(1970, 1, 1, 0, 0, 1, 800), datetime(1970, 1, 1)], [0, 1, 1]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_times_order_rows_before_they_are_cut_to_seconds(tmp_path, times, seconds, suffix):
    log = pl.DataFrame({"user_id": ["u"] * 3, "item_id": ["c", "b", "a"], "timestamp": times})
    interactions = read(tmp_path, log, suffix).interactions
    assert interactions["item_key"].to_list() == ["a", "b", "c"]
    assert interactions["timestamp"].to_list() == seconds


def test_template_follows_the_columns():
    config = TablesConfig(
        interactions="log.csv",
        items="items.csv",
        title_column="name",
        category_column="kind",
        text_columns=("made_in",),
    )
    assert Tables(config).text_template == ("{title}.", "Category: {category}.", "Made in: {made_in}.")


def test_unknown_column_lists_the_available(tmp_path):
    with pytest.raises(InputError, match=r"log\.csv has no column 'user'; columns: user_id, item_id, timestamp, extra"):
        read(tmp_path, user_column="user")
    write(ITEMS, tmp_path / "items.csv")
    with pytest.raises(InputError, match=r"items\.csv has no column 'price'; columns: item_id, name, colour"):
        read(tmp_path, items="items.csv", text_columns=("price",))


def test_missing_keys_and_times(tmp_path):
    log = pl.DataFrame({"user_id": ["u", None, "u"], "item_id": ["a", "b", "c"], "timestamp": [1.0, float("nan"), 3.0]})
    with pytest.raises(InputError, match=r"column 'user_id' is empty in 1 rows, first in row 2"):
        read(tmp_path, log, ".parquet")
    with pytest.raises(InputError, match=r"column 'timestamp' is empty in 1 rows, first in row 2"):
        read(tmp_path, log.with_columns(user_id=pl.lit("u")), ".parquet")


def test_times_that_are_no_times(tmp_path):
    log = INTERACTIONS.with_columns(timestamp=pl.lit("yesterday"))
    with pytest.raises(InputError, match=r"column 'timestamp' holds 'yesterday' \(String\) in row 1; expected"):
        read(tmp_path, log)


def test_a_day_written_in_another_order_is_refused_not_guessed(tmp_path):
    """2 January or 1 February: a guess would silently put histories into the wrong order."""
    log = INTERACTIONS.with_columns(timestamp=pl.Series(["2020-01-03", "01/02/2020", "02/01/2020"]))
    for suffix in (".csv", ".jsonl", ".parquet"):
        with pytest.raises(InputError, match=r"holds '01/02/2020' \(String\) in row 2; expected .* such as 2020-12-31"):
            read(tmp_path, log, suffix)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_iso_times_as_text(tmp_path, suffix):
    written = ["2020-01-01T12:00:00.75Z", "2020-01-01 12:00:00.5", "2020-01-01T14:00+02:00", "2020-01-01", "2019-12-31"]
    log = pl.DataFrame({"user_id": ["u"] * 5, "item_id": list("edcba"), "timestamp": written})
    interactions = read(tmp_path, log, suffix).interactions
    noon = 1577880000
    assert interactions["item_key"].to_list() == list("abcde")
    assert interactions["timestamp"].to_list() == [noon - 129_600, noon - 43_200, noon, noon, noon]


@pytest.mark.parametrize("times", [["1", "later", "3"], ["1", "inf", "3"], ["1", "1e30", "3"], ["1", "nan", "3"]])
def test_a_time_among_numbers_that_is_none_is_named(tmp_path, times):
    log = INTERACTIONS.with_columns(timestamp=pl.Series(times))
    with pytest.raises(InputError, match=rf"holds '{times[1]}' \(String\) in row 2"):
        read(tmp_path, log)


def test_numbers_beyond_64_bits_are_refused(tmp_path):
    for times in ([1.0, float("inf"), 2.0], pl.Series([1, 2**64 - 1, 2], dtype=pl.UInt64)):
        with pytest.raises(InputError, match=r"column 'timestamp' holds .* in row 2; expected"):
            read(tmp_path, INTERACTIONS.with_columns(timestamp=pl.Series(times)), ".parquet")


def test_whole_and_broken_numbers_may_mix(tmp_path):
    log = INTERACTIONS.with_columns(timestamp=pl.Series(["3", "1.5", "1"]))
    assert read(tmp_path, log).interactions["item_key"].to_list() == ["01", "a", "b"]


def test_texts_stay_as_they_are_written(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,name,price,day\n01,1984,300.50,01/02/2020\na,,,\nb,B,1,x\n")
    items = read(tmp_path, items="items.csv", title_column="name", text_columns=("price", "day")).items
    assert items.rows() == [
        ("01", "1984", None, "300.50", "01/02/2020"),
        ("a", *[None] * 4),
        ("b", "B", None, "1", "x"),
    ]


def test_columns_of_nested_values_are_refused(tmp_path):
    log = INTERACTIONS.with_columns(item_id=pl.concat_list("item_id"))
    with pytest.raises(
        InputError, match=r"log\.parquet: column 'item_id' holds List\(String\) values; expected one key"
    ):
        read(tmp_path, log, ".parquet")
    pl.DataFrame({"item_id": ["a"], "name": [{"x": 1}]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(InputError, match=r"column 'name' holds Struct.* values; expected text, numbers or lists"):
        read(tmp_path, suffix=".parquet", items="items.parquet", title_column="name")


def test_names_are_names_not_patterns(tmp_path):
    write(INTERACTIONS, tmp_path / "log[1].csv")
    write(INTERACTIONS, tmp_path / "log*.parquet")
    write(INTERACTIONS, tmp_path / "log2.parquet")
    for name in ("log[1].csv", "log*.parquet"):
        assert len(Tables(TablesConfig(interactions=name)).read(tmp_path).interactions) == 3


def test_truncated_parquet(tmp_path):
    path = write(INTERACTIONS, tmp_path / "log.parquet")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"log\.parquet could not be read"):
        Tables(TablesConfig(interactions="log.parquet")).read(tmp_path)


def test_malformed_json_lines(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"user_id": "u", "item_id": "i", "timestamp": 1}\n{"user_id": \n')
    with pytest.raises(InputError, match=r"log\.jsonl could not be read"):
        Tables(TablesConfig(interactions="log.jsonl")).read(tmp_path)


def test_unknown_suffix(tmp_path):
    with pytest.raises(InputError, match=r"log\.xlsx: unknown kind of file; expected one of \.csv"):
        Tables(TablesConfig(interactions="log.xlsx")).read(tmp_path)


def test_no_rows(tmp_path):
    with pytest.raises(InputError, match=r"log\.csv has no rows"):
        read(tmp_path, INTERACTIONS.clear())


def test_contradictions_in_the_config():
    with pytest.raises(InputError, match="user_column and item_column are both 'id'"):
        Tables(TablesConfig(interactions="log.csv", user_column="id", item_column="id"))
    with pytest.raises(InputError, match="names title, category or text columns but no items file"):
        Tables(TablesConfig(interactions="log.csv", title_column="name"))
    with pytest.raises(InputError, match=r"text_columns \['title'\] have reserved names"):
        Tables(TablesConfig(interactions="log.csv", items="items.csv", text_columns=("title",)))
    with pytest.raises(InputError, match="must be usable as the name of a folder"):
        Tables(TablesConfig(interactions="log.csv", name="../elsewhere"))
