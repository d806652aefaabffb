import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from data.files import exclusive, replaced_folder
from data.prepare import PrepareSettings, build_splits, k_core, prepare
from data.processed import PreparedDataset
from data.schemas import Histories, InputError, user_hashes
from data.sources.base import SourceTables

REPOSITORY = Path(__file__).resolve().parents[2]


def tables(log: list[tuple[str, str, int]], items: list[str] | None = None, num_malformed: int = 0) -> SourceTables:
    interactions = pl.DataFrame(log, schema=["user_key", "item_key", "timestamp"], orient="row")
    keys = items if items is not None else interactions["item_key"].unique(maintain_order=True).to_list()
    nothing = pl.Series([None] * len(keys), dtype=pl.String)
    return SourceTables(
        pl.DataFrame({"item_key": keys, "title": nothing, "category": nothing}), interactions, num_malformed
    )


def settings(min_interactions: int = 0) -> PrepareSettings:
    return PrepareSettings(
        name="toy", min_interactions=min_interactions, text_template=("{title}.",), request={"a": 1}, raw_files=[]
    )


def prepared(folder: Path, source_tables: SourceTables, min_interactions: int = 0) -> PreparedDataset:
    target = folder / "toy"
    with exclusive(target):
        prepare(source_tables, settings(min_interactions), target)
    return PreparedDataset(target)


def histories_by_key(dataset: PreparedDataset) -> dict[str, list[str]]:
    keys, offsets = dataset.catalogue.item_keys, dataset.histories.offsets.tolist()
    items = dataset.histories.item_ids.tolist()
    users = pl.read_parquet(dataset.folder / "users.parquet")["user_key"].to_list()
    return {user: [keys[item] for item in items[offsets[row] : offsets[row + 1]]] for row, user in enumerate(users)}


def of_lengths(*lengths: int) -> Histories:
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    total = int(offsets[-1])
    times = torch.arange(total, dtype=torch.int64)
    return Histories(
        offsets, torch.zeros(total, dtype=torch.int32), times, torch.zeros(len(lengths), dtype=torch.int64)
    )


def triples(ranges) -> list[tuple[int, int, int]]:
    return list(zip(ranges.rows.tolist(), ranges.begins.tolist(), ranges.ends.tolist(), strict=True))


def test_k_core_runs_to_the_fixpoint():
    # Item 2 has one interaction; without it user 1 has one; without user 1 item 1 has one; and so on: a chain.
    users = np.array([0, 0, 1, 1, 2, 2, 3, 3, 2])
    items = np.array([0, 1, 1, 2, 3, 4, 3, 4, 0])
    assert k_core(users, items, 2).tolist() == [False, False, False, False, True, True, True, True, False]
    assert k_core(users, items, 0).all()
    assert not k_core(users, items, 3).any()
    assert k_core(users[:0], items[:0], 5).tolist() == []


def test_time_order_is_stable(tmp_path):
    log = [("u", "c", 5), ("v", "b", 1), ("u", "a", 5), ("u", "b", 3), ("v", "a", 1), ("u", "d", 5), ("v", "c", 0)]
    dataset = prepared(tmp_path, tables(log, items=["a", "b", "c", "d"]))
    assert histories_by_key(dataset) == {"u": ["b", "c", "a", "d"], "v": ["c", "b", "a"]}
    assert dataset.histories.timestamps.tolist() == [3, 5, 5, 5, 0, 1, 1]
    assert dataset.histories.offsets.dtype == dataset.histories.item_ids.dtype == torch.int32


def test_time_order_is_stable_among_many_ties(tmp_path):
    generator = np.random.default_rng(0)
    columns = (generator.integers(0, high, 5_000).tolist() for high in (20, 400, 4))
    log = [(f"u{user}", f"i{item}", time) for user, item, time in zip(*columns, strict=True)]
    wanted: dict[str, list[str]] = {}
    for user, item, _ in sorted(dict.fromkeys(log), key=lambda row: row[2]):  # Python's sort is stable
        wanted.setdefault(user, []).append(item)
    assert histories_by_key(prepared(tmp_path, tables(log))) == wanted


