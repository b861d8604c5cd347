"""The examples in docs/testing.md are tests: they run, and they pass without a network."""

from pathlib import Path

from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from conserve_sdk.testing import deny_network

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "testing.md"


def test_every_example_is_a_test_that_passes() -> None:
    document = Sybil([CodeBlockParser("python", PythonEvaluator())]).parse(DOCUMENT)
    for example in document.examples():
        example.evaluate()
    tests = {name: value for name, value in document.namespace.items() if name.startswith("test_")}
    assert len(tests) == DOCUMENT.read_text().count("\ndef test_") >= 5
    with deny_network():
        for test in tests.values():
            test()
