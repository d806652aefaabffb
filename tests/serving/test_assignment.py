"""Codes of a feature file in shards: what is written, and what kills, damage and other requests do to it."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import data.files
from data.feature_files import open_features
from data.schemas import Catalogue, InputError
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from serving import assignment, processes
from serving.assignment import assign
from serving.processes import LostProcessError
from tests.conftest import REPOSITORY
from tests.serving import assign_process

WIDTH, NUM_ROWS, ROWS_PER_SHARD, NUM_SHARDS = 6, 2950, 200, 15


def make_tokenizer(seed=0):
    torch.manual_seed(seed)
    rqvae = RqVae(RqVaeConfig(input_dim=WIDTH, embed_dim=4, hidden_dims=(8,), codebook_sizes=(7, 5)))
    features = torch.randn(20, WIDTH)
    rqvae.initialize_codebooks_(features)
    keys = [f"known {item}" for item in range(20)]
    catalogue = Catalogue(keys, [""] * 20, [""] * 20)
    return SemanticIdTokenizer.fit(rqvae, features, catalogue, feature_description={}, dataset_manifest_hash="")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write_features(path, *, num_rows=NUM_ROWS, keys=True, seed=0):
    rows = np.random.default_rng(seed).standard_normal((num_rows, WIDTH)).astype(np.float16)
    np.save(path, rows)
    if keys:
        path.with_suffix(".keys.txt").write_text("".join(f"item {row}\n" for row in range(num_rows)))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("source") / "features.npy")


@pytest.fixture(scope="module")
def artifact(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(tokenizer, source, tmp_path_factory):
    """The content of an uninterrupted run, of one process."""
    folder = tmp_path_factory.mktemp("expected") / "ids"
    run(tokenizer, source, folder)
    return contents(folder)


def run(tokenizer, source, folder, **options):
    options = {"rows_per_shard": ROWS_PER_SHARD, **options}
    return assign(tokenizer, open_features(source), folder, **options)


def contents(folder):
    """Every file of a folder, locks and temporary files included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


# What is written


def test_shards_hold_keys_and_the_codes_that_the_tokenizer_gives(tokenizer, source, tmp_path):
    done = run(tokenizer, source, tmp_path / "ids")
    assert done[:3] == (NUM_ROWS, NUM_SHARDS, NUM_ROWS)
    names = [f"ids-{shard:05}-of-00015.parquet" for shard in range(NUM_SHARDS)]
    assert sorted(path.name for path in (tmp_path / "ids").iterdir()) == [*names, "manifest.json"]
    table = pl.concat([pl.read_parquet(tmp_path / "ids" / name) for name in names])
    assert table.schema == {"item_key": pl.String, "code_0": pl.Int32, "code_1": pl.Int32}
    assert table["item_key"].to_list() == [f"item {row}" for row in range(NUM_ROWS)]
    codes = tokenizer.encode(np.load(source))
    assert len(codes.unique(dim=0)) > 10
    np.testing.assert_array_equal(table.drop("item_key").to_numpy(), codes.numpy())


