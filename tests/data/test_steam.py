"""Small files in the true format of steam_reviews.json.gz and steam_games.json.gz."""

import gzip
from pathlib import Path

import pytest

from data.processed import DatasetConfig, RecDataset, load_dataset
from data.schemas import InputError
from data.sources.steam import Steam
from data.text import render_texts

REVIEWS = [
    r"""{u'username': u'Chaos Syren', u'hours': 0.1, u'products': 41, u'product_id': u'725280', u'page_order': 0, """
    r"""u'date': u'2017-12-17', u'text': u'This would not be acceptable as an entertainment\neven "then"', """
    r"""u'early_access': False, u'page': 1}""",
    r"""{u'username': u'\u2665 Ariman \u2665', u'hours': 13.2, u'products': 1386, u'product_id': u'328100', """
    r"""u'page_order': 2, u'date': u'2017-08-02', u'text': u"it's, u'product_id': u'1'", u'early_access': True, """
    r"""u'page': 1, u'user_id': u'76561198027974268', u'found_funny': 3, """
    r"""u'compensation': u'Product received for free'}""",
    r"""{u'date': u'2017-12-17', u'product_id': u'328100', u'username': u'Chaos Syren', u'text': u'', u'page': 2}""",
    r"""{u'user_id': u'76561198000000001', u'product_id': u'328100', u'username': u' ', u'date': u'2016-01-31'}""",
]
GAMES = [
    r"""{u'publisher': u'Kotoshiro', u'genres': [u'Action', u'Design &amp; Illustration'], u'app_name': u'Lost """
    r"""Summoner Kitty', u'title': u'Lost Summoner Kitty', u'url': u'http://store.steampowered.com/app/725280/', """
    r"""u'release_date': u'2018-01-04', u'tags': [u'Strategy', u'Indie'], u'discount_price': 4.49, """
    r"""u'reviews_url': u'http://steamcommunity.com/app/725280/reviews/', u'specs': [u'Single-player'], """
    r"""u'price': 4.99, u'early_access': False, u'id': u'725280', u'developer': u'Kotoshiro'}""",
    r"""{u'genres': [u'RPG'], u'app_name': u'War\xadzone', u'price': u'Free To Play', u'early_access': False, """
    r"""u'id': u'328100', u'developer': u'Somebody'}""",
    r"""{u'title': u'A game without an id', u'price': 9.99}""",
    r"""{u'title': u'Nobody reviewed it', u'id': u'1'}""",
]
DAY = 86_400


def write(folder: Path, reviews: list[str] = REVIEWS, games: list[str] | None = GAMES) -> Path:
    for name, lines in (("steam_reviews.json.gz", reviews), ("steam_games.json.gz", games)):
        if lines is not None:
            with gzip.open(folder / name, "wt", encoding="utf-8") as stream:
                stream.writelines(f"{line}\n" for line in lines)
    return folder


def test_reviews_are_interactions_in_file_order(tmp_path):
    log = Steam().read(write(tmp_path)).interactions
    assert log.columns == ["user_key", "item_key", "timestamp"]
    assert log.rows() == [
        ("Chaos Syren", "725280", 17_517 * DAY),
        ("\u2665 Ariman \u2665", "328100", 17_380 * DAY),
        ("Chaos Syren", "328100", 17_517 * DAY),
        ("76561198000000001", "328100", 16_831 * DAY),  # who has no name
    ]


def test_games_become_texts(tmp_path):
    items = Steam().read(write(tmp_path)).items
    assert items["item_key"].to_list() == ["725280", "328100"]
    assert render_texts(items, Steam.text_template) == [
        "This item is called 'Lost Summoner Kitty'. It is priced at 4.99 dollars. It is manufactured by 'Kotoshiro'. "
        "It belongs to the categories of Action, Design & Illustration. Its tags are Strategy, Indie.",
        "This item is called 'War\xadzone'. It is priced at Free To Play. It is manufactured by 'Somebody'. "
        "It belongs to the categories of RPG.",
    ]
    assert items["specs"].to_list() == ["Single-player", None]


