"""The release checklist, run: `make release-check`.

Builds sdist and wheel, checks what they contain, and installs the wheel (never the source tree) into an empty virtual
environment: bare, then with each extra alone, where a small program must do what that extra is for. Prints what a
client pays: installed size, number of distributions, import time. Ends with 1 and a list of what to mend.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {
    "conserve_sdk",
    "conserve_broker",
    "conserve_langgraph",
    "conserve_lab",
    "conserve_openai_agents",
    "conserve_pydantic_ai",
    "conserve_vllm",
}
NOT_FOR_CLIENTS = {"fastapi", "uvicorn", "langchain", "langgraph", "matplotlib", "redis", "rich", "typer", "vllm"}
LEFT_OUT = {"all": "the sum of the others", "vllm": "vLLM itself: `make test-vllm` runs with it"}
STAGE = """
from conserve_sdk import ConServe, conversation
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine
broker, engine = InMemoryBroker(), ScriptedEngine(EngineReply.chat("Paris"))
conserve = ConServe(broker.url, broker_transport=broker, engine_transport=engine)
"""
TURN = f"""{STAGE}
with conserve, conversation("c"):
    question = [{{"role": "user", "content": "Capital?"}}]
    reply = conserve.openai_client().chat.completions.create(model="test-model", messages=question)
assert reply.choices[0].message.content == "Paris"
assert engine.turns[-1].engine in {{"d0", "d1"}}
"""
GRAPH = f"""{STAGE}
from conserve_langgraph import ConServeChat
model = ConServeChat(model="test-model", conserve=conserve)
assert model.invoke("Capital?", {{"configurable": {{"thread_id": "c"}}}}).content == "Paris"
"""
RUN = f"""{STAGE}
import asyncio
from agents import Agent, RunConfig, Runner
from conserve_openai_agents import ConServeModelProvider
config = RunConfig(
    model_provider=ConServeModelProvider(conserve=conserve, default_model="test-model"), tracing_disabled=True
)
assert asyncio.run(Runner.run(Agent(name="a"), "Capital?", run_config=config)).final_output == "Paris"
"""
PYDANTIC = f"""{STAGE}
import asyncio
from pydantic_ai import Agent
from conserve_pydantic_ai import ConServeModel
agent = Agent(ConServeModel("test-model", conserve=conserve))
assert asyncio.run(agent.run("Capital?")).output == "Paris"
"""
SMOKES = {
    "langgraph": GRAPH,
    "openai-agents": RUN,
    "pydantic-ai": PYDANTIC,
    "broker": "import subprocess as s; s.run(['conserve', 'broker', 'check-config', 'broker.toml'], check=True)",
    "otel": "from conserve_sdk import OpenTelemetryHook; OpenTelemetryHook()",
    "prometheus": "from conserve_sdk import PrometheusHook; PrometheusHook()",
    "redis": "import conserve_broker.redis_store",
    "dns": "import conserve_broker.dns_discovery",
    "eddsa": "from conserve_sdk import tokens; import cryptography",
    "lab": "import subprocess as s; s.run(['conserve', 'emulate', '--help'], check=True, stdout=s.DEVNULL)",
    "energy": "import pynvml",
}
BROKER_TOML = '[[engine]]\nid = "d0"\nurl = "http://127.0.0.1:1"\nrole = "decoder"\nmodel = "m"\n'


class Checklist:
    """Prints each finding as it comes and remembers what is wrong."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def note(self, text: str) -> None:
        """A figure, or that something is right."""
        print(f"   {text}", flush=True)

    def expect(self, holds: bool, text: str, remedy: str) -> None:
        """One point of the list."""
        print(f"{'ok ' if holds else 'NO '}{text}" + ("" if holds else f": {remedy}"), flush=True)
        if not holds:
            self.wrong.append(f"{text}: {remedy}")


