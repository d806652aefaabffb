import gzip
import json
from pathlib import Path

import pytest

from data.schemas import InputError
from data.sources.amazon_p5 import AmazonP5

USERS = {"REVIEWER_A": "1", "REVIEWER_B": "2"}
ITEMS = {"ASIN1": "1", "ASIN2": "2", "ASIN3": "3"}
SEQUENCES = "1 1 2 3\n2 3 1 2 1\n"
# Not in item order, and ASIN2 is absent: a join by position would shift every text.
METADATA = [
    {
        "asin": "ASIN3",
        "title": "Soap",
        "brand": "Unknown",
        "categories": [["Beauty", "Bath"], ["Home", "Bath", "Soap"]],
    },
    {"asin": "OTHER", "title": "Not in the data"},
    {"asin": "ASIN1", "title": "L&#39;Oreal\n Cream", "brand": "L&#39;Oreal", "categories": [["Beauty"]], "price": 4.5},
]


def write_p5(folder: Path, *, sequences: str = SEQUENCES, lines: list[str] | None = None, users=USERS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sequential_data.txt").write_text(sequences)
    (folder / "datamaps.json").write_text(json.dumps({"user2id": users, "item2id": ITEMS}))
    with gzip.open(folder / "meta.json.gz", "wt") as stream:
        stream.writelines(line + "\n" for line in (map(repr, METADATA) if lines is None else lines))
    return folder


def test_items_are_joined_by_key_and_interactions_keep_their_order(tmp_path):
    tables = AmazonP5("beauty").read(write_p5(tmp_path / "beauty"))
    assert tables.items.select("item_key", "title", "brand", "category", "price").rows() == [
        ("ASIN1", "L'Oreal Cream", "L'Oreal", "Beauty", 4.5),
        ("ASIN2", None, None, None, None),
        ("ASIN3", "Soap", None, "Beauty > Bath", None),
    ]
    assert tables.interactions.rows() == [
        ("REVIEWER_A", "ASIN1", 0),
        ("REVIEWER_A", "ASIN2", 1),
        ("REVIEWER_A", "ASIN3", 2),
        ("REVIEWER_B", "ASIN3", 0),
        ("REVIEWER_B", "ASIN1", 1),
        ("REVIEWER_B", "ASIN2", 2),
        ("REVIEWER_B", "ASIN1", 3),
    ]
    assert tables.num_malformed == 0


def test_reviewer_ids_in_the_user_column_are_understood(tmp_path):
    by_number = AmazonP5("beauty").read(write_p5(tmp_path / "numbers"))
    by_id = AmazonP5("beauty").read(write_p5(tmp_path / "ids", sequences="REVIEWER_A 1 2 3\nREVIEWER_B 3 1 2 1\n"))
    assert by_id.interactions.equals(by_number.interactions)


def test_flattened_category_paths_are_cut_at_the_root(tmp_path):
    flat = ["Acme", "Sports & Outdoors", "Golf", "Sports & Outdoors", "Golf", "Balls", "Sports & Outdoors", "Toys"]
    foreign = ["Cell Phones", "Contract Phones", "Sports & Outdoors", "Fan Shop"]
    lines = [repr({"asin": "ASIN1", "categories": [flat]}), repr({"asin": "ASIN2", "categories": [foreign]})]
    items = AmazonP5("sports").read(write_p5(tmp_path / "sports", lines=lines)).items
    assert items.select("brand", "category", "other_categories").rows() == [
        ("Acme", "Sports & Outdoors > Golf > Balls", "Sports & Outdoors > Golf; Sports & Outdoors > Toys"),
        (None, "Sports & Outdoors > Fan Shop", None),
        (None, None, None),
    ]


def test_metadata_lines_are_never_executed(tmp_path):
    witness = tmp_path / "executed"
    attack = f"__import__('pathlib').Path({str(witness)!r}).touch() or {{'asin': 'ASIN1'}}"
    tables = AmazonP5("beauty").read(write_p5(tmp_path / "beauty", lines=[attack] + [repr(METADATA[0])] * 99))
    assert tables.num_malformed == 1
    assert not witness.exists()


def test_malformed_lines_are_counted_up_to_one_percent_and_refused_beyond(tmp_path, caplog):
    good = [repr(METADATA[2])] * 198
    tables = AmazonP5("beauty").read(write_p5(tmp_path / "one", lines=["{'asin': ", "{'title': 'x'}", *good]))
    assert tables.num_malformed == 2
    assert tables.items["title"][0] == "L'Oreal Cream"
    assert "skipped 2 malformed of 200 lines" in caplog.text
    with pytest.raises(InputError, match=r"3 of 200 lines are malformed, at most 1% may be"):
        AmazonP5("beauty").read(write_p5(tmp_path / "two", lines=["{'asin': ", "[]", "3", *good[:-1]]))


def test_truncated_metadata(tmp_path):
    folder = write_p5(tmp_path / "beauty")
    whole = (folder / "meta.json.gz").read_bytes()
    (folder / "meta.json.gz").write_bytes(whole[:-20])
    with pytest.raises(InputError, match=r"meta\.json\.gz is truncated or damaged"):
        AmazonP5("beauty").read(folder)


def test_metadata_that_is_not_gzip(tmp_path):
    folder = write_p5(tmp_path / "beauty")
    (folder / "meta.json.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match=r"meta\.json\.gz is truncated or damaged"):
        AmazonP5("beauty").read(folder)


def test_truncated_datamaps(tmp_path):
    folder = write_p5(tmp_path / "beauty")
    (folder / "datamaps.json").write_text('{"user2id": {"REVIEWER_A": "1"')
    with pytest.raises(InputError, match=r"datamaps\.json is truncated or not JSON"):
        AmazonP5("beauty").read(folder)


def test_datamaps_of_another_kind(tmp_path):
    folder = write_p5(tmp_path / "beauty")
    (folder / "datamaps.json").write_text('{"user2id": {"REVIEWER_A": "1"}}')
    with pytest.raises(InputError, match=r"expected the maps user2id and item2id, got the keys \['user2id'\]"):
        AmazonP5("beauty").read(folder)


def test_truncated_sequences(tmp_path):
    folder = write_p5(tmp_path / "beauty", sequences="1 1 2 3\n")
    with pytest.raises(InputError, match=r"one line for each of the 2 users of datamaps\.json, got 1 lines"):
        AmazonP5("beauty").read(folder)


def test_sequences_cut_within_the_last_line(tmp_path):
    folder = write_p5(tmp_path / "beauty")
    path = folder / "sequential_data.txt"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"sequential_data\.txt is truncated: its last line has no end"):
        AmazonP5("beauty").read(folder)


def test_unknown_item_number_names_the_line(tmp_path):
    folder = write_p5(tmp_path / "beauty", sequences="1 1 2 3\n2 3 99 2\n")
    with pytest.raises(InputError, match=r"line 2: item number '99' is not in datamaps\.json \(1 such interactions\)"):
        AmazonP5("beauty").read(folder)


def test_unknown_user_names_the_line(tmp_path):
    folder = write_p5(tmp_path / "beauty", sequences="1 1 2 3\n7 3 1 2\n")
    with pytest.raises(InputError, match=r"line 2: user '7' is not in datamaps\.json"):
        AmazonP5("beauty").read(folder)


def test_folder_of_another_category_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"category is 'sports' but the raw files in .* are those of 'beauty'"):
        AmazonP5("sports").read(write_p5(tmp_path / "beauty"))


@pytest.mark.parametrize("category", ["books", "Beauty", None])
def test_unknown_category_lists_the_valid_ones(category):
    with pytest.raises(InputError, match=r"unknown category .* valid categories: beauty, sports, toys"):
        AmazonP5(category)


@pytest.mark.parametrize(
    ("category", "num_users", "num_items", "num_interactions"),
    [("beauty", 22_363, 12_101, 198_502), ("sports", 35_598, 18_357, 296_337)],
)
def test_real_counts(shared_data, category, num_users, num_items, num_interactions):
    tables = AmazonP5(category).read(shared_data / "amazon_p5" / category)
    assert tables.interactions["user_key"].n_unique() == num_users
    assert tables.interactions["item_key"].n_unique() == len(tables.items) == num_items
    assert len(tables.interactions) == num_interactions
    assert tables.items["category"].null_count() == 0
