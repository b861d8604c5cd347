"""Do what `docker build -f broker/Dockerfile` does, without Docker: `python tests/deploy/image_steps.py`.

Every COPY and RUN of the build stages happens below a temporary folder instead of `/`; then the broker's entry point
serves with the image's environment until its health check passes, and the engines' entry point checks a configuration.
Takes a minute or two and needs the package index, so it is no test of the suite.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BUDGET_S = 30.0
_CONFIG = """
[[engine]]
id = "d0"
url = "http://127.0.0.1:9"
role = "both"
model = "m"
connector = "none"
"""


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, lines joined."""
    text = (ROOT / "broker" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def moved(text: str, root: Path) -> str:
    """Absolute paths of the image, below `root`."""
    return re.sub(r"(?<![\w./])/(opt|src|wheels|var/lib|etc)\b", rf"{root}/\1", text)


def build(root: Path, stages: set[str]) -> None:
    """COPY and RUN of these stages."""
    stage, where = "", root
    for name, arguments in instructions():
        if name == "FROM":
            stage = arguments.split()[-1]
        if stage not in stages:
            continue
        if name == "WORKDIR":
            where = Path(moved(arguments, root))
            where.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = arguments.split()
            for source in sources:
                found, place = ROOT / source, where / target
                if found.is_dir():
                    shutil.copytree(found, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(found, place / found.name)
        elif name == "RUN":
            print(f"[{stage}] {arguments}", flush=True)
            subprocess.run(moved(arguments, root), shell=True, check=True, cwd=where, env=clean_environment(root))


def clean_environment(root: Path) -> dict[str, str]:
    """This machine's, with a plain interpreter in front."""
    path = os.pathsep.join([str(root / "interpreter" / "bin"), os.environ["PATH"]])
    return {**{key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}, "PATH": path}


def serve(root: Path) -> None:
    """The entry point, until the health check passes."""
    found = dict(instructions())
    command = [*json.loads(found["ENTRYPOINT"]), *json.loads(found["CMD"])]
    environment = dict(re.findall(r"(CONSERVE_\w+)=(\S+)", found["ENV"]))
    (root / "etc" / "conserve").mkdir(parents=True)
    (root / "var" / "lib" / "conserve").mkdir(parents=True)
    (root / "etc" / "conserve" / "broker.toml").write_text(_CONFIG)
    check = json.loads(found["HEALTHCHECK"].partition("CMD ")[2])
    tools = str(root / "opt" / "conserve" / "bin")
    process = subprocess.Popen(
        [f"{tools}/{command[0]}", *(moved(argument, root) for argument in command[1:])],
        env={**clean_environment(root), **{key: moved(value, root) for key, value in environment.items()}},
    )
    try:
        until_s = time.monotonic() + _BUDGET_S
        while subprocess.run([f"{tools}/{check[0]}", *check[1:]], stderr=subprocess.DEVNULL, check=False).returncode:
            if time.monotonic() > until_s or process.poll() is not None:
                raise SystemExit("the broker is not healthy")
            time.sleep(0.2)
        assert (root / "var" / "lib" / "conserve" / "leases.db").is_file(), "the journal stands where the image says"
    finally:
        process.terminate()
        process.wait()
    print(f"healthy; stopped with status {process.returncode}")


def main() -> None:
    """Broker first, then the engines on top of it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subprocess.run([sys.executable, "-m", "venv", str(root / "interpreter")], check=True)
        build(root, {"build"})
        size = sum(path.stat().st_size for path in (root / "opt").rglob("*") if path.is_file())
        print(f"/opt/conserve of the broker: {size / 1e6:.0f} MB", flush=True)
        serve(root)
        build(root, {"build-engines"})
        engines = [f"{root}/opt/conserve/bin/conserve", "emulate", "--check", "--config"]
        subprocess.run([*engines, str(ROOT / "broker" / "compose" / "engines.toml")], check=True)


if __name__ == "__main__":
    main()
