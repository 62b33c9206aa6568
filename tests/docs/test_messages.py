"""Errors and warnings that pages quote are still what the code says."""

import ast
import functools
import re

import pytest

from pages import ROOT, blocks_of, name_of, pages, text_of

CODE = ("beit_fast", "kernels")


@functools.cache
def phrases() -> list[str]:
    """What stands in the strings of the code, between what is filled in; the longest first."""
    found = set()
    for path in (path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= {part.strip() for part in re.split(r"\{[^}]*\}|%s|[()]", node.value)}
    return sorted((p for p in found if " " in p), key=len, reverse=True)


def unsaid(message: str) -> list[str]:
    """Runs of three and more words of a message that the code does not say.

    In brackets are details: values, and what libraries say.
    """
    rest = re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)", "|", message)
    for phrase in phrases():
        rest = rest.replace(phrase, "|")
    return re.findall(r"\b[a-z]+(?: [a-z]+){2,}\b", rest)


def quoted() -> list:
    return [
        pytest.param(line.partition(" ")[2], id=f"{name_of(page)}: {line[:60]}")
        for page in pages()
        for block in blocks_of(text_of(page))
        if not block.is_commands and block.language != "python"
        for line in block.text.splitlines()
        if line.startswith(("beit-fast: ", "WARNING "))
    ]


@pytest.mark.parametrize("message", quoted())
def test_a_message_is_one_of_the_code(message):
    assert unsaid(message) == []


def test_a_message_that_is_no_longer_said_is_found():
    assert unsaid("run is in use by process 7: give another --run.output, or end that run") == []
    assert unsaid("run is being used by process 7: give another") == [
        "run is being used by process"
    ]
