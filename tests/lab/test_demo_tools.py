"""The demo agent's tools really read, query and calculate, and refuse nonsense with an error the model can read."""

from pathlib import Path
from typing import get_args

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.utils.function_calling import convert_to_openai_tool

from conserve_lab.demo import tools as tools_module
from conserve_lab.demo.agent import AgentRun, build_agent, run_agents
from conserve_lab.demo.tasks import Task, make_tasks
from conserve_lab.demo.tools import Toolbox
from conserve_lab.demo.workspace import CITIES, FILES, NOTES_MAX, TABLES, Workspace


@pytest.fixture
def toolbox(tmp_path: Path) -> Toolbox:
    return Toolbox(Workspace(tmp_path / "w", seed=7))


def test_enums_of_the_schemas_are_what_a_workspace_holds() -> None:
    assert get_args(tools_module.File) == FILES
    assert get_args(tools_module.Table) == TABLES
    assert get_args(tools_module.City) == CITIES


def test_files_are_listed_read_searched_and_outlined(toolbox: Toolbox, tmp_path: Path) -> None:
    size = (tmp_path / "w/src/tax.py").stat().st_size
    assert f"src/tax.py  {size}" in toolbox.list_files("src").splitlines()
    assert toolbox.read_file("src/tax.py", 1, 1) == '1 """Part of the shop."""'
    assert all("TODO" in line for line in toolbox.search_files("TODO").splitlines())
    first = toolbox.outline("src/tax.py").splitlines()[0]
    name, line = first.split(" at line ")
    assert f"{line} def {name}(" in toolbox.read_file("src/tax.py", int(line), 1)


def test_reading_past_the_end_says_how_long_the_file_is(toolbox: Toolbox) -> None:
    with pytest.raises(ValueError, match=r"has only \d+ lines: ask for an earlier one"):
        toolbox.read_file("docs/billing.md", 20, 1)


def test_outline_wants_python(toolbox: Toolbox) -> None:
    with pytest.raises(ValueError, match="no Python file"):
        toolbox.outline("docs/billing.md")


def test_query_and_sum_agree(toolbox: Toolbox) -> None:
    everything = toolbox.query_table("orders", "amount", "York", 12)
    count, total = toolbox.sum_amounts("orders", "York").split(" rows, sum ")
    amounts = [int(line.split(": ")[1]) for line in everything.splitlines()]
    assert len(amounts) == min(int(count), 12)
    assert sum(amounts) <= int(total)


def test_database_is_opened_read_only(toolbox: Toolbox) -> None:
    with pytest.raises(Exception, match="readonly"):
        toolbox._rows("delete from orders returning id", ())


@pytest.mark.parametrize(
    ("operation", "left", "right", "answer"),
    [("add", 2, 3, "5"), ("subtract", 2, 3, "-1"), ("multiply", 4, 3, "12"), ("divide", 9, 4, "2")],
)
def test_arithmetic(toolbox: Toolbox, operation: str, left: int, right: int, answer: str) -> None:
    assert toolbox.calculate(operation, left, right) == answer  # type: ignore[arg-type]


def test_division_by_zero_is_a_readable_error(toolbox: Toolbox) -> None:
    with pytest.raises(ValueError, match="cannot divide by 0"):
        toolbox.calculate("divide", 1, 0)


def test_notes_stay_inside_their_folder_and_are_bounded(toolbox: Toolbox, tmp_path: Path) -> None:
    assert toolbox.write_note("../../escape", "text") == "kept as 01.md"  # type: ignore[arg-type]
    assert (tmp_path / "w/notes/01.md").read_text("utf-8") == "# ../../escape\n\ntext\n"
    for _ in range(NOTES_MAX - 1):
        toolbox.write_note("cause", "text")
    with pytest.raises(ValueError, match="no room"):
        toolbox.write_note("cause", "one too many")


def test_every_tool_describes_itself_in_a_schema(toolbox: Toolbox) -> None:
    schemas = [convert_to_openai_tool(tool)["function"] for tool in toolbox.tools()]
    assert [schema["name"] for schema in schemas][:2] == ["list_files", "read_file"]
    assert all(schema["description"] for schema in schemas)
    assert schemas[1]["parameters"]["properties"]["first_line"]["maximum"] == 20


def test_same_seed_same_world(tmp_path: Path) -> None:
    one, two, other = (
        Workspace(tmp_path / name, seed=seed).root.joinpath("src/orders.py").read_text("utf-8")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == two != other


def test_tasks_are_reproducible_and_share_no_prompt() -> None:
    tasks = make_tasks(24, seed=3, prompt_chars=(9_000, 12_000), arrivals_s=2.0)
    assert tasks == make_tasks(24, seed=3, prompt_chars=(9_000, 12_000), arrivals_s=2.0)
    assert len({task.prompt[:60] for task in tasks}) == 24
    assert all(9_000 <= len(task.prompt) < 12_200 for task in tasks)
    assert [task.arrival_s for task in tasks] == sorted(task.arrival_s for task in tasks)
    assert all(task.prompt.isascii() for task in tasks)
    assert all(3 <= task.turns <= 12 for task in tasks)


def _task(name: str) -> Task:
    return Task(conversation_id=name, arrival_s=0.0, prompt="go", seed=1, turns=3)


async def test_agent_loop_runs_tools_and_hands_their_errors_back(toolbox: Toolbox) -> None:
    calls = [
        {"name": "calculate", "args": {"operation": "divide", "left": 1, "right": 0}, "id": "c1"},
        {"name": "calculate", "args": {"operation": "add", "left": 1, "right": 2}, "id": "c2"},
    ]

    def model(state: dict[str, list[object]]) -> dict[str, list[AIMessage]]:
        answered = sum(isinstance(message, AIMessage) for message in state["messages"])
        if answered < len(calls):
            return {"messages": [AIMessage("", tool_calls=[calls[answered]])]}
        return {"messages": [AIMessage("done")]}

    finished: list[AgentRun] = []
    agent = build_agent(RunnableLambda(model), toolbox.tools())
    (run,) = await run_agents([_task("t")], agent_for=lambda task: agent, on_finish=finished.append)
    assert (run.turns, run.tool_calls, run.tool_errors, run.error) == (3, 2, 1, "")
    answers = [message.text for message in run.messages if isinstance(message, ToolMessage)]
    assert "cannot divide by 0" in answers[0]
    assert answers[1] == "3"
    assert isinstance(run.messages[1], HumanMessage)
    assert finished == [run]


async def test_one_failing_agent_does_not_end_the_others(toolbox: Toolbox) -> None:
    def broken(state: object) -> dict[str, list[AIMessage]]:
        raise RuntimeError("no engine")

    good = build_agent(RunnableLambda(lambda state: {"messages": [AIMessage("done")]}), toolbox.tools())
    bad = build_agent(RunnableLambda(broken), toolbox.tools())
    runs = await run_agents(
        [_task("bad"), _task("good")], agent_for=lambda task: bad if task.conversation_id == "bad" else good
    )
    assert [run.error for run in runs] == ["bad: RuntimeError: no engine", ""]
    assert runs[1].turns == 1
