"""What differs between the releases of torch that are supported, where it cannot be written so that it does not matter.

Attributes:
    PACKAGE: options of Inductor for a package. In 2.11, no more in 2.13, it plans the memory of both branches of a
        decision by the sizes of the graph around them, and ends with "Start index ... out of bounds" where a branch is
        longer. Without planned reuse the allocator does that work while the package runs.
    FORGETFUL: whether `torch.cond`, inside one graph, is given attributes of objects as they were before anything was
        set. So it is in 2.13 and 2.14; not in 2.11 and 2.15.
"""

from __future__ import annotations

from typing import Any

import torch

_RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))  # one built from source, 2.13.0a0, is of 2.13
PACKAGE: dict[str, Any] = {"allow_buffer_reuse": False} if _RELEASE < (2, 13) else {}
FORGETFUL = (2, 13) <= _RELEASE < (2, 15)
