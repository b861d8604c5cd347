"""The import contracts of pyproject.toml hold, and every package of the wheel is typed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "conserve_sdk": ROOT / "conserve_sdk",
    "conserve_broker": ROOT / "broker/conserve_broker",
    "conserve_langgraph": ROOT / "integrations/conserve_langgraph",
    "conserve_openai_agents": ROOT / "integrations/conserve_openai_agents",
    "conserve_pydantic_ai": ROOT / "integrations/conserve_pydantic_ai",
    "conserve_vllm": ROOT / "integrations/conserve_vllm",
    "conserve_lab": ROOT / "lab/conserve_lab",
}


def test_import_contracts_hold() -> None:
    script = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([script, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", PACKAGES)
def test_package_ships_its_types(name: str) -> None:
    assert (PACKAGES[name] / "py.typed").is_file()


def test_generic_folders_are_no_packages() -> None:
    """`import broker` must keep meaning the package of that name on the index."""
    for folder in ("broker", "integrations", "lab", "examples"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_rooms_keep_names_that_tell() -> None:
    vague = {"utils", "helpers", "common", "manager", "misc"}
    found = [path for folder in PACKAGES.values() for path in folder.rglob("*.py") if path.stem.strip("_") in vague]
    assert found == []
