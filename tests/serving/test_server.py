import json
import math
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} comes with requirements-serve.txt")

from data.schemas import InputError  # noqa: E402
from modules.recommender import Recommender  # noqa: E402
from serving.gate import is_loopback_host  # noqa: E402
from serving.requests import Limits, RecommendBody  # noqa: E402
from serving.service import RecommendService  # noqa: E402
from tests.modules.tiny_artifact import save_tiny_artifact, save_tiny_liger, save_tiny_sasrec  # noqa: E402
from tests.serving.running import metric, running, wait_until  # noqa: E402

SMALL = Limits(max_body_bytes=20_000, max_histories=4, max_history=5, max_k=20, timeout=5.0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    save_tiny_artifact(folder)
    return folder


@pytest.fixture(scope="module")
def recommender(artifact):
    return Recommender.from_pretrained(artifact, device="cpu")


@pytest.fixture(scope="module")
def client(artifact):
    service = RecommendService(Recommender.from_pretrained(artifact, device="cpu"))
    with running(service, limits=SMALL, max_queue=8) as client:
        yield client


def keys_of(ranked):
    return [item["item_key"] for item in ranked["items"]]


class Slow:
    """A service that answers when it is told to."""

    num_items = catalogue_version = 1
    mode = "slow"

    def __init__(self):
        self.began, self.release = threading.Event(), threading.Event()

    def answer(self, queries):
        self.began.set()
        assert self.release.wait(30)
        return [{"lists": []} for _ in queries]


def test_answers_are_those_of_the_recommender(client, recommender):
    histories = [["item-1", "item-2"], ["item-3"]]
    reply = client.post("/recommend", {"histories": histories, "k": 3, "users": ["u", None]})
    assert reply.status == 200
    expected = recommender.recommend(histories, 3, users=["u", None])
    for answered, ranked in zip(reply.content["lists"], expected, strict=True):
        assert keys_of(answered) == [item.item_key for item in ranked]
        assert [item["title"] for item in answered["items"]] == [item.title for item in ranked]
        np.testing.assert_allclose([item["score"] for item in answered["items"]], [item.score for item in ranked])
        assert [tuple(item["semantic_id"]) for item in answered["items"]] == [
            recommender.semantic_id(item.item_key) for item in ranked
        ]
        assert (answered["complete"], answered["unknown"]) == (True, [])


def test_filters_and_short_lists(client):
    body = {"history": ["item-1", "nowhere"], "k": 12, "exclude_seen": True}
    (ranked,) = client.post("/recommend", body).content["lists"]
    assert sorted(keys_of(ranked)) == sorted({f"item-{place}" for place in range(12)} - {"item-1"})
    assert (ranked["complete"], ranked["unknown"]) == (False, ["nowhere"])
    (ranked,) = client.post("/recommend", {**body, "allow": ["item-1", "item-2", "item-3", "x"]}).content["lists"]
    assert sorted(keys_of(ranked)) == ["item-2", "item-3"]
    (ranked,) = client.post("/recommend", {**body, "k": 5, "deny": ["item-4", "x"]}).content["lists"]
    assert len(ranked["items"]) == 5
    assert not {"item-1", "item-4"} & set(keys_of(ranked))
    (ranked,) = client.post("/recommend", {**body, "allow": []}).content["lists"]
    assert ranked == {"items": [], "complete": False, "unknown": ["nowhere"]}
    (ranked,) = client.post("/recommend", {"history": ["item-1"], "k": 15}).content["lists"]
    assert (len(ranked["items"]), ranked["complete"]) == (12, False)


def test_mates_of_a_batch_do_not_change_an_answer(artifact):
    bodies = [
        {"history": ["item-1"], "k": 2},
        {"histories": [["item-2", "item-3"], ["item-1"]], "k": 5, "exclude_seen": True},
        {"history": ["nowhere"]},
        {"history": ["item-4"], "k": 11},
        {"history": ["item-5"], "k": 3, "allow": ["item-6", "item-7"]},
        {"history": ["item-5"], "k": 4, "deny": ["item-6", "item-7"], "users": ["u"]},
    ]
    service = RecommendService(Recommender.from_pretrained(artifact, device="cpu"))
    with running(service, max_batch=7, max_wait=30.0) as client, ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: client.post("/recommend", body), bodies))
        assert metric(client, "recommender_batch_histories_count") == 1
    with running(service, max_batch=1) as client:
        alone = [client.post("/recommend", body) for body in bodies]
    assert [reply.status for reply in together] == [200, 200, 422, 200, 200, 200]
    assert together[2].field == "history"
    for mixed, single in zip(together, alone, strict=True):
        assert mixed.status == single.status
        if mixed.status == 200:
            for ranked, expected in zip(mixed.content["lists"], single.content["lists"], strict=True):
                assert keys_of(ranked) == keys_of(expected)
                assert ranked["complete"] == expected["complete"]
                scores = [[item["score"] for item in answer["items"]] for answer in (ranked, expected)]
                np.testing.assert_allclose(*scores, rtol=1e-4)


