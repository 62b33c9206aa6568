"""What `pip install` puts on a machine: every module of the checkout, and every one imports."""

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"beit_fast": ROOT / "beit_fast", "beit_fast/kernels": ROOT / "kernels"}
SINGLE = ("beit_fast_main.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc")

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in version("setuptools").split(".")[:2]) < (70, 1),
    reason="builds a wheel: pip install -e '.[test]' brings a setuptools that can",
)

BUILD = "from setuptools import build_meta; build_meta.build_wheel({folder!r})"
# An editable install has a finder that would give from the checkout what the wheel has not.
IMPORT = """
import importlib, json, sys
folder, names = {folder!r}, {names!r}
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
sys.path.insert(0, folder)
print(json.dumps([importlib.import_module(name).__file__ for name in names]))
"""


def run(code, folder):
    """What python prints, which knows no path but its own packages'; its errors are the test's."""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def files_of_the_checkout():
    """Paths inside the wheel, as the files of both folders lie there."""
    found = {"beit_fast_main.py"}
    for prefix, folder in PACKAGES.items():
        paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        found |= {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in paths}
    return found


def module_of(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the checkout, in which building leaves what it leaves."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for folder in ("beit_fast", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=SKIPPED)
    for name in SINGLE:
        shutil.copy(ROOT / name, source / name)
    run(BUILD.format(folder=str(built)), source)
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_a_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == files_of_the_checkout()
    assert sum(name.startswith("beit_fast/data/photographs/") for name in held) > 10
    (scripts,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "beit-fast = beit_fast_main:main" in wheel.read(scripts).decode()


def test_every_module_imports_from_the_wheel(wheel, tmp_path):
    wheel.extractall(tmp_path / "installed")
    modules = {module_of(p): p for p in sorted(files_of_the_checkout()) if p.endswith(".py")}
    folder = str(tmp_path / "installed")
    files = json.loads(run(IMPORT.format(folder=folder, names=list(modules)), tmp_path))
    assert files == [str(tmp_path / "installed" / path) for path in modules.values()]
