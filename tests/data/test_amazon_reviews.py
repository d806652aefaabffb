import gzip
import json
from pathlib import Path

import pytest

from data.schemas import InputError
from data.sources.amazon_reviews import AmazonReviews

REVIEWS = [
    {"reviewerID": "U1", "asin": "0001", "unixReviewTime": 200, "reviewText": "fine", "overall": 5.0},
    {"reviewerID": "U2", "asin": "0001", "unixReviewTime": 100},
    {"reviewerID": "U1", "asin": "0002", "unixReviewTime": 100},
]
LOG = [("U1", "0001", 200), ("U2", "0001", 100), ("U1", "0002", 100)]


def write_lines(path: Path, lines: list[str]) -> None:
    with gzip.open(path, "wt") as stream:
        stream.writelines(line + "\n" for line in lines)


@pytest.mark.parametrize("encode", [json.dumps, repr], ids=["json", "python"])
def test_both_kinds_of_lines_are_read_in_file_order(tmp_path, encode):
    write_lines(tmp_path / "reviews_Baby_5.json.gz", [encode(review) for review in REVIEWS])
    write_lines(tmp_path / "meta_Baby.json.gz", [encode({"asin": "0002", "title": "Cot", "categories": [["Baby"]]})])
    tables = AmazonReviews("baby").read(tmp_path)
    assert tables.interactions.rows() == LOG
    assert tables.items.select("item_key", "title", "category").rows() == [
        ("0001", None, None),
        ("0002", "Cot", "Baby"),
    ]


def test_unfiltered_reviews_are_accepted(tmp_path):
    write_lines(tmp_path / "reviews_Baby.json.gz", [json.dumps(review) for review in REVIEWS])
    assert AmazonReviews("Baby").read(tmp_path).interactions.rows() == LOG


def test_without_metadata_items_keep_their_rows(tmp_path, caplog):
    write_lines(tmp_path / "reviews_Baby_5.json.gz", [json.dumps(review) for review in REVIEWS])
    items = AmazonReviews("Baby").read(tmp_path).items
    assert items.select("item_key", "title").rows() == [("0001", None), ("0002", None)]
    assert "no meta_Baby.json.gz" in caplog.text


def test_malformed_reviews_are_counted_up_to_one_percent(tmp_path):
    good = [json.dumps(REVIEWS[0])] * 199
    write_lines(tmp_path / "reviews_Baby_5.json.gz", [*good, '{"reviewerID": "U1", "unixReviewTime": 3}'])
    tables = AmazonReviews("Baby").read(tmp_path)
    assert tables.num_malformed == 1
    assert len(tables.interactions) == 199
    write_lines(tmp_path / "reviews_Baby_5.json.gz", [*good, "{", '{"reviewerID": "U1"', "]"])
    with pytest.raises(InputError, match="3 of 202 lines are malformed"):
        AmazonReviews("Baby").read(tmp_path)


def test_truncated_reviews(tmp_path):
    path = tmp_path / "reviews_Baby_5.json.gz"
    write_lines(path, [json.dumps(review) for review in REVIEWS])
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match=r"reviews_Baby_5\.json\.gz is truncated or damaged"):
        AmazonReviews("Baby").read(tmp_path)


def test_empty_reviews(tmp_path):
    write_lines(tmp_path / "reviews_Baby_5.json.gz", [])
    with pytest.raises(InputError, match="holds no reviews"):
        AmazonReviews("Baby").read(tmp_path)


def test_names_and_downloads():
    source = AmazonReviews("toys and games")
    assert source.name == "amazon-reviews-toys-and-games"
    reviews, meta = source.raw_files()
    assert reviews.url == (
        "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_Toys_and_Games_5.json.gz"
    )
    assert not reviews.optional
    assert meta.optional


def test_unknown_category_lists_the_valid_ones():
    with pytest.raises(InputError, match=r"unknown category 'Shoes' .* Automotive, Baby, Beauty, Books"):
        AmazonReviews("Shoes")


def test_real_counts(shared_data):
    tables = AmazonReviews("Musical_Instruments").read(shared_data / "amazon_2014_raw")
    log = tables.interactions
    assert (log["user_key"].n_unique(), len(tables.items), len(log)) == (1_429, 900, 10_261)
    assert log.row(0) == ("A2IBPI20UZIR0U", "1384719342", 1_393_545_600)
