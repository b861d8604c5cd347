"""TLS and mutual TLS by real handshakes: broker, SDK, commands; certificates made here."""

import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme

from conserve_broker.cli import engines_main
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig, ConfigProblem
from conserve_broker.tls import ServerTls
from conserve_sdk import BrokerUnavailable, ConServe
from conserve_sdk._broker_access import BrokerAccess
from conserve_sdk._broker_client import SyncBrokerClient
from conserve_sdk.doctor import main as doctor_main

BUDGET_S = 40.0


class Papers:
    """An authority, its certificate for the broker, and one for a client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.ca_file = self.kept("ca.pem", self.authority.cert_pem.bytes())
        self.cert_file, self.key_file = self.issue("broker", "127.0.0.1", "localhost")
        self.client_cert, self.client_key = self.issue("client", "agent.example")

    def kept(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.write_bytes(content)
        return str(path)

    def issue(self, name: str, *hosts: str) -> tuple[str, str]:
        made = self.authority.issue_cert(*hosts)
        chain = b"".join(part.bytes() for part in made.cert_chain_pems)
        return self.kept(f"{name}.pem", chain), self.kept(f"{name}.key", made.private_key_pem.bytes())

    def tables(self, *, mutual: bool = False) -> dict[str, str]:
        tls = {"cert_file": self.cert_file, "key_file": self.key_file}
        return tls | ({"client_ca_file": self.ca_file} if mutual else {})


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Papers(tmp_path)


def broker(**tls: str) -> BrokerServer:
    return BrokerServer(BrokerConfig.from_mapping({"listen": {"port": 0}, "tls": tls}))


@pytest.fixture
def server(papers: Papers) -> Iterator[BrokerServer]:
    with broker(**papers.tables()) as running:
        yield running


@pytest.fixture
def mutual(papers: Papers) -> Iterator[BrokerServer]:
    with broker(**papers.tables(mutual=True)) as running:
        yield running


def client(server: BrokerServer, **access: str) -> SyncBrokerClient:
    return SyncBrokerClient([server.url], access=BrokerAccess.resolve(**access))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BUDGET_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def test_the_sdk_speaks_to_a_broker_whose_authority_it_is_told(server: BrokerServer, papers: Papers) -> None:
    assert server.url.startswith("https://127.0.0.1:")
    knowing = client(server, ca_file=papers.ca_file)
    assert knowing.engines().engines == ()
    knowing.close()
    stranger = client(server)
    with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        stranger.engines(budget_ms=300)
    stranger.close()


async def test_async_clients_and_options_of_the_front_door(server: BrokerServer, papers: Papers) -> None:
    async with ConServe(server.url, broker_ca=papers.ca_file) as conserve:
        assert (await conserve._runtime.async_broker.engines()).engines == ()


def test_another_authority_of_the_same_name_is_none(server: BrokerServer, papers: Papers) -> None:
    other = papers.kept("other.pem", trustme.CA().cert_pem.bytes())
    suspicious = client(server, ca_file=other)
    with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        suspicious.engines(budget_ms=300)
    suspicious.close()


def test_plain_http_gets_no_answer_from_a_tls_port(server: BrokerServer) -> None:
    with pytest.raises(httpx2.TransportError):
        httpx2.get(server.url.replace("https", "http") + "/healthz", trust_env=False)


def test_old_protocol_versions_are_refused(server: BrokerServer, papers: Papers) -> None:
    assert ServerTls(BrokerConfig.from_mapping({"tls": papers.tables()}).tls).context.minimum_version is (
        ssl.TLSVersion.TLSv1_2
    )


def test_mutual_tls_lets_nobody_without_a_certificate_in(mutual: BrokerServer, papers: Papers) -> None:
    mine = client(mutual, ca_file=papers.ca_file, cert_file=papers.client_cert, cert_key_file=papers.client_key)
    assert mine.engines().engines == ()
    mine.close()
    bare = client(mutual, ca_file=papers.ca_file)
    with pytest.raises(BrokerUnavailable):
        bare.engines(budget_ms=300)
    bare.close()
    (papers.folder / "foreign").mkdir()
    foreign = Papers(papers.folder / "foreign")
    wrong = client(mutual, ca_file=papers.ca_file, cert_file=foreign.client_cert, cert_key_file=foreign.client_key)
    with pytest.raises(BrokerUnavailable):
        wrong.engines(budget_ms=300)
    wrong.close()


def test_commands_take_authority_and_certificate_from_the_environment(
    mutual: BrokerServer, papers: Papers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("CA", papers.ca_file), ("CERT", papers.client_cert), ("CERT_KEY", papers.client_key)):
        monkeypatch.setenv(f"CONSERVE_BROKER_{name}", value)
    assert engines_main(["list", "--broker", mutual.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"engines": []}
    doctor_main(["--broker", mutual.url, "--no-requests", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    said = {finding["check"]: finding["detail"] for finding in findings if finding["subject"] == "broker"}
    assert said["access"].startswith("open: no API key is configured")
    monkeypatch.delenv("CONSERVE_BROKER_CERT")
    assert engines_main(["list", "--broker", mutual.url]) == 1
    assert "broker_cert and broker_cert_key go together" in capsys.readouterr().err


def serial(server: BrokerServer, papers: Papers) -> int:
    context = ssl.create_default_context(cafile=papers.ca_file)
    host, port = server.url.removeprefix("https://").split(":")
    with (
        socket.create_connection((host, int(port)), timeout=BUDGET_S) as raw,
        context.wrap_socket(raw, server_hostname=host) as wrapped,
    ):
        found: Any = wrapped.getpeercert()
        return int(found["serialNumber"], 16)


def test_a_renewed_certificate_is_taken_over_while_the_broker_runs(server: BrokerServer, papers: Papers) -> None:
    before = serial(server, papers)
    kept = httpx2.Client(verify=ssl.create_default_context(cafile=papers.ca_file), trust_env=False)
    with kept:
        assert kept.get(f"{server.url}/healthz").status_code == 200
        papers.issue("broker", "127.0.0.1", "localhost")
        until(lambda: serial(server, papers) != before)
        assert kept.get(f"{server.url}/healthz").status_code == 200


def test_a_pair_that_does_not_fit_is_not_taken_over_and_said(papers: Papers) -> None:
    tls = ServerTls(BrokerConfig.from_mapping({"tls": papers.tables()}).tls)
    assert tls.poll() is False
    good = Path(papers.key_file).read_bytes()
    Path(papers.key_file).write_bytes(Path(papers.client_key).read_bytes())
    assert tls.poll() is False
    assert "cannot use" in tls.problem
    Path(papers.key_file).unlink()
    assert tls.poll() is False
    Path(papers.key_file).write_bytes(good)
    tls.poll()
    papers.issue("broker", "127.0.0.1")
    assert tls.poll() is True
    assert tls.problem == ""


@pytest.mark.parametrize(
    ("tls", "line"),
    [
        ({"cert_file": "a.pem"}, "tls: cert_file and key_file go together; set both"),
        ({"client_ca_file": "a.pem"}, "tls: client_ca_file needs cert_file and key_file; set them"),
    ],
)
def test_tables_that_do_not_fit(tls: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigProblem) as caught:
        BrokerConfig.from_mapping({"tls": tls})
    assert str(caught.value) == line


@pytest.mark.parametrize(("name", "key"), [("cert_file", "tls.cert_file"), ("client_ca_file", "tls.client_ca_file")])
def test_files_that_cannot_be_used_are_named(papers: Papers, name: str, key: str) -> None:
    tables = papers.tables(mutual=True) | {name: papers.kept("broken.pem", b"no certificate")}
    with pytest.raises(ConfigProblem, match=rf"{key}: cannot use .*broken.pem"):
        ServerTls(BrokerConfig.from_mapping({"tls": tables}).tls)


def test_an_encrypted_key_is_refused_instead_of_asked_for(papers: Papers) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(papers.key_file).read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    Path(papers.key_file).write_bytes(locked)
    with pytest.raises(ConfigProblem, match="the key is encrypted"):
        ServerTls(BrokerConfig.from_mapping({"tls": papers.tables()}).tls)
