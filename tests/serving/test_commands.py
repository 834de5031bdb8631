"""`freewheel serve`: what it writes and the two commands that it prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from freewheel.bundle.manifest import TokenizerEntry
from freewheel.bundle.reader import Bundle
from freewheel.cli import app
from freewheel.serving.commands import example_request, start_server
from freewheel.serving.repository import Written


def test_serve_writes_a_model_and_prints_two_commands(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["serve", str(tiny_bundle.folder), "--out", "models", "--name", "wan"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    server, request = done.stdout.splitlines()
    assert "--model-repository=models" in shlex.split(server)
    assert shlex.split(request)[:4] == ["python", "examples/triton_client.py", "--model", "wan"]
    assert "libtriton_freewheel.so is not there yet" in done.stderr
    again = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert again["version"] == 2
    assert again["commands"]["server"] == server


def test_a_refusal_has_its_exit_code(tiny_bundle: Bundle, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["serve", str(tiny_bundle.folder), "--out", str(tmp_path), "--name", "a b", "--json"]
    )
    assert done.exit_code == 3
    assert json.loads(done.stdout)["error"]["hint"] == "give --name wan"


def test_the_server_s_variables_stand_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from freewheel.serving import commands
    from freewheel.serving.server import Server

    found = Server(Path("/x/tritonserver"), {"LD_LIBRARY_PATH": "/x y/libs"})
    monkeypatch.setattr(commands, "find_server", lambda: found)
    assert start_server(Path("m"), Path("b")).startswith(
        "LD_LIBRARY_PATH='/x y/libs' /x/tritonserver --model-repository=m"
    )


def test_a_bundle_with_its_text_encoder_is_asked_with_words(tiny_bundle: Bundle) -> None:
    written = Written("wan", 1, Path("models/wan"), 1, 0)
    assert "--embeddings" in example_request(tiny_bundle, written)
    graphs = {**tiny_bundle.manifest.graphs, "text_encoder": tiny_bundle.manifest.graphs["head"]}
    manifest = tiny_bundle.manifest.model_copy(update={"graphs": graphs})
    tiny = Bundle(tiny_bundle.folder)
    tiny.manifest = manifest
    assert "--tokenizer" in example_request(tiny, written)
    with_tokenizer = {"tokenizer": TokenizerEntry(file="tokenizer/model.xml")}
    tiny.manifest = manifest.model_copy(update=with_tokenizer)
    assert "--prompt" in example_request(tiny, written)
    assert "--tokenizer" not in example_request(tiny, written)