def test_games_without_metadata_keep_their_rows(tmp_path, caplog):
    items = Steam().read(write(tmp_path, games=GAMES[:1])).items
    assert items.select("item_key", "title", "price").rows()[1] == ("328100", None, None)
    (tmp_path / "steam_games.json.gz").unlink()
    items = Steam().read(tmp_path).items
    assert items["title"].to_list() == [None, None]
    assert "no steam_games.json.gz" in caplog.text


def test_unpacked_files_and_their_own_folder_are_found(tmp_path):
    (tmp_path / "steam").mkdir()
    (tmp_path / "steam" / "steam_reviews.json").write_text("\n".join(REVIEWS))
    config = DatasetConfig(
        dataset=RecDataset.STEAM, root=str(tmp_path / "out"), raw_dir=str(tmp_path), min_interactions=1
    )
    with pytest.raises(InputError, match="interactions"):  # nobody has three: but the files were found and read
        load_dataset(config)


def test_bad_lines_are_counted_up_to_one_percent(tmp_path):
    bad = [REVIEWS[0][:60], "{u'username': u'x', u'product_id': u'1', u'date': u'2017-13-01'}"]
    tables = Steam().read(write(tmp_path, REVIEWS * 60 + bad, [*GAMES * 60, "{u'id': u'725280', u'title': }"]))
    assert tables.num_malformed == 3
    assert len(tables.interactions) == 240
    with pytest.raises(InputError, match="3 of 43 lines are malformed"):
        Steam().read(write(tmp_path, REVIEWS * 10 + [*bad, "{"]))
    with pytest.raises(InputError, match=r"steam_reviews\.json\.gz holds no reviews"):
        Steam().read(write(tmp_path, []))


def test_numbers_too_large_for_an_id_or_a_price_are_none(tmp_path):
    """Neither ends in a traceback."""
    huge = f"{{u'username': 0x{'f' * 5000}, u'product_id': u'1', u'date': u'2017-12-17'}}"
    game = f"{{u'id': u'328100', u'title': u'Dear', u'price': {'9' * 400}}}"
    tables = Steam().read(write(tmp_path, [*REVIEWS * 60, huge], [game]))
    assert tables.num_malformed == 1
    assert tables.items.select("title", "price").rows() == [(None, None), ("Dear", None)]


def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path) / "steam_reviews.json.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match=r"steam_reviews\.json\.gz is truncated or damaged"):
        Steam().read(tmp_path)


def test_five_core_in_the_order_of_days(tmp_path):
    """Five users review five games, each on its day, the file begins with the latest; a sixth user has two reviews."""
    lines = [
        f"{{u'username': u'user {user}', u'product_id': u'{game}', u'date': u'2017-01-{11 + (game + user) % 5:02}'}}"
        for game in reversed(range(5))
        for user in range(5)
    ]
    lines += [f"{{u'username': u'rare', u'product_id': u'{game}', u'date': u'2017-01-01'}}" for game in range(2)]
    config = DatasetConfig(dataset=RecDataset.STEAM, root=str(tmp_path / "out"), raw_dir=str(write(tmp_path, lines)))
    dataset = load_dataset(config)
    assert dataset.name == "steam"
    assert dataset.histories.num_users == 5
    assert dataset.catalogue.item_keys == ["4", "3", "2", "1", "0"]
    assert dataset.histories.item_ids[:5].tolist() == [4, 3, 2, 1, 0]  # user 0: games 0 to 4
    assert dataset.histories.item_ids[5:10].tolist() == [0, 4, 3, 2, 1]  # user 1: game 4 comes round to the first day


def test_where_the_files_come_from():
    reviews, games = Steam().raw_files()
    assert reviews.url == "https://cseweb.ucsd.edu/~wckang/steam_reviews.json.gz"
    assert games.url == "https://cseweb.ucsd.edu/~wckang/steam_games.json.gz"
    assert (reviews.optional, games.optional) == (False, True)
