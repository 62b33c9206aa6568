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


def dead_links(page: Path, root: Path = ROOT) -> list[str]:
    """With what is wrong with each."""
    dead = []
    for link in links_of(text_of(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z]+:", link):
            if not link.startswith("https://"):
                dead.append(f"{link} is not https")
        elif not target.is_relative_to(root):
            dead.append(f"{link} leads out of the repository")
        elif not target.exists():
            dead.append(link)
        elif anchor and anchor not in anchors_of(text_of(target)):
            dead.append(f"{link}: there is no such heading")
    return dead


def dead_paths(page: Path, root: Path = ROOT) -> list[str]:
    """Paths of this repository in backticks that are not in it."""
    path = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*")
    spans = [span for span in code_spans_of(text_of(page)) if path.fullmatch(span)]
    return [s for s in spans if not s.startswith(MADE) and not list(root.glob(s.rstrip("/")))]


@pytest.mark.parametrize("page", markdown(), ids=name_of)
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


@pytest.mark.parametrize("page", markdown(), ids=name_of)
def test_paths_in_backticks_exist(page):
    assert dead_paths(page) == []


def test_dead_links_and_paths_are_found(tmp_path):
    """So that a pattern that finds nothing does not pass."""
    page = tmp_path / "page.md"
    (tmp_path / "kernels").mkdir()
    page.write_text(
        "# A `b`: c\n[x](gone.md) ![p](no.png) [y](page.md#no) [z](../out.md) [fine](#a-b-c)\n"
        '`[code](no)` `kernels/gone.py` `kernels/` <img src="q.png"> [w](http://w.org)\n'
        "```\n[block](no) `kernels/no.py`\n```\n"
    )
    assert dead_links(page, tmp_path) == [
        *("gone.md", "no.png", "page.md#no: there is no such heading"),
        *("../out.md leads out of the repository", "http://w.org is not https", "q.png"),
    ]
    assert dead_paths(page, tmp_path) == ["kernels/gone.py"]
    assert anchors_of("## Twice\n## Twice\n") == {"twice", "twice-1"}


def test_every_page_is_linked_from_the_first():
    readme = set(links_of(text_of(ROOT / "README.md")))
    assert {name_of(page) for page in pages()} - {"README.md"} <= readme
