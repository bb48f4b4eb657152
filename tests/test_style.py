"""The style: short functions, few parameters, modules that can be read in one go."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [path for folder in ("bntools", "cli") for path in sorted((ROOT / folder).rglob("*.py"))]

MAX_FUNCTION_LINES = 50
MAX_POSITIONAL = 5
MAX_MODULE_LINES = 400

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    """Every function, method and nested function."""
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def line_count(function: Function) -> int:
    """The lines from `def` to the end, docstring included and decorators not."""
    return function.end_lineno - function.lineno + 1


def positional_count(function: Function) -> int:
    """The parameters that can be given by position, `self` and `cls` apart."""
    names = [a.arg for a in function.args.posonlyargs + function.args.args]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def too_long(source: str) -> list[str]:
    return [
        f"{f.name}: {line_count(f)}"
        for f in functions(source)
        if line_count(f) > MAX_FUNCTION_LINES
    ]


def too_many_parameters(source: str) -> list[str]:
    return [
        f"{f.name}: {positional_count(f)}"
        for f in functions(source)
        if positional_count(f) > MAX_POSITIONAL
    ]


def offenders(check) -> dict[str, list[str]]:
    """What a check finds in each file, files with nothing left out."""
    found = {str(f.relative_to(ROOT)): check(f.read_text("utf-8")) for f in FILES}
    return {name: lines for name, lines in found.items() if lines}


def test_no_function_is_longer_than_fifty_lines():
    """A long function hides its steps."""
    assert offenders(too_long) == {}


def test_a_long_function_is_found():
    """Fifty lines pass and fifty-one do not, nested ones too."""
    body = "\n        pass" * 48
    fits = f"class A:\n    def f(self):{body}\n        pass"
    assert too_long(fits) == []
    assert too_long(f"{fits}\n        pass") == ["f: 51"]


def test_no_function_has_more_than_five_positional_parameters():
    """Further ones are keyword-only."""
    assert offenders(too_many_parameters) == {}


def test_a_sixth_positional_parameter_is_found():
    """Neither `self` nor keyword-only parameters count."""
    assert too_many_parameters("def f(self, a, b, c, d, e, *, g, h): ...") == []
    assert too_many_parameters("async def f(a, b, /, c, d, e, g): ...") == ["f: 6"]


def test_no_module_is_longer_than_four_hundred_lines():
    """A longer one holds two subjects."""
    lengths = {str(f.relative_to(ROOT)): len(f.read_text("utf-8").splitlines()) for f in FILES}
    assert {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES} == {}
