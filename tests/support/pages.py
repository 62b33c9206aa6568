"""The Markdown pages of the repository, taken apart: code blocks, commands, links, headings."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
SHELL = ("bash", "sh", "console")  # languages of blocks of commands; those without one may be
STARTERS = ("torchrun", "timeout", "docker")  # of the command beit-fast
# What a newcomer has, or has after the first command; others would be a slip of the pen.
PROGRAMS = frozenset(
    (*STARTERS, "beit-fast", "python", "pip", "pytest", "ruff", "git", "source", ".", "cd", "tar")
) | {"nvidia-smi", "sbatch"}

_FENCE = re.compile(r"^(`{3,})(\w*)[^\n`]*\n(.*?)^\1 *$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line of content, from 1."""

    language: str
    text: str
    line: int

    @property
    def is_commands(self) -> bool:
        """Without a language, a block whose first line starts with a program; else it is text."""
        if self.language:
            return self.language in SHELL
        first = next(iter(_commands(self.text)), Command("", False))
        return first.program in PROGRAMS


@dataclass(frozen=True)
class Command:
    """One command; `elsewhere`: behind a `cd`, in a folder that is not the repository."""

    text: str
    elsewhere: bool

    @property
    def program(self) -> str:
        words = (word for word in self.text.split() if not re.fullmatch(r"[A-Z_]+=\S*", word))
        return next(words, "")


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md and everything in docs/, as far as they are there."""
    contributing = ROOT / "CONTRIBUTING.md"
    return [README, *filter(Path.exists, [contributing]), *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page: Path) -> str:
    """For the ids of tests."""
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks, in order."""
    return [
        Block(match[2], match[3], text.count("\n", 0, match.start(3)) + 1)
        for match in _FENCE.finditer(text)
    ]


def without_blocks(text: str) -> str:
    """The prose: fenced blocks and comments are gone."""
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.DOTALL)


def commands_of(text: str) -> list[Command]:
    """Those of all blocks of commands, in order."""
    return [c for block in blocks_of(text) if block.is_commands for c in _commands(block.text)]


def _commands(text: str) -> list[Command]:
    """Lines, joined where one goes on, without remarks, and parted at `&&`."""
    commands, elsewhere = [], False
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ")
        for part in filter(None, map(str.strip, line.split("&&"))):
            commands.append(Command(part, elsewhere))
            elsewhere = elsewhere or part.startswith("cd ")
    return commands


def anchors_of(text: str) -> set[str]:
    """What `#...` may follow a page's address: GitHub's names of its headings."""
    anchors: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", _FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = anchors.get(anchor, 0)
        anchors[anchor] = number + 1
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def links_of(text: str) -> list[str]:
    """Targets of links and pictures in the prose."""
    prose = re.sub(r"`[^`\n]*`", "", without_blocks(text))
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", prose)
    defined = re.findall(r"^\[[^]]+\]:\s*(\S+)", prose, re.MULTILINE)
    in_html = re.findall(r"<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"", prose)
    return inline + defined + in_html


def code_spans_of(text: str) -> list[str]:
    """What stands between single backticks in the prose."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_blocks(text))
