"""The command line, as a user meets it: what it prints, its exit codes, its JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from piping import piped
from typer.testing import CliRunner

import cachekit as ck
from cachekit.cli import models, options
from cachekit.cli.app import app
from cachekit.diffusers import inputs, zoo

FIVE = ["first_block_cache", "mag_cache", "taylorseer", "pyramid_attention_broadcast", "faster_cache"]
SMALL = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "6"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of classes that diffusers has moved


def call(*args: str, code: int = 0) -> str:
    """What a command prints to stdout, or to both where it fails."""
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "160"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.stdout if code == 0 else result.output


def read(*args: str, code: int = 0) -> Any:
    """The JSON of a command."""
    return json.loads(CliRunner().invoke(app, [*args, "--json"]).stdout) if code else json.loads(call(*args, "--json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of two transformers, as diffusers saves it."""
    path = tmp_path_factory.mktemp("pipeline")
    piped("wan_two").pipe.save_pretrained(path)
    return path


# explain -----------------------------------------------------------------------------------------------------


def test_explain_is_what_the_step_says():
    for name in ("FluxTransformer2DModel", "Wan"):
        specimen = zoo.specimen("Flux" if name[0] == "F" else "Wan")
        said = call("explain", name, "--tiny", "--method", "taylorseer", "--set", "interval=4", "--steps", "9")
        wanted = ck.cache(specimen.model, ck.taylorseer(4)).explain(options.timesteps(9), **specimen.inputs(0))
        assert said.strip() == str(wanted)
        assert "3 of 9" in said or "4 of 9" in said


def test_explain_of_every_method_in_json():
    entries = read("explain", "FluxTransformer2DModel", "--tiny", "--steps", "8")
    assert [entry["method"] for entry in entries] == FIVE
    for entry in entries:
        assert entry["state_bytes"] >= sum(site["state_bytes"] for site in entry["sites"]) > 0
        assert entry["plan"] is None or len(entry["plan"]["computed"]) == 8
    assert [entry["plan"] is None for entry in entries] == [True, False, False, False, False]


def test_explain_of_a_model_of_real_size_computes_nothing():
    entries = read("explain", "FluxTransformer2DModel", "--method", "first_block_cache")
    held = {site["name"]: site["state_bytes"] for site in entries[0]["sites"]}
    # 4096 tokens of the image, 3072 wide, in bfloat16.
    assert set(held.values()) == {4096 * 3072 * 2}
    assert entries[0]["sites"][1]["modules"] == 18 + 38


def test_explain_of_a_folder(folder):
    entries = read("explain", str(folder), "--method", "mag_cache", *SMALL)
    assert [entry["component"] for entry in entries] == ["transformer", "transformer_2"]
    alone = read("explain", str(folder / "transformer"), "--method", "mag_cache", *SMALL)
    assert alone[0]["sites"] == entries[0]["sites"]


def test_explain_of_a_class_with_a_config(folder):
    config = str(folder / "transformer" / "config.json")
    given = read("explain", "WanTransformer3DModel", "--config", config, "--method", "mag_cache", *SMALL)
    assert given[0]["sites"] == read("explain", config, "--method", "mag_cache", *SMALL)[0]["sites"]
    assert given[0]["sites"][0]["modules"] == 3


def test_explain_of_a_hub_id(folder, monkeypatch):
    real = ConfigMixin.load_config.__func__
    local = classmethod(lambda cls, name, **kwargs: real(cls, str(folder) if name == "some/model" else name, **kwargs))
    monkeypatch.setattr(ConfigMixin, "load_config", local)
    entries = read("explain", "some/model", "--method", "mag_cache", *SMALL)
    assert [entry["component"] for entry in entries] == ["transformer", "transformer_2"]


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no such repository\nand much more")

    monkeypatch.setattr(DiffusionPipeline, "load_config", fail)
    said = call("explain", "some/model", code=2)
    assert "some/model" in said and "no such repository" in said and "much more" not in said


def test_settings_reach_the_methods_that_have_them():
    entries = read("explain", "Flux", "--tiny", "--set", "threshold=0.2", "--set", "interval=3", "--set", "max_skips=2")
    assert [entry["policy"].startswith(name) for entry, name in zip(entries, FIVE, strict=True)] == [True] * 5
    assert "0.2" in entries[0]["policy"] and "0.2" in entries[1]["policy"] and "(3" in entries[2]["policy"]


