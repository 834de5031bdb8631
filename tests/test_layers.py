# SPDX-License-Identifier: Apache-2.0
"""The shape of the repository: who may import whom, and that every source file has its tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "bundle",
    "commands",
    "compiler",
    "configs",
    "core",
    "engines",
    "passes",
    "policies",
    "runtime",
    "serving",
    "tuning",
)

ALLOWED = {
    "core": set(),
    "policies": {"core"},
    "configs": {"core", "policies"},
    "engines": {"core"},
    "passes": {"core"},
    "bundle": {"core", "policies"},
    "runtime": {"bundle", "configs", "core", "engines", "policies"},
    "compiler": {"bundle", "configs", "core", "engines", "passes", "policies", "runtime"},
    "tuning": {"bundle", "configs", "core", "engines", "policies", "runtime"},
    "serving": {"bundle", "core", "runtime"},
    "commands": {
        "bundle",
        "compiler",
        "configs",
        "core",
        "engines",
        "policies",
        "runtime",
        "serving",
        "tuning",
    },
    "cli": {"", "commands", "core"},
    "__main__": {"cli"},
    "": {"core", "policies", "runtime"},
}
"""Package or top module → those it imports; "" is the root's `__init__`: version, `attach`."""

ONLY_IN = {
    "diffusers": ("commands/options.py", "compiler", "runtime", "tuning/bench.py"),
    "gguf": ("compiler/checkpoints/gguf_file.py",),
    "huggingface_hub": ("compiler/checkpoints/checkpoint.py",),
    "imageio": ("runtime/pipeline/video.py",),
    "onnx": ("compiler", "engines"),
    "onnx_ir": ("compiler", "passes"),
    "onnxruntime": ("engines/onnxruntime.py",),
    "onnxscript": ("passes/optimize_graph.py",),
    "openvino": ("engines/openvino.py", "engines/openvino_tokenizer.py"),
    "openvino_tokenizers": ("engines/openvino_tokenizer.py",),
    "peft": ("runtime/pipeline/adapters.py",),
    "polygraphy": ("compiler",),
    "rich": ("commands/screen.py", "compiler"),
    "skimage": ("tuning/quality.py",),
    "starlette": ("serving/videos.py",),
    "tensorrt": ("engines/tensorrt.py",),
    "tensorrt_rtx": ("engines/tensorrt.py",),
    "torch": ("bundle", "compiler", "engines", "policies", "runtime", "tuning"),
    "transformers": ("commands/options.py", "compiler"),
    "typer": ("cli.py", "commands"),
    "uvicorn": ("commands/videos.py",),
}
"""Third-party package → the files or folders where its weight stops."""

UNMIRRORED = {
    "bundle/__init__.py": "empty",
    "commands/__init__.py": "empty",
    "compiler/__init__.py": "empty",
    "compiler/checkpoints/__init__.py": "empty",
    "compiler/cut/__init__.py": "empty",
    "compiler/forecast/__init__.py": "empty",
    "compiler/graphs/__init__.py": "empty",
    "compiler/sequence/__init__.py": "empty",
    "compiler/verify/__init__.py": "empty",
    "core/__init__.py": "empty",
    "runtime/__init__.py": "empty",
    "runtime/distributed/__init__.py": "empty",
    "runtime/forecast/__init__.py": "empty",
    "runtime/pipeline/__init__.py": "empty",
    "serving/__init__.py": "empty",
    "tuning/__init__.py": "empty",
    "core/progress.py": "a protocol and its empty form",
    "compiler/cut/declared.py": "data classes alone; models/test_init.py checks what fills them",
    "core/tensor_spec.py": "one data class without behaviour",
}
"""Source file → why it has no test file of its name."""

