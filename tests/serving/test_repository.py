"""Model repositories: whole or not at all, hard links, versions that follow one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from freewheel.bundle.reader import Bundle
from freewheel.core.errors import OutputError, RequestError
from freewheel.serving import repository
from freewheel.serving.repository import CONFIG, ServeRequest, write_repository


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_model_is_written_with_its_bundle_linked(tiny_bundle: Bundle, tmp_path: Path) -> None:
    written = write_repository(ServeRequest(tiny_bundle, tmp_path / "models", name="wan"))
    model = tmp_path / "models" / "wan"
    assert (written.version, written.folder, written.copied_bytes) == (1, model, 0)
    assert written.bytes > 0
    served = Bundle(model / "1" / "bundle")
    assert files(served.folder) == {*tiny_bundle.manifest.files, "manifest.json"}
    name = next(iter(tiny_bundle.manifest.files))
    assert served.path(name).samefile(tiny_bundle.path(name))
    assert 'name: "wan"' in (model / CONFIG).read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["models"]  # nothing staged is left


def test_writing_again_adds_the_next_version(tiny_bundle: Bundle, tmp_path: Path) -> None:
    request = ServeRequest(tiny_bundle, tmp_path / "models", name="wan")
    write_repository(request)
    (tmp_path / "models" / "other").mkdir()
    second = write_repository(ServeRequest(tiny_bundle, request.out, name="wan", instances=3))
    assert second.version == 2
    model = tmp_path / "models" / "wan"
    assert {p.name for p in model.iterdir()} == {"1", "2", CONFIG}
    assert "count: 3" in (model / CONFIG).read_text()
    assert (tmp_path / "models" / "other").is_dir()
    tenth = write_repository(ServeRequest(tiny_bundle, request.out, name="wan", version=10))
    assert (tenth.version, write_repository(request).version) == (10, 11)


def test_files_are_copied_where_links_can_t_be_made(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "link_or_none", lambda source, target: None)
    written = write_repository(ServeRequest(tiny_bundle, tmp_path / "models", name="wan"))
    assert written.copied_bytes == written.bytes
    assert Bundle(written.folder / "1" / "bundle").digests() == []


def test_a_failure_leaves_nothing_behind(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(repository, "link_or_none", fail)
    with pytest.raises(OutputError, match=r"wan: can't be written: no space .*; choose"):
        write_repository(ServeRequest(tiny_bundle, tmp_path / "models", name="wan"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "models").mkdir()
    with pytest.raises(OutputError):
        write_repository(ServeRequest(tiny_bundle, tmp_path / "models" / "more", name="wan"))
    assert [p.name for p in tmp_path.rglob("*")] == ["models"], "what was there stays"


@pytest.mark.parametrize(
    "options",
    [
        {"name": "../up"},
        {"name": ".hidden"},
        {"instances": 0},
        {"threads": 0},
        {"version": 0},
        {"backend": "tensorrt"},
        {"cuda_graphs": True},
        {"device": 0},
    ],
    ids=str,
)
def test_what_can_t_be_served_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, options: dict[str, object]
) -> None:
    with pytest.raises(RequestError) as fault:
        write_repository(ServeRequest(tiny_bundle, tmp_path, **{"name": "wan", **options}))  # type: ignore[arg-type]
    assert fault.value.hint
    assert files(tmp_path) == set()


def test_a_repository_that_is_a_file_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    with pytest.raises(OutputError, match=r"models: is a file, expected a folder; choose another"):
        write_repository(ServeRequest(tiny_bundle, tmp_path / "models", name="wan"))


def test_a_version_is_never_overwritten(tiny_bundle: Bundle, tmp_path: Path) -> None:
    request = ServeRequest(tiny_bundle, tmp_path, name="wan", version=3)
    write_repository(request)
    with pytest.raises(OutputError, match=r"wan/3: is there already; leave --version out for 4"):
        write_repository(request)


def test_the_folder_of_loras_is_there_and_its_place_is_absolute(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path('my "loras"')
    request = ServeRequest(tiny_bundle, tmp_path / "models", name="wan", lora_folder=folder)
    with pytest.raises(RequestError, match=r"--lora-folder.*is no folder"):
        write_repository(request)
    assert not request.out.exists()
    folder.mkdir()
    text = (write_repository(request).folder / CONFIG).read_text()
    place = str(tmp_path / folder).replace('"', '\\"')
    assert f'key: "lora_folder" value {{ string_value: "{place}" }}' in text
    plain = write_repository(ServeRequest(tiny_bundle, request.out, name="plain"))
    assert "lora_folder" not in (plain.folder / CONFIG).read_text()


def test_weights_inside_engines_are_served_without_loras(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baked = tiny_bundle.manifest.model_copy(update={"weights": "baked"})
    monkeypatch.setattr(tiny_bundle, "manifest", baked)
    with pytest.raises(RequestError, match="weights are inside its engines"):
        write_repository(ServeRequest(tiny_bundle, tmp_path / "models", lora_folder=tmp_path))


def test_options_of_a_gpu_reach_the_server(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = tiny_bundle.manifest.engines[0].model_copy(update={"backend": "tensorrt"})
    compiled = tiny_bundle.manifest.model_copy(update={"engines": [engines]})
    monkeypatch.setattr(tiny_bundle, "manifest", compiled)
    given = {"offload": True, "cuda_graphs": True, "device": 1}
    request = ServeRequest(tiny_bundle, tmp_path / "models", name="wan", **given)
    text = (write_repository(request).folder / CONFIG).read_text()
    for name, value in (("offload", "true"), ("cuda_graphs", "true"), ("device", "1")):
        assert f'key: "{name}" value {{ string_value: "{value}" }}' in text
    plain = write_repository(ServeRequest(tiny_bundle, request.out, name="plain"))
    text = (plain.folder / CONFIG).read_text()
    assert not [name for name in given if f'"{name}"' in text]


def test_weights_inside_engines_are_not_offloaded(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baked = tiny_bundle.manifest.model_copy(update={"weights": "baked"})
    monkeypatch.setattr(tiny_bundle, "manifest", baked)
    with pytest.raises(RequestError, match="--offload: can't be had"):
        write_repository(ServeRequest(tiny_bundle, tmp_path / "models", offload=True))
