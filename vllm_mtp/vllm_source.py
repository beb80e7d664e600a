"""vLLM's source read without importing it: does a name exist, which parameters does it take, what is set on its instances?

An import would initialise a device, or fail where the modules are those of another device. What is imported already is asked
itself (`Installed`), for it is what will run.
"""

import ast
import importlib.util
import inspect
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Parameters:
    """What a function takes.

    Attributes:
        positional: names of those that may be given by position, in order.
        keyword: names of those that may not.
        required: names of those without a default.
        more_positional, more_keywords: whether it takes any others.
    """

    positional: tuple[str, ...]
    keyword: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    more_positional: bool = False
    more_keywords: bool = False

    @staticmethod
    def parse(text: str) -> "Parameters":
        """Of what stands between the parentheses of a `def`."""
        function = ast.parse(f"def f({text}): ...").body[0]
        assert isinstance(function, ast.FunctionDef)
        return Parameters.of_source(function)

    @staticmethod
    def of_source(function: Function) -> "Parameters":
        """Of a function's definition."""
        given = function.args
        positional = [argument.arg for argument in (*given.posonlyargs, *given.args)]
        without_default = positional[: len(positional) - len(given.defaults)]
        keywords = [argument.arg for argument in given.kwonlyargs]
        without_default += [name for name, default in zip(keywords, given.kw_defaults, strict=True) if default is None]
        return Parameters(
            tuple(positional), tuple(keywords), frozenset(without_default), given.vararg is not None, given.kwarg is not None
        )

    @staticmethod
    def of_function(function: Any) -> "Parameters":
        """Of a function or class that is imported; of the original, where it is wrapped."""
        found = inspect.signature(function).parameters.values()
        kinds = inspect.Parameter
        return Parameters(
            tuple(p.name for p in found if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)),
            tuple(p.name for p in found if p.kind is kinds.KEYWORD_ONLY),
            frozenset(p.name for p in found if p.default is kinds.empty and p.kind < kinds.VAR_KEYWORD),
            any(p.kind is kinds.VAR_POSITIONAL for p in found),
            any(p.kind is kinds.VAR_KEYWORD for p in found),
        )

    def __str__(self) -> str:
        more = ["*args"] if self.more_positional else ["*"] if self.keyword else []
        return "(" + ", ".join([*self.positional, *more, *self.keyword, *(["**kwargs"] if self.more_keywords else [])]) + ")"


@dataclass(frozen=True)
class Definition:
    """Where a name is defined: a module's, a class's or a function's node, or the statement that assigns it."""

    module: str
    node: ast.AST