def test_exact_repeats_are_dropped_and_later_repeats_stay(tmp_path):
    log = [("u", "a", 1), ("u", "b", 1), ("u", "a", 1), ("u", "a", 2), ("v", "a", 1), ("u", "b", 1), ("u", "b", 3)]
    dataset = prepared(tmp_path, tables(log, num_malformed=3))
    assert histories_by_key(dataset) == {"u": ["a", "b", "a", "b"], "v": ["a"]}
    assert dataset.manifest["counts"] == {
        "repeated_rows": 2,
        "filtered_rows": 0,
        "malformed_lines": 3,
        "users": 2,
        "items": 2,
        "interactions": 5,
        "users_with_fewer_than_3": 1,
    }


def test_filtering_leaves_contiguous_ids_in_the_order_of_the_item_table(tmp_path):
    log = [(user, item, time) for time, item in enumerate("zyx") for user in ("u", "v", "w")] + [("rare", "q", 0)]
    dataset = prepared(tmp_path, tables(log, items=["q", "never", "x", "y", "z"]), min_interactions=3)
    assert dataset.catalogue.item_keys == ["x", "y", "z"]
    assert dataset.histories.item_ids.tolist() == [2, 1, 0] * 3
    assert pl.read_parquet(dataset.folder / "items.parquet")["item_id"].to_list() == [0, 1, 2]
    assert pl.read_parquet(dataset.folder / "interactions.parquet").row(0) == (0, 2, 0)
    assert dataset.manifest["counts"]["filtered_rows"] == 1


@pytest.mark.parametrize(("min_interactions", "keys"), [(0, ["never", "a"]), (1, ["a"])])
def test_untouched_items_stay_only_without_filter(tmp_path, min_interactions, keys):
    log = [("u", "a", 1), ("u", "a", 2), ("u", "a", 3)]
    assert prepared(tmp_path, tables(log, ["never", "a"]), min_interactions).catalogue.item_keys == keys


def test_splits_by_hand():
    splits = build_splits(of_lengths(1, 2, 3, 5, 25))
    leave_one_out, liger = splits["leave_one_out"], splits["liger"]
    assert triples(leave_one_out.train) == [(0, 0, 0), (1, 0, 1), (2, 0, 0), (3, 0, 2), (4, 0, 22)]
    assert triples(leave_one_out.valid) == [(2, 0, 1), (3, 0, 3), (4, 0, 23)]
    assert triples(leave_one_out.test) == [(2, 0, 2), (3, 0, 4), (4, 0, 24)]
    assert triples(liger.train) == [(0, 0, 0), (1, 0, 1), (2, 0, 0), (3, 0, 2), (4, 5, 22)]
    assert triples(liger.valid) == [(2, 0, 1), (3, 0, 3), (4, 5, 23)]
    assert triples(liger.test) == [(2, 0, 2), (3, 0, 4), (4, 5, 24)]
    assert leave_one_out.train.rows.dtype == torch.int32


def test_training_ranges_never_contain_the_targets_of_their_user():
    histories = of_lengths(*range(1, 60))
    for split in build_splits(histories).values():
        last_seen = dict(zip(split.train.rows.tolist(), split.train.ends.tolist(), strict=True))
        for row, begin, end in triples(split.valid) + triples(split.test):
            assert last_seen[row] < end
            assert begin < end


def test_user_hashes_are_what_they_always_were():
    hashes = user_hashes(["alice", "A1YJEY40UW4SE", ""])
    assert hashes.tolist() == [-8513398901633652147, 6904367086342348087, -5426141060434712860]
    assert hashes.dtype == np.int64


