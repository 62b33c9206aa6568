"""No source file has a call that would run what a file says: all of them are looked through."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.promise("S1", "S8")
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("beit_fast", "kernels")
# Of these nothing is used, but for the names in the braces.
NOTHING_OF = {
    "pickle": {"UnpicklingError"},  # an error of torch.load
    "torch.hub": {"get_dir", "download_url_to_file"},  # of published weights, by their digest
    "torch.package": set(),
    "torch.jit.load": set(),
    "torch.serialization.add_safe_globals": set(),
    "runpy": set(),
    "imp": set(),
    "code": set(),
    "numpy.fromregex": set(),
    **{name: set() for name in ("marshal", "shelve", "dill", "cloudpickle", "joblib", "pty")},
    **{f"os.{name}": set() for name in ("system", "popen", "startfile", "posix_spawn")},
    **{f"os.exec{kind}": set() for kind in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")},
    **{f"os.spawn{kind}": set() for kind in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")},
    **{f"subprocess.{name}": set() for name in ("getoutput", "getstatusoutput")},
    **{f"yaml.{name}": set() for name in ("load", "load_all", "full_load", "unsafe_load")},
    **{f"yaml.{name}": set() for name in ("Loader", "FullLoader", "UnsafeLoader", "CLoader")},
    **{f"builtins.{name}": set() for name in ("eval", "exec", "compile", "__import__")},
    **{f"importlib.{name}": set() for name in ("import_module", "reload", "machinery")},
    **{f"importlib.util.{name}": set() for name in ("module_from_spec", "spec_from_file_location")},
}
PACKAGES = {name.partition(".")[0] for name in NOTHING_OF}
BUILTINS = ("eval", "exec", "compile", "__import__")
# Names of modules that are ours or a library's, and come from no file.
ALLOWED = {
    ("beit_fast/__init__.py", "importlib.import_module"),
    ("beit_fast/acceleration/patching.py", "builtins.__import__"),
}


def dangers(source: str) -> list[str]:
    """What in it may run code of a file: dotted names, or what is missing of a call."""
    nodes = list(ast.walk(ast.parse(source)))
    names, used = {name: f"builtins.{name}" for name in BUILTINS}, set()
    for node in nodes:
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or name] = name
        elif isinstance(node, ast.ImportFrom):
            imported = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            names, used = names | imported, used | {*imported.values()}

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, "")
        if isinstance(node, ast.Attribute) and (inner := dotted(node.value)):
            return f"{inner}.{node.attr}"
        return ""

    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            used.add(dotted(node))
    found = []
    for name in used:
        if name.partition(".")[0] not in PACKAGES:
            continue
        for danger, harmless in NOTHING_OF.items():
            rest = name.removeprefix(danger)
            inside = rest.startswith(".") and rest.split(".")[1] not in harmless
            if name.startswith(danger) and (inside or (not rest and not harmless)):
                found.append(name)
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {k.arg: k.value for k in node.keywords}
        for function, keyword, value in (
            ("torch.load", "weights_only", True),
            ("numpy.load", "allow_pickle", False),
            ("numpy.save", "allow_pickle", False),
        ):
            said = given.get(keyword)
            if name == function and not (isinstance(said, ast.Constant) and said.value is value):
                found.append(f"{function} without {keyword}={value}")
        shell = given.get("shell")
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            found.append(f"{name or 'a call'} with shell")
    return sorted(set(found))


def test_no_source_file_has_any():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    paths += [ROOT / "beit_fast_main.py", ROOT / "setup.py"]
    assert len(paths) > 150
    found = set()
    for path in paths:
        short = path.relative_to(ROOT).as_posix()
        found |= {(short, danger) for danger in dangers(path.read_text(encoding="utf-8"))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle\npickle.load(f)", "pickle.load"),
        ("import pickle as p\np.Unpickler(f)", "pickle.Unpickler"),
        ("from pickle import loads as json\njson(b)", "pickle.loads"),
        ("import torch\ntorch.load(p)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(p, weights_only=w)", "torch.load without weights_only=True"),
        ("from torch import load\nload(p, weights_only=False)", "torch.load without weights_onl"),
        ("import torch\ntorch.hub.load('a/b', 'c')", "torch.hub.load"),
        ("from torch.hub import load", "torch.hub.load"),
        ("import torch\ntorch.jit.load(p)", "torch.jit.load"),
        ("import numpy as np\nnp.load(p)", "numpy.load without allow_pickle=False"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "numpy.load without"),
        ("eval('1')", "builtins.eval"),
        ("f = exec", "builtins.exec"),
        ("compile(t, 'x', 'exec')", "builtins.compile"),
        ("import os\nos.system(t)", "os.system"),
        ("from os import popen", "os.popen"),
        ("import os\nos.execvp(a, b)", "os.execvp"),
        ("import subprocess\nsubprocess.run(t, shell=True)", "subprocess.run with shell"),
        ("run(t, shell=s)", "a call with shell"),
        ("import subprocess\nsubprocess.getoutput(t)", "subprocess.getoutput"),
        ("import yaml\nyaml.load(t, Loader=L)", "yaml.load"),
        ("import yaml\nyaml.parse(t, Loader=yaml.UnsafeLoader)", "yaml.UnsafeLoader"),
        ("import marshal", "marshal"),
        ("import shelve", "shelve"),
        ("from joblib import load", "joblib.load"),
        ("import importlib\nimportlib.import_module(n)", "importlib.import_module"),
        ("from importlib.util import spec_from_file_location", "importlib.util.spec_from_file"),
        ("__import__(n)", "builtins.__import__"),
        ("import runpy\nrunpy.run_path(p)", "runpy.run_path"),
    ],
)
def test_each_would_be_found(source, danger):
    assert any(found.startswith(danger) for found in dangers(source)), dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re, torch\nre.compile('a'), torch.compile(f), model.eval()",
        "import pickle\ntry: f()\nexcept pickle.UnpicklingError: pass",
        "import torch\ntorch.load(p, map_location='cpu', weights_only=True)",
        "import numpy as np\nnp.load(p, allow_pickle=False)",
        "import yaml\nyaml.parse(t, Loader=yaml.SafeLoader)",
        "import subprocess\nsubprocess.run(['git'], shell=False)",
        "import importlib.util\nimportlib.util.find_spec('a')",
    ],
)
def test_what_is_harmless_is_none(source):
    assert dangers(source) == []
