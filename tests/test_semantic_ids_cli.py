import json
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch

import semantic_ids
from modules.tokenizer.index_file import read_index
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from tests.conftest import REPOSITORY
from tests.modules.hub_server import serve_hub
from tests.modules.test_tokenizer import snapshot
from tests.modules.tiny_artifact import save_tiny_artifact, save_tiny_sasrec, tiny_tokenizer
from tests.tiny_dataset import MODEL_SIZES, NUM_ITEMS, walks, write_interactions

INDEX = '{"0": ["<a_3>", "<b_0>"], "1": ["<a_3>", "<b_12>"], "2": ["<a_3>", "<b_0>"]}'


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "tokenizer"
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def index_file(tmp_path):
    path = tmp_path / "shop.index.json"
    path.write_text(INDEX)
    return path


def run(*argv):
    return semantic_ids.main([str(argument) for argument in argv])


def refused(capsys, *argv):
    """The one line on stderr of a command that the user must mend."""
    assert run(*argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1, printed.err
    return printed.err


def test_export_as_index(artifact, tmp_path, capsys):
    assert run("export", artifact, tmp_path / "ids.index.json") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ids.index.json'}: 12 items\n"
    index, tokenizer = read_index(tmp_path / "ids.index.json"), tiny_tokenizer()
    assert index.item_keys == tokenizer.catalogue.item_keys
    torch.testing.assert_close(index.codes, tokenizer.semantic_ids)
    assert index.letters == "abc"


def test_export_as_parquet(artifact, tmp_path):
    assert run("export", artifact, tmp_path / "ids.parquet") == 0
    table = pl.read_parquet(tmp_path / "ids.parquet")
    assert table["item_key"].to_list() == tiny_tokenizer().catalogue.item_keys
    assert table["title"].to_list()[-2:] == ["Title 10", None]
    codes = table.select("code_0", "code_1", "dedup_code").to_numpy()
    np.testing.assert_array_equal(codes, tiny_tokenizer().semantic_ids.numpy())


def test_removed_items_are_left_out(tmp_path, capsys):
    tiny_tokenizer().without_items(["item-0", "item-7"]).save_pretrained(tmp_path / "fewer")
    for name in ("ids.index.json", "ids.parquet"):
        assert run("export", tmp_path / "fewer", tmp_path / name) == 0
        assert capsys.readouterr().out.endswith(": 10 items; 2 removed ones are left out\n")
    left = [f"item-{item}" for item in range(12) if item not in (0, 7)]
    assert read_index(tmp_path / "ids.index.json").item_keys == left
    assert pl.read_parquet(tmp_path / "ids.parquet")["item_key"].to_list() == left


@pytest.mark.parametrize("place", [".", "model", "run/model", "run"])
def test_artifacts_of_every_kind(tmp_path, place):
    """A tokenizer, the run that trained it, a model, and the run that trained that."""
    if place.startswith("run"):
        save_tiny_artifact(tmp_path / "run" / "model")
    else:
        tiny_tokenizer().save_pretrained(tmp_path / "training" / place)
    folder = tmp_path / place if place.startswith("run") else tmp_path / "training"
    assert run("export", folder, tmp_path / "ids.parquet") == 0
    assert len(pl.read_parquet(tmp_path / "ids.parquet")) == 12


@pytest.mark.parametrize("place", ["", "model"])
def test_a_model_without_semantic_ids_is_said_to_be_one(tmp_path, capsys, place):
    save_tiny_sasrec(tmp_path / place)
    said = refused(capsys, "export", tmp_path, tmp_path / "ids.parquet")
    assert f"{tmp_path} holds a model without semantic ids" in said


def test_import_lists_or_tells_apart(index_file, tmp_path, capsys):
    assert run("import", index_file, tmp_path / "none", "--collisions", "none") == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'none'}: 3 items, 2 levels of 4, 13 codes; 2 distinct tuples, 2 items share theirs in 1 group "
        "of at most 2; collision policy none\n"
    )
    shared = SemanticIdTokenizer.from_pretrained(tmp_path / "none")
    assert shared.semantic_ids.tolist() == [[3, 0], [3, 12], [3, 0]]
    assert shared.collision_policy is CollisionPolicy.NONE
    assert shared.collisions() == [[0, 2]]
    assert shared.rqvae is None
    assert shared.manifest["provenance"]["imported_from"] == "shop.index.json"
    listed = json.loads((tmp_path / "none" / "collisions.json").read_text())
    assert listed["groups"] == [{"codes": [3, 0], "item_keys": ["0", "2"]}]

    assert run("import", index_file, tmp_path / "dedup") == 0
    separate = SemanticIdTokenizer.from_pretrained(tmp_path / "dedup")
    assert separate.semantic_ids.tolist() == [[3, 0, 0], [3, 12, 0], [3, 0, 1]]
    assert separate.catalogue.item_keys == ["0", "1", "2"]
    assert separate.catalogue.titles == ["", "", ""]
    assert separate.language == "text"


