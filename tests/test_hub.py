"""Weights folders by hub name, from a server on this machine."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import sis_jax
from sis_jax.checkpoints import catalogue, hub
from sis_jax.types import UsageError

COMMIT = "0" * 39 + "1"


class Server(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that its client asks for one model: info, and files."""

    folder: Path
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        _, _, name = self.path.partition("/resolve/")
        file = self.folder / name.partition("/")[2]
        if self.path.startswith("/api/models/someone/tiny"):
            paths = sorted(self.folder.iterdir())
            content = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name}
                for p in paths
            ]
            if "/tree/" not in self.path:
                names = [{"rfilename": path.name} for path in paths]
                content = {"id": "someone/tiny", "sha": COMMIT, "siblings": names}
            self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith("/someone/tiny/resolve/") and file.is_file():
            headers = {"ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT}
            self._answer(200, file.read_bytes(), headers)
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, status, data, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tiny_weights):
    Server.folder, Server.asked = tiny_weights, []
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


LOAD = """
import sis_jax as sis
from sis_jax.checkpoints import hub
from sis_jax.types import UsageError
print(sis.load_generator("someone/tiny").info.name)
print(hub.folder_of("someone/tiny"))
try:
    sis.load_generator("someone/else")
except UsageError as error:
    print(error)
"""


@pytest.mark.integration
def test_a_weights_folder_is_downloaded_once(server, tmp_path):
    settings = {"HF_ENDPOINT": server, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", LOAD]

    def load(**more):
        env = os.environ | settings | more
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    name, place, error = load()
    assert name == "tiny" and Path(place).is_relative_to(tmp_path / "hub" / "models--someone--tiny")
    assert error.startswith("someone/else is not here and was not downloaded (")
    assert (
        "download model.safetensors, config.json from https://huggingface.co/someone/else" in error
    )
    before = [path for path in Server.asked if "tiny" in path]
    assert any(path.endswith("model.safetensors") for path in before)
    assert load(HF_HUB_OFFLINE="1")[:2] == [name, place]
    assert [path for path in Server.asked if "tiny" in path] == before


def test_a_slip_in_a_path_asks_no_hub(tmp_path, monkeypatch):
    """runs/facs, where runs/ is here, is a path; so are names of files."""
    asked = []
    monkeypatch.setattr(hub, "_snapshot", lambda *_, **__: (asked.append(1), (None, "no"))[1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for text in ("runs/facs", "faces64", "a/b/c", "someone/net.pt", "../x", "/a/b"):
        assert hub.folder_of(text) is None
    assert asked == []
    with pytest.raises(UsageError, match=r"someone/facs is not here and was not downloaded \(no\)"):
        hub.folder_of("someone/facs")


def test_a_folder_that_ships_is_nobody_elses(monkeypatch):
    """someone/faces64 is not the faces64 in ported_weights/."""
    monkeypatch.setattr(hub, "_snapshot", lambda *_, **__: (None, "no"))
    with pytest.raises(UsageError, match="someone/faces64 is not here"):
        hub.folder_of("someone/faces64")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://huggingface.co/someone/tiny", "give the name of the model, someone/tiny"),
        ("https://example.org/net.pkl", "is an address: download the file, and give its path"),
        ("s3://bucket/net.pkl", "is an address: download the file, and give its path"),
    ],
)
def test_an_address_is_no_file(text, said):
    for load in (sis_jax.load_generator, sis_jax.load_student, sis_jax.load_clip):
        with pytest.raises(UsageError, match=said):
            load(text)


@pytest.mark.parametrize(
    ("load", "name"),
    [("load_generator", "faces64"), ("load_student", "faces-student"), ("load_clip", "faces-clip")],
)
def test_weights_that_were_not_installed(load, name, monkeypatch):
    monkeypatch.setattr(catalogue, "search_folders", list)
    said = f"the weights {name} ship with sis_jax, and are missing from this installation"
    with pytest.raises(UsageError, match=said):
        getattr(sis_jax, load)(name)
