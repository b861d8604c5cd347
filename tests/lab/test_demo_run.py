"""The demo itself, small and without waiting: processes, broker, agents and engines are the real ones."""

import io
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from rich.console import Console

from conserve_lab.cli import bench_main, demo_main
from conserve_lab.demo.agent import AgentRun
from conserve_lab.demo.bench import as_markdown, spread
from conserve_lab.demo.cpu import LagMeter, cpu_s, thread_ids
from conserve_lab.demo.equality import compare_with_reference
from conserve_lab.demo.figures import Variant
from conserve_lab.demo.fleet_process import FleetProcess, FleetProcessError
from conserve_lab.demo.fleets import DECODERS, PREFILLERS, emulated_config
from conserve_lab.demo.serve import serve
from conserve_lab.demo.settings import demo_settings
from conserve_lab.demo.tasks import Task
from conserve_lab.demo.view import Progress, watching
from conserve_lab.emulator import fleet_of
from conserve_lab.stack import LocalStack
from conserve_sdk.telemetry import TurnCollector

KEYS = {
    "engine", "conversations", "turns", "leases", "leases_migrated", "migrations", "migrations_per_migrated_lease",
    "follow_up_turns", "follow_up_turns_on_prefiller", "follow_up_cached_token_share", "ttft_ms", "ttfet_ms", "tbt_ms",
    "errors",
}  # fmt: skip


@pytest.fixture(scope="module")
def process() -> Iterator[FleetProcess]:
    with FleetProcess() as process:
        yield process


@pytest.mark.timeout(180)
def test_demo_shows_one_move_a_conversation_and_writes_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.json"
    code = demo_main(
        ["--plain", "--conversations", "4", "--time-scale", "0", "--preset", "paper", "--seed", "5", "--json", str(out)]
    )
    shown = capsys.readouterr().out
    found = json.loads(out.read_text("utf-8"))
    assert code == 0, shown
    assert found.keys() >= KEYS
    assert found["per_turn"].keys() >= KEYS
    assert found["affinity"].keys() >= KEYS
    assert found["conversations"] == found["leases"] == found["leases_migrated"] == found["migrations"] == 4
    assert found["migrations_per_migrated_lease"] == 1.0
    assert found["follow_up_turns_on_prefiller"] == 0
    assert found["turns"] == found["follow_up_turns"] + 4
    assert found["follow_up_cached_token_share"] > 0.9
    assert found["errors"] == 0
    assert found["per_turn"]["migrations"] == found["per_turn"]["turns"] == found["turns"]
    assert found["per_turn"]["follow_up_turns_on_prefiller"] == found["per_turn"]["follow_up_turns"]
    assert found["affinity"]["migrations"] == found["affinity"]["follow_up_turns_on_prefiller"] == 0
    assert found["affinity"]["errors"] == found["per_turn"]["errors"] == 0
    assert "migrations per migrated lease" in shown
    assert "1.00" in shown


