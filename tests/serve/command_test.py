"""`anyexperts serve`: errors in one line, what it prints, and how it stops."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from anyexperts_jax.cli.main import main
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.serve.run import API_KEY, Address, api_key_of, bind, is_loopback
from serve.tiny import tiny_folder

for package in ("safetensors", "tokenizers", "starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)


def test_a_missing_model_is_one_line(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "nothing")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("anyexperts: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-budget", "9"], "budget=9 must be from 1 to 7"),
        (["--length", "500"], "length=500 is more than the model's 96 positions"),
        (["--length", "1"], "length=1 must be >= 2"),
    ],
)
def test_sizes_out_of_the_models_range_are_refused(options, said, tmp_path, capsys):
    assert main(["serve", str(tiny_folder(tmp_path / "tiny")), *options]) == 2
    assert said in capsys.readouterr().err


def test_bind_refuses_an_address_it_cannot_have():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*; try another port"):
            bind(Address(port=port))
    with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:70000"):
        bind(Address(port=70000))


def test_the_api_key_is_read_from_the_environment():
    assert api_key_of({}) is None
    assert api_key_of({API_KEY: " secret\n"}) == "secret"
    with pytest.raises(UserError, match=f"{API_KEY} is set but empty"):
        api_key_of({API_KEY: " "})


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("box", False)]
)
def test_is_loopback(host, own):
    assert is_loopback(host) == own


@pytest.mark.slow
def test_sigterm_finishes_running_answers_and_exits_with_0(tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    command = [sys.executable, "-m", "anyexperts_jax", "serve", str(folder), "--port", "0", "--slots", "2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = iter(server.stderr.readline, "")
        ready = next(line for line in lines if line.startswith("serving "))
        name, url = ready.split()[1], ready.split()[3]
        assert name == "tiny"
        connection = http.client.HTTPConnection(url.removeprefix("http://").removesuffix("/v1"), timeout=120)
        body = {
            "model": "tiny",
            "prompt": [5, 3],
            "max_tokens": 90,
            "temperature": 1,
            "seed": 1,
            "stream": True,
            "n": 4,
        }
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        said = answer.readline()
        server.send_signal(signal.SIGTERM)
        said += answer.read()
        connection.close()
        assert said.endswith(b"data: [DONE]\n\n")
        assert said.count(b'"finish_reason":"') == 4
        assert server.wait(60) == 0
        assert server.stderr.read().splitlines()[-1] == "stopped: every request that was taken is answered"
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
