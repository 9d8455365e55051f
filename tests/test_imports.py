"""What is loaded when: importing costs little, and what is heavy comes where it is first needed."""

from __future__ import annotations

import importlib.util

import pytest
from test_kernels_compiled import fresh

LOADED = """
        import sys
        def loaded(*names):
            return {name for name in sys.modules for heavy in names if f"{name}.".startswith(f"{heavy}.")}
"""


def test_importing_loads_no_compiler(tmp_path):
    code = """
        import torch
        heavy = "torch._dynamo", "torch._inductor", "triton", "sympy", "diffusers", "transformers", "matplotlib"
        before = loaded(*heavy)
        import cachekit
        assert all(hasattr(cachekit, name) for name in cachekit.__all__)
        print(sorted(loaded(*heavy) - before))
    """
    assert fresh(LOADED + code, tmp_path) == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["choose", "--help"], ["bench", "--help"]])
def test_help_loads_no_library_of_models(arguments, tmp_path):
    code = f"""
        from cachekit.cli import main
        sys.argv = ["cachekit", *{arguments!r}]
        try:
            main()
        except SystemExit as end:
            assert not end.code
        print(sorted(loaded("diffusers", "transformers", "matplotlib", "torch._dynamo")))
    """
    assert fresh(LOADED + code, tmp_path) == "[]"


FIRST = """
    import os, sys
    os.environ["TRITON_INTERPRET"] = "1"
    {before}
    import torch, cachekit_kernels as kernels
    from cachekit_kernels import reference
    assert not {{"triton", "torch._dynamo", "cachekit_kernels._triton"}} & {{*filter(sys.modules.get, sys.modules)}}

    seen = []
    def keep(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes if "cachekit" in str(node.target)])
        return graph

    def both(output, base, before):
        return kernels.residual_norm(output, base, before), kernels.norm_ratio(base, before)

    output, base, before = torch.arange(3 * 7 * 5.0).reshape(3, 7, 5).sin()
    run = torch.compile(both, fullgraph=True, backend=keep) if {compiled} else both
    for _ in range(2):
        found, sums = run(output, base, before)
        torch.testing.assert_close(found, reference.residual_norm(output, base, before))
        torch.testing.assert_close(sums, reference.norm_ratio(base, before))
    print("cachekit_kernels._triton._residual" in sys.modules, kernels.runs_on(output), seen)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_kernels_are_loaded_by_the_first_use_inside_a_graph_too(compiled, tmp_path):
    seen = [["cachekit.residual_norm.default"]] if compiled else []
    assert fresh(FIRST.format(before="", compiled=compiled), tmp_path) == f"True True {seen}"


@pytest.mark.parametrize("compiled", [False, True])
def test_the_references_run_where_triton_cannot_be_loaded(compiled, tmp_path):
    code = FIRST.format(before="sys.modules['triton'] = None", compiled=compiled)
    assert fresh(code, tmp_path) == f"False False {[[]] if compiled else []}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_what_interprets_is_read_as_triton_reads_it(tmp_path):
    code = """
        import importlib, os
        from cachekit_kernels import _choice
        from triton import knobs

        values = "", "0", "1", "2", " 1", "true", "True", "TRUE", "t", "on", "On", "yes", "y", "Y", "no", "off"
        for value in values:
            os.environ["TRITON_INTERPRET"] = value
            assert importlib.reload(_choice).INTERPRETED == knobs.runtime.interpret, value
        del os.environ["TRITON_INTERPRET"]
        assert importlib.reload(_choice).INTERPRETED == knobs.runtime.interpret
        print("alike")
    """
    assert fresh(code, tmp_path) == "alike"