def test_one_search_per_beam_width(recommender, monkeypatch):
    """A wider beam may find more, so that a mate with a larger k must not widen the beam of others (5 here)."""
    asked = []
    recommend = recommender.recommend
    monkeypatch.setattr(
        recommender, "recommend", lambda rows, k, **more: asked.append((len(rows), k)) or recommend(rows, k, **more)
    )
    bodies = [RecommendBody(histories=[["item-1"]], k=k) for k in (2, 7, 5, 12, 1)]
    answers = RecommendService(recommender).answer(bodies)
    assert asked == [(3, 5), (1, 8), (1, 12)]  # 12 items in all, or it would be 16
    assert [len(answer["lists"][0]["items"]) for answer in answers] == [2, 7, 5, 12, 1]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "field"),
    [
        ("POST", "/recommend", b'{"history": ', 400, "body"),
        ("POST", "/recommend", b"\xff\xfe", 400, "body"),
        ("POST", "/recommend", {"history": ["item-1"], "k": 0}, 422, "k"),
        ("POST", "/recommend", {"history": ["item-1"], "k": 21}, 422, "k"),
        ("POST", "/recommend", {"histories": [["item-1"], [None]]}, 422, "histories[1][0]"),
        ("POST", "/recommend", {"histories": [["item-1"], ["item-2"] * 6]}, 422, "histories[1]"),
        ("POST", "/recommend", {"histories": [["item-1"]] * 5}, 422, "histories"),
        ("POST", "/recommend", {"histories": [["item-1"], ["x"]]}, 422, "histories[1]"),
        ("POST", "/recommend", {"history": ["item-1"], "top_k": 3}, 422, "top_k"),
        ("POST", "/recommend", b"[[[[[[[[", 400, "body"),
        pytest.param("POST", "/recommend", b"[" * 15_000, 400, "body", id="nested"),
        pytest.param("POST", "/recommend", b'{"k": ' + b"1" * 5_000 + b"}", 400, "body", id="long number"),
        ("POST", "/recommend", b'{"history": ["\\ud800"]}', 422, "history[0]"),
        ("POST", "/recommend", b'{"history": ["item-1"], "\\ud800": 1}', 422, "body"),
        ("POST", "/recommend", 20_001, 413, "body"),
        ("POST", "/recommend", 40_000_000, 413, "body"),
        ("POST", "/items", {"remove": ["nowhere"]}, 422, "remove"),
        ("POST", "/items", {"add": [{"item_key": "new", "text": {"title": "New"}}]}, 422, "add[0].text"),
        ("POST", "/items", {"add": [{"item_key": "a", "features": [1.0] * 5}]}, 422, "add"),
        ("POST", "/items", b'{"add": [{"item_key": "\\udc00", "features": [1]}]}', 422, "add[0].item_key"),
        ("POST", "/items", b'{"add": [{"item_key": "a", "features": [NaN, 1, 1, 1, 1, 1]}]}', 422, "add"),
        ("POST", "/items", {"add": [{"item_key": "a", "features": [1e39] * 6}]}, 422, "add"),
        ("POST", "/items", {"add": [{"item_key": "item-1", "features": [1.0] * 6}]}, 422, "add"),
        ("POST", "/items", {"add": [{"item_key": "a", "features": [1.0] * 6}] * 2}, 422, "add"),
        ("GET", "/items?limit=0", None, 422, "limit"),
        ("GET", "/nothing", None, 404, None),
        ("DELETE", "/recommend", None, 405, None),
    ],
)
def test_errors_are_json_and_name_the_field(client, method, path, body, status, field):
    """A body that is a number is that many spaces."""
    reply = client.request(method, path, b" " * body if isinstance(body, int) else body)
    assert (reply.status, reply.field) == (status, field)
    assert reply.message
    assert client.get("/healthz").content["num_items"] == 12


