"""`conserve worker -- vllm serve MODEL`: the command in front of an engine."""

from conserve_vllm.worker.command import worker_main

__all__ = ["worker_main"]
