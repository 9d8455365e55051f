"""What a compiler makes of the kernels, shown without a GPU: each in a process of its own, not interpreted."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def fresh(code: str, tmp_path) -> str:
    """What a process of its own prints, away from the repository."""
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_a_compiled_program_sees_the_kernels_and_not_the_operators(tmp_path):
    code = """
        import logging, torch
        logging.disable(logging.WARNING)  # without a GPU nobody can tell what a kernel writes to
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.func import functionalize
        import cachekit_kernels
        from torch._functorch.aot_autograd import aot_function

        seen = []
        def keep(graph, inputs):
            seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph

        def everything(x, low, spacing):
            ops = torch.ops.cachekit
            return (
                ops.residual_norm(x, x, x, False), ops.residual_change(x, x, True), ops.norm_ratio(x, x),
                ops.differences([x, x], x, spacing), ops.polynomial([x, x], spacing, torch.bfloat16, True),
                ops.guidance_delta(x, low, low, spacing, False),
            )

        with FakeTensorMode() as mode, torch.no_grad():
            x = torch.empty(2, 64, 64, device="cuda", dtype=torch.bfloat16)
            assert cachekit_kernels.runs_on(x) and not cachekit_kernels.runs_on(torch.empty(2))
            low, spacing = torch.empty(2, 64, 64, device="cuda"), torch.empty(2, device="cuda")
            try:
                aot_function(everything, fw_compiler=keep, inference_compiler=keep)(x, low, spacing)
            except RuntimeError as error:
                assert "cuda" in str(error)  # the graph is there; what would run it is not
        print(sum("triton_kernel_wrapper" in name for name in seen), [name for name in seen if "cachekit" in name])
    """
    assert fresh(code, tmp_path) == "6 []"


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_program_writes_to_nothing_by_two_names(order, tmp_path):
    # Each would be copied before and copied back after, and the copy that was not written to wins.
    code = f"""
        import logging, torch
        logging.disable(logging.WARNING)
        from torch._subclasses import FakeTensorMode
        from torch._functorch.aot_autograd import aot_function
        from cachekit_kernels import _triton

        seen = []
        def keep(graph, inputs):
            for node in graph.graph.nodes:
                if "triton_kernel_wrapper" in str(node.target):
                    given = node.kwargs["kwargs"]
                    seen.append([str(given[f"b{{n}}_ptr"]) for n in range({order + 1})])
            return graph

        with FakeTensorMode(), torch.no_grad():
            x, spacing = torch.empty(2, 64, device="cuda"), torch.empty(3, device="cuda")
            try:
                aot_function(lambda x, spacing: _triton.differences([x] * {order + 1}, x, spacing), fw_compiler=keep,
                             inference_compiler=keep)(x, spacing)
            except RuntimeError as error:
                assert "cuda" in str(error)
        print([len({{*names}}) for names in seen])
    """
    assert fresh(code, tmp_path) == f"[{order + 1}]"


KERNELS = {
    "_residual._sums_kernel": {"SUBTRACT": True, "BLOCK": 4096},
    "_residual._ratio_kernel": {"TOKENS": 4, "CHANNELS": 1024},
    "_polynomial._update_kernel": {"ORDER": 3, "STRIDE": 1, "BLOCK": 2048},
    "_polynomial._predict_kernel": {"ORDER": 3, "STRIDE": 0, "FACTORIAL": True, "BLOCK": 2048},
    "_guidance._delta_kernel": {"COND_FIRST": False, "BLOCK": 2048},
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_for_a_gpu_into_wide_loads_without_spills(name, tmp_path):
    code = f"""
        import importlib, json, triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from cachekit_kernels._triton._operator import WARPS

        module, _, function = {name!r}.partition(".")
        kernel = getattr(importlib.import_module("cachekit_kernels._triton." + module), function)
        constants = {KERNELS[name]!r}
        single = ("partial_ptr", "spacing_ptr", "offset_ptr", "weights_ptr", "low_ptr", "high_ptr")
        names, sizes = kernel.arg_names, ("size", "other_size", "width")
        pointers = [name for name in names if name.endswith("_ptr")]
        kinds = {{name: "i32" if name not in pointers else "*fp32" if name in single else "*bf16" for name in names}}
        aligned = [n for n, name in enumerate(names) if name in pointers or name in sizes]
        source = ASTSource(
            fn=kernel,
            signature={{name: "constexpr" if name in constants else kind for name, kind in kinds.items()}},
            constexprs=constants,
            attrs={{(n,): [["tt.divisibility", 16]] for n in aligned}},
        )
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": WARPS}})
        lines = made.asm["ptx"].splitlines()
        print(json.dumps({{
            "wide": sum("ld.global" in line and ".v4.b32" in line for line in lines),
            "narrow": sum("ld.global" in line and "b16" in line for line in lines),
            "stack": sum(".local" in line for line in lines),
        }}))
    """
    found = json.loads(fresh(code, tmp_path))
    assert found["wide"] and not found["narrow"] and not found["stack"], found


@pytest.mark.parametrize("name", KERNELS)
def test_an_offset_into_a_tensor_has_64_bits(name, tmp_path):
    # More than 2^31 elements cannot be run here; an index of 32 bits would be seen in the kernel's own code.
    code = f"""
        import importlib, json, re, triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        module, _, function = {name!r}.partition(".")
        kernel = getattr(importlib.import_module("cachekit_kernels._triton." + module), function)
        constants, names = {KERNELS[name]!r}, kernel.arg_names
        kinds = {{name: "*fp32" if name.endswith("_ptr") else "i64" if "size" in name else "i32" for name in names}}
        kinds |= {{name: "constexpr" for name in constants}}
        source = ASTSource(fn=kernel, signature={{name: kinds[name] for name in names}}, constexprs=constants)
        text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
        blocks = re.findall(r"tt.addptr .*: tensor<[^,]*, tensor<[0-9x]*(i32|i64)>", text)
        print(json.dumps({{"offsets": len(blocks), "narrow": blocks.count("i32")}}))
    """
    found = json.loads(fresh(code, tmp_path))
    assert found["offsets"] >= 2 and not found["narrow"], found


def test_inside_a_graph_the_kernel_that_decides_is_all_that_a_compiler_does_not_fuse(tmp_path):
    code = """
        import os
        os.environ["TRITON_INTERPRET"] = "1"
        import torch, cachekit_kernels as kernels

        seen = []
        def keep(graph, inputs):
            seen.extend(str(node.target) for node in graph.graph.nodes if "cachekit" in str(node.target))
            return graph

        @torch.compile(fullgraph=True, backend=keep)
        def everything(x, weights):
            updated = kernels.taylor_update([x, x], x, weights[0])
            return (
                kernels.residual_norm(x, x, x), kernels.residual_change(x, x), kernels.norm_ratio(x, x), updated,
                kernels.newton_predict(updated, weights),
                kernels.guidance_delta(x, x, x, weights),
            )

        x = torch.ones(2, 5)
        assert kernels.runs_on(x)
        everything(x, torch.ones(2))
        print(seen)
    """
    assert fresh(code, tmp_path) == "['cachekit.residual_norm.default']"


def test_no_package_of_the_name_kernels_can_be_imported(tmp_path):
    # transformers and diffusers look for one, and would take the folder for it.
    assert (
        fresh("import importlib.util, cachekit_kernels; print(importlib.util.find_spec('kernels'))", tmp_path) == "None"
    )
