import asyncio
import json

import pytest

from benchmarks.http_load import Connection, Outcome, request_bytes

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason=f"{package} comes with requirements-serve.txt")

from benchmarks import server  # noqa: E402


def test_outcomes_by_hand():
    outcome = Outcome(duration=2.0)
    for status, seconds in ((200, 0.1), (200, 0.1), (200, 0.4), (429, 0.0), (0, 0.0), (500, 0.0)):
        outcome.add(status, seconds)
    assert (outcome.rate, outcome.num_failed) == (1.5, 2)
    assert server.tail(outcome) == pytest.approx(3.94)


def test_a_request_is_whole():
    head, _, body = request_bytes("POST", "/x", {"k": 1}).partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /x HTTP/1.1"
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body) == {"k": 1}


def test_a_connection_that_was_idle_for_too_long_is_opened_again():
    async def answer_once(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
        writer.close()

    async def ask_twice():
        async with await asyncio.start_server(answer_once, "127.0.0.1", 0) as opened:
            connection = Connection(opened.sockets[0].getsockname()[1])
            first = await connection.ask(request_bytes("GET", "/"))
            await asyncio.sleep(0.05)  # the server's end has arrived
            second = await connection.ask(request_bytes("GET", "/"))
            connection.close()
            return first, second

    assert asyncio.run(ask_twice()) == ((200, b"hi"), (200, b"hi"))


@pytest.mark.slow
def test_a_short_run(tmp_path):
    """Nothing fails and the queue keeps its bound; times are left open on a machine that does other things."""
    server.main(["--quick", "--seconds", "0.7", "--device", "cpu", "--results", str(tmp_path)])
    (path,) = tmp_path.rglob("server-quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"].split(", ")[-1] for row in rows] == ["saturation", "half", "overload"]
    assert all(row["failed"] == 0 and row["answered"] > 0 for row in rows)
    assert rows[0]["told_to_wait"] == 0
    assert rows[2]["most_in_queue"] <= server.MAX_QUEUE
