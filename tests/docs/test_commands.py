"""Every command of every page parses, and every page starts with one."""

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields

import pytest

from beit_fast.cli import (
    USAGE,
    VERBS,
    WITHOUT_RECIPE,
    ConvertConfig,
    EvaluateConfig,
    EvaluateSegmentationConfig,
    PredictConfig,
    PredictSegmentationConfig,
    parse,
)
from beit_fast.tasks.check.config import CheckConfig
from beit_fast.tasks.pack.config import PackConfig
from beit_fast.tasks.replay.config import ReplayConfig
from beit_fast.train.kept_config import write_config
from pages import (
    PROGRAMS,
    README,
    ROOT,
    STARTERS,
    blocks_of,
    code_spans_of,
    commands_of,
    name_of,
    pages,
    text_of,
)

FIRST_SCREEN = 25  # lines
WITHOUT_RECIPE_CONFIGS = (
    *(EvaluateConfig, PredictConfig, ConvertConfig),
    *(EvaluateSegmentationConfig, PredictSegmentationConfig, ReplayConfig),
    *(CheckConfig, PackConfig),
)
# Flags of torchrun and docker.
FOREIGN = frozenset(
    ("--no-python", "--max-restarts", "--nproc_per_node", "--local_addr", "--user", "--ipc")
)
COMMANDS = [(name_of(page), c) for page in pages() for c in commands_of(text_of(page))]


def of_program(name: str, *words: str) -> list:
    """Words of the commands of one program that are given in this repository."""
    start = (name, *words)
    return [
        pytest.param(shlex.split(c.text), id=f"{page}: {c.text}")
        for page, c in COMMANDS
        if tuple(c.text.split()[: len(start)]) == start and not c.elsewhere
    ]


def beit_fast_commands() -> list:
    """Words after `beit-fast`, whatever starts it, up to a pipe or a redirection."""
    found = []
    for page, command in COMMANDS:
        text = command.text
        if command.program == "sbatch":  # whose script starts the command
            text = re.sub(r"^sbatch docs/slurm/\w+\.sbatch\b", "beit-fast", text)
        elif command.program not in (*STARTERS, "beit-fast"):
            continue
        if match := re.search(r"(?:^|\s)beit-fast(?:\s+(.*))?$", text):
            words = shlex.split(re.split(r"\s[|>]", match[1] or "")[0])
            found.append(pytest.param(words, id=f"{page}: {command.text}"))
    return found


def test_the_two_commands_are_the_ones_ci_runs():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = text_of(README).splitlines()
    (demo,) = [c for c in lines if c.startswith("pip install -c constraints.txt -e . &&")]
    (test,) = [c for c in lines if c.startswith('pip install -c constraints.txt -e ".[test]" &&')]
    assert demo.endswith("&& beit-fast pretrain demo")
    assert test.endswith("&& pytest -n 2 --dist worksteal")
    assert "README.md" in script


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_a_page_starts_with_a_command_or_code_that_works(page):
    """That it works: below for commands, in test_code.py for Python."""
    first = next(iter(blocks_of(text_of(page))), None)
    assert first is not None, "the page has no block"
    assert first.is_commands or first.language == "python", "it starts with what is printed"
    if page != README:  # which says first what all this is
        assert first.line <= FIRST_SCREEN


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_a_block_of_commands_holds_nothing_else(page):
    """What is printed stands in a block of its own."""
    for command in commands_of(text_of(page)):
        assert command.program in PROGRAMS, command.text


