"""The benchmarks run on a new machine, with empty caches, and with blanks in the path of the temporary folder."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import accelerator
import inference
import input as input_alone
import pytest
import side_by_side
import stages
import start
import training
import visualization

BENCHMARKS = Path(side_by_side.__file__).parent


@pytest.mark.parametrize("place", ["two words", "a,comma"])
@pytest.mark.parametrize(
    "module", [inference, training, stages, visualization, input_alone], ids=lambda module: module.__name__
)
def test_no_engine_gets_a_folder_that_a_compiler_would_split(
    module: object, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / place
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with side_by_side.scratch() as folder:
        names = list(module.ENGINES)  # type: ignore[attr-defined]
        paths = [path for name in names for path in side_by_side.folders(name, folder).values()]
        assert len(set(paths)) == 3 * len(names)
        assert all(re.fullmatch(r"[\w/.-]+", path) for path in paths)


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("inference.py", ["--quick"]),
        ("training.py", ["--quick"]),
        ("stages.py", ["--quick"]),
        ("accelerator.py", ["--quick"]),
        ("visualization.py", ["--quick"]),
        ("input.py", ["--quick"]),
        ("start.py", ["--quick"]),
        ("drift.py", ["drift.png", "--steps", "1"]),
    ],
)
def test_every_engine_starts_on_a_new_machine(script: str, options: list[str], tmp_path: Path) -> None:
    temporary = tmp_path / "two words, and a comma"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    for variable in ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        environment.pop(variable, None)
    process = subprocess.run(
        [sys.executable, BENCHMARKS / script, *options], cwd=temporary, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    engines = {
        "inference.py": inference.ENGINES,
        "training.py": training.ENGINES,
        "stages.py": stages.ENGINES,
        "visualization.py": visualization.ENGINES,
        "input.py": input_alone.ENGINES,
        "start.py": start.ENGINES,
        "accelerator.py": [f"| {library}, TF32 |" for library in accelerator.LIBRARIES],
    }
    assert all(name in process.stdout for name in engines.get(script, ("JAX float32", "JAX float64")))
