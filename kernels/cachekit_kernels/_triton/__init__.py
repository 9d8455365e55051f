"""The kernels and their operators. To import this loads Triton, Dynamo and Inductor: `kernels_for` does, when needed.

Attributes:
    HERE: whether there is Triton. Without it nothing else is in here, and the references run.
"""

try:
    import triton.language  # noqa: F401
except ImportError:  # not on this platform, or not whole
    HERE = False
else:
    HERE = True
    from cachekit_kernels._triton._guidance import guidance_delta
    from cachekit_kernels._triton._polynomial import differences, differences_, polynomial
    from cachekit_kernels._triton._residual import norm_ratio, residual_change, residual_norm

    __all__ = [
        "HERE",
        "differences",
        "differences_",
        "guidance_delta",
        "norm_ratio",
        "polynomial",
        "residual_change",
        "residual_norm",
    ]
