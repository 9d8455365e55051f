"""The only part of cachekit that knows diffusers: caching for pipelines, in one line.

```python
import cachekit as ck
import cachekit.diffusers as ckd

with ckd.cached(pipe, ck.first_block_cache(threshold=0.1)) as run:
    image = pipe("a cat", num_inference_steps=28).images[0]
print(run.summary())
```
"""

from cachekit.diffusers.configs import from_config
from cachekit.diffusers.runs import Run, cached, disable, enable

__all__ = ["Run", "cached", "disable", "enable", "from_config"]