def test_the_manifest_says_what_the_ids_are_of(tokenizer, source, tmp_path):
    run(tokenizer, source, tmp_path / "ids")
    manifest = manifest_of(tmp_path / "ids")
    assert manifest["complete"] is True
    assert manifest["columns"] == ["item_key", "code_0", "code_1"]
    assert manifest["request"]["tokenizer"] == tokenizer.content_hash
    assert manifest["request"]["features"] == open_features(source).content_sha256()
    assert manifest["request"]["rows_per_shard"] == ROWS_PER_SHARD
    assert [shard["num_rows"] for shard in manifest["shards"]] == [200] * 14 + [150]
    for shard in manifest["shards"]:
        assert hashlib.sha256((tmp_path / "ids" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_without_keys_rows_are_numbered(tokenizer, tmp_path):
    source = write_features(tmp_path / "features.npy", num_rows=7, keys=False)
    run(tokenizer, source, tmp_path / "ids", rows_per_shard=3)
    assert pl.read_parquet(tmp_path / "ids" / "ids-00001-of-00003.parquet")["row"].to_list() == [3, 4, 5]
    table = pl.read_parquet(tmp_path / "ids" / "ids-00002-of-00003.parquet")
    assert table.schema == {"row": pl.Int64, "code_0": pl.Int32, "code_1": pl.Int32}
    assert table["row"].to_list() == [6]


def test_codes_do_not_depend_on_layout_or_shards(tokenizer, source, tmp_path):
    rows = np.load(source)
    table = pl.DataFrame({"item_key": [f"item {row}" for row in range(NUM_ROWS)], "embedding": rows.tolist()})
    (tmp_path / "parts").mkdir()
    table[:1111].write_parquet(tmp_path / "parts" / "a.parquet", row_group_size=100)
    table[1111:].write_parquet(tmp_path / "parts" / "b.parquet")
    run(tokenizer, tmp_path / "parts", tmp_path / "parquet", rows_per_shard=777)
    run(tokenizer, source, tmp_path / "npy")
    assert pl.read_parquet(tmp_path / "parquet" / "*.parquet").equals(pl.read_parquet(tmp_path / "npy" / "*.parquet"))


@pytest.mark.parametrize(("rows_per_shard", "num_shards"), [(1, 5), (2, 3), (5, 1), (100, 1)])
def test_shard_sizes(tokenizer, tmp_path, rows_per_shard, num_shards):
    source = write_features(tmp_path / "features.npy", num_rows=5)
    assert run(tokenizer, source, tmp_path / "ids", rows_per_shard=rows_per_shard).num_shards == num_shards
    assert pl.read_parquet(tmp_path / "ids" / "*.parquet")["item_key"].to_list() == [f"item {row}" for row in range(5)]


# Kills and damage


def num_shards_of(folder):
    return len(list(folder.glob("ids-*.parquet")))


def killed(process, folder, num_shards, delay):
    """Kill -9 some time after so many shards were written; whether that was before the end."""
    while process.is_alive() and num_shards_of(folder) < num_shards:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_at_random_moments_the_result_is_that_of_one_run(artifact, source, expected, tmp_path):
    folder, moments = tmp_path / "ids", random.Random(1)
    kills = sum(
        killed(assign_process.start(artifact, source, folder), folder, num_shards, moments.random() / 100)
        for num_shards in (0, 1, 4, 9, 12)
    )
    last = assign_process.start(artifact, source, folder)
    last.join()
    assert last.exitcode == 0
    assert kills >= 2
    assert contents(folder) == expected


def test_whole_shards_are_not_computed_again_and_damaged_ones_are(tokenizer, source, expected, tmp_path, caplog):
    folder = tmp_path / "ids"
    run(tokenizer, source, folder)
    first, second, third, *others = sorted(folder.glob("ids-*.parquet"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-5])
    pl.read_parquet(third)[:-1].write_parquet(third)
    before = {path: path.stat().st_mtime_ns for path in others}
    assert run(tokenizer, source, folder).num_assigned == 3 * ROWS_PER_SHARD
    assert {path: path.stat().st_mtime_ns for path in others} == before
    assert contents(folder) == expected
    assert f"{second} is damaged; its codes are computed again" in caplog.text
    assert caplog.text.count("is damaged") == 2
    assert run(tokenizer, source, folder).num_assigned == 0
    assert contents(folder) == expected


@pytest.mark.parametrize("num_processes", [2, 3, 20])
def test_several_processes_write_what_one_does(tokenizer, source, expected, tmp_path, num_processes):
    done = []

    def one(rank):
        share = {"process_index": rank, "num_processes": num_processes}
        done.append(run(tokenizer, source, tmp_path / "ids", **share).num_assigned)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sum(done) == NUM_ROWS
    assert len(done) == num_processes
    assert contents(tmp_path / "ids") == expected


def test_a_dead_process_is_noticed_and_another_number_of_processes_goes_on(tokenizer, source, expected, tmp_path):
    folder, failures = tmp_path / "ids", []

    def first():
        try:
            run(tokenizer, source, folder, num_processes=2)
        except LostProcessError as error:
            failures.append(str(error))

    thread = threading.Thread(target=first)
    shards = assignment._Shards(tokenizer, open_features(source), folder, ROWS_PER_SHARD)
    with shards.locked(1):  # a second process, which writes one of its shards and dies
        thread.start()
        shards.write(1)
        while num_shards_of(folder) < 9:
            time.sleep(0.001)
        time.sleep(0.3)
        assert thread.is_alive()
    thread.join(timeout=20)
    assert failures == ["process 1 has ended early. Run the same again to go on."]
    assert manifest_of(folder)["complete"] is False
    assert run(tokenizer, source, folder).num_assigned == 6 * ROWS_PER_SHARD
    assert contents(folder) == expected


def test_a_process_that_never_begins_is_named(tokenizer, source, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "START_PATIENCE", 0.1)
    with pytest.raises(LostProcessError, match=r"process 1 has not begun after 0 s\. Run the same again to go on"):
        run(tokenizer, source, tmp_path / "ids", num_processes=2)
    assert manifest_of(tmp_path / "ids")["complete"] is False


def test_two_runs_do_not_write_one_folder(tokenizer, source, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.parts.LOCK_PATIENCE", 0.1)
    shards = assignment._Shards(tokenizer, open_features(source), tmp_path / "ids", ROWS_PER_SHARD)
    with shards.locked(0), pytest.raises(InputError, match=r"another process is writing .*ids"):
        run(tokenizer, source, tmp_path / "ids")


@pytest.mark.slow
def test_under_torchrun_after_a_kill(artifact, source, expected, tmp_path):
    folder = tmp_path / "ids"
    assert killed(assign_process.start(artifact, source, folder), folder, 3, 0)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--features", str(source), "--output", str(folder), "--rows-per-shard", str(ROWS_PER_SHARD)]
    done = subprocess.run(
        [*launcher, "semantic_ids.py", "assign", str(artifact), *options, "--device", "cpu"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert contents(folder) == expected


def test_a_full_disk_leaves_whole_shards(tokenizer, source, expected, tmp_path, monkeypatch):
    folder, written = tmp_path / "ids", []

    def until_full(path, content):
        written.append(path)
        if len(written) > 4:
            raise OSError(28, "No space left on device")
        return write_synced(path, content)

    write_synced = data.files.write_synced
    monkeypatch.setattr(data.files, "write_synced", until_full)
    with pytest.raises(InputError, match=r"cannot write .*ids: the disk is full\. Free space there"):
        run(tokenizer, source, folder)
    monkeypatch.undo()
    assert set(contents(folder)) == {"manifest.json"} | {f"ids-0000{shard}-of-00015.parquet" for shard in range(3)}
    run(tokenizer, source, folder)
    assert contents(folder) == expected


def test_a_file_size_limit_is_one_clear_error(artifact, source, tmp_path):
    """The system itself stops the writing of a shard in its middle."""
    script = f"""
        import resource, sys
        from pathlib import Path
        from data.feature_files import open_features
        from data.schemas import InputError
        from modules.tokenizer.tokenizer import SemanticIdTokenizer
        from serving.assignment import assign
        tokenizer = SemanticIdTokenizer.from_pretrained({str(artifact)!r})
        features = open_features(Path({str(source)!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        try:
            assign(tokenizer, features, Path({str(tmp_path / "ids")!r}), rows_per_shard=200)
        except InputError as error:
            print(error)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert "the file size limit is reached" in done.stdout, done.stderr
    assert set(contents(tmp_path / "ids")) == {"manifest.json"}


# Refusals


def test_another_request_is_refused_and_nothing_is_changed(tokenizer, source, expected, tmp_path):
    folder = tmp_path / "ids"
    run(tokenizer, source, folder)
    with pytest.raises(InputError, match=r"asked for something else: tokenizer was '[0-9a-f]+', now '[0-9a-f]+'\. Ask"):
        run(make_tokenizer(seed=1), source, folder)
    changed = write_features(tmp_path / "features.npy", seed=1)
    with pytest.raises(InputError, match=r"features was '[0-9a-f]+', now '[0-9a-f]+'\. Ask"):
        run(tokenizer, changed, folder)
    shorter = write_features(tmp_path / "features.npy", num_rows=9)
    with pytest.raises(InputError, match=r"num_rows was 2950, now 9\. Ask"):
        run(tokenizer, shorter, folder)
    with pytest.raises(InputError, match=r"rows_per_shard was 200, now 100\. Ask"):
        run(tokenizer, source, folder, rows_per_shard=100)
    assert contents(folder) == expected


def test_features_that_move_are_the_same_features(tokenizer, source, expected, tmp_path):
    run(tokenizer, source, tmp_path / "ids")
    (tmp_path / "moved.npy").write_bytes(source.read_bytes())
    (tmp_path / "moved.keys.txt").write_bytes(source.with_suffix(".keys.txt").read_bytes())
    assert run(tokenizer, tmp_path / "moved.npy", tmp_path / "ids").num_assigned == 0


def test_features_that_change_meanwhile_are_noticed(tokenizer, tmp_path):
    source = write_features(tmp_path / "features.npy")
    features = open_features(source)
    write_features(source, seed=1)
    with pytest.raises(InputError, match=r"features\.npy has changed since it was opened"):
        assign(tokenizer, features, tmp_path / "ids")
    assert num_shards_of(tmp_path / "ids") == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "other"}', '{"kind": "semantic ids of a feature file"}'])
def test_a_foreign_manifest_is_refused(tokenizer, source, tmp_path, content):
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids" / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json .*\. Choose a new folder"):
        run(tokenizer, source, tmp_path / "ids")
    assert contents(tmp_path / "ids") == {"manifest.json": content.encode()}


def test_a_folder_with_other_files_is_refused(tokenizer, source, tmp_path):
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"ids holds other files\. Choose a new folder"):
        run(tokenizer, source, tmp_path / "ids")
    assert contents(tmp_path / "ids") == {"notes.txt": b"mine"}


def test_an_output_that_is_a_file_is_refused(tokenizer, source, tmp_path):
    (tmp_path / "ids").write_text("mine")
    with pytest.raises(InputError, match=r"cannot write .*ids"):
        run(tokenizer, source, tmp_path / "ids")
    assert (tmp_path / "ids").read_text() == "mine"


@pytest.mark.parametrize(("keys", "named"), [(True, r"row 405 \(item 'item 405'\)"), (False, "row 405")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named_with_their_shard(tokenizer, tmp_path, keys, named, value):
    source = write_features(tmp_path / "features.npy", keys=keys)
    rows = np.load(source)
    rows[405, 3] = rows[598, 0] = value
    np.save(source, rows)
    other = named.replace("405", "598")
    with pytest.raises(
        InputError,
        match=rf"ids-00002-of-00015\.parquet: 2 rows of .*features\.npy hold NaN or infinity: {named}, {other}\.",
    ):
        run(tokenizer, source, tmp_path / "ids")
    assert num_shards_of(tmp_path / "ids") == 2


def test_many_bad_rows_are_counted_and_the_first_named(tokenizer, tmp_path):
    np.save(tmp_path / "features.npy", np.full((300, WIDTH), np.nan, np.float32))
    with pytest.raises(InputError, match=r"200 rows of .* hold NaN or infinity: row 0, row 1, row 2, \.\.\. Rebuild"):
        run(tokenizer, tmp_path / "features.npy", tmp_path / "ids")


def test_another_width_is_refused_before_anything_is_written(tokenizer, tmp_path):
    np.save(tmp_path / "features.npy", np.zeros((3, WIDTH + 1), np.float32))
    with pytest.raises(InputError, match=r"features\.npy: .*expected x of shape \[B, 6\]"):
        run(tokenizer, tmp_path / "features.npy", tmp_path / "ids")
    assert not (tmp_path / "ids").exists()


def test_a_shard_has_rows(tokenizer, source, tmp_path):
    with pytest.raises(InputError, match="rows_per_shard expected at least 1, got 0"):
        run(tokenizer, source, tmp_path / "ids", rows_per_shard=0)


# Memory


def peak_mb(artifact, source, folder):
    """Resident memory at its highest, in a process of its own."""
    process = assign_process.start(artifact, source, folder, rows_per_shard=20_000)
    peak = 0
    while process.is_alive():
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
        time.sleep(0.005)
    process.join()
    assert process.exitcode == 0
    return peak / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_file(artifact, tmp_path):
    short = write_features(tmp_path / "short.npy", num_rows=60_000)
    long = write_features(tmp_path / "long.npy", num_rows=2_400_000)
    grown = peak_mb(artifact, long, tmp_path / "of_long") - peak_mb(artifact, short, tmp_path / "of_short")
    assert long.stat().st_size > 27e6
    assert grown < 15