class SourceTree:
    """vLLM's source.

    Args:
        package: the folder `vllm`, on disk or in a wheel.

    Attributes:
        modules: what was read so far, by name; None where there is no such module.
    """

    def __init__(self, package: Path | zipfile.Path) -> None:
        self.package = package
        self.modules: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        """The module's tree, None if there is none; `name` is relative to vLLM's package, "" the package itself."""
        if name not in self.modules:
            file = self.path(name)
            self.modules[name] = ast.parse(file.read_bytes()) if file.is_file() else None
        return self.modules[name]

    def path(self, module: str) -> Any:
        """Where a module or package is, or would be."""
        *parents, last = module.split(".")
        folder = self.package.joinpath(*parents, last) if module else self.package
        return folder.joinpath("__init__.py") if folder.is_dir() else self.package.joinpath(*parents, f"{last}.py")

    def find(self, module: str, name: str) -> Definition | None:
        """The definition of `name`, with dots from a class to its members; names that are imported are followed."""
        first, *members = name.split(".")
        found = self._in_module(module, first)
        for member in members:
            found = self._in_class(found, member) if found is not None and isinstance(found.node, ast.ClassDef) else None
        return found

    def parameters(self, module: str, name: str) -> Parameters | None:
        """What a function takes, or a class when it is constructed (self not counted); None if it is neither."""
        found = self.find(module, name)
        if found is None:
            return None
        if isinstance(found.node, Function):
            return Parameters.of_source(found.node)
        if not isinstance(found.node, ast.ClassDef):
            return None
        constructor = self._in_class(found, "__init__")
        if constructor is not None and isinstance(constructor.node, Function):
            taken = Parameters.of_source(constructor.node)
            return Parameters(
                taken.positional[1:], taken.keyword, taken.required - {"self"}, taken.more_positional, taken.more_keywords
            )
        fields: dict[str, bool] = {}
        for owner in reversed(list(self._ancestry(found))):
            assert isinstance(owner.node, ast.ClassDef)
            for line in owner.node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    fields[line.target.id] = line.value is None
        return Parameters(tuple(fields), required=frozenset(name for name, required in fields.items() if required))

    def abstract_methods(self, module: str, name: str) -> set[str]:
        """Names of the methods that a subclass must define."""
        found = self.find(module, name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return set()
        abstract: set[str] = set()
        for owner in reversed(list(self._ancestry(found))):
            assert isinstance(owner.node, ast.ClassDef)
            for line in owner.node.body:
                if isinstance(line, Function):
                    names = {ast.unparse(decorator) for decorator in line.decorator_list}
                    (abstract.add if names & {"abstractmethod", "abc.abstractmethod"} else abstract.discard)(line.name)
        return abstract

    def calls(self, module: str, function: str, method: str) -> list[tuple[tuple[str, ...], frozenset[str]]]:
        """What `function` gives where it calls a `method` of whatever object: last names of the arguments, and keywords."""
        found = self.find(module, function)
        if found is None:
            return []
        nodes = (node for node in ast.walk(found.node) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
        return [
            (tuple(_last_name(given) for given in call.args), frozenset(word.arg for word in call.keywords if word.arg))
            for call in nodes
            if call.func.attr == method  # type: ignore[attr-defined]
        ]

    def attributes_read(self, module: str, name: str, of: str) -> set[str]:
        """Attributes of `of`, itself a name or an attribute of whatever object, that a class or function of vLLM reads."""
        found = self.find(module, name)
        nodes = ast.walk(found.node) if found is not None else ()
        return {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute) and _last_name(node.value) == of
        }

    def mentions(self, module: str, text: str) -> bool:
        """Whether `text` is a name, an attribute or a whole string in the module."""
        tree = self.module(module)
        return tree is not None and any(
            text in (getattr(node, "value", None), getattr(node, "attr", None), getattr(node, "id", None))
            for node in ast.walk(tree)
        )

    def _in_module(self, module: str, name: str) -> Definition | None:
        tree = self.module(module)
        if tree is None:
            return None
        found: Definition | None = None
        for line in _statements(tree.body):
            match line:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() if line.name == name:
                    found = Definition(module, line)
                case ast.Assign() | ast.AnnAssign() if name in _assigned(line):
                    found = Definition(module, line)
                case ast.ImportFrom():
                    for alias in line.names:
                        if (alias.asname or alias.name) == name:
                            found = self._imported(module, line, alias.name)
                        elif alias.name == "*":
                            found = self._imported(module, line, name) or found
        if found is None and self.module(f"{module}.{name}".lstrip(".")) is not None:
            submodule = self.module(f"{module}.{name}".lstrip("."))
            assert submodule is not None
            found = Definition(f"{module}.{name}".lstrip("."), submodule)
        return found

    def _imported(self, module: str, line: ast.ImportFrom, name: str) -> Definition | None:
        if line.level:
            is_package = self.path(module).name == "__init__.py"
            parents = module.split(".") if module else []
            parents = parents[: len(parents) - line.level + is_package]
            source = ".".join([*parents, *([line.module] if line.module else [])])
        elif line.module == "vllm" or (line.module or "").startswith("vllm."):
            source = (line.module or "").removeprefix("vllm").removeprefix(".")
        else:
            return Definition(module, line)  # another package's
        return self._in_module(source, name) if source != module else None

    def _ancestry(self, found: Definition) -> Iterator[Definition]:
        """A class and its bases in vLLM, nearest first."""
        yield found
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base  # Generic[..]
            if isinstance(name, ast.Name | ast.Attribute):
                parent = self._in_module(found.module, _last_name(name))
                if parent is not None and isinstance(parent.node, ast.ClassDef):
                    yield from self._ancestry(parent)

    def _in_class(self, found: Definition, name: str) -> Definition | None:
        for owner in self._ancestry(found):
            node = _members(owner.node).get(name)
            if node is not None:
                return Definition(owner.module, node)
        return None


@cache
def _members(owner: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class defines in its body, and what its methods set on `self`."""
    members: dict[str, ast.AST] = {}
    for node in ast.walk(owner):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in _targets(node):
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                    members.setdefault(target.attr, node)
    for line in _statements(owner.body):
        if isinstance(line, Function | ast.ClassDef):
            members[line.name] = line
        for name in _assigned(line):
            members[name] = line
    return members


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, those under `if` and `try` included."""
    for line in body:
        yield line
        for part in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(line, Function | ast.ClassDef):
                inner = getattr(line, part, [])
                yield from _statements([y for x in inner for y in (x.body if isinstance(x, ast.ExceptHandler) else [x])])


def _targets(line: ast.AST) -> Iterator[ast.expr]:
    if isinstance(line, ast.Assign):
        for target in line.targets:
            yield from target.elts if isinstance(target, ast.Tuple) else [target]
    elif isinstance(line, ast.AnnAssign | ast.AugAssign):
        yield line.target


def _assigned(line: ast.stmt) -> list[str]:
    return [target.id for target in _targets(line) if isinstance(target, ast.Name)]


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ast.unparse(node)


class Installed(SourceTree):
    """The vLLM of this process: functions of modules that are imported are asked themselves, the rest is read."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("vLLM is not installed", name="vllm")
        super().__init__(Path(spec.submodule_search_locations[0]))

    def parameters(self, module: str, name: str) -> Parameters | None:
        """As `SourceTree.parameters`."""
        running: ModuleType | None = sys.modules.get(f"vllm.{module}".rstrip("."))
        if running is None:
            return super().parameters(module, name)
        found: Any = running
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            return None
        if inspect.isroutine(found) or inspect.isclass(found):
            return Parameters.of_function(found)
        return super().parameters(module, name)  # a Triton kernel does not say what it takes
