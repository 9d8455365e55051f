"""The code blocks of the documents: found, run in order, and their output compared."""

from __future__ import annotations

import ast
import contextlib
import doctest
import inspect
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
LANGUAGES = ("python", "text", "sh")
OPTED_OUT = re.compile(r"<!-- not run: (.+) -->")
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<info>[^`]*)$")


class PageError(AssertionError):
    """A page says what is not so."""


class Block(NamedTuple):
    """One fenced block."""

    language: str
    code: str
    line: int  # of its first line of code, from 1
    opted_out: str  # why it is not run; "" where it is
    follows: bool  # whether nothing but blank lines is between it and the block before


def markdown() -> list[Path]:
    """README and every page."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def docstrings() -> dict[str, str]:
    """The docstrings with fenced blocks, which the pages of the API show."""
    found = {}
    for path in sorted((ROOT / "cachekit").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "```" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and "```" in text:
                    name = getattr(node, "name", path.stem)
                    found[f"{path.relative_to(ROOT)}:{name}"] = text
    return found


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        PageError: a block does not end, or is in a language that nobody checks.
    """
    found: list[Block] = []
    lines = text.splitlines()
    number, ended, why = 0, True, ""
    while number < len(lines):
        line = lines[number]
        number += 1
        opening = FENCE.match(line)
        if opening is None:
            if line.strip():
                marked = OPTED_OUT.fullmatch(line.strip())
                why, ended = (marked[1], ended) if marked else ("", False)
            continue
        indent, ticks = len(opening["indent"]), opening["ticks"]
        language = (opening["info"].split() or [""])[0]
        if language not in LANGUAGES:
            raise PageError(f"line {number}: a block of {language or 'no language'}; known are {', '.join(LANGUAGES)}")
        start = number
        while number < len(lines) and lines[number].strip() != ticks:
            number += 1
        if number == len(lines):
            raise PageError(f"line {start}: the block does not end")
        code = "\n".join(row[indent:] if not row[:indent].strip() else row for row in lines[start:number])
        found.append(Block(language, code, start + 1, why, bool(found) and ended))
        number, ended, why = number + 1, True, ""
    return found


def run(name: str, text: str, namespace: dict[str, Any], shell: Callable[[Sequence[str]], str] | None = None) -> int:
    """Run the Python blocks of a page in order, in one namespace: how many there were.

    Args:
        name: of the page.
        text: the page.
        namespace: what the blocks find, and leave.
        shell: what a command of a shell block prints; asked where a text block follows.

    Raises:
        PageError: a block fails, or prints something else than the text block behind it says.
    """
    count, before = 0, ""
    found = blocks(text)
    for index, block in enumerate(found):
        if block.language == "text":
            above = found[index - 1]
            if not block.follows or above.language == "text" or (above.language == "sh" and shell is None):
                raise PageError(f"{name}:{block.line}: a text block that follows no other block is checked by nobody")
            if above.language == "sh" and shell is not None:
                before = "".join(shell(words) for _, words in _words(above))
            if not above.opted_out:
                _compare(f"{name}:{block.line}", block.code, before)
        elif block.language == "python" and not block.opted_out:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                try:
                    _execute(name, block, namespace)
                except PageError:
                    raise
                except BaseException as error:
                    raise PageError(f"{name}:{block.line}: {type(error).__name__}: {error}") from error
            before, count = printed.getvalue(), count + 1
    return count


def _execute(name: str, block: Block, namespace: dict[str, Any]) -> None:
    if block.code.lstrip().startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.code, namespace, name, name, block.line - 1)
        out = io.StringIO()
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        runner = doctest.DocTestRunner(optionflags=flags)
        failed, _ = runner.run(test, out=out.write, clear_globs=False)[:2]
        namespace.update(test.globs)
        if failed:
            raise PageError(out.getvalue())
        return
    # At its place in the page: tracebacks, and whoever asks for the source of a class, find it there.
    exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)


def _compare(where: str, want: str, got: str) -> None:
    """Line by line, `...` for anything; spaces at the ends of lines do not count."""
    want, got = ("\n".join(row.rstrip() for row in each.strip("\n").splitlines()) + "\n" for each in (want, got))
    if not doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS):
        raise PageError(f"{where}: the page says\n{want}\nand the block before it prints\n{got}")


def commands(text: str) -> Iterator[tuple[int, Sequence[str]]]:
    """The commands of the shell blocks: line and words, without comments, prompts and variables before them."""
    for block in blocks(text):
        if block.language == "sh":
            yield from _words(block)


def _words(block: Block) -> Iterator[tuple[int, Sequence[str]]]:
    for offset, row in enumerate(block.code.splitlines()):
        words = re.sub(r"(^|\s)#.*", "", row).split()
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            yield block.line + offset, words


def links(text: str) -> list[str]:
    """Where the links and pictures of a page outside of its code lead, without anchors; not those to other sites."""
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^ *```.*?^ *```", "", text))
    found = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [link.partition("#")[0] for link in found if not re.match(r"[a-z]+:", link) and not link.startswith("#")]


def cleaned(text: str) -> str:
    """A text of a test, without its indentation."""
    return inspect.cleandoc(text)
