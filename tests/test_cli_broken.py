"""Files that are broken, and options that make no sense: a command says what is wrong, and never how it failed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import piping
import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import cachekit as ck
from cachekit.cli import sources
from cachekit.cli.app import app

VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 3, -0.5, math.nan, math.inf, 10**12, "", "many", "../.."),
    *([], {}, [1], [None], [[]], {"a": 1}),
)
SMALL = ("--method", "mag_cache", "--height", "64", "--width", "64", "--frames", "5", "--steps", "6")
PLANS = (("--computed", "3"), ("--error", "0.1"))

# One folder is written to by every example of a test, as a user's is.
same_folder = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(*words: Any) -> Result:
    """A command that ends well, or says in one line what is wrong."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1, 2)
    if result.exit_code:
        assert "Traceback" not in result.output
        assert "Error: " in result.output or "refused: " in result.output or "Lost: " in result.output, result.output
    return result


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A tree of JSON with one of its parts replaced or taken out."""
    made = copy.deepcopy(tree)
    places: list[tuple[Any, Any]] = []

    def see(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            see(node[key])

    see(made)
    if not places or draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(VALUES))
    node, key = draw(st.sampled_from(places))
    if draw(st.booleans()) or draw(st.booleans()):
        node[key] = draw(st.sampled_from(VALUES))
    else:
        del node[key]
    return made


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Content that is cut off, or in which a few bytes are others."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content) - 1))]
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 5))):
        made[draw(st.integers(0, len(made) - 1))] = draw(st.integers(0, 255))
    return bytes(made)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands read: a pipeline's folder, ratios, a recording, findings."""
    folder = tmp_path_factory.mktemp("saved")
    piping.piped("wan_two").pipe.save_pretrained(folder / "pipeline")
    ck.MagRatios((1.0,) + (0.9,) * 7).save(folder / "ratios.json")
    run("record", "digits", "--steps", "6", "--prompt", "1", "--out", folder / "trace.safetensors")
    run("coverage", "PixArt", "--no-compile", "--method", "mag_cache", "--save", folder / "findings.json")
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@same_folder
@given(data=st.data())
def test_a_configuration(data, saved, tmp_path):
    config = saved / "pipeline" / "transformer" / "config.json"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data.draw(changed(read(config)))), encoding="utf-8")
    run("explain", path, *SMALL)
    run("explain", "WanTransformer3DModel", "--config", path, *SMALL)
    path.write_bytes(data.draw(damaged(config.read_bytes())))
    run("explain", path, *SMALL)


@same_folder
@given(data=st.data())
def test_an_index_of_a_pipeline(data, saved, tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps(data.draw(changed(read(saved / "pipeline" / "model_index.json")))), encoding="utf-8"
    )
    run("explain", tmp_path, *SMALL)
    run("record", tmp_path, "--steps", "2", "--device", "cpu", "--out", tmp_path / "out.safetensors")


@same_folder
@given(data=st.data())
def test_ratios(data, saved, tmp_path):
    path = tmp_path / "ratios.json"
    for content in (
        json.dumps(data.draw(changed(read(saved / "ratios.json")))).encode(),
        data.draw(damaged((saved / "ratios.json").read_bytes())),
    ):
        path.write_bytes(content)
        run("explain", "Flux", "--tiny", "--method", "mag_cache", "--ratios", path)


@same_folder
@given(data=st.data())
def test_a_recording(data, saved, tmp_path):
    path, content = tmp_path / "trace.safetensors", (saved / "trace.safetensors").read_bytes()
    long = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + long])
    about = {key: json.loads(value) for key, value in head["__metadata__"].items() if value[:1] in "[{"}
    for made in (
        data.draw(changed(head)),
        {
            **head,
            "__metadata__": {
                **head["__metadata__"],
                **{k: json.dumps(data.draw(changed(v))) for k, v in about.items()},
            },
        },
    ):
        text = json.dumps(made).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + long :])
        for budget in PLANS:
            run("plan", path, *budget)
        run("replay", path)
    path.write_bytes(data.draw(damaged(content)))
    run("plan", path, *PLANS[0])


@same_folder
@given(data=st.data())
def test_findings(data, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("cachekit.coverage.table.cover_all", lambda *given, **more: [])
    path = tmp_path / "findings.json"
    path.write_text(json.dumps(data.draw(changed(read(saved / "findings.json")))), encoding="utf-8")
    run("coverage", "PixArt", "--no-compile", "--method", "mag_cache", "--against", path)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("plan", "TRACE", "--computed", "3", "--forecaster", "newton 1e3"), "--forecaster"),
        (("plan", "TRACE", "--speedup", "2", "--costs", "nan,nan"), "`costs`"),
        (("record", "digits", "--seed", str(10**30), "--out", "out"), "--seed"),
        (("record", "digits", "--seed", "-1", "--out", "out"), "--seed"),
        (("record", "digits", "--steps", str(10**12), "--out", "out"), "--steps"),
        (("explain", "Flux", "--height", str(10**12)), "--height"),
        (("explain", "Flux", "--frames", str(10**12)), "--frames"),
        (("explain", "Flux", "--batch", str(10**12)), "--batch"),
        (("explain", "Flux", "--tiny", "--method", "faster_cache", "--set", "layout=HWC"), "`layout`"),
        (("explain", "Flux", "--tiny", "--method", "faster_cache", "--set", "uncond=0"), "`uncond`"),
        (("explain", "Flux", "--tiny", "--method", "faster_cache", "--set", "alpha_low=x"), "`alpha_low`"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(words, named, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*(saved / "trace.safetensors" if word == "TRACE" else word for word in words))
    assert result.exit_code and named in result.output, result.output


@pytest.fixture
def flux(monkeypatch):
    """A pipeline that is read from anywhere."""
    made = piping.piped("flux")
    monkeypatch.setattr(sources.DiffusionPipeline, "from_pretrained", lambda *given, **more: made.pipe)
    return made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "guidance=3"), "FluxPipeline takes no 'guidance'"),
        ((), "FluxPipeline fails with no prompt: "),
        (("--set", "height=x", "--prompt", "a cat"), "FluxPipeline fails with height='x', prompt='a cat': "),
    ],
)
def test_what_a_pipeline_is_called_with(words, said, flux, tmp_path):
    result = run("record", "some/flux", "--steps", "2", "--device", "cpu", "--out", tmp_path / "out", *words)
    assert result.exit_code == 2 and said in result.output, result.output


def test_an_error_of_ours_is_not_taken_for_the_pipelines(flux, monkeypatch, tmp_path):
    def refuse(*given: Any, **more: Any) -> None:
        raise ck.StateError("a fault and its mending")

    monkeypatch.setattr(type(flux.pipe), "__call__", refuse)
    result = run("record", "some/flux", "--steps", "2", "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "Error: a fault and its mending" in result.output