@pytest.mark.timeout(180)
def test_bench_writes_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, figures = tmp_path / "bench.md", tmp_path / "bench.json"
    code = bench_main(
        ["--seeds", "1", "--conversations", "2", "--time-scale", "0", "--json", str(figures), "--markdown", str(table)]
    )
    assert code == 0, capsys.readouterr().out
    assert "| KV transfers |" in table.read_text("utf-8")
    policies = json.loads(figures.read_text("utf-8"))["policies"]
    assert list(policies) == ["default", "paper", "affinity", "per turn"]
    assert policies["paper"][0]["migrations"] == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--engine", "tpu"], "tpu"),
        (["--conversations", "0"], "conversations"),
        (["--nonsense"], "nonsense"),
        (["--serve", "--engine", "vllm"], "leave out --engine vllm"),
    ],
    ids=["unknown engine", "no conversations", "unknown option", "serve on vllm"],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo_main(arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_missing_vllm_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_main(["--engine", "vllm", "--vllm-venv", str(tmp_path / "none"), "--plain"]) == 1
    error = capsys.readouterr().err
    assert "conserve_lab.vllm" in error
    assert error.count("\n") == 1


def test_unwritable_json_is_noticed_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_main(["--plain", "--json", "/nowhere/demo.json"]) == 1
    assert "/nowhere" in capsys.readouterr().err


def test_help_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_main(["--help"]) == 0
    assert "--conversations" in capsys.readouterr().out


def test_comparisons_run_on_as_many_engines() -> None:
    sizes = {variant: len(emulated_config(variant).engine) for variant in Variant}
    assert set(sizes.values()) == {PREFILLERS + DECODERS}
    assert {engine.role for engine in emulated_config(Variant.AFFINITY).engine} == {"both"}


def test_serve_says_how_to_use_it_until_it_is_stopped() -> None:
    stop, out = threading.Event(), io.StringIO()
    settings = demo_settings("emulated", time_scale=0)
    thread = threading.Thread(
        target=serve, args=(settings,), kwargs={"console": Console(file=out, width=120), "stop": stop, "port": 0}
    )
    thread.start()
    try:
        assert _eventually(lambda: "thread_id" in out.getvalue())
        url = next(line.split()[1] for line in out.getvalue().splitlines() if line.startswith("broker"))
        with httpx2.Client(trust_env=False, timeout=10) as client:
            assert client.get(f"{url}/readyz").status_code == 200
        namespace: dict[str, Any] = {}
        lines = out.getvalue()[out.getvalue().index("from conserve_langgraph") :]
        exec(lines, namespace)
        assert namespace["llm"].conserve.release("my-conversation") == 1
        namespace["llm"].conserve.close()
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()


def test_fleet_in_a_process_serves_one_fleet_after_the_other(process: FleetProcess) -> None:
    for count in (1, 2):
        config = fleet_of([{"id": f"d{index}", "role": "decoder"} for index in range(count)])
        with process.fleet(config) as fleet:
            urls = [entry["url"] for entry in fleet.entries]
            with httpx2.Client(trust_env=False, timeout=10) as client:
                assert [client.get(f"{url}/health").status_code for url in urls] == [200] * count


def test_fleet_that_cannot_start_says_why(process: FleetProcess) -> None:
    with process.fleet(fleet_of([{"id": "d0"}])) as fleet:
        taken = int(fleet.entries[0]["url"].rpartition(":")[2])
        config = fleet_of([{"id": "d0", "host": "192.0.2.1", "port": taken}])
        with FleetProcess() as other, pytest.raises(FleetProcessError, match="did not start"), other.fleet(config):
            pass


def test_fleet_whose_process_died_is_an_error_not_a_hang() -> None:
    with FleetProcess() as process:
        (child,) = [c for c in multiprocessing.active_children() if c.pid == process.pid]
        child.kill()
        child.join()
        config = fleet_of([{"id": "d0"}])
        with pytest.raises(FleetProcessError, match="ended unexpectedly"), process.fleet(config):
            pass


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "live"])
def test_watching_shows_the_broker_and_survives_its_end(plain: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=not plain)
    with LocalStack() as stack:
        progress = Progress("Run", conversations=3, broker_url=stack.broker_url, turns=TurnCollector())
        with watching(progress, console=console, plain=plain):
            assert _eventually(lambda: "Run" in out.getvalue())
            progress.finish(AgentRun(task=_task("t", turns=1)))
            stack.broker.kill()
            assert _eventually(lambda: "1/3" in out.getvalue())


def test_threads_cpu_time_is_told_on_this_system() -> None:
    before = cpu_s(thread_ids())
    assert before is not None
    sum(range(3_000_000))
    assert (cpu_s(thread_ids()) or 0) >= before
    assert cpu_s([2**22 + 1]) is None


def test_lag_meter_reports_what_it_measured() -> None:
    assert LagMeter().late_ms(95) is None
    with LagMeter() as lag:
        assert _eventually(lambda: lag.late_ms(50) is not None)


def test_spread_of_several_seeds() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2 [1 .. 3]"
    assert spread([5.25, 5.25]) == "5.2"
    assert spread([None]) == "-"
    assert "| errors |" in as_markdown({"default": [_figures()]}, conversations=1)


async def test_equality_counts_only_turns_on_which_the_reference_agrees_with_itself() -> None:
    call = {"name": "add", "args": {"a": 1}, "id": "x"}
    history = (
        HumanMessage("go"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("1", tool_call_id="x"),
        AIMessage("done"),
    )
    runs = [AgentRun(task=_task("t", turns=2), messages=history)]
    same_call = RunnableLambda(lambda history: AIMessage("", tool_calls=[{**call, "id": "other"}]))
    answers = iter("abc")
    fickle = RunnableLambda(lambda history: AIMessage(next(answers)))
    found = await compare_with_reference(runs, caller=same_call, speaker=fickle)
    assert (found.equal, found.compared, found.unstable) == (1, 1, 1)
    stubborn = RunnableLambda(lambda history: AIMessage("else"))
    found = await compare_with_reference(runs, caller=same_call, speaker=stubborn)
    assert (found.equal, found.compared, found.unstable) == (1, 2, 0)
    assert found.differences == ("t, message 3: ('done', ()) instead of ('else', ())",)


def _task(name: str, *, turns: int) -> Task:
    return Task(conversation_id=name, arrival_s=0.0, prompt="go", seed=1, turns=turns)


def _figures() -> dict[str, Any]:
    percentiles = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    names = (
        "migrations", "moved_tokens", "follow_up_turns_on_prefiller", "re_leases", "follow_up_cached_token_share",
        "elapsed_s", "broker_cpu_ms_per_conversation", "machine_lag_ms", "errors",
    )  # fmt: skip
    return {"ttft_ms": percentiles, "ttfet_ms": percentiles, "tbt_ms": percentiles, **dict.fromkeys(names, 0)}


def _eventually(holds: Callable[[], bool], *, budget_s: float = 30.0) -> bool:
    """Poll until `holds()`; False after the budget."""
    deadline_s = time.monotonic() + budget_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True
