"""`conserve worker` in front of real vLLM: it starts, says who it is, answers, and ends with vLLM's own exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import conserve_sdk
import conserve_vllm
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.vllm import ModelShape, find_venv, parse_counters
from conserve_lab.vllm._model import make_model
from conserve_lab.vllm._ports import free_ports
from conserve_lab.vllm.fleet import DEFAULT_CACHE
from conserve_lab.vllm.install import python_of
from conserve_sdk import ConServe, conversation
from conserve_sdk._ed25519 import PrivateKey
from conserve_sdk.core.lease import EngineBinding, Mode
from conserve_sdk.core.units import EngineId, LeaseId, Ms, Tokens
from conserve_sdk.telemetry import TurnCollector
from conserve_sdk.tokens import LeaseClaims, SigningKey, TokenSigner

START_BUDGET_S = 170.0
END_BUDGET_S = 60.0
CONSERVE = Path(sys.executable).with_name("conserve")
ENTRY = "vllm.entrypoints.launchers.api_server.entry"
SECRET = "a token key of at least thirty-two bytes"
ENGINE_KEY = "vllms-own-api-key"
PROMPT = {"model": "tiny", "prompt": "read the file " * 40, "max_tokens": 4, "temperature": 0}
HOLD_S = 300
"""Longer than any test waits: what is free before was let go of."""


class Running:
    def __init__(self, folder, *, own=(), served=(), env=()):
        python = python_of(find_venv())
        model = make_model(ModelShape(), python=python, cache=DEFAULT_CACHE)
        for package in (conserve_sdk, conserve_vllm):
            (folder / package.__name__).symlink_to(Path(package.__path__[0]).absolute())
        port, side_channel = free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        options = ["--id", "d7", "--role", "decoder", "--quiet-nixl", "--tier", "cpu"]
        options += ["--side-channel-port", str(side_channel), *own]
        flags = ["--model", str(model), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
        flags += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "1024"]
        flags += ["--kv-cache-memory-bytes", "8M", "--max-num-seqs", "4", *served]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COVERAGE", "VLLM"))}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [CONSERVE, "worker", *options, "--", python, "-m", ENTRY, *flags],
                stdout=log,
                stderr=log,
                env=kept
                | {
                    "PYTHONPATH": str(folder),
                    **dict(env),
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


def new_pair():
    """Private and public half, as `openssl` writes them."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    return private, key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture(scope="module")
def keys_folder(tmp_path_factory):
    """Where the broker's key pair is: `token.pem` and `token.pub.pem`."""
    folder = tmp_path_factory.mktemp("keys")
    private, public = new_pair()
    (folder / "token.pem").write_bytes(private)
    (folder / "token.pub.pem").write_bytes(public)
    return folder


@pytest.fixture(scope="module")
def worker(vllm_here, keys_folder, tmp_path_factory):
    """A decoder with a key of its own, and a guard that can check leases and mint none."""
    own = ["--hold-s", str(HOLD_S), "--leased-holds", "--token-keys", f"pair=public:{keys_folder / 'token.pub.pem'}"]
    env = {"CONSERVE_GUARD_STAMP_KEYS": "stamps=env:STAMPS", "STAMPS": SECRET}
    started = Running(tmp_path_factory.mktemp("worker"), own=own, served=["--api-key", ENGINE_KEY], env=env)
    try:
        started.wait_healthy()
        yield started
    finally:
        if started.process.poll() is None:
            started.process.terminate()
            started.process.wait(END_BUDGET_S)


def post(worker, body, *, key=ENGINE_KEY, **headers):
    told = {"Authorization": f"Bearer {key}", **headers}
    return httpx2.post(f"{worker.url}/v1/completions", json=body, headers=told, timeout=60, trust_env=False)


def test_the_worker_starts_a_guarded_decoder(worker):
    told = httpx2.get(f"{worker.url}/conserve/engine", trust_env=False).json()
    assert (told["engine_id"], told["role"], told["tier"]) == ("d7", "decoder", "cpu")
    assert told["kv_engine_id"].startswith("d7-")
    assert (told["kv_load_failure_policy"], told["kv_lease_duration_ms"]) == ("recompute", HOLD_S * 1000)
    assert (told["models"], told["prompt_tokens_details"]) == (["tiny"], True)
    answer = post(worker, PROMPT)
    assert answer.status_code == 200, answer.text
    refused = post(worker, PROMPT | {"kv_transfer_params": {"do_remote_prefill": True}})
    assert json.loads(refused.content)["error"]["code"] == "bad_transfer_params"
    assert post(worker, PROMPT, key="another").status_code == 401, "vLLM asks for its own key behind the guard"


