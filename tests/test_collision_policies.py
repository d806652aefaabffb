"""Under each collision policy a model trains, is evaluated, recommends and is served."""

import json
from pathlib import Path

import pytest
import torch

import evaluate
import recommend
import serve
import train_decoder
from data.processed import load_dataset
from data.schemas import InputError, SeqBatch
from modules.model import RetrievalModelConfig
from modules.recommender import Recommender
from modules.tokenizer.policies import CollisionPolicy
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from tests.modules.tiny_artifact import save_tiny_artifact, tiny_catalogue, tiny_tokenizer
from tests.tiny_dataset import MODEL_SIZES, NUM_ITEMS, NUM_USERS, random_tokenizer, walks, write_interactions
from training.loop_config import LoopConfig
from training.run_folder import RunOptions

POLICIES = pytest.mark.parametrize("policy", CollisionPolicy)


def artifact_of(folder, policy):
    return save_tiny_artifact(folder, tokenizer=tiny_tokenizer(collisions=policy))


@POLICIES
def test_trained_and_evaluated(tmp_path: Path, policy):
    write_interactions(tmp_path / "log.csv")
    config = walks(tmp_path / "dataset", tmp_path / "log.csv")
    load_dataset(config)
    tokenizer = random_tokenizer(config, (6, 6), collisions=policy)
    assert len(tokenizer.nearest_codes.unique(dim=0)) < NUM_ITEMS
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    artifact = train_decoder.train(
        options=RunOptions(),
        save_dir_root=str(tmp_path / "run"),
        dataset=config,
        model=RetrievalModelConfig(languages={"text": (1,)}, num_user_buckets=0, **MODEL_SIZES),
        loop=LoopConfig(num_steps=60, learning_rate=1e-2, eval_every=30, checkpoint_every=60, log_every=30),
        tokenizer=str(tmp_path / "tokenizer"),
        batch_size=16,
        max_history=5,
        beam_width=NUM_ITEMS,
    )
    assert evaluate.main([str(artifact), "--no-baselines", "--json", str(tmp_path / "metrics.json")]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["generative/test/all/count"] == NUM_USERS
    # Items are what is hit: a walk's next item is learned, also where it shares its id with others.
    assert metrics["generative/test/warm/recall@10"] > 0.5
    assert metrics["generative/test/all/recall@10"] == pytest.approx(
        json.loads((tmp_path / "run" / "metrics.json").read_text())["generative/test/all/recall@10"]
    )


@POLICIES
def test_every_item_is_ranked_once(tmp_path, policy):
    artifact = artifact_of(tmp_path, policy)
    item_ids, scores = artifact.make_ranker(beam_width=12).rank(SeqBatch.from_lists([[0, 3], [5]]), 12)
    assert [sorted(row) for row in item_ids.tolist()] == [list(range(12))] * 2
    for row, values in zip(item_ids.tolist(), scores.tolist(), strict=True):
        score = dict(zip(row, values, strict=True))
        for group in artifact.tokenizer.collisions():
            assert len({score[item] for item in group}) == 1  # equal ids have equal scores


@POLICIES
def test_recommended_and_changed(tmp_path, policy):
    artifact_of(tmp_path / "model", policy)
    recommender = Recommender.from_pretrained(tmp_path / "model", device="cpu")
    (before,) = recommender.recommend([["item-1", "item-2"]], 12)
    assert sorted(item.item_key for item in before) == sorted(tiny_catalogue().item_keys)
    (similar,) = recommender.similar_items(["item-1"], 11)
    assert len(similar) == 11
    assert len(recommender.semantic_id("item-1")) == 2 + (policy is CollisionPolicy.DEDUP_CODE)
    recommender.remove_items(["item-4"])
    recommender.add_items(["new"], torch.zeros(1, 6), ["New"])
    recommender.save_pretrained(tmp_path / "changed")
    again = Recommender.from_pretrained(tmp_path / "changed", device="cpu")
    for changed in (recommender, again):
        (after,) = changed.recommend([["item-1", "new"]], 13)
        assert {item.item_key for item in after} == {*tiny_catalogue().item_keys, "new"} - {"item-4"}
        assert "item-4" not in {item.item_key for item in changed.similar_items(["new"], 12)[0]}
    assert again.artifact.tokenizer.collision_policy is policy


@POLICIES
def test_recommended_from_the_command_line(tmp_path, capsys, policy):
    artifact_of(tmp_path / "model", policy)
    arguments = [str(tmp_path / "model"), "--history", "item-1", "item-2", "--format", "json", "--top-k", "12"]
    assert recommend.main(arguments) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    assert sorted(item["item_key"] for item in items) == sorted(tiny_catalogue().item_keys)


@POLICIES
def test_served(tmp_path, policy):
    for package in serve.PACKAGES:
        pytest.importorskip(package, reason=f"{package} comes with requirements-serve.txt")
    from serving.service import RecommendService
    from tests.serving.running import running

    artifact_of(tmp_path / "model", policy)
    recommender = Recommender.from_pretrained(tmp_path / "model", device="cpu")
    service = RecommendService(recommender, save_to=tmp_path / "grown")
    with running(service) as client:
        assert client.post("/items", {"add": [{"item_key": "new", "features": [0.5] * 6}]}).status == 200
        (listed,) = client.post("/recommend", {"history": ["new"], "k": 13}).content["lists"]
    assert len({item["item_key"] for item in listed["items"]}) == 13
    assert SemanticIdTokenizer.from_pretrained(tmp_path / "grown" / "tokenizer").num_items == 13


@pytest.mark.parametrize("policy", [CollisionPolicy.DEDUP_CODE, CollisionPolicy.NONE])
def test_imported_ids_recommend_but_have_no_neighbours(tmp_path, policy):
    codes = tiny_tokenizer().codes
    imported = SemanticIdTokenizer.from_ids(codes, (5, 3), tiny_catalogue(), collisions=policy)
    artifact = save_tiny_artifact(tmp_path / "model", tokenizer=imported)
    assert artifact.tokenizer.rqvae is None
    recommender = Recommender.from_pretrained(tmp_path / "model", device="cpu")
    assert len(recommender.recommend([["item-1"]], 12)[0]) == 12
    recommender.remove_items(["item-4"])
    assert len(recommender.recommend([["item-1"]], 12)[0]) == 11
    with pytest.raises(InputError, match="similar_items needs a quantizer"):
        recommender.similar_items(["item-1"])
    with pytest.raises(InputError, match="with_items needs a quantizer"):
        recommender.add_items(["new"], torch.zeros(1, 6))