def test_a_body_without_a_length_is_bounded_too(client):
    with socket.create_connection((client.host, client.port), timeout=30) as connection:
        head = "POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall(b"4e20\r\n" + b" " * 20_000 + b"\r\n" + b"1\r\n \r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_says_it_is_too_large_is_not_waited_for(client):
    with socket.create_connection((client.host, client.port), timeout=30) as connection:
        head = "POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 20001\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_ends():
    head = "POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with (
        running(Slow(), limits=replace(SMALL, timeout=0.2)) as client,
        socket.create_connection((client.host, client.port), timeout=30) as connection,
    ):
        connection.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_client_that_goes_before_its_body_is_no_fault_of_the_server():
    head = "POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(Slow(), limits=SMALL) as client:
        with socket.create_connection((client.host, client.port), timeout=30) as connection:
            connection.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        counted = 'recommender_requests_total{path="/recommend",status="%s"}'
        wait_until(lambda: metric(client, counted % 499) == 1)
        assert metric(client, counted % 500) is None


def test_only_json_is_read(client):
    """A form of another site can send text/plain without asking first."""
    for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert client.post("/recommend", {"history": ["item-1"]}, Content_Type=media_type).status == 415
    assert (
        client.post("/recommend", {"history": ["item-1"]}, Content_Type="application/json; charset=utf-8").status == 200
    )


def test_other_names_are_refused_on_loopback(client):
    reply = client.get("/items", Host="evil.example")
    assert (reply.status, reply.field) == (403, "Host")
    hosts = {"localhost": True, "127.0.0.1:8000": True, "[::1]:80": True, "127.9.9.9": True}
    hosts |= {"": False, "localhost.evil.example": False, "10.1.1.1": False, "[::": False, "127.0.0.1.nip.io": False}
    assert {host: is_loopback_host(host) for host in hosts} == hosts


def test_a_full_queue_is_429_and_what_was_accepted_is_answered():
    slow = Slow()
    with running(slow, limits=replace(SMALL, timeout=30.0), max_queue=4, max_batch=1) as client:
        with ThreadPoolExecutor(5) as pool:
            first = pool.submit(client.post, "/recommend", {"history": ["a"]})
            assert slow.began.wait(30)
            queued = [pool.submit(client.post, "/recommend", {"history": ["a"]}) for _ in range(4)]
            wait_until(lambda: metric(client, "recommender_queue_histories") == 4)
            refused = client.post("/recommend", {"history": ["a"]})
            assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
            assert "full" in refused.message
            slow.release.set()
            assert [future.result().status for future in (first, *queued)] == [200] * 5
        assert client.post("/recommend", {"history": ["a"]}).status == 200
        counted = 'recommender_requests_total{path="/recommend",status="429"}'
        assert metric(client, counted) == 1


def test_a_late_answer_is_504_and_the_server_goes_on():
    slow = Slow()
    with running(slow, limits=replace(SMALL, timeout=0.2)) as client:
        late = client.post("/recommend", {"history": ["a"]})
        assert (late.status, late.field) == (504, None)
        slow.release.set()
        wait_until(lambda: client.post("/recommend", {"history": ["a"]}).status == 200)  # a busy machine may be late


def test_a_fault_is_500_and_says_nothing_of_the_inside():
    class Faulty(Slow):
        def answer(self, queries):
            raise RuntimeError("secret")

    with running(Faulty(), limits=SMALL) as client:
        reply = client.post("/recommend", {"history": ["a"]})
        assert reply.status == 500
        assert "secret" not in reply.text
        assert client.get("/healthz").status == 200


def test_a_stopped_server_leaves_no_thread():
    def models():
        return [thread for thread in threading.enumerate() if thread.name == "model"]

    before = models()
    with running(Slow()):
        assert len(models()) == len(before) + 1
    assert models() == before


def test_the_token(artifact):
    service = RecommendService(Recommender.from_pretrained(artifact, device="cpu"))
    with running(service, token="s3cret") as client:
        for path in ("/items", "/metrics", "/openapi.json", "/nothing"):
            for header in (
                {},
                {"Authorization": "Bearer S3cret"},
                {"Authorization": "s3cret"},
                {"Authorization": "Basic s3cret"},
            ):
                reply = client.get(path, **header)
                assert (reply.status, reply.field) == (401, "Authorization")
        assert client.post("/items", {"remove": ["item-1"]}).status == 401
        assert client.get("/items", Authorization="bearer  s3cret").status == 200
        assert client.get("/items", Authorization="Bearer s3cret", Host="shop.example").content["num_items"] == 12
        assert (client.get("/").status, client.get("/healthz").status) == (200, 200)


