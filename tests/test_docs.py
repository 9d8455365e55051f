"""What the documents say is so: every block runs, every output is compared, every command and link exists."""

from __future__ import annotations

import html
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cachekit_kernels
import diffusers
import pages
import piping
import pytest
import specimens
import torch
import typer
from pages import PageError, cleaned
from typer.testing import CliRunner

import cachekit as ck
from cachekit.cli.app import app

PAGES = {str(path.relative_to(pages.ROOT)): path for path in pages.markdown()}
COMPILED = {"docs/compile.md", "docs/your-own-dit.md", "docs/your-own-policy.md"}
LEFT_OUT = {"docs/compile.md": ["needs a GPU"]}
"""The blocks that are not run, page by page, and why. A new one has to be written down here."""
NUMBERS = itertools.count()
PIPELINES = {
    diffusers.FluxPipeline: "flux",
    diffusers.CogVideoXPipeline: "cogvideox",
    diffusers.QwenImagePipeline: "qwen",
    diffusers.WanPipeline: "wan",
    diffusers.LTXPipeline: "ltx",
}


# What a reader has, and a test has not: a checkpoint, and a device -------------------------------------------------


def tiny(kind: type[Any], name: str, **models: Any) -> Any:
    """A pipeline with random weights that takes a prompt as text, and has its embedding from elsewhere."""
    made = piping.piped(name, models=models, transformer=piping.new)
    given = {key: value for key, value in made.given.items() if key not in ("num_inference_steps", "return_dict")}

    def call(self: Any, prompt: Any = None, negative_prompt: Any = None, **more: Any) -> Any:
        assert prompt is None or isinstance(prompt, str)
        out = kind.__call__(self, **{**given, **more})
        if "output_type" not in more:  # it would be pictures, of which nobody can say torch.equal
            for field in ("images", "frames"):
                if hasattr(out, field):
                    setattr(out, field, getattr(out, field).numpy() if field == "frames" else list(getattr(out, field)))
        return out

    made.pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    return made.pipe


def from_pretrained(cls: type[Any], name: str, **more: Any) -> Any:
    """Instead of a download."""
    return tiny(cls, PIPELINES[cls], **{part: given for part, given in more.items() if part.startswith("transformer")})


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What the blocks of a page run in: a folder of their own, and the names that stand for what the reader has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda self, *device, **more: self)
    flux = specimens.shallow("Flux")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(28)
    given = flux.inputs(0)
    fixed = {name: value for name, value in given.items() if name not in ("hidden_states", "timestep")}
    # A module of its own, since the compiler looks functions up where they say that they are from, and remembers it.
    page = types.ModuleType(f"page_{next(NUMBERS)}_of_the_documents")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    vars(page).update(
        {
            "pipe": tiny(diffusers.FluxPipeline, "flux"),
            "transformer": flux.model,
            "scheduler": scheduler,
            "timesteps": scheduler.timesteps,
            "x": given["hidden_states"],
            "inputs": lambda x, t: {**fixed, "hidden_states": x, "timestep": t.expand(len(x)) / 1000},
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield vars(page)


def shell(words: Sequence[str]) -> str:
    """What a command of the command line prints."""
    program, *arguments = words
    if program != "cachekit":
        raise PageError(f"{' '.join(words)}: only what `cachekit` prints is compared")
    result = CliRunner().invoke(app, arguments)
    if result.exit_code:
        raise PageError(f"{' '.join(words)}: {result.output}")
    return result.stdout


# The blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", [pytest.param(name, marks=[pytest.mark.compiles] if name in COMPILED else []) for name in PAGES]
)
def test_every_block_of_a_page_runs(page, namespace):
    grad = torch.is_grad_enabled()
    try:
        pages.run(str(PAGES[page]), PAGES[page].read_text(encoding="utf-8"), namespace, shell)
    finally:
        torch.set_grad_enabled(grad)


@pytest.mark.parametrize("name", pages.docstrings())
def test_every_block_of_a_docstring_runs(name, namespace):
    # Examples of one module go on from its imports.
    exec("import cachekit as ck\nimport cachekit.diffusers as ckd\nfrom diffusers.hooks import *", namespace)
    pages.run(name, pages.docstrings()[name], namespace)


def test_few_blocks_are_left_out_and_all_are_known():
    found = {
        page: [block.opted_out for block in pages.blocks(path.read_text(encoding="utf-8")) if block.opted_out]
        for page, path in PAGES.items()
    }
    assert {page: reasons for page, reasons in found.items() if reasons} == LEFT_OUT
    assert sum(map(len, LEFT_OUT.values())) <= 5


def test_the_pages_have_blocks():
    """A parser that finds nothing would find nothing wrong."""
    counts = {
        page: sum(block.language == "python" for block in pages.blocks(path.read_text(encoding="utf-8")))
        for page, path in PAGES.items()
    }
    taught = [page for page in PAGES if not page.startswith("docs/api/") and page not in COMPANIONS]
    assert all(counts[page] >= 2 for page in taught), counts
    assert sum(counts.values()) >= 50
    raw = sum(path.read_text(encoding="utf-8").count("```python") for path in PAGES.values())
    assert sum(counts.values()) == raw


def test_a_decider_and_a_forecaster_of_your_own_are_short():
    text = PAGES["docs/your-own-policy.md"].read_text(encoding="utf-8")
    made = [
        block for block in pages.blocks(text) if re.search(r"(?m)^def .*\n(.*\n)*.*(Decider|Forecaster)\(", block.code)
    ]
    assert len(made) == 2 and all(len(block.code.split("\n")) < 30 for block in made)


COMPANIONS = {"docs/command-line.md", "docs/coverage.md", "docs/schedulers.md"}
"""Pages about commands and tables."""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nprint(1 + 1)\n```\n\n```text\n3\n```", "the page says\n3\n\nand the block before it prints\n2"),
        ("```python\n1 / 0\n```", "ZeroDivisionError"),
        ("```python\nx = (\n```", "SyntaxError"),
        ("    ```python\n    nowhere\n    ```", "NameError"),
        ("```python\nimport sys\nsys.exit()\n```", "SystemExit"),
        ("```python\n>>> 1 + 1\n3\n```", "Expected:"),
        ("```python\nprint(1)\n```\n\nwhich prints\n\n```text\n1\n```", "checked by nobody"),
        ("```text\n1\n```", "checked by nobody"),
        ("```sh\ncachekit explain FluxTransformer2DModel --tiny --steps 3\n```\n\n```text\nhello\n```", "mag_cache"),
        ("```sh\ncachekit explain Flax\n```\n\n```text\nhello\n```", "cachekit explain Flax: "),
        ("```sh\nmake test\n```\n\n```text\nhello\n```", "only what `cachekit` prints is compared"),
        ("```py\nprint(1)\n```", "a block of py"),
        ("```\nprint(1)\n```", "a block of no language"),
        ("```python\nprint(1)\n", "does not end"),
        ("~~~python\n1 / 0\n~~~", "ZeroDivisionError"),
        ("<!-- not run: no -->\n\nprose\n\n```python\n1 / 0\n```", "ZeroDivisionError"),
    ],
)
def test_a_page_that_is_wrong_is_found(text, complaint):
    with pytest.raises(PageError) as caught:
        pages.run("page.md", text, {}, shell)
    assert complaint in str(caught.value)