def test_import_with_keys_titles_sizes_and_language(index_file, tmp_path):
    index_file.write_text(INDEX.upper().replace('"A', '"<A').replace("<<", "<"))
    (tmp_path / "shop.item2id").write_text("B0\t0\nB2\t2\nB1\t1\n")
    (tmp_path / "titles.tsv").write_text("B1\tNail file\n")
    options = ["--keys", tmp_path / "shop.item2id", "--titles", tmp_path / "titles.tsv"]
    assert run("import", index_file, tmp_path / "image", *options, "--codebook-sizes", "256", "256") == 0
    tokenizer = SemanticIdTokenizer.from_pretrained(tmp_path / "image")
    assert tokenizer.catalogue.item_keys == ["B0", "B1", "B2"]
    assert tokenizer.catalogue.titles == ["", "Nail file", ""]
    assert tokenizer.codebook_sizes == (256, 256)
    assert tokenizer.language == "image"
    assert run("import", index_file, tmp_path / "sound", "--language", "sound") == 0
    assert SemanticIdTokenizer.from_pretrained(tmp_path / "sound").language == "sound"


def test_import_for_a_prepared_dataset(tmp_path, capsys):
    write_interactions(tmp_path / "log.csv")
    from data.processed import load_dataset

    dataset = load_dataset(walks(tmp_path / "root", tmp_path / "log.csv"))
    keys = dataset.catalogue.item_keys
    ids = {key: [f"<a_{item // 5}>", f"<b_{item % 5}>"] for item, key in reversed(list(enumerate(keys)))}
    (tmp_path / "walks.index.json").write_text(json.dumps({"other": ["<a_9>", "<b_9>"], **ids}))
    assert run("import", tmp_path / "walks.index.json", tmp_path / "a", "--dataset", dataset.folder) == 0
    tokenizer = SemanticIdTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.catalogue.item_keys == keys
    assert tokenizer.catalogue.titles == dataset.catalogue.titles
    assert tokenizer.codes.tolist() == [[item // 5, item % 5] for item in range(NUM_ITEMS)]
    assert tokenizer.manifest["dataset_manifest_hash"] == dataset.manifest_hash
    capsys.readouterr()

    del ids["i3"]
    (tmp_path / "walks.index.json").write_text(json.dumps(ids))
    message = refused(capsys, "import", tmp_path / "walks.index.json", tmp_path / "b", "--dataset", dataset.folder)
    assert "walks.index.json lacks 1 items ('i3') of the 30 of" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.parametrize("collisions", ["none", "dedup_code"])
def test_a_model_trains_on_imported_ids(tmp_path, collisions):
    """And its artifact answers, also where items share an id."""
    import train_decoder
    from data.processed import load_dataset
    from modules.model import RetrievalModelConfig
    from modules.recommender import Recommender
    from training.loop_config import LoopConfig
    from training.run_folder import RunOptions

    write_interactions(tmp_path / "log.csv")
    config = walks(tmp_path / "root", tmp_path / "log.csv")
    dataset = load_dataset(config)
    ids = {key: [f"<a_{item // 10}>", f"<b_{item % 5}>"] for item, key in enumerate(dataset.catalogue.item_keys)}
    (tmp_path / "walks.index.json").write_text(json.dumps(ids))
    options = ["--dataset", dataset.folder, "--collisions", collisions]
    assert run("import", tmp_path / "walks.index.json", tmp_path / "ids", *options) == 0
    train_decoder.train(
        options=RunOptions(),
        save_dir_root=str(tmp_path / "run"),
        dataset=config,
        model=RetrievalModelConfig(languages={"text": (1,)}, num_user_buckets=0, **MODEL_SIZES),
        loop=LoopConfig(num_steps=4, learning_rate=1e-3, eval_every=2, checkpoint_every=4, log_every=1),
        tokenizer=str(tmp_path / "ids"),
        batch_size=8,
        max_history=5,
    )
    recommended = Recommender.from_pretrained(str(tmp_path / "run")).recommend([["i3", "i4"]], k=NUM_ITEMS)
    assert len({item.item_key for item in recommended[0]}) == NUM_ITEMS


@pytest.mark.parametrize("collisions", ["none", "dedup_code"])
def test_what_is_exported_can_be_imported(artifact, tmp_path, collisions):
    assert run("export", artifact, tmp_path / "a.index.json") == 0
    assert run("import", tmp_path / "a.index.json", tmp_path / "b", "--collisions", collisions) == 0
    tokenizer = SemanticIdTokenizer.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(tokenizer.codes, tiny_tokenizer().semantic_ids)
    assert tokenizer.collisions() == []


def test_imported_ids_give_no_codes_to_new_items(index_file, tmp_path, capsys):
    np.save(tmp_path / "new.npy", np.zeros((3, 4), dtype=np.float32))
    assert run("import", index_file, tmp_path / "a") == 0
    capsys.readouterr()
    message = refused(capsys, "assign", tmp_path / "a", "--features", tmp_path / "new.npy", "--output", tmp_path / "b")
    assert "imported" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"0": ["<a_3>"], "1": ["<a_3>", "<b_1>"]}', [], "item '1' expected 1 codes like the first item, got 2"),
        (INDEX[:-9], [], "shop.index.json is not a whole JSON file"),
        (INDEX, ["--keys", "absent.item2id"], "cannot read absent.item2id: No such file or directory"),
        (INDEX, ["--keys", "{folder}/short.item2id"], "has no name for 2 items ('1', '2')"),
        (INDEX, ["--titles", "{folder}/titles.tsv"], "has a title of none of the 3 items, such as '0'"),
        (INDEX, ["--dataset", "{folder}"], "is not a prepared dataset"),
        (INDEX, ["--codebook-sizes", "4", "12"], "shop.index.json, of at least 4 13, got 4 12."),
        (INDEX, ["--codebook-sizes", "4"], "--codebook-sizes expected 2 numbers for the levels of"),
        (INDEX, ["--language", "Text!"], "language expected lower-case letters"),
    ],
)
def test_import_refuses(index_file, tmp_path, capsys, content, options, message):
    index_file.write_text(content)
    (tmp_path / "short.item2id").write_text("B0\t0\n")
    (tmp_path / "titles.tsv").write_text("B0\tNail file\n")
    options = [option.format(folder=tmp_path) for option in options]
    assert message in refused(capsys, "import", index_file, tmp_path / "a", *options)
    assert not (tmp_path / "a").exists()


