"""Hostile input: adapter folders, options and requests, changed at random and by the structure of what they are.

    python -m tests.fuzz.adapters --count 20000 --seed 0
    python -m tests.fuzz.options --count 20000 --seed 0
    python -m tests.fuzz.requests --count 2000 --seed 0

Case i of a seed is always the same, so a finding is repeated with `--seed S --first i --count 1`.
"""