def test_a_page_that_is_right_is_not():
    text = cleaned("""
        ```python
        x = 2
        ```

        prose

        ```python
        print("loss", x / 3)
        ```

        ```text
        loss 0.6...
        ```

        ```python
        >>> x
        2
        ```

        <!-- not run: needs a GPU -->
        ```python
        1 / 0
        ```
        """)
    assert pages.run("page.md", text, {}) == 3
    assert [block.opted_out for block in pages.blocks(text)] == ["", "", "", "", "needs a GPU"]


# Commands and links ---------------------------------------------------------------------------------------------------


def extras() -> set[str]:
    """Of pyproject.toml."""
    text = (pages.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return set(re.findall(r"(?m)^(\w+) = \[", text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]))


def exists(words: list[str]) -> bool:
    """Whether there is what a command names."""
    match words:
        case ["make", *targets]:
            makefile = (pages.ROOT / "Makefile").read_text(encoding="utf-8")
            named = [target for target in targets if "=" not in target]
            return all(re.search(rf"(?m)^{re.escape(target)}:", makefile) for target in named)
        case ["pip" | "pip3", "install", *what] | ["python", "-m", "pip", "install", *what]:
            named = re.findall(r"\[([\w,]+)\]", " ".join(what))
            return all(extra in extras() for each in named for extra in each.split(","))
        case ["python", "-m", module, *_]:
            return importlib.util.find_spec(module) is not None
        case ["python", script, *_]:
            return (pages.ROOT / script).is_file()
        case ["cachekit", name, *given]:
            command = typer.main.get_command(app).commands.get(name)  # type: ignore[attr-defined]
            if command is None:
                return False
            known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {
                "--help",
                "-h",
            }
            # The demo reads its options itself.
            return name == "demo" or all(word in known for word in given if word.startswith("-"))
    return False


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists(page):
    text = PAGES[page].read_text(encoding="utf-8")
    assert [(line, words) for line, words in pages.commands(text) if not exists(words)] == []


