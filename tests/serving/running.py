"""A real server in a thread, on a free port of the loopback address, and a client without any package."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from typing import NamedTuple

import uvicorn

from serving.app import Settings, create_app


class Reply(NamedTuple):
    status: int
    headers: dict
    text: str

    @property
    def content(self):
        return json.loads(self.text)

    @property
    def field(self):
        return self.content["error"]["field"]

    @property
    def message(self):
        return self.content["error"]["message"]


class Client:
    """One connection per request."""

    def __init__(self, port, host="127.0.0.1"):
        self.host, self.port = host, port

    def request(self, method, path, body=None, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            names = {name.title(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read().decode())
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.request("GET", path, **headers)

    def post(self, path, body, **headers):
        return self.request("POST", path, body, **headers)


@contextmanager
def running(service, **settings):
    """A client of a server with this service."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(service, Settings(**settings)), log_level="critical", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


def wait_until(happened, seconds=30):
    """The last value of a condition that must come true soon."""
    deadline = time.monotonic() + seconds
    while not (value := happened()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return value


def metric(client, name, **headers):
    """A value of /metrics."""
    lines = client.get("/metrics", **headers).text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), None)
