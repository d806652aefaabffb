import polars as pl
import pytest
import torch

from data.schemas import Catalogue, InputError
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from serving.id_tables import by_first, by_second, read_pairs, titled, write_id_table

CODES = torch.tensor([[3, 0], [3, 12], [3, 0], [1, 1]])
CATALOGUE = Catalogue(["B0", "B1", "B2", "é"], ["Title 0", "", "Title 2", "Título"], [""] * 4)


def make_tokenizer(collisions, codes=CODES):
    return SemanticIdTokenizer.from_ids(codes, (4, 16), CATALOGUE, collisions=collisions)


def test_table_with_dedup_codes(tmp_path):
    write_id_table(tmp_path / "new" / "ids.parquet", make_tokenizer(CollisionPolicy.DEDUP_CODE), "abc")
    table = pl.read_parquet(tmp_path / "new" / "ids.parquet")
    assert dict(table.schema) == {
        "item_key": pl.String,
        "title": pl.String,
        "code_0": pl.Int32,
        "code_1": pl.Int32,
        "dedup_code": pl.Int32,
        "semantic_id": pl.String,
    }
    assert table.rows() == [
        ("B0", "Title 0", 3, 0, 0, "<a_3><b_0><c_0>"),
        ("B1", None, 3, 12, 0, "<a_3><b_12><c_0>"),
        ("B2", "Title 2", 3, 0, 1, "<a_3><b_0><c_1>"),
        ("é", "Título", 1, 1, 0, "<a_1><b_1><c_0>"),
    ]


def test_table_without_dedup_codes_and_without_removed_items(tmp_path):
    tokenizer = make_tokenizer(CollisionPolicy.NONE).without_items(["B1", "é"])
    write_id_table(tmp_path / "ids.parquet", tokenizer, "AB")
    table = pl.read_parquet(tmp_path / "ids.parquet")
    assert table.columns == ["item_key", "title", "code_0", "code_1", "semantic_id"]
    assert table.rows() == [("B0", "Title 0", 3, 0, "<A_3><B_0>"), ("B2", "Title 2", 3, 0, "<A_3><B_0>")]


def test_table_without_titles_has_nulls(tmp_path):
    catalogue = titled(CATALOGUE.item_keys, {})
    tokenizer = SemanticIdTokenizer.from_ids(CODES, (4, 16), catalogue, collisions=CollisionPolicy.NONE)
    write_id_table(tmp_path / "ids.parquet", tokenizer, "ab")
    titles = pl.read_parquet(tmp_path / "ids.parquet")["title"]
    assert titles.dtype == pl.String
    assert titles.null_count() == 4


def test_table_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"cannot write .*ids\.parquet"):
        write_id_table(tmp_path / "file" / "ids.parquet", make_tokenizer(CollisionPolicy.NONE), "ab")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.fixture
def two_columns(tmp_path):
    def write(content):
        (tmp_path / "shop.item2id").write_bytes(content)
        return tmp_path / "shop.item2id"

    return write


def test_pairs(two_columns):
    path = two_columns("\ufeffB0\t7\r\nB1\tNail file, steel\n\né\t\n".encode())
    assert read_pairs(path) == [("B0", "7"), ("B1", "Nail file, steel"), ("é", "")]
    assert by_first(path) == {"B0": "7", "B1": "Nail file, steel", "é": ""}
    assert by_second(path) == {"7": "B0", "Nail file, steel": "B1", "": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no lines"),
        (b"\n\n", "has no lines"),
        (b"B0\t1\nB1 2\n", r"shop\.item2id:2 expected FIRST<TAB>SECOND, got 'B1 2'"),
        (b"B0\t1\t2\n", ":1 expected"),
        (b"\t1\n", ":1 expected"),
        (b"\xff\t1\n", "it is not UTF-8"),
    ],
)
def test_what_is_no_table_of_pairs(two_columns, content, message):
    with pytest.raises(InputError, match=message):
        read_pairs(two_columns(content))


def test_pairs_that_repeat_a_name(two_columns):
    path = two_columns(b"B0\t1\nB1\t1\n")
    assert by_first(path) == {"B0": "1", "B1": "1"}
    with pytest.raises(InputError, match="'1' is there twice"):
        by_second(path)
    with pytest.raises(InputError, match="'B0' is there twice"):
        by_first(two_columns(b"B0\t1\nB0\t1\n"))


def test_pairs_of_no_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*: No such file or directory"):
        read_pairs(tmp_path / "absent.tsv")


def test_titles_of_items():
    catalogue = titled(["B0", "B1"], {"B1": "Nail file", "B2": "Soap"})
    assert catalogue.item_keys == ["B0", "B1"]
    assert catalogue.titles == ["", "Nail file"]
