"""Finding `tritonserver`, and the command that starts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from freewheel.serving import server
from freewheel.serving.server import Server, find_server, server_command


@pytest.fixture(autouse=True)
def _no_server_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(server, "CONTAINER", tmp_path / "container" / "tritonserver")


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return path


def test_the_wheel_s_server_needs_its_libraries(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    assert find_server(venv) is None
    site = venv / "lib" / "python3.11" / "site-packages"
    binary = program(site / "pytriton" / "tritonserver" / "bin" / "tritonserver")
    libraries = str(site / "nvidia_pytriton.libs")
    assert find_server(venv) == Server(binary, {"LD_LIBRARY_PATH": libraries})


def test_a_server_on_the_path_comes_first_then_the_container_s(tmp_path: Path) -> None:
    container = program(tmp_path / "container" / "tritonserver")
    assert find_server(tmp_path) == Server(container)
    named = program(tmp_path / "bin" / "tritonserver")
    assert find_server(tmp_path) == Server(named)


def test_the_command_listens_on_three_ports_of_one_address() -> None:
    command = server_command(Server(Path("tritonserver")), Path("models"), Path("b"), port=9000)
    assert command[0] == "tritonserver"
    assert "--model-repository=models" in command
    assert "--backend-directory=b" in command
    ports = [part for part in command if "-port=" in part]
    assert ports == ["--http-port=9000", "--grpc-port=9001", "--metrics-port=9002"]
    assert sum("-address=127.0.0.1" in part for part in command) == 3
