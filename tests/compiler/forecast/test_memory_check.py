"""A run that memory can't hold is refused before anything of it is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
from generations import generation_of

from freewheel.bundle.manifest import ResolvedConfig
from freewheel.bundle.reader import Bundle
from freewheel.compiler.cut.document import cut_of
from freewheel.compiler.forecast import memory_check
from freewheel.compiler.forecast.memory_check import check_fit, forecast_memory
from freewheel.compiler.sizes import size_of
from freewheel.core.errors import RequestError
from freewheel.policies.setting import CacheSetting
from freewheel.runtime.pipeline.parts import loaded_bytes

GB = 10**9


@pytest.fixture
def entry() -> ResolvedConfig:
    return ResolvedConfig(cache=CacheSetting(policy="taylorseer"), generation=generation_of())


def check(bundle: Bundle, entry: ResolvedConfig, frames: int = 81) -> str | None:
    size = size_of(entry.generation, height=480, width=832, frames=frames, steps=4)
    return check_fit(bundle, entry, size, backend=None, model=None)


def available(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(memory_check, "memory_available_bytes", lambda: count)


def test_what_fits_is_not_mentioned(
    i2v_bundle: Bundle, entry: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    available(monkeypatch, 100 * GB)
    assert check(i2v_bundle, entry) is None


def test_a_size_beyond_the_memory_is_refused_with_the_number_that_decides(
    i2v_bundle: Bundle, entry: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    available(monkeypatch, GB)
    with pytest.raises(RequestError) as caught:
        check(i2v_bundle, entry)
    assert caught.value.where == "run at 832x480, 81 frames"
    assert "1.00 GB available; VAE at work decide: " in caught.value.what
    assert "--force" in caught.value.hint
    assert check(i2v_bundle, entry, frames=1) is None, "one frame of it fits"


def test_mapped_weights_alone_are_a_warning(
    tiny_bundle: Bundle, entry: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "memory_beside", lambda *args, **options: {})
    monkeypatch.setattr(
        memory_check,
        "footprint_of",
        lambda *args, **options: _Parts({"weights": 30 * GB, "rest": GB}),
    )
    available(monkeypatch, 20 * GB)
    warning = check(tiny_bundle, entry)
    assert warning is not None
    assert "weights decide: 30.00 GB" in warning
    assert "memory-mapped, so it runs" in warning


class _Parts:
    """A forecast of given parts."""

    def __init__(self, parts: dict[str, int]) -> None:
        self._parts = parts

    def parts(self, setting: str, *, offload: bool) -> dict[str, int]:
        return self._parts

    def as_dict(self) -> dict[str, object]:
        return {}


def test_the_pipeline_may_lie_elsewhere(
    tiny_bundle: Bundle,
    i2v_checkpoint: Path,
    entry: ResolvedConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    available(monkeypatch, GB)
    assert check(tiny_bundle, entry) is None, "nothing is known of a pipeline"
    size = size_of(entry.generation, height=480, width=832, frames=81, steps=4)
    with pytest.raises(RequestError, match="VAE at work"):
        check_fit(tiny_bundle, entry, size, backend=None, model=i2v_checkpoint)


def test_the_gpu_that_will_run_is_the_one_that_is_asked(
    i2v_bundle: Bundle, entry: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {None: 100 * GB, 0: 100 * GB, 1: 10**7}
    monkeypatch.setattr(memory_check, "gpu_free_bytes", lambda index=None: free[index])
    size = size_of(entry.generation, height=480, width=832, frames=81, steps=4)
    for gpu in (None, 0):
        assert check_fit(i2v_bundle, entry, size, backend="tensorrt", model=None, gpu=gpu) is None
    with pytest.raises(RequestError, match=r"10\.00 MB available.*with --offload, or pass --force"):
        check_fit(i2v_bundle, entry, size, backend="tensorrt", model=None, gpu=1)


def test_a_gpu_holds_the_pipelines_parts_and_offloading_leaves_it_less(
    i2v_bundle: Bundle, i2v_checkpoint: Path, entry: ResolvedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "gpu_free_bytes", lambda index=None: 0)
    size = size_of(entry.generation, height=64, width=96, frames=9, steps=4)

    def parts(backend: str, **options: bool) -> dict[str, int]:
        manifest = i2v_bundle.manifest
        found: dict[str, int] = forecast_memory(
            cut_of(i2v_bundle),
            size,
            setting="run",
            settings={"run": entry.cache},
            specs=manifest.specs,
            pipeline=i2v_checkpoint,
            backend=backend,
            precision=manifest.precision,
            **options,
        )["parts"]
        return found

    host, gpu, less = parts("onnxruntime"), parts("tensorrt"), parts("tensorrt", offload=True)
    assert gpu == {name: count for name, count in host.items() if name != "program"}
    loaded = loaded_bytes(i2v_checkpoint)
    assert gpu["other parts of the pipeline"] == sum(loaded.values())
    assert less["largest part of the pipeline"] == loaded["vae"] + gpu["VAE at work"]
    assert less["largest part of the pipeline"] > loaded["text_encoder"]
    assert less["weights"] < gpu["weights"]
    changed = {"weights", "largest part of the pipeline"}
    assert {n: less[n] for n in less.keys() - changed} == {
        n: gpu[n] for n in gpu.keys() - {"weights", "other parts of the pipeline", "VAE at work"}
    }
    with pytest.raises(RequestError, match="smaller size, or pass --force"):
        check_fit(i2v_bundle, entry, size, backend="tensorrt", model=None, offload=True)
