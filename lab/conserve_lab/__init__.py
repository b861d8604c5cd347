"""Everything to try and measure ConServe without GPUs: engine model, emulated fleet, real vLLM on CPU, demo, bench.

`LocalStack` (`conserve_lab.stack`) is a broker in front of an emulated fleet, ready to use.
"""

__all__: list[str] = []