def test_import_replaces_nothing_but_tokenizers(index_file, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("meow")
    assert "is not a semantic-id tokenizer" in refused(capsys, "import", index_file, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.txt").read_text() == "meow"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{artifact}", "ids.csv"], "cannot write ids.csv: its name must end in .index.json or .parquet"),
        (["export", "{artifact}", "evaluate.py/ids.parquet"], "cannot write evaluate.py/ids.parquet"),
        (["export", "./absent", "ids.parquet"], "./absent is not a folder"),
        (["export", "tests", "ids.parquet"], "tests is not a semantic-id tokenizer: it has no manifest.json"),
        (["report", "{artifact}", "--output", "evaluate.py"], "cannot write evaluate.py/metrics.json"),
        (
            ["report", "{artifact}", "--features", "absent.npy", "--output", "{artifact}-page"],
            "absent.npy does not exist",
        ),
        (["report", "{artifact}", "--metrics-log", "absent.jsonl", "--output", "{artifact}-page"], "absent.jsonl"),
        (["pull", "./absent", "folder"], "./absent is not a folder"),
        (["push", "./absent", "me/copy"], "./absent is not a folder"),
        (["assign", "{artifact}", "--features", "absent.npy", "--output", "ids"], "absent.npy does not exist"),
        (["assign", "{artifact}", "--features", "README.md", "--output", "ids"], "README.md must end in .npy"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(artifact, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(REPOSITORY)
    assert message in refused(capsys, *(argument.format(artifact=artifact) for argument in arguments))


@pytest.mark.parametrize("arguments", [[], ["explain"], ["export"], ["import", "a.json", "b", "--collisions", "move"]])
def test_bad_usage(capsys, arguments):
    assert run(*arguments) == 2
    assert capsys.readouterr().err.startswith("usage: semantic_ids.py")


def test_ctrl_c_while_torch_is_imported(monkeypatch, capsys):
    class Interrupting:
        def find_spec(self, name, *_):
            if name == "training.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "training.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert run("export", "anything", "ids.parquet") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_does_not_wait_for_torch():
    code = "import sys, semantic_ids; semantic_ids.main(['import', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
    assert "KEY<TAB>TITLE" in done.stdout


def test_assign(artifact, tmp_path, capsys):
    features = torch.randn(25, 6, generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "new.npy", features.numpy())
    (tmp_path / "new.keys.txt").write_text("".join(f"n{row}\n" for row in range(25)))
    arguments = [
        "assign",
        artifact,
        "--features",
        tmp_path / "new.npy",
        "--output",
        tmp_path / "ids",
        "--device",
        "cpu",
    ]
    assert run(*arguments, "--rows-per-shard", "10") == 0
    shards = sorted((tmp_path / "ids").glob("*.parquet"))
    assert [path.name for path in shards] == [f"ids-{shard:05}-of-00003.parquet" for shard in range(3)]
    table = pl.concat([pl.read_parquet(path) for path in shards])
    assert table["item_key"].to_list() == [f"n{row}" for row in range(25)]
    codes = table.select("code_0", "code_1").to_numpy()
    np.testing.assert_array_equal(codes, tiny_tokenizer().encode(features).numpy())
    assert "25 of 25 rows given codes by this process" in capsys.readouterr().err
    assert run(*arguments, "--rows-per-shard", "10") == 0
    assert "0 of 25 rows given codes by this process" in capsys.readouterr().err
    assert "asked for something else" in refused(capsys, *arguments, "--rows-per-shard", "5")


def test_assign_as_one_of_several_processes(artifact, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "new.npy", np.zeros((5, 6), dtype=np.float16))
    arguments = ["assign", artifact, "--features", tmp_path / "new.npy", "--output", tmp_path / "ids"]
    monkeypatch.setattr("serving.processes.START_PATIENCE", 0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(*arguments, "--rows-per-shard", "2") == 1  # the other process is not there
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: process 1")
    shards = [f"ids-{shard:05}-of-00003.parquet" for shard in range(3)]
    assert sorted(path.name for path in (tmp_path / "ids").glob("*.parquet")) == [shards[0], shards[2]]
    monkeypatch.setenv("RANK", "1")
    assert run(*arguments, "--rows-per-shard", "2") == 0
    assert "2 of 5 rows given codes by this process" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert run(*arguments, "--rows-per-shard", "2") == 0
    assert sorted(path.name for path in (tmp_path / "ids").glob("*.parquet")) == shards
    assert json.loads((tmp_path / "ids" / "manifest.json").read_text())["complete"] is True


def test_report(artifact, tmp_path, capsys):
    """Rows of features are matched to items by key, whatever their order."""
    tokenizer = tiny_tokenizer()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))  # as tiny_tokenizer draws them
    np.save(tmp_path / "features.npy", features[order].numpy())
    keys = [tokenizer.catalogue.item_keys[item] for item in order.tolist()]
    (tmp_path / "features.keys.txt").write_text("".join(f"{key}\n" for key in keys))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    options = ["--features", tmp_path / "features.npy", "--metrics-log", tmp_path / "metrics.jsonl"]
    assert run("report", artifact, *options, "--output", tmp_path / "page") == 0
    numbers = json.loads((tmp_path / "page" / "metrics.json").read_text())
    assert numbers["features"]["reproduced"] == 1.0  # the features give the ids that the artifact holds
    headline = numbers["verdict"]["headline"]
    assert capsys.readouterr().out == f"{tmp_path / 'page' / 'index.html'}: {headline}\n"
    assert headline in (tmp_path / "page" / "index.html").read_text()


def test_report_of_imported_ids(index_file, tmp_path):
    assert run("import", index_file, tmp_path / "a", "--collisions", "none") == 0
    assert run("report", tmp_path / "a", "--output", tmp_path / "page") == 0
    assert json.loads((tmp_path / "page" / "metrics.json").read_text())["features"] is None


def test_publish_takes_ids_without_texts_and_what_made_them(tmp_path, capsys):
    finished = tmp_path / "run"
    tiny_tokenizer().save_pretrained(finished / "model")
    (finished / "config.gin").write_text('DatasetConfig.raw_dir = "/somewhere/on/this/machine"\n')
    (finished / "env.json").write_text('{"command": "python train_rqvae.py shop.gin --gin.x=/somewhere/raw"}')
    (finished / "metrics.json").write_text('{"codebook/unique_ratio": 0.5}')
    assert run("publish", finished, tmp_path / "shop") == 0
    assert "12 items" in capsys.readouterr().out
    published, original = SemanticIdTokenizer.from_pretrained(tmp_path / "shop"), tiny_tokenizer()
    assert published.content_hash == original.content_hash
    assert published.catalogue.item_keys == original.catalogue.item_keys
    assert any(original.catalogue.titles)
    assert not any(published.catalogue.titles)
    assert (tmp_path / "shop" / "config.gin").read_text() == 'DatasetConfig.raw_dir = "machine"\n'
    assert json.loads((tmp_path / "shop" / "metrics.json").read_text()) == {"codebook/unique_ratio": 0.5}
    assert "- trained by `python train_rqvae.py shop.gin --gin.x=raw`" in (tmp_path / "shop" / "README.md").read_text()


def test_publish_wants_a_run(artifact, tmp_path, capsys):
    assert "expected the folder of a run" in refused(capsys, "publish", artifact, tmp_path / "shop")
    (tmp_path / "run").mkdir()
    for name in ("config.gin", "env.json", "metrics.json"):
        (tmp_path / "run" / name).write_text("{}")
    message = refused(capsys, "publish", tmp_path / "run", tmp_path / "shop")
    assert "env.json expected the command of the run, got None" in message
    assert not (tmp_path / "shop").exists()


def test_pull_copies_a_folder_verified(artifact, tmp_path, capsys):
    assert run("pull", artifact, tmp_path / "copy") == 0
    assert "12 items, 2 levels of 5, 3 codes" in capsys.readouterr().out
    assert snapshot(tmp_path / "copy") == snapshot(artifact)
    (tmp_path / "copy" / "catalogue.safetensors").write_bytes(b"")
    assert "catalogue.safetensors is damaged" in refused(capsys, "pull", tmp_path / "copy", tmp_path / "again")


@pytest.mark.slow
def test_push_and_pull(artifact, tmp_path):
    tiny_tokenizer().without_items(["item-3"]).save_pretrained(tmp_path / "fewer")
    (tmp_path / "hub").mkdir()

    def command(endpoint, *argv, **environment):
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_test"}
        return subprocess.run(
            [sys.executable, "semantic_ids.py", *map(str, argv)],
            cwd=REPOSITORY,
            env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **hub, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    with serve_hub(tmp_path / "hub") as (endpoint, requests):
        pushed = command(endpoint, "push", artifact, "me/shop", "--private")
        assert (pushed.returncode, pushed.stderr) == (0, "")
        assert pushed.stdout.startswith(f"{endpoint}/me/shop/commit/")
        assert "create me/shop private" in requests
        assert command(endpoint, "push", tmp_path / "fewer", "me/fewer").returncode == 0
        assert "create me/fewer default" in requests
        assert snapshot(tmp_path / "hub" / "me" / "shop") == snapshot(artifact)

        pulled = command(endpoint, "pull", "me/shop", tmp_path / "shop")
        assert pulled.returncode == 0, pulled.stderr
        assert snapshot(tmp_path / "shop") == snapshot(artifact)
        assert command(endpoint, "pull", "me/fewer", tmp_path / "fewer again", "--revision", "main").returncode == 0
        assert snapshot(tmp_path / "fewer again") == snapshot(tmp_path / "fewer")

        absent = command(endpoint, "pull", "me/absent", tmp_path / "absent")
        assert (absent.returncode, len(absent.stderr.splitlines())) == (2, 1)
        assert "does not exist or is private" in absent.stderr
        unknown = command(endpoint, "pull", "me/shop", tmp_path / "absent", "--revision", "v9")
        assert "there is no such revision" in unknown.stderr
        (tmp_path / "hub" / "me" / "shop" / "catalogue.safetensors").write_bytes(b"cut short")
        damaged = command(endpoint, "pull", "me/shop", tmp_path / "absent", HF_HOME=str(tmp_path / "other cache"))
        assert damaged.returncode == 2
        assert "catalogue.safetensors is damaged" in damaged.stderr
    offline = command(endpoint, "push", artifact, "me/other")
    assert (offline.returncode, len(offline.stderr.splitlines())) == (2, 1)
    assert "upload to Hub repository 'me/other' failed" in offline.stderr
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "letter/Beauty/Beauty.index.json",
            "12,101 items, 4 levels of 256, 256, 256, 256 codes; 12,088 distinct tuples",
        ),
        ("mql4grec/Instruments/Instruments.index_lemb.json", "524 items share theirs in 262 groups of at most 2"),
        ("mql4grec/Instruments/Instruments.index_vitemb.json", "6,250 distinct tuples, no two items share theirs"),
    ],
)
def test_published_ids(shared_data, tmp_path, capsys, name, expected):
    keys = ["--keys", shared_data / "mql4grec/Instruments/Instruments.item2id"] if "Instruments" in name else []
    assert run("import", shared_data / name, tmp_path / "a", "--collisions", "none", *keys) == 0
    assert expected in capsys.readouterr().out
    assert run("export", tmp_path / "a", tmp_path / "again.index.json") == 0
    published = json.loads((shared_data / name).read_text())
    exported = json.loads((tmp_path / "again.index.json").read_text())
    assert list(exported.values()) == list(published.values())
    assert next(iter(exported)) == ("B002SQJL9U" if keys else "0")