def test_search(client):
    assert [item["item_key"] for item in client.get("/items?query=TITLE%201").content["items"]] == [
        "item-1",
        "item-10",
    ]
    assert [item["item_key"] for item in client.get("/items?query=item-1").content["items"]] == [
        "item-1",
        "item-10",
        "item-11",
    ]
    found = client.get("/items?query=item-11").content["items"]
    assert [(item["item_key"], item["title"]) for item in found] == [("item-11", "")]
    everything = client.get("/items?limit=3").content
    assert (len(everything["items"]), everything["num_items"]) == (3, 12)
    assert client.get("/items?query=nowhere").content["items"] == []


def test_the_catalogue_lives(artifact, tmp_path):
    service = RecommendService(Recommender.from_pretrained(artifact, device="cpu"), save_to=tmp_path / "grown")
    features = np.random.default_rng(0).normal(size=(2, 6)).tolist()
    new = [{"item_key": f"new-{place}", "title": f"New {place}", "features": row} for place, row in enumerate(features)]
    with running(service) as client:
        assert client.get("/items?query=new").content["items"] == []
        added = client.post("/items", {"add": new})
        assert added.status == 200, added.text
        assert [item["item_key"] for item in added.content["added"]] == ["new-0", "new-1"]
        assert added.content["catalogue"] == {"num_items": 14, "version": 2}
        assert added.content["saved"]
        (ranked,) = client.post("/recommend", {"history": ["item-1"], "k": 14}).content["lists"]
        assert {"new-0", "new-1"} <= set(keys_of(ranked))
        removed = client.post("/items", {"remove": ["new-1", "item-2"]}).content
        assert removed["catalogue"] == {"num_items": 12, "version": 3}
        (ranked,) = client.post("/recommend", {"history": ["item-2"], "k": 14}).content["lists"]
        assert not {"new-1", "item-2"} & set(keys_of(ranked))
        assert (len(ranked["items"]), ranked["complete"]) == (12, False)
        assert [item["item_key"] for item in client.get("/items?query=new").content["items"]] == ["new-0"]
        assert client.get("/items?query=item-2").content["items"] == []
        assert metric(client, "recommender_items") == 12
        assert client.get("/healthz").content == {
            "status": "ok",
            "mode": "generative",
            "num_items": 12,
            "catalogue_version": 3,
        }
        in_memory = client.post("/recommend", {"history": ["item-2", "new-1"], "k": 12}).content
    saved = RecommendService(Recommender.from_pretrained(tmp_path / "grown", device="cpu"))
    with running(saved) as client:
        assert client.post("/recommend", {"history": ["item-2", "new-1"], "k": 12}).content == in_memory


@pytest.mark.parametrize("mode", ["dense", "hybrid@2"])
def test_an_item_with_features_is_in_the_lists_of_the_next_request(tmp_path, mode):
    save_tiny_liger(tmp_path / "model")
    recommender = Recommender.from_pretrained(tmp_path / "model", device="cpu", mode=mode)
    asked = {"history": ["item-1", "item-2"], "k": 13}
    with running(RecommendService(recommender, save_to=tmp_path / "grown")) as client:
        assert client.get("/healthz").content["mode"] == mode
        (before,) = client.post("/recommend", asked).content["lists"]
        added = client.post("/items", {"add": [{"item_key": "new", "features": [0.5] * 6}]})
        assert added.status == 200, added.text
        (ranked,) = client.post("/recommend", asked).content["lists"]
        assert set(keys_of(ranked)) == {*keys_of(before), "new"}
        (short,) = client.post("/recommend", asked | {"k": 3}).content["lists"]
        assert keys_of(short) == keys_of(ranked)[:3]
    again = RecommendService(Recommender.from_pretrained(tmp_path / "grown", device="cpu", mode=mode))
    with running(again) as client:
        assert keys_of(client.post("/recommend", asked).content["lists"][0]) == keys_of(ranked)


