import json
import logging

import pytest
import torch

from data.schemas import InputError
from modules.tokenizer.collisions import codebook_health
from modules.tokenizer.index_file import MAX_CODE, letters_of, read_index, write_index


@pytest.fixture
def index_file(tmp_path):
    def write(content):
        path = tmp_path / "shop.index.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


GOOD = '{"B07": ["<a_3>", "<b_0>", "<c_255>"], "B01": ["<a_3>", "<b_12>", "<c_7>"]}'


def test_reading(index_file):
    index = read_index(index_file(GOOD))
    assert index.item_keys == ["B07", "B01"]
    torch.testing.assert_close(index.codes, torch.tensor([[3, 0, 255], [3, 12, 7]]))
    assert index.letters == "abc"
    assert index.codebook_sizes == (4, 13, 256)


def test_writing(tmp_path):
    path = tmp_path / "new" / "shop.index.json"
    write_index(path, ["é\n", "B01"], torch.tensor([[3, 0], [3, 12]]), letters_of("image", 2))
    assert path.read_text(encoding="utf-8") == '{\n"é\\n": ["<A_3>", "<B_0>"],\n"B01": ["<A_3>", "<B_12>"]\n}\n'
    assert [entry.name for entry in path.parent.iterdir()] == ["shop.index.json"]


@pytest.mark.parametrize("num_levels", [1, 4, 26])
@pytest.mark.parametrize("language", ["text", "image"])
def test_what_is_written_is_read(tmp_path, language, num_levels):
    keys = [f"item {row}" for row in range(63)]
    ids = torch.randint(0, MAX_CODE + 1, (63, num_levels), generator=torch.Generator().manual_seed(0))
    write_index(tmp_path / "i.json", keys, ids, letters_of(language, num_levels))
    index = read_index(tmp_path / "i.json")
    assert index.item_keys == keys
    torch.testing.assert_close(index.codes, ids)
    assert index.letters == letters_of(language, num_levels)


