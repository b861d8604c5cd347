"""`conserve worker` in front of real vLLM: it starts, says who it is, answers, and ends with vLLM's own exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

import conserve_sdk
import conserve_vllm
from conserve_lab.vllm import ModelShape, find_venv
from conserve_lab.vllm._model import make_model
from conserve_lab.vllm._ports import free_ports
from conserve_lab.vllm.fleet import DEFAULT_CACHE
from conserve_lab.vllm.install import python_of

START_BUDGET_S = 170.0
END_BUDGET_S = 60.0
CONSERVE = Path(sys.executable).with_name("conserve")
ENTRY = "vllm.entrypoints.launchers.api_server.entry"
SECRET = "a token key of at least thirty-two bytes"


class Running:
    def __init__(self, folder):
        python = python_of(find_venv())
        model = make_model(ModelShape(), python=python, cache=DEFAULT_CACHE)
        for package in (conserve_sdk, conserve_vllm):
            (folder / package.__name__).symlink_to(Path(package.__path__[0]).absolute())
        port, side_channel = free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        own = [
            "--id",
            "d7",
            "--role",
            "decoder",
            "--hold-s",
            "12",
            "--quiet-nixl",
            "--token-keys",
            "main=env:TOKEN_KEY",
        ]
        own += ["--side-channel-port", str(side_channel), "--tier", "cpu"]
        served = ["--model", str(model), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
        served += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "1024"]
        served += ["--kv-cache-memory-bytes", "8M", "--max-num-seqs", "4"]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COVERAGE", "VLLM"))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [CONSERVE, "worker", *own, "--", python, "-m", ENTRY, *served],
                stdout=log,
                stderr=log,
                env=kept
                | {
                    "PYTHONPATH": str(folder),
                    "TOKEN_KEY": SECRET,
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_CACHE_ROOT": str(DEFAULT_CACHE.absolute() / "vllm"),
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "OMP_NUM_THREADS": "1",
                },
            )

    def wait_healthy(self):
        deadline_s = time.monotonic() + START_BUDGET_S
        while True:
            try:
                if httpx2.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx2.TransportError:
                pass  # not listening yet
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-4_000:]
            assert time.monotonic() < deadline_s, self.log.read_text(errors="replace")[-4_000:]
            time.sleep(0.2)


@pytest.fixture
def worker(vllm_here, tmp_path):
    running = Running(tmp_path)
    try:
        running.wait_healthy()
        yield running
    finally:
        if running.process.poll() is None:
            running.process.terminate()
            running.process.wait(END_BUDGET_S)


def test_the_worker_starts_a_guarded_decoder_and_ends_it(worker):
    told = httpx2.get(f"{worker.url}/conserve/engine", trust_env=False).json()
    assert (told["engine_id"], told["role"], told["tier"]) == ("d7", "decoder", "cpu")
    assert told["kv_engine_id"].startswith("d7-")
    assert (told["kv_load_failure_policy"], told["kv_lease_duration_ms"]) == ("recompute", 12_000)
    assert (told["models"], told["prompt_tokens_details"]) == (["tiny"], True)
    body = {"model": "tiny", "prompt": "read the file", "max_tokens": 4, "temperature": 0}
    answer = httpx2.post(f"{worker.url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    made_up = body | {"kv_transfer_params": {"do_remote_prefill": True}}
    refused = httpx2.post(f"{worker.url}/v1/completions", json=made_up, timeout=60, trust_env=False)
    assert json.loads(refused.content)["error"]["code"] == "bad_transfer_params"
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(END_BUDGET_S) == 0, worker.log.read_text(errors="replace")[-2_000:]
