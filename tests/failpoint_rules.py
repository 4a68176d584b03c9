"""What the source must look like for every outside call to have failpoints: rules on the syntax tree.

Statements have theirs from the connection, port methods from the wrapper, calls to Ray from `ray_calls`. So
what has to be held is that nothing goes past these three.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import asyncpg

import orchestrator
from orchestrator import ports
from orchestrator.adapters.postgres.failpoint_connection import FailpointConnection

ROOT = Path(orchestrator.__file__).parent
RAY_CALLS = "actors/ray_calls.py"
CONNECTIONS = "adapters/postgres/failpoint_connection.py"

# Without anything outside: time, and what a process is told of itself.
NO_OUTSIDE_PORTS = {"Clock"}
LOCAL_OF_RAY = {"remote", "exceptions", "get_runtime_context", "is_initialized"}
LOCAL_IMPORTS = {"metrics", "worker"}  # the figures of a process, and what a driver prints
OF_COMMANDS = {"init", "shutdown"}  # a command's own cluster, in `runtime`
STATEMENTS = {"execute", "executemany", "fetch", "fetchval", "fetchrow", "copy_records_to_table"}
BY_OTHER_METHODS = {"add_listener", "remove_listener", "reset"}  # by `fetch` and `execute`
NO_STATEMENTS = {"close"} | BY_OTHER_METHODS
OUTSIDE_MODULES = {"subprocess", "socket", "httpx", "aiohttp", "urllib"}
OUTSIDE_OF_ASYNCIO = {
    "open_connection",
    "create_connection",
    "create_subprocess_exec",
    "create_subprocess_shell",
}
# What a submission's author runs, what runs beside a submission, and `doctor`'s look at a cluster.
NOT_OF_THE_CONTROL_PLANE = ("authoring/", "submission/", "diagnosis/ray_probe.py")
# What these start, nobody of the control plane waits for: they live beside it.
PROCESSES_OF_THEIR_OWN = {"adapters/process/shim.py", "adapters/postgres/guardian.py"}
# These hand an adapter on to a caller, for which the same rule holds.
FACTORIES = {"kubernetes_containers", "process_containers", "submission_containers"}

Sources = Mapping[str, str]
Rule = Callable[[str, ast.Module], Iterator[str]]


def sources() -> dict[str, str]:
    """The control plane's source by path below the package."""
    paths = (path.relative_to(ROOT).as_posix() for path in sorted(ROOT.rglob("*.py")))
    return {
        path: (ROOT / path).read_text() for path in paths if not path.startswith(NOT_OF_THE_CONTROL_PLANE)
    }


def violations(files: Sources) -> list[str]:
    """Every place that goes past the failpoints, with what it does."""
    return [
        f"{path}:{found}"
        for path, text in files.items()
        for rule in (connections, statements, ray_calls, adapters_made, outside_by_hand, means_of_adapters)
        for found in rule(path, ast.parse(text))
    ]


# ------------------------------------------------------------------------------------------- Postgres


def connections(path: str, tree: ast.Module) -> Iterator[str]:
    """Connections are made by `failpoint_connection.connecting` alone."""
    for call in _calls(tree):
        if _dotted(call.func) == "asyncpg.connect" and path != CONNECTIONS:
            yield f"{call.lineno}: connects without failpoints"
        if _dotted(call.func) == "asyncpg.create_pool" and "connecting" not in ast.unparse(call):
            yield f"{call.lineno}: a pool whose connections have no failpoints"


def statements(path: str, tree: ast.Module) -> Iterator[str]:
    """Statements stand in adapters/postgres, and go by methods that the connection has points round."""
    ours = path.startswith("adapters/postgres/")
    uncovered = _methods_to_the_server() - vars(FailpointConnection).keys()
    for call in _calls(tree):
        if not isinstance(call.func, ast.Attribute):
            continue
        method = call.func.attr
        if ours and method in uncovered:
            yield f"{call.lineno}: {method} talks to the server without failpoints"
        if not ours and method in STATEMENTS:
            yield f"{call.lineno}: {method} outside of adapters/postgres"