@pytest.mark.parametrize("words", beit_fast_commands())
def test_a_command_parses(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not words or words in (["--help"], ["-h"]):
        return
    verb, *arguments = words
    if verb == "convert-dalle":
        assert arguments[::2] == ["--encoder", "--decoder", "--output"]
        return
    if verb == "convert":
        check_convert(arguments)
        return
    if verb == "replay":  # of a run's folder
        folder = tmp_path / arguments[0]
        folder.mkdir(parents=True)
        write_config(folder, "tokenizer", VERBS["tokenizer"][0]["demo"]())
    if verb in WITHOUT_RECIPE:
        parse_verb, _ = WITHOUT_RECIPE[verb]
        parse_verb(arguments)
        return
    known, _ = VERBS[verb]
    if not arguments:  # which lists the recipes
        return
    name, *rest = arguments
    assert name in known
    if ">" in rest:
        rest = rest[: rest.index(">")]
    if rest[-1:] == ["--print_config"] or rest in (["--help"], ["--tokenizer_training.help"]):
        with pytest.raises(SystemExit) as done:
            parse(verb, name, known[name], rest)
        assert not done.value.code
        return
    if "--config" in rest:  # a file of the reader's
        file = tmp_path / rest[rest.index("--config") + 1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n", encoding="utf-8")
    parse(verb, name, known[name], rest)


def check_convert(arguments):
    _source, _target, *flags = arguments
    assert not _source.startswith("-")
    assert not _target.startswith("-")
    assert flags[flags.index("--to") + 1] in ("unilm", "timm", "hf")
    known = {f"--{field.name}" for field in fields(ConvertConfig)}
    assert {flag for flag in flags if flag.startswith("--")} <= known


def test_every_verb_is_on_a_page():
    verbs = re.findall(r"^  ([a-z][a-z-]+)", USAGE, re.MULTILINE)
    assert {*VERBS, *WITHOUT_RECIPE} == set(verbs)
    shown = {p.values[0][0] for p in beit_fast_commands() if p.values[0]}
    assert set(verbs) <= shown


@pytest.mark.parametrize("words", of_program("torchrun"))
def test_ranks_run_the_installed_command(words):
    """As a file of the checkout, it would find the folder kernels/ in place of a package."""
    assert words[words.index("--no-python") + 1] == "beit-fast"


@functools.cache
def usage_of(script: str) -> str:
    """What `--help` prints. In this process, which has imported most of what a bench imports."""
    path, before, printed = ROOT / script, set(sys.modules), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(str(path.parent))
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(path), run_name="__main__")
    for name in set(sys.modules) - before:  # names as short as `data`: nothing else may find them
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(path.parent)):
            del sys.modules[name]
    assert done.value.code == 0
    return printed.getvalue()


@pytest.mark.parametrize(
    "words", [p for p in of_program("python") if p.values[0][1].startswith("bench/")]
)
def test_a_bench_knows_its_flags(words):
    _, script, *given = words
    usage = usage_of(script)
    known = set(re.findall(r"(?<!\w)--[\w-]+", usage))
    assert {word.partition("=")[0] for word in given if word.startswith("--")} <= known
    if given and not given[0].startswith("--"):  # which of its parts
        assert re.search(rf"\b{re.escape(given[0])}\b", usage)


@functools.cache
def flags() -> frozenset[str]:
    """Of all verbs with all recipes, and of all benches."""
    found = {"--help", "--config", "--print_config", "--json", "--to", "--overwrite"}
    for config in WITHOUT_RECIPE_CONFIGS:
        found |= {f"--{field.name}" for field in fields(config)}
    for recipes, _ in VERBS.values():
        for recipe in recipes.values():
            found |= set(_flags_of(asdict(recipe()), "--"))
    for script in sorted((ROOT / "bench").glob("*.py")):
        if 'if __name__ == "__main__"' in script.read_text(encoding="utf-8"):
            found |= set(re.findall(r"(?<!\w)--[\w-]+", usage_of(f"bench/{script.name}")))
    return frozenset(found)


def _flags_of(settings: dict, prefix: str) -> Iterator[str]:
    for name, value in settings.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _flags_of(value, f"{prefix}{name}.")


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_flags_in_the_text_are_flags_of_a_command(page):
    named = {
        word.removesuffix(".*").partition("=")[0]
        for span in code_spans_of(text_of(page))
        if span.startswith(("--", "beit-fast "))
        for word in span.split()
        if word.startswith("--")
    }
    assert sorted(named - flags() - FOREIGN) == []


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_verbs_in_the_text_are_verbs(page):
    spans = [s.split() for s in code_spans_of(text_of(page)) if s.startswith("beit-fast ")]
    assert {words[1] for words in spans} <= {*VERBS, *WITHOUT_RECIPE, "--help"}
    for _, verb, *rest in spans:
        if rest and verb in VERBS and re.fullmatch(r"[a-z]\w*", rest[0]):
            assert rest[0] in VERBS[verb][0], rest


@pytest.mark.parametrize("words", of_program("python", "-m"))
def test_a_module_that_is_run_is_there(words):
    assert importlib.util.find_spec(words[2]) is not None


@pytest.mark.parametrize("words", of_program("pytest"))
def test_what_is_tested_is_there(words):
    for path in (word.partition("::")[0] for word in words[1:]):
        if path.startswith(("tests", "bench")):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("words", of_program("pip", "install"))
def test_an_extra_is_one_of_the_package(words):
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = setup[setup.index("extras_require") :]
    for names in re.findall(r"\[([a-z0-9,]+)\]", " ".join(words)):
        for name in names.split(","):
            assert f'"{name}": [' in extras
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