def test_ratios_are_those_of_the_file(tmp_path):
    path = tmp_path / "ratios.json"
    ck.MagRatios((1.0,) + (2.0,) * 7).save(path)
    arguments = ("explain", "Flux", "--tiny", "--method", "mag_cache", "--steps", "8")
    [entry] = read(*arguments, "--ratios", str(path))
    assert entry["plan"]["computed"] == [True] * 8  # each would double what is held
    assert "FLUX.1" in call(*arguments) and "FLUX.1" not in call(*arguments, "--ratios", str(path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["Nothing"], "no class 'Nothing'"),
        (["FluxPipeline", "--method", "taylorseer"], "FluxPipeline is no model"),
        (["Flux", "--tiny", "--method", "magic"], "'magic' is none of first_block_cache"),
        (["Flux", "--tiny", "--set", "thresold=1"], "no method asked for has thresold"),
        (["Flux", "--tiny", "--set", "threshold"], "'threshold' is not KEY=VALUE"),
        (["Nothing", "--tiny"], "no tiny configuration of 'Nothing'"),
        (["FluxTransformer2DModel", "--height", "1000"], "1000 is no multiple of 16"),
        (["FluxTransformer2DModel", "--dtype", "int8"], "'int8' is none of float32"),
        (["."], "holds neither model_index.json nor config.json"),
        (["FluxTransformer2DModel", "--steps", "1"], "--steps"),
        (["Flux", "--tiny", "--method", "mag_cache", "--set", "ratios=3"], "--ratios FILE"),
    ],
)
def test_what_is_wrong_is_named(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in call("explain", *arguments, code=2)


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99"])
def test_a_device_that_is_not_here(device):
    assert "--device" in call("bench", "Flux", "--tiny", "--device", device, code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "bad.json"], "--against"),
        (["--against", "other.json"], "--against"),
        (["--save", "nowhere/c.json"], "--save"),
        (["--markdown", "nowhere/c.md"], "--markdown"),
    ],
)
def test_coverage_looks_at_its_files_before_it_runs(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    monkeypatch.setattr("cachekit.coverage.table.cover_all", None)
    assert said in call("coverage", "PixArtTransformer2DModel", *arguments, code=2)


def test_a_file_that_is_no_configuration(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[]")
    assert "cannot be read as a configuration" in call("explain", str(path), code=2)
    path.write_text('{"_class_name": "FluxTransformer2DModel", "num_layers": "many"}')
    assert "refuses its configuration" in call("explain", str(path), code=2)


def test_a_class_whose_inputs_are_not_known_says_so():
    said = call("explain", "HiDreamImageTransformer2DModel", code=1)
    assert "The inputs of HiDreamImageTransformer2DModel are not known" in said
    assert "Traceback" not in said


def test_a_value_that_a_method_refuses():
    said = call("explain", "Flux", "--tiny", "--method", "taylorseer", "--set", "interval=0", code=1)
    assert "`interval`" in said and "Traceback" not in said


def test_a_method_that_a_model_refuses_does_not_end_the_others(monkeypatch):
    monkeypatch.setitem(options.METHODS, "taylorseer", lambda: ck.taylorseer(3, sites=("nowhere",)))
    entries = read("explain", "Flux", "--tiny", "--steps", "6")
    assert [name for name, entry in zip(FIVE, entries, strict=True) if "refused" in entry] == ["taylorseer"]
    assert "refused: " in call("explain", "Flux", "--tiny", "--method", "taylorseer", code=1)


# What a sampler would pass -----------------------------------------------------------------------------------


UNFINISHED = {  # classes whose default configuration does not build, and what it lacks
    "LatteTransformer3DModel": {"in_channels": 4, "sample_size": 64, "patch_size": 2, "caption_channels": 4096},
}


@pytest.mark.parametrize("name", inputs.KINDS)
def test_a_class_takes_the_inputs_that_are_known_of_it(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(UNFINISHED.get(name, {})))
    size = ["--height", "256", "--width", "256", "--frames", "17", "--steps", "10"]
    arguments = ("explain", name, "--config", str(path), "--method", "first_block_cache", *size)
    if name in ("Lumina2Transformer2DModel", "MochiTransformer3DModel"):  # they branch on data
        assert f"{name} must run once for real" in call(*arguments, code=1)
    else:
        [entry] = read(*arguments)
        assert entry["faked"] and entry["state_bytes"] > 0


def test_inputs_are_where_and_what_they_should_be():
    [subject] = models.subjects("FluxTransformer2DModel", None, False, (2, 1, 128, 64), "float16", "meta")
    given = subject.inputs(3)
    assert {key: tuple(value.shape) for key, value in given.items()} == {
        "hidden_states": (2, 8 * 4, 64),
        "encoder_hidden_states": (2, 512, 4096),
        "pooled_projections": (2, 768),
        "img_ids": (32, 3),
        "txt_ids": (512, 3),
        "timestep": (2,),
    }
    assert given["hidden_states"].dtype == torch.float16 and given["img_ids"].dtype == torch.float32


# coverage ----------------------------------------------------------------------------------------------------


def test_coverage_of_one_class(tmp_path):
    saved, page = tmp_path / "coverage.json", tmp_path / "coverage.md"
    said = call("coverage", "PixArt", "--no-compile", "--save", str(saved), "--markdown", str(page))
    assert "PixArtTransformer2DModel" in said and "✗" not in said
    record = json.loads(saved.read_text())
    found = record["rows"]["PixArt"]["methods"]
    assert {name: finding["verdict"] for name, finding in found.items()} == dict.fromkeys(
        [*FIVE, "faster_cache, guidance"], "works"
    )
    assert "| `PixArtTransformer2DModel` | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ |" in page.read_text()
    call("coverage", "PixArtTransformer2DModel", "--no-compile", "--against", str(saved))


def test_coverage_fails_where_something_is_lost(tmp_path):
    saved = tmp_path / "coverage.json"
    row = {"class": "PriorTransformer", "methods": {"faster_cache, guidance": {"verdict": "works"}}}
    before = {"rows": {"Prior": row}}
    saved.write_text(json.dumps(before))
    arguments = ("coverage", "Prior", "--no-compile", "--against", str(saved))
    said = call(*arguments, "--method", "faster_cache, guidance", code=1)
    assert "Lost: PriorTransformer (Prior), faster_cache, guidance: refused, `layout`" in said
    assert "not tried" in call(*arguments, "--method", "mag_cache", code=1)


def test_coverage_names_what_it_cannot_try():
    assert "a part of UNets" in call("coverage", "Transformer2DModel", code=2)
    assert "no tiny configuration" in call("coverage", "Nothing", code=2)
    assert "'magic' is none of" in call("coverage", "Prior", "--method", "magic", code=2)


def test_the_version_is_said():
    assert call("--version") == f"cachekit {ck.__version__}, torch {torch.__version__}\n"


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "cachekit.coverage", "Prior", "--no-compile", "--method", "mag_cache", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows"]["Prior"]["methods"]["mag_cache"]["verdict"] == "works"


# bench -------------------------------------------------------------------------------------------------------


def test_bench_measures_every_way():
    arguments = ("bench", "Wan", "--tiny", "--rounds", "2", "--steps", "6", "--device", "cpu")
    record = read(*arguments)
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == ["uncached", *FIVE]
    assert rows["uncached"]["ratio"] == 1 and rows["uncached"]["computed"] == 6
    for name in FIVE:
        assert rows[name]["computed"] < 6 and rows[name]["state_bytes"] > 0 and rows[name]["ratio"] > 0
    assert "speed-up" in call(*arguments, "--method", "mag_cache")


def test_bench_times_no_wrong_result(monkeypatch):
    real = ck.CachedStep.forward
    monkeypatch.setattr(
        ck.CachedStep,
        "forward",
        lambda self, state, **kwargs: (lambda out, state: ((out[0] * 1.1,), state))(*real(self, state, **kwargs)),
    )
    said = call("bench", "Wan", "--tiny", "--rounds", "1", "--steps", "3", "--device", "cpu", code=1)
    assert "A wrong result is not timed" in said


def test_bench_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr("cachekit.cli.bench._free", lambda device: 1 << 30)
    said = call("bench", "FluxTransformer2DModel", "--device", "cpu", code=1)
    assert "The weights of FluxTransformer2DModel take 22.1 GiB, cpu has 1.0 GiB free" in said


# All of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["explain", "bench", "coverage", "demo"])
def test_every_command_has_help_with_an_example(command):
    said = call(command, "--help")
    assert f"cachekit {command} " in said and "--json" in said


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("typer", []),
        ("diffusers", ["explain", "Flux", "--tiny"]),
        ("diffusers", ["record", "digits", "--out", "never"]),
        ("diffusers", ["coverage", "Prior"]),
    ],
)
def test_without_the_extra_it_says_what_to_install(missing, arguments):
    code = f"import sys; sys.modules[{missing!r}] = None; from cachekit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'cachekit[cli]'" in done.stderr and "Traceback" not in done.stderr


def test_the_zoo_has_every_class_whose_inputs_are_known():
    assert set(inputs.KINDS) <= {cls.__name__ for cls, _ in zoo.BUILDERS.values()}
    assert all(hasattr(diffusers, name) for name in inputs.KINDS)
