"""The transport pair: put one under any httpx2 client and its completions travel by lease.

```python
import httpx2, openai
from conserve_sdk import ConServeTransport

client = openai.OpenAI(
    base_url="http://conserve.invalid/v1", api_key="EMPTY",
    http_client=httpx2.Client(transport=ConServeTransport("http://127.0.0.1:7070")),
)
```

`conserve_sdk.openai_client` does just that, and shares one transport per process.
"""

from __future__ import annotations

from conserve_sdk.transport._async import AsyncConServeTransport
from conserve_sdk.transport._settings import ConServeOptions, Settings
from conserve_sdk.transport._sync import ConServeTransport

__all__ = ["AsyncConServeTransport", "ConServeOptions", "ConServeTransport", "Settings"]
