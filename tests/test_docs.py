"""The notebooks run, every link leads somewhere, and the reference has every public name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flax_googlenet
from flax_googlenet.commands import cli

ROOT = Path(__file__).parents[1]
SUBCOMMANDS = tuple(cli.SUBCOMMANDS)
MODULES = (flax_googlenet, flax_googlenet.training, flax_googlenet.visualization)
PORT_WEIGHTS = "python convert/port_weights.py"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NOTEBOOKS = [page for page in PAGES if "```{code-cell}" in page.read_text(encoding="utf-8")]


def test_there_are_notebooks() -> None:
    assert {notebook.stem for notebook in NOTEBOOKS} == {"first_steps", "fine_tuning"}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    cells = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", notebook.read_text(encoding="utf-8"), re.M | re.S)
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(cells), encoding="utf-8")
    environment = os.environ | {"MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    process = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, link


def commands(text: str) -> list[str]:
    """Return the command lines in the blocks of a page, those after && included."""
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", text.replace("\\\n", " "), re.M | re.S)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [command.strip() for line in lines for command in line.split("&&")]


@pytest.mark.parametrize("program", [PORT_WEIGHTS, *(f"flax-googlenet {name}" for name in SUBCOMMANDS)])
def test_the_help_has_every_option_that_a_page_uses(program: str) -> None:
    lines = [line for page in PAGES for line in commands(page.read_text(encoding="utf-8")) if line.startswith(program)]
    assert lines
    script = ["-m", "flax_googlenet", program.split()[1]] if program != PORT_WEIGHTS else program.split()[1:]
    process = subprocess.run([sys.executable, *script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for line in lines:
        options = {word for word in line.split() if word.startswith("--")}
        assert all(re.search(rf"{re.escape(option)}\b", process.stdout) for option in options), line


def test_ci_runs_the_test_command_of_the_readme() -> None:
    *_, install, test = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert test.startswith("pytest")
    assert f"{install}\n{test}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name() -> None:
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\.\. auto\w+:: (\w+)$", reference, re.M))
    assert documented == {name for module in MODULES for name in module.__all__}