def test_a_byte_order_mark_does_not_matter(index_file):
    assert read_index(index_file(b"\xef\xbb\xbf" + GOOD.encode())).item_keys == ["B07", "B01"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a whole JSON file"),
        (GOOD[:-1], "is not a whole JSON file"),
        (GOOD[: len(GOOD) // 2], "is not a whole JSON file"),
        (b"\xff\xfe\x00", "is not a whole JSON file"),
        ("[" * 100_000, "is not a whole JSON file"),
        ("{}", "holds no items"),
        ('[["B01", ["<a_1>"]]]', 'expected {"item": ["<a_1>", ...], ...}, got a JSON list'),
        ("3", "got a JSON int"),
        ('{"x": ["<a_1>"], "y": ["<a_2>"], "x": ["<a_3>"]}', "item 'x' is there twice"),
        ('{"": ["<a_1>"]}', "item '' expected a key of at least one character"),
        ('{"\\ud800": ["<a_1>"]}', "item '\\ud800' expected a key"),
        ('{"x": []}', "item 'x' expected a list of codes"),
        ('{"x": "<a_1>"}', "item 'x' expected a list of codes"),
        ('{"x": {"<a_1>": 1}}', "item 'x' expected a list of codes"),
        ('{"x": ["<a_1>"], "y": {"<a_1>": 1}}', "item 'y' expected 1 codes like the first item, got"),
        ('{"x": ["<a_1>"], "y": "<a_1>"}', "item 'y' expected 1 codes like the first item, got '<a_1>'"),
        ('{"x": ["<a_1>", "<b_1>"], "y": ["<a_1>"]}', "item 'y' expected 2 codes like the first item, got 1"),
        ('{"x": ["<a_1>"], "y": ["<a_1>", "<b_1>"]}', "item 'y' expected 1 codes like the first item, got 2"),
        ('{"x": ["<a_1>"], "y": []}', "item 'y' expected 1 codes like the first item, got 0"),
        ('{"x": ["<a_1>", "<c_1>"]}', "got '<c_1>' in the place of <b_...>"),
        ('{"x": ["<b_1>", "<a_1>"]}', "got '<b_1>' in the place of <a_...>"),
        ('{"x": ["<a_1>", "<B_1>"]}', "got '<B_1>' in the place of <b_...>"),
        ('{"x": ["<A_1>"], "y": ["<a_1>"]}', "item 'y' expected its codes as <A_...>"),
        ('{"x": ["<a_-1>"]}', "got '<a_-1>'"),
        ('{"x": ["<a_1.5>"]}', "got '<a_1.5>'"),
        ('{"x": ["<a_>"]}', "got '<a_>'"),
        ('{"x": ["<a_٣>"]}', "got '<a_٣>'"),
        ('{"x": ["<a_1>\\n"]}', "got '<a_1>\\n'"),
        ('{"x": ["a_1"]}', "got 'a_1'"),
        ('{"x": [1, 2]}', "got 1 in"),
        ('{"x": [null]}', "got None"),
        (f'{{"x": ["<a_{MAX_CODE + 1}>"]}}', f"at most {MAX_CODE}"),
        (f'{{"x": ["<a_{"9" * 5000}>"]}}', f"at most {MAX_CODE}"),
        ('{"x": [' + ", ".join(['"<a_1>"'] * 27) + "]}", "item 'x' has 27 codes, expected at most 26"),
    ],
)
def test_what_is_no_index_is_refused_by_file_and_item(index_file, content, message):
    path = index_file(content)
    with pytest.raises(InputError) as caught:
        read_index(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*absent\.json: No such file"):
        read_index(tmp_path / "absent.json")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        read_index(tmp_path)


def test_aligning_to_a_catalogue(index_file, caplog):
    index = read_index(index_file('{"x": ["<a_1>"], "y": ["<a_2>"], "z": ["<a_3>"]}'))
    with caplog.at_level(logging.INFO, logger="modules"):
        aligned = index.aligned(["z", "x"], "the shop")
    assert aligned.item_keys == ["z", "x"]
    assert aligned.codes.tolist() == [[3], [1]]
    assert "1 items that the shop does not have are left out" in caplog.text
    with pytest.raises(InputError) as caught:
        index.aligned(["z", "w", "x", "v"], "the shop")
    assert str(caught.value).startswith(f"{index.path} lacks 2 items ('w', 'v') of the 4 of the shop; it has 3, such")


def test_renaming(index_file):
    index = read_index(index_file('{"0": ["<a_1>"], "1": ["<a_2>"]}'))
    renamed = index.renamed({"1": "B1", "0": "B0", "2": "B2"}, "shop.item2id")
    assert renamed.item_keys == ["B0", "B1"]
    assert renamed.codes is index.codes
    with pytest.raises(InputError, match=r"shop\.item2id has no name for 1 items \('1'\) of .*shop\.index\.json"):
        index.renamed({"0": "B0"}, "shop.item2id")
    with pytest.raises(InputError, match=r"gives 'B0' to two items of .*: '0' and '1'"):
        index.renamed({"0": "B0", "1": "B0"}, "shop.item2id")


@pytest.mark.parametrize(
    ("keys", "shape", "letters"),
    [(["x"], (2, 2), "ab"), (["x", "y"], (2, 2), "abc"), (["x", "x"], (2, 2), "ab"), ([], (0, 2), "ab")],
)
def test_writing_what_does_not_fit(tmp_path, keys, shape, letters):
    with pytest.raises(InputError, match="write_index expected ids of shape"):
        write_index(tmp_path / "i.json", keys, torch.zeros(shape, dtype=torch.int64), letters)
    assert list(tmp_path.iterdir()) == []


def test_more_levels_than_letters():
    with pytest.raises(InputError, match="letters for 26 levels, got 27"):
        letters_of("text", 27)


def test_writing_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*i\.json"):
        write_index(tmp_path / "file" / "i.json", ["x"], torch.zeros(1, 1), "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*folder"):
        write_index(tmp_path / "folder", ["x"], torch.zeros(1, 1), "a")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("name", "letters", "num_items", "num_distinct", "num_groups"),
    [
        ("letter/Beauty/Beauty.index.json", "abcd", 12_101, 12_088, 11),
        ("mql4grec/Instruments/Instruments.index_lemb.json", "abcd", 6_250, 5_988, 262),
        ("mql4grec/Instruments/Instruments.index_vitemb.json", "ABCD", 6_250, 6_250, 0),
    ],
)
def test_published_ids(shared_data, tmp_path, name, letters, num_items, num_distinct, num_groups):
    index = read_index(shared_data / name)
    assert index.letters == letters
    assert index.item_keys == [str(item) for item in range(num_items)]
    health = codebook_health(index.codes, index.codebook_sizes)
    assert health.num_distinct == num_distinct
    assert num_distinct - (num_items - health.num_colliding) == num_groups
    write_index(tmp_path / "again.json", index.item_keys, index.codes, letters)
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((shared_data / name).read_text())
