"""`conserve worker` in front of real vLLM: it starts, says who it is, registers with a real broker and repeats that,
answers whoever has a lease, drains on SIGTERM, and ends with vLLM's own exit code."""

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
from conserve_lab.ports import free_ports
from conserve_lab.vllm import ModelShape, find_venv, parse_counters
from conserve_lab.vllm._model import make_model
from conserve_lab.vllm.fleet import DEFAULT_CACHE
from conserve_lab.vllm.install import python_of
from conserve_sdk import ConServe, LeaseRefused, conversation
from conserve_sdk._ed25519 import PrivateKey
from conserve_sdk.core.lease import EngineBinding, Mode
from conserve_sdk.core.units import EngineId, LeaseId, Ms, Tokens
from conserve_sdk.telemetry import TurnCollector
from conserve_sdk.tokens import LeaseClaims, SigningKey, TokenSigner

START_BUDGET_S = 300.0
END_BUDGET_S = 60.0
DRAIN_BUDGET_S = 120.0 + END_BUDGET_S
"""Where a test has failed: it waits for the leases of those that are gone."""
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
def broker(vllm_here, keys_folder):
    """Knows no engine; those on this machine may register."""
    config = {
        "listen": {"port": 0},
        "placement": {"preset": "affinity"},
        "lease": {"hold_ms": HOLD_S * 1000},
        "token": {"keys": [{"kid": "pair", "private_key_file": str(keys_folder / "token.pem")}]},
        "registration": {"allow": ["127.0.0.0/8"], "api_key_env": "ENGINE_KEY"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_KEY", ENGINE_KEY)
        with BrokerServer(BrokerConfig.from_mapping(config)) as running:
            yield running


@pytest.fixture(scope="module")
def worker(broker, keys_folder, tmp_path_factory):
    """A decoder with a key of its own, and a guard that asks everybody for a lease, can check them and mint none."""
    own = ["--hold-s", str(HOLD_S), "--leased-holds", "--token-keys", f"pair=public:{keys_folder / 'token.pub.pem'}"]
    own += ["--broker", broker.url, "--heartbeat-s", "2", "--require-lease"]
    env = {"CONSERVE_GUARD_STAMP_KEYS": "stamps=env:STAMPS", "STAMPS": SECRET}
    started = Running(tmp_path_factory.mktemp("worker"), own=own, served=["--api-key", ENGINE_KEY], env=env)
    try:
        started.wait_healthy()
        broker.wait_until_ready(timeout_s=END_BUDGET_S, engines=1)
        yield started
    finally:
        if started.process.poll() is None:
            started.process.terminate()
            started.process.wait(DRAIN_BUDGET_S)


def until(condition):
    deadline_s = time.monotonic() + END_BUDGET_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def entry(broker):
    """The engine as the broker sees it; None: it knows none."""
    answer = httpx2.get(f"{broker.url}/v1/engines/d7", trust_env=False)
    return None if answer.status_code == 404 else answer.raise_for_status().json()


def post(worker, body, *, key=ENGINE_KEY, lease=""):
    told = {"Authorization": f"Bearer {key}", **({"X-ConServe-Lease": lease} if lease else {})}
    return httpx2.post(f"{worker.url}/v1/completions", json=body, headers=told, timeout=60, trust_env=False)


def test_the_worker_starts_a_guarded_decoder(worker, keys_folder):
    told = httpx2.get(f"{worker.url}/conserve/engine", trust_env=False).json()
    assert (told["engine_id"], told["role"], told["tier"]) == ("d7", "decoder", "cpu")
    assert told["kv_engine_id"].startswith("d7-")
    assert (told["kv_load_failure_policy"], told["kv_lease_duration_ms"]) == ("recompute", HOLD_S * 1000)
    assert (told["models"], told["prompt_tokens_details"]) == (["tiny"], True)
    lease = minted(worker, PrivateKey("pair", (keys_folder / "token.pem").read_bytes()))
    answer = post(worker, PROMPT, lease=lease)
    assert answer.status_code == 200, answer.text
    refused = post(worker, PROMPT | {"kv_transfer_params": {"do_remote_prefill": True}}, lease=lease)
    assert json.loads(refused.content)["error"]["code"] == "bad_transfer_params"
    assert post(worker, PROMPT, key="another", lease=lease).status_code == 401, "vLLM asks for its own key behind it"


def test_nobody_is_answered_without_a_lease(worker):
    before = httpx2.get(f"{worker.url}/metrics", trust_env=False).text
    refused = post(worker, PROMPT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "lease_required")
    wrong = post(worker, PROMPT, lease=minted(worker, PrivateKey("pair", new_pair()[0])))
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (403, "lease_invalid")
    after = httpx2.get(f"{worker.url}/metrics", trust_env=False).text
    assert parse_counters(after).since(parse_counters(before)).requests == 0, "vLLM heard of neither"


def test_the_worker_registers_and_repeats_it(worker, broker):
    told = httpx2.get(f"{worker.url}/conserve/engine", trust_env=False).json()
    seen = entry(broker)
    assert (seen["url"], seen["role"], seen["model"], seen["tier"]) == (worker.url, "decoder", "tiny", "cpu")
    assert (seen["incarnation"], seen["block_size_tokens"]) == (told["incarnation"], 32)
    assert (seen["state"], seen["leases"]) == ("ready", 0)
    httpx2.delete(f"{broker.url}/v1/engines/d7", trust_env=False).raise_for_status()  # which forgets it, without leases
    until(lambda: (found := entry(broker)) is not None and found["state"] == "ready")  # by its next heartbeat


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


def minted(worker, key):
    """A lease that somebody with this key wrote."""
    return TokenSigner([key]).sign(claims(worker))


def held_tokens(worker):
    return parse_counters(httpx2.get(f"{worker.url}/metrics", trust_env=False).text).kv_used_tokens


def test_a_lease_is_held_and_let_go_of_behind_vllms_own_key(worker, broker):
    turns = TurnCollector()
    with ExitStack() as stack:
        conserve = stack.enter_context(ConServe(broker.url, on_turn=turns))
        client = stack.enter_context(conserve.openai_client(api_key=ENGINE_KEY, max_retries=0))
        with conversation("behind two keys"):
            client.completions.create(**PROMPT)
        assert (turns.records[0].error, turns.records[0].held) == ("", True)
        assert held_tokens(worker) > 0, "held between turns"
        assert conserve.flush(END_BUDGET_S)
        assert conserve.release("behind two keys") == 1
        until(lambda: held_tokens(worker) == 0)  # the hold itself lasts longer than this waits
    counts = httpx2.get(f"{worker.url}/conserve/engine", trust_env=False).json()["guard"]
    assert counts["hold"] >= 1
    assert counts["released"] == 1


def test_only_the_brokers_private_key_makes_leases(worker, keys_folder):
    hold = PROMPT | {"kv_transfer_params": {"do_remote_decode": True}}
    private, public = ((keys_folder / name).read_bytes() for name in ("token.pem", "token.pub.pem"))
    keys = [PrivateKey("pair", private), PrivateKey("pair", new_pair()[0]), SigningKey(kid="pair", secret=public)]
    assert [post(worker, hold, lease=minted(worker, key)).status_code for key in keys] == [200, 403, 403]


def test_on_sigterm_it_waits_for_its_leases_and_ends_with_vllms_own_exit_code(worker, broker):
    """The last test of this file: the others need the engine alive."""
    with ExitStack() as stack:
        conserve = stack.enter_context(ConServe(broker.url, wait_s=0.5))
        client = stack.enter_context(conserve.openai_client(api_key=ENGINE_KEY, max_retries=0))
        with conversation("stays to the end"):
            client.completions.create(**PROMPT)
        worker.process.send_signal(signal.SIGTERM)
        until(lambda: entry(broker)["state"] == "draining")
        with conversation("too late"), pytest.raises(LeaseRefused):
            client.completions.create(**PROMPT)
        with conversation("stays to the end"):
            assert client.completions.create(**PROMPT).usage.prompt_tokens_details.cached_tokens > 0
        assert worker.process.poll() is None, "a live lease keeps the engine"
        assert conserve.release("stays to the end") == 1
        assert worker.process.wait(END_BUDGET_S) == 0, worker.log.read_text(errors="replace")[-2_000:]
    assert entry(broker) is None
    assert "draining: 1 leases left" in worker.log.read_text(errors="replace")