class Installed:
    """A virtual environment of its own, in a folder from which the source tree cannot be imported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.site = next((folder / "venv/lib").glob("python3.*")) / "site-packages"
        self.bin = folder / "venv/bin"

    def pip(self, *arguments: str) -> None:
        """Runs pip, quietly."""
        subprocess.run([self.bin / "python", "-m", "pip", "install", "--quiet", *arguments], check=True)

    def run(self, program: str) -> subprocess.CompletedProcess[str]:
        """Runs a program that cannot see the source tree."""
        environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [self.bin / "python", "-I", "-c", program],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def distributions(self) -> dict[str, str]:
        """Names and licences of what is installed, but for pip itself."""
        program = (
            "import json; from importlib.metadata import distributions as d; print(json.dumps({"
            "x.metadata['Name'].lower(): x.metadata['License-Expression'] or x.metadata['License'] or "
            "' '.join(c for c in x.metadata.get_all('Classifier') or [] if c.startswith('License')) for x in d()}))"
        )
        found: dict[str, str] = json.loads(self.run(program).stdout)
        return {name: licence for name, licence in found.items() if name not in {"pip", "setuptools"}}


def version_and_changelog(checks: Checklist) -> None:
    """The version, the newest section of the changelog, and what the package says of itself are one."""
    version = PROJECT["version"]
    newest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    section = newest[1] if newest else ""
    wanted = "Unreleased" if ".dev" in version else version
    checks.expect(
        section.strip("[]").startswith(wanted),
        f"version {version} has its section in CHANGELOG.md",
        f"the newest section is {section!r}, not {wanted!r}",
    )


def build(checks: Checklist, folder: Path) -> tuple[Path, Path]:
    """Sdist, and the wheel out of the sdist."""
    tools = Installed(folder / "tools")
    tools.pip("build", "twine", "hatchling")
    made = folder / "dist"
    subprocess.run([tools.bin / "python", "-m", "build", "--outdir", made, ROOT], check=True, stdout=subprocess.DEVNULL)
    files = sorted(made.iterdir())
    checked = subprocess.run(
        [tools.bin / "twine", "check", "--strict", *files], capture_output=True, text=True, check=False
    )
    checks.expect(checked.returncode == 0, "twine check --strict", checked.stdout.strip())
    return next(made.glob("*.whl")), next(made.glob("*.tar.gz"))


def contents(checks: Checklist, wheel: Path, sdist: Path) -> None:
    """The wheel has the packages, their types and the licence, nothing else; the sdist can be tested."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    checks.expect(top == PACKAGES, "the wheel has the seven packages only", f"found {sorted(top)}")
    untyped = {package for package in PACKAGES if f"{package}/py.typed" not in names}
    checks.expect(not untyped, "each package is typed", f"no py.typed in {sorted(untyped)}")
    checks.expect(any(name.endswith("licenses/LICENSE") for name in names), "the wheel has the licence", "add LICENSE")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    bases = ("", "broker/", "integrations/", "lab/")
    missing = [
        path
        for path in tracked
        for base in bases
        if path.startswith(tuple(f"{base}{package}/" for package in PACKAGES)) and path.removeprefix(base) not in names
    ]
    checks.expect(not missing, "every file of the packages is in the wheel", f"missing {missing[:5]}")
    with tarfile.open(sdist) as source:
        held = {name.split("/", 1)[-1] for name in source.getnames()}
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "tests/conftest.py"}
    checks.expect(needed <= held, "the sdist can be built and tested", f"missing {sorted(needed - held)}")
    checks.note(
        f"wheel {wheel.stat().st_size / 1e3:.0f} kB, {len(names)} files; sdist {sdist.stat().st_size / 1e3:.0f} kB"
    )


def bare(checks: Checklist, wheel: Path, folder: Path) -> None:
    """What `pip install conserve-sdk` brings."""
    installed = Installed(folder / "bare")
    empty = _size(installed.site)
    installed.pip(str(wheel))
    found = installed.distributions()
    extra = NOT_FOR_CLIENTS & set(found)
    checks.expect(not extra, "a client gets nothing that it does not need", f"found {sorted(extra)}")
    size = (_size(installed.site) - empty) / 1e6
    own = sum(_size(installed.site / package) for package in PACKAGES) / 1e6
    checks.note(f"installed: {len(found)} distributions, {size:.0f} MB, of them {own:.1f} MB ours")
    for module in ("conserve_sdk", "openai"):
        checks.note(f"import {module}: {_import_ms(installed, module):.0f} ms (median of 5)")
    unclear = {name for name, licence in found.items() if not licence or "GPL" in licence.upper()}
    checks.expect(not unclear, "every dependency has a permissive licence", f"look at {sorted(unclear)}")
    done = installed.run(TURN)
    checks.expect(done.returncode == 0, "a turn on the bare installation", done.stderr[-500:])
    done = installed.run("import subprocess as s; print(s.run(['conserve', '--version'], capture_output=True).stdout)")
    checks.expect(PROJECT["version"] in done.stdout, "conserve --version", f"says {done.stdout.strip()!r}")


def extras(checks: Checklist, wheel: Path, folder: Path) -> None:
    """Each extra alone does what it is for."""
    known = set(PROJECT["optional-dependencies"])
    checks.expect(
        known == set(SMOKES) | set(LEFT_OUT), "each extra has a smoke test", f"{sorted(known ^ {*SMOKES, *LEFT_OUT})}"
    )
    for extra, program in SMOKES.items():
        installed = Installed(folder / extra)
        (installed.folder / "broker.toml").write_text(BROKER_TOML)
        installed.pip(f"{wheel}[{extra}]")
        done = installed.run(program)
        checks.expect(done.returncode == 0, f"extra [{extra}] alone", done.stderr[-500:])
        checks.note(f"{len(installed.distributions())} distributions, {_size(installed.site) / 1e6:.0f} MB")
        shutil.rmtree(installed.folder)
    for extra, why in LEFT_OUT.items():
        checks.note(f"[{extra}] is not tried: {why}")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _import_ms(installed: Installed, module: str) -> float:
    program = f"import time; t = time.perf_counter(); import {module}; print((time.perf_counter() - t) * 1e3)"
    return statistics.median(float(installed.run(program).stdout) for _ in range(5))


def main() -> int:
    """Runs the list."""
    checks = Checklist()
    version_and_changelog(checks)
    with tempfile.TemporaryDirectory(prefix="conserve-release-") as name:
        folder = Path(name)
        wheel, sdist = build(checks, folder)
        contents(checks, wheel, sdist)
        bare(checks, wheel, folder)
        extras(checks, wheel, folder)
    print(f"\n{len(checks.wrong)} to mend" if checks.wrong else "\nready: what is left is to tag and to upload")
    return 1 if checks.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
