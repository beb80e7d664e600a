"""Arithmetic word problems with worked steps, made by a seeded generator: a number of things, and how it changes.

    Question: Tom has 12 coins. He buys 3 boxes with 8 coins each. Then he gives 9 coins to Mia. How many coins does Tom have now?
    Solution: The boxes hold 3 * 8 = 24 coins. Tom has 12 + 24 = 36 coins.
    Tom has 36 - 9 = 27 coins.
    Answer: 27

A problem is held out when the SHA-256 of its question is 0 modulo 24, the rule of the files, so no seed can repeat one in training.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

HELD_OUT_MODULUS = 24
MOST = 60  # of the things: small models learn small numbers
PEOPLE = ("Tom", "Mia", "Sam", "Ada", "Max", "Eva", "Ben", "Ida")  # he and she in turns
THINGS = ("coins", "cards", "books", "stones", "pens", "keys", "eggs", "nuts", "stamps", "files", "points", "lines")
CONTAINERS = ("boxes", "bags", "sets", "packs", "rows")


class Problem(NamedTuple):
    """A problem in words: `prompt` ends where the solution begins."""

    prompt: str
    solution: str
    answer: int


class Change(NamedTuple):
    """What happens: a clause of the question, the lines of the solution it takes, and the number afterwards."""

    told: str
    worked: str
    left: int


def _buys_sets(who: str, what: str, n: int, r: random.Random) -> Change | None:
    sets, each, container = r.randint(2, 5), r.randint(2, 9), r.choice(CONTAINERS)
    more = sets * each
    worked = f"The {container} hold {sets} * {each} = {more} {what}. {who} has {n} + {more} = {n + more} {what}."
    return Change(f"buys {sets} {container} with {each} {what} each", worked, n + more)


def _finds(who: str, what: str, n: int, r: random.Random) -> Change | None:
    more = r.randint(2, 20)
    return Change(f"finds {more} more {what}", f"{who} has {n} + {more} = {n + more} {what}.", n + more)


def _gives(who: str, what: str, n: int, r: random.Random) -> Change | None:
    if n < 4:
        return None
    less, friend = r.randint(2, min(n - 1, 20)), r.choice([name for name in PEOPLE if name != who])
    return Change(f"gives {less} {what} to {friend}", f"{who} has {n} - {less} = {n - less} {what}.", n - less)


def _loses_half(who: str, what: str, n: int, r: random.Random) -> Change | None:
    if n % 2 or n < 4:
        return None
    return Change(f"loses half of the {what}", f"{who} has {n} / 2 = {n // 2} {what}.", n // 2)


def _doubles(who: str, what: str, n: int, r: random.Random) -> Change | None:
    if n > MOST // 2:
        return None
    return Change(f"doubles the number of {what}", f"{who} has {n} * 2 = {n * 2} {what}.", n * 2)


def _spends_daily(who: str, what: str, n: int, r: random.Random) -> Change | None:
    days, each = r.randint(2, 5), r.randint(2, 9)
    if days * each >= n:
        return None
    less = days * each
    worked = f"That takes {days} * {each} = {less} {what}. {who} has {n} - {less} = {n - less} {what}."
    return Change(f"uses {each} {what} a day for {days} days", worked, n - less)


CHANGES: tuple[Callable[[str, str, int, random.Random], Change | None], ...] = (
    _buys_sets,
    _finds,
    _gives,
    _loses_half,
    _doubles,
    _spends_daily,
)


def problem(generator: random.Random) -> Problem:
    """One problem of two to four changes."""
    who, what, n = generator.choice(PEOPLE), generator.choice(THINGS), generator.randint(4, 30)
    pronoun = "He" if who in PEOPLE[::2] else "She"
    told, wanted = [f"{who} has {n} {what}."], generator.randint(2, 4)
    worked: list[str] = []
    while len(worked) < wanted:
        change = generator.choice(CHANGES)(who, what, n, generator)
        if change is None or not 0 < change.left <= MOST:
            continue
        told.append(f"{'Then ' + pronoun.lower() if worked else pronoun} {change.told}.")
        worked.append(change.worked)
        n = change.left
    question = f"{' '.join(told)} How many {what} does {who} have now?"
    return Problem(f"Question: {question}\nSolution:", " " + "\n".join(worked) + f"\nAnswer: {n}", n)


def is_held_out(problem: Problem) -> bool:
    """Whether the fixed rule keeps `problem` out of training."""
    return int(hashlib.sha256(problem.prompt.encode()).hexdigest(), 16) % HELD_OUT_MODULUS == 0


def problems(held_out: bool, seed: int = 0) -> Iterator[Problem]:
    """Problems without end, all different, of one side of the split."""
    generator, seen = random.Random(seed), set()
    while True:
        made = problem(generator)
        if made.prompt not in seen and is_held_out(made) == held_out:
            seen.add(made.prompt)
            yield made


def answer(text: str) -> int | None:
    """The answer that a solution gives; None where it gives none."""
    found = re.search(r"\nAnswer: (\d+)(?!\d)", text)
    return int(found[1]) if found else None