def _methods_to_the_server() -> set[str]:
    methods = {
        name
        for name, method in inspect.getmembers(asyncpg.Connection, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }
    return (methods | {"cursor"}) - NO_STATEMENTS


# ------------------------------------------------------------------------------------------------ Ray


def ray_calls(path: str, tree: ast.Module) -> Iterator[str]:
    """Ray is called in `ray_calls` alone, and there by functions with failpoints."""
    if path == RAY_CALLS:
        for function in _functions(tree):
            if list(_of_ray(function, path)) and "failpoints." not in ast.unparse(function):
                yield f"{function.lineno}: {function.name} calls Ray without failpoints"
        return
    yield from _of_ray(tree, path)


def _of_ray(tree: ast.AST, path: str) -> Iterator[str]:
    allowed = LOCAL_OF_RAY | (OF_COMMANDS if path == "runtime.py" else set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = _dotted(node)
            if name.startswith("ray.") and name.count(".") == 1 and node.attr not in allowed | {"util"}:
                yield f"{node.lineno}: {name} outside of {RAY_CALLS}"
            if name.startswith("ray.util.") and name != "ray.util.get_node_ip_address":
                yield f"{node.lineno}: {name} outside of {RAY_CALLS}"
            if node.attr == "remote" and name != "ray.remote":
                yield f"{node.lineno}: asks an actor outside of {RAY_CALLS}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray."):
            functions = [each.name for each in node.names if each.name[0].islower()]
            functions = [name for name in functions if name not in LOCAL_IMPORTS]
            if functions and path != RAY_CALLS:
                yield f"{node.lineno}: {', '.join(functions)} of Ray outside of {RAY_CALLS}"
        if isinstance(node, ast.Name) and node.id in {"placement_group", "remove_placement_group"}:
            yield f"{node.lineno}: {node.id} outside of {RAY_CALLS}"


# ----------------------------------------------------------------------------------- ports and others


def adapters_made(path: str, tree: ast.Module) -> Iterator[str]:
    """Whoever makes an adapter of a port hands it on with points round its methods."""
    if path.startswith("adapters/"):
        return
    names = adapter_names() | FACTORIES | ({"load_benchmark"} if path.startswith("actors/") else set())
    for function in _functions(tree):
        if function.name in FACTORIES:
            continue
        text = ast.unparse(function)
        for call in _own_calls(function):
            if _last(call.func) in names and "instrumented" not in text and "_with_points" not in text:
                yield f"{call.lineno}: {_last(call.func)} without failpoints"


def outside_by_hand(path: str, tree: ast.Module) -> Iterator[str]:
    """Actors and composition root reach out through ports; where by a function, with points beside it."""
    if not (path.startswith("actors/") or path in ("app.py", "stores.py")):
        return
    functions = _asynchronous_of_adapters(tree)
    for function in _functions(tree):
        for call in _own_calls(function):
            name = _dotted(call.func)
            module, _, rest = name.partition(".")
            if (module in OUTSIDE_MODULES and rest) or (module == "asyncio" and rest in OUTSIDE_OF_ASYNCIO):
                yield f"{call.lineno}: {name} outside of the adapters"
            if name in functions and "failpoints." not in ast.unparse(function):
                yield f"{call.lineno}: {name} without failpoints"


def means_of_adapters(path: str, tree: ast.Module) -> Iterator[str]:
    """Within an adapter, a call of the API server or a new process has points besides those of the port."""
    if not path.startswith("adapters/") or path in PROCESSES_OF_THEIR_OWN:
        return
    for function in _functions(tree):
        text = ast.unparse(function)
        for call in _own_calls(function):
            means = _dotted(call.func) == "subprocess.Popen" or _last(call.func) == "call_api"
            if means and "failpoints." not in text and "reach_async" not in text:
                yield f"{call.lineno}: {_dotted(call.func)} without failpoints"


def _asynchronous_of_adapters(tree: ast.Module) -> set[str]:
    """The names of coroutine functions that are imported from adapters, but for those of Postgres."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.startswith("orchestrator.adapters.") and "postgres" not in node.module:
            module = importlib.import_module(node.module)
            found |= {
                each.asname or each.name
                for each in node.names
                if inspect.iscoroutinefunction(getattr(module, each.name, None))
            }
    return found


def outside_ports() -> dict[str, type]:
    """The ports by name, but for those with nothing outside."""
    return {
        name: port
        for name, port in vars(ports).items()
        if inspect.isclass(port)
        and getattr(port, "_is_protocol", False)
        and name not in NO_OUTSIDE_PORTS | {"Protocol"}
    }


def methods_of(port: type) -> list[str]:
    """Its methods; properties ask nothing of the outside."""
    return [
        name for name, value in vars(port).items() if inspect.isfunction(value) and not name.startswith("_")
    ]


def adapter_names() -> set[str]:
    """The classes of adapters that have all methods of a port."""
    wanted = [set(methods_of(port)) for port in outside_ports().values()]
    return {
        name
        for module in _adapter_modules()
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and any(methods and methods <= set(dir(value)) for methods in wanted)
    }


def _adapter_modules() -> Iterable[ModuleType]:
    for path in sorted((ROOT / "adapters").rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if not path.stem.startswith("__") and "shim" not in path.stem:
            yield importlib.import_module(".".join(parts))


# ----------------------------------------------------------------------------------------- the syntax


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _own_calls(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.Call]:
    """The calls of a function, without those of functions inside it."""
    inner = {id(call) for each in _functions(function) if each is not function for call in _calls(each)}
    return (call for call in _calls(function) if id(call) not in inner)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _last(node: ast.AST) -> str:
    return _dotted(node).rpartition(".")[2]