TESTED_THROUGH = {
    "__init__.py": "runtime/pipeline/test_attach.py",
    "compiler/cut/image_patches.py": "compiler/cut/test_patch.py",
    "compiler/cut/video_patches.py": "compiler/cut/test_patch.py",
    "__main__.py": "runtime/distributed/test_ranks.py",
    "compiler/cut/audio_models.py": "compiler/cut/test_models.py",
    "compiler/cut/image_models.py": "compiler/cut/test_models.py",
    "compiler/pipeline_files.py": "compiler/test_build.py",
    "compiler/request.py": "compiler/test_plan.py",
    "compiler/forecast/run.py": "compiler/test_inspect.py",
    "compiler/forecast/tables.py": "compiler/test_inspect.py",
    "compiler/cut/video_models.py": "compiler/cut/test_models.py",
    "configs/__init__.py": "configs/test_load.py",
    "tuning/rank.py": "tuning/test_suite_recorder.py",
    "tuning/calibration.py": "tuning/test_calibrate.py",
    "tuning/pieces.py": "tuning/test_shares.py",
    "tuning/solved_configs.py": "tuning/test_calibrate.py",
    "tuning/threshold_configs.py": "tuning/test_calibrate.py",
    "policies/config.py": "configs/test_load.py",
    "commands": "test_cli.py",
    "engines/__init__.py": "engines/test_backends.py",
    "engines/openvino_tokenizer.py": "compiler/graphs/test_tokenizer.py",
    "runtime/pipeline/adapters.py": "runtime/test_lora.py",
    "runtime/pipeline/arguments.py": "runtime/pipeline/test_attach.py",
    "runtime/pipeline/parts.py": "compiler/forecast/test_memory_beside.py",
    "runtime/pipeline/request.py": "runtime/pipeline/test_generate.py",
    "runtime/pipeline/transformer.py": "runtime/pipeline/test_attach.py",
    "compiler/sequence/evaluate.py": "compiler/sequence/test_cut.py",
    "compiler/sequence/blocks.py": "compiler/sequence/test_cut.py",
    "compiler/sequence/finish.py": "compiler/sequence/test_cut.py",
    "compiler/sequence/local.py": "compiler/sequence/test_cut.py",
    "compiler/sequence/pieces.py": "compiler/sequence/test_cut.py",
    "runtime/distributed/alike.py": "runtime/distributed/test_ranks.py",
    "runtime/distributed/counts.py": "runtime/distributed/test_sequence.py",
    "runtime/distributed/exchange.py": "runtime/distributed/test_sequence.py",
    "runtime/distributed/formula.py": "runtime/distributed/test_sequence.py",
    "runtime/distributed/layout.py": "runtime/distributed/test_ranks.py",
    "runtime/distributed/shared_run.py": "runtime/distributed/test_sequence.py",
    "runtime/body.py": "runtime/test_session.py",
    "runtime/buffers.py": "runtime/test_session.py",
    "runtime/branch_cache.py": "runtime/test_session.py",
    "runtime/decider.py": "tuning/test_replay.py",
    "runtime/forecast/fold.py": "tuning/test_replay.py",
    "runtime/model.py": "runtime/test_session.py",
    "runtime/step_record.py": "tuning/test_gram.py",
}
"""Source file or folder → the test file that covers it, where none has its name."""