def claims(worker):
    told = httpx2.get(f"{worker.url}/conserve/engine", trust_env=False).json()
    now_ms = time.time_ns() // 1_000_000
    return LeaseClaims(
        lease_id=LeaseId("by hand"),
        epoch=1,
        tenant="default",
        conversation_id="c",
        lineage="main",
        model="tiny",
        mode=Mode.LOCAL,
        prefiller=None,
        decoder=EngineBinding(engine_id=EngineId("d7"), url=worker.url, incarnation=told["incarnation"]),
        ttl_ms=Ms(60_000),
        hold_ms=Ms(2_000),
        append_threshold_tokens=Tokens(0),
        ledger_tokens=Tokens(0),
        granted_at_ms=Ms(now_ms),
        exp_ms=Ms(now_ms + 600_000),
    )


def engine_entry(worker):
    return {
        "id": "d7",
        "url": worker.url,
        "role": "decoder",
        "model": "tiny",
        "connector": "nixl",
        "transfer_group": "nixl",
        "block_size_tokens": 32,
        "max_hold_ms": HOLD_S * 1000,
        "api_key_env": "ENGINE_KEY",
    }


def held_tokens(worker):
    return parse_counters(httpx2.get(f"{worker.url}/metrics", trust_env=False).text).kv_used_tokens


def test_a_lease_is_held_and_let_go_of_behind_vllms_own_key(worker, keys_folder, monkeypatch):
    monkeypatch.setenv("ENGINE_KEY", ENGINE_KEY)
    config = {
        "listen": {"port": 0},
        "placement": {"preset": "affinity"},
        "lease": {"hold_ms": HOLD_S * 1000},
        "token": {"keys": [{"kid": "pair", "private_key_file": str(keys_folder / "token.pem")}]},
        "engine": [engine_entry(worker)],
    }
    turns = TurnCollector()
    with ExitStack() as stack:
        broker = stack.enter_context(BrokerServer(BrokerConfig.from_mapping(config)))
        broker.wait_until_ready(timeout_s=END_BUDGET_S, engines=1)
        conserve = stack.enter_context(ConServe(broker.url, on_turn=turns))
        client = stack.enter_context(conserve.openai_client(api_key=ENGINE_KEY, max_retries=0))
        with conversation("behind two keys"):
            client.completions.create(**PROMPT)
        assert (turns.records[0].error, turns.records[0].held) == ("", True)
        assert held_tokens(worker) > 0, "held between turns"
        assert conserve.flush(END_BUDGET_S)
        assert conserve.release("behind two keys") == 1
        deadline_s = time.monotonic() + END_BUDGET_S
        while held_tokens(worker):  # the hold itself lasts longer than this waits
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
    counts = httpx2.get(f"{worker.url}/conserve/engine", trust_env=False).json()["guard"]
    assert counts["hold"] >= 1
    assert counts["released"] == 1


def test_only_the_brokers_private_key_makes_leases(worker, keys_folder):
    hold = PROMPT | {"kv_transfer_params": {"do_remote_decode": True}}
    private, public = ((keys_folder / name).read_bytes() for name in ("token.pem", "token.pub.pem"))
    keys = [PrivateKey("pair", private), PrivateKey("pair", new_pair()[0]), SigningKey(kid="pair", secret=public)]
    seen = []
    for key in keys:
        answer = post(worker, hold, **{"X-ConServe-Lease": TokenSigner([key]).sign(claims(worker))})
        assert answer.status_code == 200, answer.text
        seen.append(answer.headers.get("x-conserve-guard", "").split(";")[0])
    assert seen == ["", "hold-stripped", "hold-stripped"]


def test_the_worker_ends_with_vllms_own_exit_code(worker):
    worker.process.send_signal(signal.SIGTERM)  # the last test of this file: the others need it alive
    assert worker.process.wait(END_BUDGET_S) == 0, worker.log.read_text(errors="replace")[-2_000:]
