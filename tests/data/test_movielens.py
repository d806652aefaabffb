from pathlib import Path

import pytest

from data.schemas import InputError
from data.sources.movielens import MovieLens1M, MovieLens32M

LOG = [("1", "31", 978300760), ("1", "2", 978302109), ("22", "31", 978300000)]


def write_1m(folder: Path) -> Path:
    (folder / "ratings.dat").write_text("1::31::5::978300760\n1::2::3::978302109\n22::31::4::978300000\n")
    movies = "2::City of Lost Children: Cité, La (1995)::Adventure|Sci-Fi\n31::A::Drama\n"
    (folder / "movies.dat").write_bytes(movies.encode("iso-8859-1"))
    return folder


def write_32m(folder: Path) -> Path:
    ratings = ["userId,movieId,rating,timestamp", "1,31,2.5,978300760", "1,2,3.0,978302109", "22,31,4.0,978300000"]
    (folder / "ratings.csv").write_bytes("".join(line + "\r\n" for line in ratings).encode())
    movies = ["movieId,title,genres", '2,"American President, The (1995)",Comedy|Drama', "31,A,(no genres listed)"]
    (folder / "movies.csv").write_bytes("".join(line + "\r\n" for line in movies).encode())
    return folder


def test_ml_1m(tmp_path):
    tables = MovieLens1M().read(write_1m(tmp_path))
    assert tables.interactions.rows() == LOG
    assert tables.items.rows() == [
        ("2", "City of Lost Children: Cité, La (1995)", "Adventure, Sci-Fi"),
        ("31", "A", "Drama"),
    ]


def test_ml_32m(tmp_path):
    tables = MovieLens32M().read(write_32m(tmp_path))
    assert tables.interactions.rows() == LOG
    assert tables.items.rows() == [("2", "American President, The (1995)", "Comedy, Drama"), ("31", "A", None)]


@pytest.mark.parametrize(
    ("source", "write", "name"),
    [
        (MovieLens1M(), write_1m, "ratings.dat"),
        (MovieLens1M(), write_1m, "movies.dat"),
        (MovieLens32M(), write_32m, "ratings.csv"),
        (MovieLens32M(), write_32m, "movies.csv"),
    ],
)
def test_truncated_files(tmp_path, source, write, name):
    path = write(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=f"{name} is truncated: its last line has no end"):
        source.read(tmp_path)


@pytest.mark.parametrize(
    ("source", "write", "name", "line"),
    [
        (MovieLens1M(), write_1m, "ratings.dat", "5::31::4::soon\n"),
        (MovieLens1M(), write_1m, "ratings.dat", "5::31::4\n"),
        (MovieLens32M(), write_32m, "ratings.csv", "5,31,4.0,soon\n"),
        (MovieLens32M(), write_32m, "ratings.csv", "5,31\n"),
    ],
)
def test_malformed_ratings(tmp_path, source, write, name, line):
    with (write(tmp_path) / name).open("a") as stream:
        stream.write(line)
    with pytest.raises(InputError, match=rf"{name}.*(could not be read as|values are missing).*Fetch the file again"):
        source.read(tmp_path)


def test_malformed_movies(tmp_path):
    with (write_1m(tmp_path) / "movies.dat").open("a") as stream:
        stream.write("32::No genres\n")
    with pytest.raises(InputError, match=r"movies\.dat line 3: expected MovieID::Title::Genres"):
        MovieLens1M().read(tmp_path)


def test_csv_of_another_schema(tmp_path):
    write_32m(tmp_path)
    (tmp_path / "movies.csv").write_text("id,name\n1,A\n")
    with pytest.raises(InputError, match=r"movies\.csv could not be read as movieId,title,genres"):
        MovieLens32M().read(tmp_path)


def test_downloads_are_pinned():
    for source, archive in ((MovieLens1M(), "ml-1m"), (MovieLens32M(), "ml-32m")):
        for file in source.raw_files():
            assert file.url == f"https://files.grouplens.org/datasets/movielens/{archive}.zip"
            assert file.member == f"{archive}/{file.name}"
            assert len(file.sha256) == 64


def test_real_small_release(shared_data):
    tables = MovieLens32M().read(shared_data / "movielens" / "ml-latest-small")
    log = tables.interactions
    assert (log["user_key"].n_unique(), log["item_key"].n_unique(), len(log)) == (610, 9_724, 100_836)
    assert log.row(0) == ("1", "1", 964982703)
    assert tables.items.row(10) == ("11", "American President, The (1995)", "Comedy, Drama, Romance")


def test_real_1m_movies(shared_data, tmp_path):
    write_1m(tmp_path)
    (tmp_path / "movies.dat").write_bytes((shared_data / "movielens" / "ml-1m" / "movies.dat").read_bytes())
    items = MovieLens1M().read(tmp_path).items
    assert len(items) == 3_883
    assert items.filter(items["item_key"] == "73")["title"][0] == "Misérables, Les (1995)"
