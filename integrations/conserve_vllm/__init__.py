"""What runs beside vLLM on a GPU worker: the guard inside its API server, and the command in front of it.

```text
vllm serve MODEL --middleware conserve_vllm.LeaseGuard ...
```

Nothing here imports vLLM; the guard is a plain ASGI class and runs in front of any server.
"""

from __future__ import annotations

from conserve_vllm.guard import LeaseGuard
from conserve_vllm.settings import GuardConfigError, GuardSettings

__all__ = ["GuardConfigError", "GuardSettings", "LeaseGuard"]
