"""No link of a page is dead: files, headings, and paths of this repository in backticks."""

import re
from pathlib import Path

import pytest

from pages import ROOT, anchors_of, code_spans_of, links_of, name_of, pages, text_of

FOLDERS = ("kernels", "beit_fast", "bench", "tests", "docs", ".ci")  # a path starts with one
# Made by a command, and not by git.
MADE = ("bench/results/gpu-",)


def markdown() -> list[Path]:
    """The pages, and all Markdown that lies beside code."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")]
    return sorted({*pages(), *inside})


@pytest.mark.parametrize("page", markdown(), ids=name_of)
def test_links_lead_somewhere(page):
    for link in links_of(text_of(page)):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert target.exists(), f"{link} is dead"
        if anchor:
            assert anchor in anchors_of(text_of(target)), f"{link}: there is no such heading"


@pytest.mark.parametrize("page", markdown(), ids=name_of)
def test_paths_in_backticks_exist(page):
    for span in code_spans_of(text_of(page)):
        if not re.fullmatch(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*", span):
            continue
        if span.startswith(MADE):
            continue
        assert list(ROOT.glob(span.rstrip("/"))), f"`{span}` is not in the repository"


def test_the_finder_of_links_finds_the_dead_ones():
    text = '# A b\n[x](gone.md) ![p](no.png) `[y](z)`\n```\n[w](v)\n```\n<img src="q.png">\n'
    assert links_of(text) == ["gone.md", "no.png", "q.png"]
    assert anchors_of("# One `two`: 3\n## Twice\n## Twice\n") == {"one-two-3", "twice", "twice-1"}
    assert code_spans_of("`kernels/x.py` and\n```\n`no`\n```\n") == ["kernels/x.py"]


def test_every_page_is_linked_from_the_first():
    readme = set(links_of(text_of(ROOT / "README.md")))
    assert {name_of(page) for page in pages()} - {"README.md"} <= readme