@pytest.mark.parametrize(
    "command",
    [
        "make dmo",
        "make demo tset",
        "python -m cachekit.dmo",
        "python bench/nothing.py",
        "cachekit sing",
        "cachekit explain x --tinny",
        "ls",
    ],
)
def test_a_command_that_does_not_exist_is_found(command):
    ((line, words),) = pages.commands(f"```sh\n# a comment\nOMP_NUM_THREADS=1 {command}  # and why\n```")
    assert line == 3 and words == command.split() and not exists(words)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """Those of the pages mkdocs checks, too; of README nobody else does."""
    text = PAGES[page].read_text(encoding="utf-8")
    missing = [link for link in pages.links(text) if not (PAGES[page].parent / link).exists()]
    assert missing == []


def test_every_picture_is_shown():
    """And small."""
    texts = [path.read_text(encoding="utf-8") for path in PAGES.values()]
    for path in (pages.ROOT / "docs" / "pictures").iterdir():
        assert any(f"pictures/{path.name})" in text for text in texts), path.name
        assert path.stat().st_size < 100_000, path.name


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pictures as the code of today draws them."""
    folder = tmp_path_factory.mktemp("pictures")
    command = [sys.executable, str(pages.ROOT / "docs" / "pictures.py"), "--out", str(folder)]
    where = os.pathsep.join(str(Path(module.__file__ or "").parents[1]) for module in (ck, cachekit_kernels))
    subprocess.run(command, env={**os.environ, "PYTHONPATH": where}, check=True, capture_output=True)
    return {path.name: path for path in folder.iterdir()}


def facts(picture: Path) -> dict[str, Any]:
    """The numbers that a picture shows, as it says itself."""
    (found,) = re.findall(r"<dc:description>(.*?)</dc:description>", picture.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(html.unescape(found))


def test_the_pictures_are_those_that_the_code_of_today_draws(drawn):
    kept = {path.name: path for path in (pages.ROOT / "docs" / "pictures").iterdir()}
    assert set(kept) == set(drawn)
    for name, path in kept.items():
        shown, now = facts(path), facts(drawn[name])
        assert set(shown) == set(now) and shown, name
        for row in shown:
            same = now[row] if isinstance(now[row], str) else pytest.approx(now[row], rel=0.02, abs=2e-3)
            assert shown[row] == same, f"{name}: {row}; run `make docs`"


def test_tables_of_the_demo_are_what_the_demo_measured():
    """The rows `| computed | name | so many dB |`; the picture beside them is drawn from the same file."""
    kept = json.loads((pages.ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))["rows"]
    measured = {(row["computed_steps"], f"{row['psnr']:.1f}") for row in kept if row["psnr"] is not None}
    for page, least in (("README.md", 7), ("docs/choosing.md", 15)):
        rows = re.findall(
            r"^\| ([\d.]+) \| .+ \| ([\d.]+) dB \|$", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE
        )
        assert len(rows) >= least, page
        assert {(float(computed), psnr) for computed, psnr in rows} <= measured, page


# README ------------------------------------------------------------------------------------------------------------


def test_readme_is_short_and_begins_with_the_picture_and_the_lines_that_matter():
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    picture = text.index("![")
    heading, opening = text[:picture].split("\n\n", 1)
    assert heading == "# cachekit"
    assert 1 <= len(re.findall(r"[.!?](?=\s)", opening)) <= 2
    code = [block for block in pages.blocks(text) if block.language == "python"][:2]
    assert text.index("```python") > picture and "ckd.cached(" in code[0].code and "step(state" in code[1].code
    assert sum(bool(row.strip()) for block in code for row in block.code.splitlines()) <= 12
    assert code[0].line < 25


# The site ----------------------------------------------------------------------------------------------------------


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "--site-dir", str(site)], env=environment, capture_output=True, text=True, check=False
    )


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    done = build(pages.ROOT / "mkdocs.yml", tmp_path / "site")
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "WARNING" not in said and "ERROR" not in said, said
    written = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.html")}
    for page in PAGES:
        if page.startswith("docs/") and not page.endswith("index.md"):
            assert f"{page[5:-3]}/index.html" in written
    for name in sorted(written):
        text = (tmp_path / "site" / name).read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)", text)
        fetched += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect|preload)\"?[^>]*href=\"?([^\s\">]+)", text)
        assert fetched and not [link for link in fetched if re.match(r"(https?:)?//", link)], name
    # Docstrings are read as they are meant: sections of examples, fields described by comments.
    api = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site" / "api").rglob("*.html"))
    assert "Examples:" in api and "Example:" not in api and "[T] bool, the verdicts of a static decider" in api
    # What is public is written about.
    for module, names in {
        "cachekit": ck.__all__,
        "cachekit.diffusers": ["cached", "enable", "from_config", "Run"],
    }.items():
        missing = [name for name in names if not re.search(rf"id=\"?{module}(\.\w+)*\.{name}[\"\s>]", api)]
        assert missing == [], missing


def test_a_site_with_a_fault_does_not_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n[away](nowhere.md)\n", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nstrict: true\n", encoding="utf-8")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "nowhere.md" in done.stderr
