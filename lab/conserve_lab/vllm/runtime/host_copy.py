"""vLLM's host tier on a machine without a GPU: its own bookkeeping, and a plain copy where a GPU would copy by DMA.

vLLM 0.32 refuses its offloading connector on a CPU ("only supported on CUDA-alike and XPU GPUs", `kv_offload/cpu/
spec.py`), because the worker's half copies on CUDA streams. Everything else of it (what is stored when, looked up,
evicted, loaded, counted) is the scheduler's half and the same here; only the copy is another one. For measurements
and tests: on a GPU vLLM's own spec is used.

Loaded by `spec_module_path`; runs inside vLLM only.
"""

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostCopyWorker(OffloadingWorker):
    """Copies pages between the cache and a tensor of its own, at once."""

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        self._pages = [cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes) for cache in kv_caches.tensors]
        self._host = [torch.zeros((chunks, page.shape[1]), dtype=torch.int8) for page in self._pages]
        self._refs = [ref for group in kv_caches.group_data_refs for ref in group]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Cache to host."""
        return self._copy(job_id, self._pages, src_spec.block_ids, self._host, dst_spec.block_ids)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Host to cache."""
        return self._copy(job_id, self._host, src_spec.block_ids, self._pages, dst_spec.block_ids)

    def get_finished(self) -> list[TransferResult]:
        """Copies that are over: all of them."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def _copy(self, job_id: int, source: Any, source_ids: Any, target: Any, target_ids: Any) -> bool:
        started_s = time.perf_counter()
        size_bytes = 0
        for ref in self._refs:
            pages = source[ref.tensor_idx][torch.as_tensor(source_ids.astype("int64"))]
            target[ref.tensor_idx][torch.as_tensor(target_ids.astype("int64"))] = pages
            size_bytes += pages.numel()
        took_s = time.perf_counter() - started_s
        self._done.append(TransferResult(job_id=job_id, success=True, transfer_size=size_bytes, transfer_time=took_s))
        return True


class HostCopySpec(CPUOffloadingSpec):
    """vLLM's own host tier with the copy above. One block a chunk, one KV group: what the tiny model has."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker's half."""
        assert self.blocks_per_chunk == 1
        assert len(kv_caches.group_data_refs) == 1
        if not self._worker:
            self._worker = HostCopyWorker(kv_caches, self.num_chunks)
        return self._worker
