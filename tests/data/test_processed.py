import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from data.processed import (
    DatasetConfig,
    PreparedDataset,
    RecDataset,
    TablesConfig,
    build_source,
    find_prepared,
    load_dataset,
)
from data.schemas import InputError
from data.sources.tables import Tables

REPOSITORY = Path(__file__).resolve().parents[2]
LOG = [(user, item, time) for user in "uvw" for time, item in enumerate("abcd")]


@pytest.fixture
def raw(tmp_path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    write_log(folder, LOG)
    pl.DataFrame({"item_id": list("dcba"), "name": ["Dee", None, "Bee", "Ay"]}).write_csv(folder / "items.csv")
    return folder


def write_log(folder: Path, log: list[tuple[str, str, int]]) -> None:
    pl.DataFrame(log, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(folder / "log.csv")


def config(raw: Path, **changes) -> DatasetConfig:
    tables = TablesConfig(interactions="log.csv", items="items.csv", title_column="name", name="mine")
    options = {"tables": tables, "min_interactions": 3, "root": str(raw.parent / "dataset"), "raw_dir": str(raw)}
    return DatasetConfig(dataset=RecDataset.TABLES, **(options | changes))


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Folders that were read from so far."""
    folders: list[Path] = []
    original = Tables.read

    def read(self, raw_dir):
        folders.append(raw_dir)
        return original(self, raw_dir)

    monkeypatch.setattr(Tables, "read", read)
    return folders


def test_a_prepared_dataset_has_all_its_parts(raw):
    dataset = load_dataset(config(raw))
    assert dataset.folder == raw.parent / "dataset" / "prepared" / "mine"
    assert dataset.name == "mine"
    assert dataset.catalogue.item_keys == ["d", "c", "b", "a"]
    assert dataset.catalogue.titles == ["Dee", "", "Bee", "Ay"]
    assert dataset.catalogue.cold is None
    assert dataset.histories.item_ids.tolist() == [3, 2, 1, 0] * 3
    assert dataset.split("leave_one_out").test.ends.tolist() == [3, 3, 3]
    assert dataset.split("liger").name == "liger"
    assert dataset.text_template == ("{title}.",)
    texts = dataset.item_texts(dataset.text_template)
    assert texts[0] == "Dee."
    assert texts[1]
    assert "None" not in texts[1]
    written = sorted(str(path.relative_to(dataset.folder)) for path in dataset.folder.rglob("*") if path.is_file())
    assert written == [
        "catalogue.safetensors",
        "histories.safetensors",
        "interactions.parquet",
        "items.parquet",
        "manifest.json",
        "splits/leave_one_out.safetensors",
        "splits/liger.safetensors",
        "users.parquet",
    ]


def test_the_second_load_reuses_the_first(raw, reads):
    first = load_dataset(config(raw))
    second = load_dataset(config(raw))
    assert reads == [raw]
    assert second.manifest == first.manifest


@pytest.mark.parametrize(
    "change",
    [
        {"min_interactions": 2},
        {"tables": TablesConfig(interactions="log.csv", items="items.csv", name="mine")},
        {"tables": TablesConfig(interactions="log.csv", items="items.csv", name="mine", time_column=None)},
    ],
)
def test_another_request_prepares_again(raw, reads, change):
    load_dataset(config(raw))
    load_dataset(config(raw, **change))
    assert len(reads) == 2


@pytest.mark.parametrize("change", [{"split": "liger"}, {"seed": 3}])
def test_what_does_not_concern_the_content_does_not(raw, reads, change):
    load_dataset(config(raw))
    load_dataset(config(raw, **change))
    assert len(reads) == 1


def test_changed_raw_files_prepare_again(raw, reads):
    before = load_dataset(config(raw))
    log = raw / "log.csv"
    content = log.read_text()
    log.write_text(content.replace("u,a,0\nu,b,1", "u,b,0\nu,a,1"))  # the same size
    os.utime(log, ns=(1, 1))
    after = load_dataset(config(raw))
    assert len(reads) == 2
    assert after.manifest_hash != before.manifest_hash
    write_log(raw, [*LOG, ("x", "a", 1)])
    load_dataset(config(raw))
    assert len(reads) == 3


def test_touched_raw_files_do_not(raw, reads):
    load_dataset(config(raw))
    os.utime(raw / "log.csv", ns=(1, 1))
    load_dataset(config(raw))
    assert len(reads) == 1


def test_the_prepared_folder_suffices_without_raw_files(raw, reads):
    load_dataset(config(raw))
    (raw / "log.csv").unlink()
    assert load_dataset(config(raw)).histories.num_users == 3
    assert len(reads) == 1
    with pytest.raises(InputError, match=r"mine: raw files are missing: log\.csv"):
        load_dataset(config(raw, min_interactions=1))
    assert load_dataset(config(raw)).histories.num_users == 3


@pytest.mark.parametrize("name", ["manifest.json", "histories.safetensors", "splits/liger.safetensors"])
def test_an_incomplete_folder_is_prepared_again(raw, reads, name):
    dataset = load_dataset(config(raw))
    (dataset.folder / name).unlink()
    assert load_dataset(config(raw)).histories.num_users == 3
    assert len(reads) == 2


def test_a_truncated_part_is_reported(raw):
    dataset = load_dataset(config(raw))
    path = dataset.folder / "histories.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"histories\.safetensors is not a whole safetensors file"):
        load_dataset(config(raw)).histories.num_users  # noqa: B018


def test_a_folder_replaced_while_in_use_is_noticed(raw):
    dataset = load_dataset(config(raw))
    write_log(raw, [(user, item, time) for user in "uvw" for time, item in enumerate("dcba")])
    load_dataset(config(raw))
    with pytest.raises(InputError, match="was prepared anew with other content while it was in use"):
        dataset.split("leave_one_out")


def test_the_hash_is_of_the_content_alone(raw, tmp_path):
    first = load_dataset(config(raw))
    shutil.copytree(raw, tmp_path / "copy")
    second = load_dataset(config(tmp_path / "copy", root=str(tmp_path / "elsewhere")))
    assert first.manifest_hash == second.manifest_hash
    assert first.item_table_hash == second.item_table_hash
    assert len(first.manifest_hash) == 64


def test_a_newer_format_is_refused_and_prepared_again(raw):
    dataset = load_dataset(config(raw))
    manifest = json.loads((dataset.folder / "manifest.json").read_text())
    (dataset.folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(InputError, match="has format version 99, this library reads version 1"):
        PreparedDataset(dataset.folder)
    assert load_dataset(config(raw)).manifest["format_version"] == 1


def test_a_folder_of_another_kind(tmp_path):
    with pytest.raises(InputError, match=r"is not a prepared dataset: manifest\.json cannot be read"):
        PreparedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "tokenizer"}')
    with pytest.raises(InputError, match=r"is not a prepared dataset: manifest\.json is of another kind"):
        PreparedDataset(tmp_path)


def test_two_processes_at_once(raw):
    script = f"""
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
from data.processed import DatasetConfig, RecDataset, TablesConfig, load_dataset
tables = TablesConfig(interactions="log.csv", items="items.csv", title_column="name", name="mine")
root = {str(raw.parent / "dataset")!r}
dataset = load_dataset(DatasetConfig(dataset=RecDataset.TABLES, tables=tables, root=root, raw_dir={str(raw)!r}))
print(dataset.histories.num_users, len(dataset.split("liger").test), dataset.manifest_hash)
"""
    write_log(raw, [(f"user {u}", item, time) for u in range(500) for time, item in enumerate("abcdabcd")])
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert outputs[0][0].startswith("500 500 "), outputs
    assert outputs[0][0] == outputs[1][0], outputs
    prepared = raw.parent / "dataset" / "prepared"
    assert sorted(path.name for path in prepared.iterdir()) == [".mine.lock", "mine"]


def test_reading_needs_no_polars(raw):
    load_dataset(config(raw))
    script = f"""
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
sys.modules["polars"] = sys.modules["pandas"] = None
from data.processed import DatasetConfig, RecDataset, TablesConfig, build_source, load_dataset
tables = TablesConfig(interactions="log.csv", items="items.csv", title_column="name", name="mine")
options = dict(min_interactions=3, root={str(raw.parent / "dataset")!r})
dataset = load_dataset(DatasetConfig(dataset=RecDataset.TABLES, tables=tables, **options))
dataset.split("liger"), dataset.manifest_hash
categories = {{RecDataset.AMAZON: "beauty", RecDataset.AMAZON_REVIEWS: "Beauty"}}
names = [build_source(DatasetConfig(dataset=member, category=categories.get(member))).name
         for member in RecDataset if member is not RecDataset.TABLES]
print(dataset.histories.num_users, dataset.catalogue.display_name(0), *names)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=raw.parent)
    assert done.stdout == "3 Dee amazon-beauty amazon-reviews-beauty ml-1m ml-32m steam demo\n", done.stderr


def test_unknown_names_list_the_valid_ones(raw):
    with pytest.raises(InputError, match=r"unknown dataset 'amazon'; valid datasets: RecDataset\.AMAZON, .*DEMO"):
        DatasetConfig(dataset="amazon")
    with pytest.raises(InputError, match=r"unknown split 'random'; valid splits: leave_one_out, liger"):
        config(raw, split="random")
    with pytest.raises(InputError, match=r"unknown split 'random'; valid splits: leave_one_out, liger"):
        load_dataset(config(raw)).split("random")
    with pytest.raises(InputError, match=r"unknown category 'books' of AMAZON; valid categories: beauty, sports, toys"):
        build_source(DatasetConfig(dataset=RecDataset.AMAZON, category="books"))


def test_contradictions_are_refused(raw):
    with pytest.raises(InputError, match="ML_1M has no categories, got category 'beauty'"):
        DatasetConfig(dataset=RecDataset.ML_1M, category="beauty")
    with pytest.raises(InputError, match=r"DatasetConfig\.tables belongs to RecDataset\.TABLES"):
        DatasetConfig(dataset=RecDataset.TABLES)
    with pytest.raises(InputError, match="min_interactions must be 0 or more, got -1"):
        config(raw, min_interactions=-1)


def count_cold_users(dataset: PreparedDataset, name: str) -> dict[str, int]:
    """The definition, written out: users whose target no training range contains."""
    split, offsets = dataset.split(name), dataset.histories.offsets.tolist()
    items = dataset.histories.item_ids.tolist()

    def ranges(role: str):
        columns = split.role(role)
        return zip(columns.rows.tolist(), columns.begins.tolist(), columns.ends.tolist(), strict=True)

    warm = {
        item for row, begin, end in ranges("train") for item in items[offsets[row] + begin : offsets[row] + end + 1]
    }
    return {
        role: sum(items[offsets[row] + end] not in warm for row, _, end in ranges(role)) for role in ("valid", "test")
    }


@pytest.fixture(scope="module")
def beauty(shared_data, tmp_path_factory) -> PreparedDataset:
    root = tmp_path_factory.mktemp("beauty")
    raw_dir = str(shared_data / "amazon_p5")
    return load_dataset(DatasetConfig(dataset=RecDataset.AMAZON, category="beauty", root=str(root), raw_dir=raw_dir))


def test_beauty_is_exact(beauty):
    counts = beauty.manifest["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (22_363, 12_101, 198_502)
    assert count_cold_users(beauty, "leave_one_out") == {"valid": 51, "test": 138}
    assert count_cold_users(beauty, "liger") == {"valid": 68, "test": 162}
    lengths = beauty.histories.offsets.diff()
    assert (int(lengths.min()), int(lengths.max())) == (5, 204)
    assert len(torch.unique(beauty.histories.user_hashes)) == 22_363


def test_every_beauty_item_has_a_text(beauty):
    texts = beauty.item_texts(beauty.text_template)
    assert len(texts) == 12_101
    assert all(text.strip() for text in texts)
    assert texts[0] == (
        "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce. Brand: OPI. "
        "Category: Beauty > Makeup > Nails > Nail Polish."
    )
    assert len(set(texts)) / len(texts) == pytest.approx(0.998, abs=0.001)


def test_sports_without_titles_prepares(shared_data, tmp_path):
    raw_dir = str(shared_data / "amazon_p5" / "sports")
    dataset = load_dataset(
        DatasetConfig(dataset=RecDataset.AMAZON, category="sports", root=str(tmp_path), raw_dir=raw_dir)
    )
    counts = dataset.manifest["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (35_598, 18_357, 296_337)
    assert set(dataset.catalogue.titles) == {""}
    assert dataset.item_texts(dataset.text_template)[0] == (
        "Brand: Ghost. Category: Sports & Outdoors > Hunting & Fishing > Hunting > Gun Maintenance > "
        "Gunsmithing Tools. ghost armorers tool 332 punch hunting fishing"
    )


def test_published_five_core_reviews_are_a_fixpoint(shared_data, tmp_path):
    dataset = load_dataset(
        DatasetConfig(
            dataset=RecDataset.AMAZON_REVIEWS,
            category="Musical_Instruments",
            root=str(tmp_path),
            raw_dir=str(shared_data / "amazon_2014_raw"),
        )
    )
    counts = dataset.manifest["counts"]
    assert (counts["users"], counts["items"], counts["interactions"]) == (1_429, 900, 10_261)
    assert counts["filtered_rows"] == counts["repeated_rows"] == 0
    falls = torch.nonzero(dataset.histories.timestamps.diff() < 0).flatten() + 1
    assert torch.isin(falls, dataset.histories.offsets).all()


def test_movielens_is_filtered_to_the_fixpoint(shared_data, tmp_path):
    raw_dir = str(shared_data / "movielens" / "ml-latest-small")
    dataset = load_dataset(DatasetConfig(dataset=RecDataset.ML_32M, root=str(tmp_path), raw_dir=raw_dir))
    assert dataset.name == "ml-32m"
    assert int(torch.bincount(dataset.histories.item_ids).min()) == 5
    assert int(dataset.histories.offsets.diff().min()) >= 5
    counts = dataset.manifest["counts"]
    assert counts["interactions"] + counts["filtered_rows"] == 100_836
    unfiltered = DatasetConfig(dataset=RecDataset.ML_32M, root=str(tmp_path), raw_dir=raw_dir, min_interactions=1)
    assert load_dataset(unfiltered).manifest["counts"]["items"] == 9_724


def test_a_raw_dir_that_holds_nothing_is_told(raw, tmp_path, caplog):
    """What is prepared is used, as on a machine without raw files, but a mistyped folder must not go unnoticed."""
    before = load_dataset(config(raw)).manifest_hash
    assert "raw_dir:" not in caplog.text
    assert load_dataset(config(raw, raw_dir=str(tmp_path / "mistyped"))).manifest_hash == before
    assert re.search(r"raw_dir: .*mistyped has no raw files of mine; using .*prepared/mine as it was", caplog.text)


def test_find_prepared_never_prepares(raw, reads):
    assert find_prepared(config(raw)) is None
    assert not (raw.parent / "dataset").exists()
    before = load_dataset(config(raw)).manifest_hash
    write_log(raw, LOG[:-1])
    assert find_prepared(config(raw)).manifest_hash == before
    assert len(reads) == 1
    (raw.parent / "dataset" / "prepared" / "mine" / "manifest.json").write_text("{}")
    assert find_prepared(config(raw)) is None