def test_a_model_without_semantic_ids_is_served(tmp_path):
    save_tiny_sasrec(tmp_path / "model")
    recommender = Recommender.from_pretrained(tmp_path / "model", device="cpu")
    with running(RecommendService(recommender)) as client:
        (ranked,) = client.post("/recommend", {"history": ["item-1"], "k": 12}).content["lists"]
        assert [sorted(item) for item in ranked["items"]] == [["item_key", "score", "title"]] * 12
        assert client.get("/items?query=item-11").content["items"] == [{"item_key": "item-11", "title": ""}]
        health = {"status": "ok", "mode": "sasrec", "num_items": 12, "catalogue_version": 1}
        assert client.get("/healthz").content == health
        for body in ({"add": [{"item_key": "new", "text": {"title": "New"}}]}, {"remove": ["item-1"]}):
            refused = client.post("/items", body)
            assert (refused.status, refused.field) == (422, next(iter(body)))
            assert "needs semantic ids, which a 'sasrec' model has not" in refused.message


def test_changes_and_answers_at_once(artifact):
    """Every answer is that of some whole catalogue, and nothing fails while items come and go."""
    service = RecommendService(Recommender.from_pretrained(artifact, device="cpu"))
    with running(service, max_queue=1000) as client, ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(client.post, "/recommend", {"history": ["item-1"], "k": 12}) for _ in range(60)]
        for _ in range(5):
            assert client.post("/items", {"remove": ["item-2", "item-3"]}).status == 200
            add = [{"item_key": key, "features": [1.0] * 6} for key in ("item-2", "item-3")]
            assert client.post("/items", {"add": add}).status == 200
        for future in asking:
            reply = future.result()
            assert reply.status == 200
            (ranked,) = reply.content["lists"]
            assert {"item-2", "item-3"} <= set(keys_of(ranked)) or not {"item-2", "item-3"} & set(keys_of(ranked))


def test_what_cannot_be_saved_is_said(artifact, tmp_path):
    (tmp_path / "file").write_text("")
    service = RecommendService(Recommender.from_pretrained(artifact, device="cpu"), save_to=tmp_path / "file" / "x")
    with running(service) as client:
        reply = client.post("/items", {"remove": ["item-2"]})
        assert reply.status == 500
        assert "changed in memory, but could not be saved" in reply.message


def test_items_with_text_are_encoded(artifact):
    def encode(texts):
        if any("colour" in text for text in texts):
            raise InputError("unknown text field 'colour'")
        return np.array([[len(text["title"])] * 6 for text in texts], dtype=np.float32)

    service = RecommendService(Recommender.from_pretrained(artifact, device="cpu"), encode_texts=encode)
    with running(service) as client:
        reply = client.post("/items", {"add": [{"item_key": "new", "text": {"colour": "red"}}]})
        assert (reply.status, reply.field, reply.message) == (422, "add[0].text", "unknown text field 'colour'")
        reply = client.post("/items", {"add": [{"item_key": "new", "text": {"title": "A Title"}}]})
        assert reply.content["added"][0]["title"] == "A Title"


def test_a_catalogue_without_titles(artifact, tmp_path):
    recommender = Recommender.from_pretrained(artifact, device="cpu")
    tokenizer = recommender.artifact.tokenizer
    bare = replace(tokenizer.catalogue, titles=[""] * len(tokenizer.catalogue))
    recommender.catalogue = tokenizer.catalogue = bare
    with running(RecommendService(recommender)) as client:
        (ranked,) = client.post("/recommend", {"history": ["item-1"]}).content["lists"]
        assert {item["title"] for item in ranked["items"]} == {""}
        assert client.get("/items?query=item-3").content["items"][0]["title"] == ""


def test_scores_that_are_no_numbers_are_a_fault_of_the_server(artifact):
    recommender = Recommender.from_pretrained(artifact, device="cpu")
    for parameter in recommender.artifact.model.parameters():
        parameter.data.fill_(math.nan)
    with running(RecommendService(recommender)) as client:
        assert client.post("/recommend", {"history": ["item-1"]}).status == 500


def test_the_page_loads_nothing_from_elsewhere(client):
    reply = client.get("/")
    assert reply.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    assert "unsafe" not in reply.headers["Content-Security-Policy"]
    assert "://" not in reply.text.replace("data:,", "")
    assert "innerHTML" not in reply.text


def test_the_schema_is_served(client):
    paths = json.loads(client.get("/openapi.json").text)["paths"]
    assert set(paths) == {"/recommend", "/items", "/healthz", "/metrics"}
