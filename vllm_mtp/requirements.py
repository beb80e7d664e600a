"""Kinds of facts about vLLM, names in it being relative to its package, and whether a vLLM is as they say."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from vllm_mtp.vllm_source import Parameters, SourceTree


class Requirement(Protocol):
    """One fact about vLLM."""

    @property
    def module(self) -> str:
        """The module that it is about."""

    def violations(self, vllm: SourceTree) -> Iterator[str]:
        """What is otherwise, a sentence each."""


@dataclass(frozen=True)
class Imported:
    """`names` can be imported from `module`."""

    module: str
    names: str

    def violations(self, vllm: SourceTree) -> Iterator[str]:
        for name in self.names.split():
            if vllm.find(self.module, name) is None:
                yield f"{self.module}.{name} is missing".lstrip(".")


@dataclass(frozen=True)
class Has:
    """Instances of the class `name` have `attributes`, which we read or set, or call without arguments."""

    module: str
    name: str
    attributes: str

    def violations(self, vllm: SourceTree) -> Iterator[str]:
        if vllm.find(self.module, self.name) is None:
            yield f"{self.module}.{self.name} is missing"
            return
        for attribute in self.attributes.split():
            if vllm.find(self.module, f"{self.name}.{attribute}") is None:
                yield f"{self.module}.{self.name}.{attribute} is missing"


@dataclass(frozen=True)
class Replaced:
    """vLLM calls `name`, and we stand in its place with a function that takes `ours`."""

    module: str
    name: str
    ours: str

    def violations(self, vllm: SourceTree) -> Iterator[str]:
        theirs, ours = vllm.parameters(self.module, self.name), Parameters.parse(self.ours)
        if theirs is None:
            yield f"{self.module}.{self.name} is missing"
            return
        count = len(ours.positional)
        fits = theirs.positional[:count] == ours.positional
        fits &= ours.more_positional or len(theirs.positional) <= count or (ours.more_keywords and not theirs.more_positional)
        fits &= ours.more_keywords or set(theirs.keyword) <= {*ours.keyword, *ours.positional}
        if not fits:
            yield f"{self.module}.{self.name} takes {theirs}, where {ours} is expected"


@dataclass(frozen=True)
class Called:
    """We call `name`, a function or a class, with `arguments`: by position, and after `*` by keyword."""

    module: str
    name: str
    arguments: str

    def violations(self, vllm: SourceTree) -> Iterator[str]:
        theirs, ours = vllm.parameters(self.module, self.name), Parameters.parse(self.arguments)
        if theirs is None:
            yield f"{self.module}.{self.name} is missing"
            return
        given = {*ours.positional, *ours.keyword}
        fits = theirs.positional[: len(ours.positional)] == ours.positional
        fits &= theirs.more_keywords or set(ours.keyword) <= {*theirs.positional, *theirs.keyword}
        fits &= theirs.required <= given
        if not fits:
            yield f"{self.module}.{self.name} takes {theirs}, where {ours} is given"


@dataclass(frozen=True)
class CallsUs:
    """`function` calls `method` of an object of ours with arguments whose last names are `arguments`, and with `keywords`."""

    module: str
    function: str
    method: str
    arguments: str
    keywords: str = ""

    def violations(self, vllm: SourceTree) -> Iterator[str]:
        expected = tuple(self.arguments.split()), set(self.keywords.split())
        calls = vllm.calls(self.module, self.function, self.method)
        if not any(given == expected[0] and expected[1] <= keywords for given, keywords in calls):
            yield f"{self.module}.{self.function} does not call {self.method}({', '.join((*expected[0], *sorted(expected[1])))})"


@dataclass(frozen=True)
class Subclassed:
    """Our subclass of `name` defines all its abstract methods, `defined`; of other attributes vLLM's `reader` reads `read` off it
    at most, or what `name` itself has."""

    module: str
    name: str
    defined: str
    reader: tuple[str, str]
    as_: str
    read: str

    def violations(self, vllm: SourceTree) -> Iterator[str]:
        if vllm.find(self.module, self.name) is None:
            yield f"{self.module}.{self.name} is missing"
            return
        for method in sorted(vllm.abstract_methods(self.module, self.name) - set(self.defined.split())):
            yield f"{self.module}.{self.name}.{method} is abstract, and not defined here"
        known = {*self.defined.split(), *self.read.split()}
        for attribute in sorted(vllm.attributes_read(*self.reader, self.as_) - known):
            if vllm.find(self.module, f"{self.name}.{attribute}") is None:
                yield f"{'.'.join(self.reader)} reads {self.as_}.{attribute}, which is not known here"


@dataclass(frozen=True)
class Takes:
    """The function `name`, which vLLM alone calls, has a `parameter`: a sign of how it works."""

    module: str
    name: str
    parameter: str

    def violations(self, vllm: SourceTree) -> Iterator[str]:
        theirs = vllm.parameters(self.module, self.name)
        if theirs is None or self.parameter not in (*theirs.positional, *theirs.keyword):
            yield f"{self.module}.{self.name} has no parameter {self.parameter}"


@dataclass(frozen=True)
class Mentions:
    """`module` has `text` as a name, an attribute or a whole string."""

    module: str
    text: str

    def violations(self, vllm: SourceTree) -> Iterator[str]:
        if not vllm.mentions(self.module, self.text):
            yield f"{self.module} does not know {self.text!r}"


@dataclass(frozen=True)
class EitherOf:
    """One of several forms, all of which are supported."""

    forms: tuple[Requirement, ...]

    @property
    def module(self) -> str:
        """Where the newest form is."""
        return self.forms[0].module

    def violations(self, vllm: SourceTree) -> Iterator[str]:
        found = [list(form.violations(vllm)) for form in self.forms]
        if all(found):
            yield from found[0]