def sources() -> list[Path]:
    found = [*ROOT.glob("*.py"), *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))]
    return sorted(p.relative_to(ROOT) for p in found)


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every module that a source file imports, in functions too, with the line."""
    parts = ("freewheel", *path.parts)
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level]
            yield ".".join((*base, node.module or "")).rstrip("."), node.lineno


def package_of(path: Path) -> str:
    name = path.parts[0] if len(path.parts) > 1 else path.stem
    return "" if name == "__init__" else name


def third_party(path: Path) -> set[str]:
    return {name.split(".")[0] for name, _ in imported(path)} - {"freewheel"}


def test_the_walk_finds_the_sources() -> None:
    found = {str(p) for p in sources()}
    assert {"cli.py", "compiler/cut/declared.py", "engines/tensorrt.py"} <= found
    assert {package_of(Path(p)) for p in found} == set(ALLOWED)
    assert "freewheel.core.errors" in {n for n, _ in imported(Path("cli.py"))}
    assert "freewheel.engines.base" in {n for n, _ in imported(Path("compiler/cut/declared.py"))}


def test_imports_go_one_way() -> None:
    wrong = []
    found: dict[str, set[str]] = {name: set() for name in ALLOWED}
    for path in sources():
        own = package_of(path)
        for name, line in imported(path):
            root, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if root != "freewheel" or target == own:
                continue
            found[own].add(target)
            if target not in ALLOWED[own]:
                wrong.append(f"{path}:{line} imports {name}")
    assert wrong == []
    assert found == ALLOWED, "a row allows what nobody imports any more: take it out"


def test_third_party_weight_stops_at_its_file() -> None:
    wrong = []
    for path in sources():
        wrong += [
            f"{path} imports {name}"
            for name in sorted(third_party(path) & set(ONLY_IN))
            if not any(path.is_relative_to(place) for place in ONLY_IN[name])
        ]
    assert wrong == []


def test_torch_export_is_compiler_business() -> None:
    for path in sources():
        if path.parts[0] != "compiler":
            text = (ROOT / path).read_text(encoding="utf-8")
            assert "torch.export" not in text, path
            assert "torch.onnx.export" not in text, path


def test_packages_import_relatively_and_the_command_line_absolutely() -> None:
    for path in sources():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                absolute = (node.module or "").startswith("freewheel") and not node.level
                if path.name != "cli.py":
                    assert not absolute, f"{path}:{node.lineno}"
                else:
                    assert not node.level, f"{path}:{node.lineno}"


def test_no_pickle_is_ever_opened() -> None:
    for path in sources():
        assert not third_party(path) & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
        text = (ROOT / path).read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text)))  # a message may name the call, no code may make it
        assert "torch.load" not in {
            ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)
        }, path
        imported = [
            a.name
            for n in nodes
            if isinstance(n, ast.ImportFrom)
            if n.module == "torch"
            for a in n.names
        ]
        assert "load" not in imported, path
        assert "allow_pickle=True" not in text, path


HEAVY = (
    "torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxscript",
    "openvino", "tensorrt", "tensorrt_rtx", "polygraphy", "numpy",
)  # fmt: skip

LISTS_HEAVY = f"import sys; print([m for m in {HEAVY} if m in sys.modules])"


@pytest.mark.parametrize(
    "code",
    [
        f"import freewheel.cli; {LISTS_HEAVY}",
        f"import freewheel.configs.load; {LISTS_HEAVY}",
        "import sys, io, contextlib\n"
        "from freewheel.cli import main\n"
        "sys.argv = ['freewheel', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "assert 'build' in out.getvalue(), out.getvalue()\n"
        f"{LISTS_HEAVY}",
        "import sys, io, contextlib\n"
        "from freewheel.cli import main\n"
        "sys.argv = ['freewheel', 'build', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "assert 'precision' in out.getvalue(), out.getvalue()\n"
        f"{LISTS_HEAVY}",
    ],
    ids=["cli", "configs", "help", "build help"],
)
def test_help_needs_neither_torch_nor_a_backend(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "freewheel.engines",
            ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "polygraphy"),
        ),
        ("freewheel.runtime.session", ("onnx", "onnx_ir", "onnxscript", "openvino", "onnxruntime")),
        ("freewheel.policies", ("diffusers", "onnx", "onnx_ir", "openvino", "onnxruntime")),
    ],
)
def test_importing_a_layer_needs_none_below_its_task(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert done.stdout.strip() == "[]"


def mirror(path: Path) -> Path:
    name = path.stem.strip("_")
    return ROOT / "tests" / path.parent / f"test_{name}.py"


def test_every_source_file_has_its_tests() -> None:
    missing = [
        path.as_posix()
        for path in sources()
        if not mirror(path).is_file()
        and not any(path.is_relative_to(listed) for listed in {*UNMIRRORED, *TESTED_THROUGH})
    ]
    assert missing == []


def test_listed_exceptions_are_needed() -> None:
    known = {place.as_posix() for p in sources() for place in (p, *p.parents)}
    for name, covering in TESTED_THROUGH.items():
        assert name in known, name
        assert (ROOT / "tests" / covering).is_file(), covering
    for name in UNMIRRORED:
        assert name in known, name
        assert not mirror(Path(name)).is_file(), f"{name} has its tests: drop the exception"


def test_every_package_is_installed() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {p.parent for p in sources() if p.name == "__init__.py"}
    assert listed == {".".join(("freewheel", *f.parts)) for f in folders}


def test_source_files_name_their_licence_first() -> None:
    for path in sources():
        first = (ROOT / path).read_text(encoding="utf-8").split("\n", 1)[0]
        assert first == "# SPDX-License-Identifier: Apache-2.0", path


def test_no_file_is_called_utils() -> None:
    assert not {p.stem for p in sources()} & {"utils", "util", "helpers", "common", "misc"}


def test_commit_hooks_run_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = [
        line
        for target in ("style", "lint")  # the second after the first
        for line in makefile.split(f"\n{target}:", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    ]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    entries = [line.split("entry: ", 1)[1] for line in hooks.splitlines() if "entry: " in line]
    assert [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe] == entries
    assert len(entries) == 3
