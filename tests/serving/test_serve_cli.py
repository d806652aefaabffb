import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import serve
from data.schemas import InputError
from tests.modules.tiny_artifact import save_tiny_artifact

REPOSITORY = Path(serve.__file__).parent


def needs_packages():
    for package in serve.PACKAGES:
        pytest.importorskip(package, reason=f"{package} comes with requirements-serve.txt")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_tiny_artifact(folder / "model")
    return str(folder)


@contextmanager
def started(*arguments, **environment):
    """The process and a client of it."""
    needs_packages()
    from tests.serving.running import Client

    process = subprocess.Popen(
        [sys.executable, "serve.py", *arguments, "--port", "0"],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        for line in process.stderr:
            if found := re.match(r"listening on http://127\.0\.0\.1:(\d+)$", line):
                break
        else:
            pytest.fail("the server ended before it listened")
        client = Client(int(found[1]))
        assert client.get("/healthz").status == 200
        yield process, client
    finally:
        process.kill()
        process.communicate()


def test_a_server_that_is_stopped_answers_what_it_accepted(run_folder, tmp_path):
    """The batch waits for company for two seconds; meanwhile the signal comes."""
    save = str(tmp_path / "grown")
    needs_packages()
    from tests.serving.running import metric, wait_until

    with started(run_folder, "--max-wait-ms", "2000", "--save", save) as (process, client):
        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(client.post, "/recommend", {"history": [f"item-{item}"]}) for item in range(3)]
            wait_until(lambda: metric(client, "recommender_queue_histories") == 3)
            process.send_signal(signal.SIGTERM)
            replies = [future.result() for future in asking]
        assert process.wait(30) == 0
    assert [reply.status for reply in replies] == [200] * 3
    assert all(len(reply.content["lists"][0]["items"]) == 10 for reply in replies)
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["system"] == "retrieval"


def test_a_token_from_the_environment(run_folder):
    with started(run_folder, "--token-env", "THE_TOKEN", THE_TOKEN="s3cret") as (process, client):
        assert client.get("/items").status == 401
        assert client.get("/items", Authorization="Bearer s3cret").status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token-env", "NO_SUCH_TOKEN"], "the environment variable NO_SUCH_TOKEN expected a token of visible ASCII"),
        (["--token-file", "absent"], "cannot read the token from absent"),
        (["--max-queue", "3"], "--max-queue 3 is less than --max-histories 64"),
        (["--max-k", "9"], "--max-k 9 is less than 10"),
        (["--timeout", "0"], "expected --timeout above 0"),
        (["--timeout", "inf"], "expected --timeout above 0"),
        (["--max-wait-ms", "inf"], "--max-wait-ms from 0, got 10.0, inf"),
        (["--text-model", "absent", "--port", "0"], "there is no folder absent"),
        (["--text-model", "tests", "--port", "0"], "tests is of no use"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1, port 8000"),
        (["--port", "70000"], "expected --port from 0 to 65535, got 70000"),
        (["--save", "tests"], "--save tests exists, and is not the artifact that is served"),
        (["--device", "tpu9", "--port", "0"], "'tpu9'"),
        (["--mode", "dense", "--port", "0"], "dense retrieval needs a model with a dense head"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_folder, capsys, arguments, message):
    needs_packages()
    assert serve.main([run_folder, *arguments]) == 2
    reported = capsys.readouterr().err
    assert reported.count("\n") == 1
    assert message in reported


def test_a_taken_port_is_found_before_the_model_is_loaded(capsys):
    needs_packages()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve.main(["no/artifact", "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_the_served_artifact_may_be_saved_in_place(run_folder, tmp_path):
    needs_packages()
    serve.check_save(Path(run_folder, "model"), run_folder)
    serve.check_save(Path(run_folder, "model"), f"{run_folder}/model")
    serve.check_save(tmp_path / "new", run_folder)
    serve.check_save(None, run_folder)
    with pytest.raises(InputError, match=f"is a run folder; to change the artifact in it: --save {run_folder}/model"):
        serve.check_save(Path(run_folder), run_folder)


def test_a_token_file(tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    args = serve.parse_arguments(["run", "--token-file", str(tmp_path / "token")])
    assert serve.read_token(args) == "s3cret"


def test_beyond_loopback_a_warning(capsys):
    needs_packages()
    for host, warns in (("0.0.0.0", True), ("127.0.0.2", False), ("localhost", False)):
        settings = serve.settings_of(serve.parse_arguments(["run", "--host", host]))
        with serve.listening_socket(host, 0) as listener:
            serve.greet(listener, settings)
        assert ("whoever reaches 0.0.0.0 may use this server" in capsys.readouterr().err) is warns


def test_missing_packages_are_one_line():
    code = (
        "import sys; sys.modules['uvicorn'] = sys.modules['fastapi'] = None; import serve; sys.exit(serve.main(['x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: serve.py needs fastapi, uvicorn")
    assert done.stderr.endswith("pip install -r requirements-serve.txt.\n")
    assert done.stderr.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = "import sys, serve; code = serve.main(['--help']); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "RUN_OR_ARTIFACT" in done.stdout