def test_short_histories_warn(tmp_path, caplog):
    prepared(tmp_path, tables([("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("v", "a", 1)]))
    assert "toy: 1 of 2 users have fewer than 3 interactions; they only train" in caplog.text


def test_no_history_long_enough(tmp_path):
    with pytest.raises(InputError, match="toy: none of the 2 users has 3 interactions"):
        prepared(tmp_path, tables([("u", "a", 1), ("u", "b", 2), ("v", "a", 1)]))


def test_unknown_items_are_named(tmp_path):
    log = [("u", "a", 1), ("u", "x", 2), ("u", "x", 3), ("v", "y", 1)]
    with pytest.raises(
        InputError, match=r"3 interactions have items that the item table lacks \(2 items\): 'x', 'y'\."
    ):
        prepared(tmp_path, tables(log, items=["a"]))


def test_repeated_item_keys_are_named(tmp_path):
    with pytest.raises(InputError, match=r"4 rows but 3 distinct keys; repeated: 'a'"):
        prepared(tmp_path, tables([("u", "a", 1)], items=["a", "b", "a", "c"]))


def test_nothing_left_after_filtering(tmp_path):
    with pytest.raises(InputError, match=r"no interaction is left: 2 were read.*Lower DatasetConfig\.min_interactions"):
        prepared(tmp_path, tables([("u", "a", 1), ("u", "b", 2)]), min_interactions=5)


def test_a_failed_preparation_leaves_the_previous_one(tmp_path):
    before = prepared(tmp_path, tables([("u", "a", 1), ("u", "b", 2), ("u", "c", 3)]))
    with pytest.raises(InputError):
        prepared(tmp_path, tables([("u", "a", 1)]))
    assert PreparedDataset(before.folder).manifest == before.manifest
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name] == []


def test_leftovers_of_killed_runs_are_cleaned_up(tmp_path):
    (tmp_path / ".toy.tmp-killed").mkdir()
    (tmp_path / ".toy.tmp-killed" / "half.parquet").touch()
    (tmp_path / ".toy.old-1").mkdir()
    (tmp_path / ".toy-of-another.tmp-1").mkdir()
    prepared(tmp_path, tables([("u", "a", 1), ("u", "b", 2), ("u", "c", 3)]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".toy-of-another.tmp-1", ".toy.lock", "toy"]


def test_a_folder_retired_just_before_a_kill_comes_back(tmp_path):
    retired = tmp_path / ".toy.old-1"
    retired.mkdir()
    (retired / "manifest.json").touch()
    with exclusive(tmp_path / "toy"):
        assert [path.name for path in (tmp_path / "toy").iterdir()] == ["manifest.json"]
    assert not retired.exists()


def test_prepared_files_are_readable_by_others(tmp_path):
    dataset = prepared(tmp_path, tables([("u", "a", 1), ("u", "b", 2), ("u", "c", 3)]))
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.stat().st_mode & 0o777 for path in dataset.folder.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*choose another place; what was there before is untouched"):
        prepared(tmp_path / "file", tables([("u", "a", 1)]))


def run_limited(script: str, folder: Path, **options) -> subprocess.CompletedProcess:
    """Runs the script in a fresh process; it sees `folder` and the helpers of this module."""
    prelude = f"""
        import sys; sys.path.insert(0, {str(REPOSITORY)!r})
        from pathlib import Path
        from tests.data.test_prepare import prepared, tables
        from data.schemas import InputError
        folder = Path({str(folder)!r})
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def test_a_full_disk_leaves_the_previous_dataset(tmp_path):
    before = prepared(tmp_path, tables([("u", "a", 1), ("u", "b", 2), ("u", "c", 3)]))
    # No file may grow beyond 20,000 bytes: writing fails in the middle, as on a full disk.
    done = run_limited(
        """
        import resource
        source = tables([(f"user {u}", f"item {i}", i) for u in range(100) for i in range(100)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            prepared(folder, source)
        except InputError as error:
            print(error)
        """,
        tmp_path,
    )
    assert f"cannot write {before.folder}: " in done.stdout, done.stderr
    assert "Free space there" in done.stdout
    assert PreparedDataset(before.folder).histories.num_users == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".toy.lock", "toy"]


def test_a_read_only_folder_is_reported(tmp_path):
    script = """
        import os
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere
        try:
            prepared(folder, tables([("u", "a", 1), ("u", "b", 2), ("u", "c", 3)]))
        except InputError as error:
            print(error)
    """
    target = tmp_path / "locked"
    target.mkdir()
    target.chmod(0o555)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o755)
    done = run_limited(script, target)
    assert f"cannot write {target / 'toy'}: " in done.stdout, done.stderr
    assert "permission denied" in done.stdout
    assert list(target.iterdir()) == []


def test_the_block_of_a_replaced_folder_may_fail(tmp_path):
    def interrupted():
        with replaced_folder(tmp_path / "toy") as temporary:
            (temporary / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
