"""The ablation's counting: stages take their figures from their variant, over the seeds that there are."""

import json
from pathlib import Path

import pytest

from benchmarks.ablation import (
    AVERAGE,
    PAPERS,
    REGIONS,
    SHAPE,
    STAGES,
    VARIANTS,
    average,
    gains,
    known_runs,
    summary,
    table,
    table_of_gains,
)
from vllm_mtp import demo
from vllm_mtp.train.config import TrainConfig


def everywhere(figures: dict[str, float]) -> dict[str, dict[str, float]]:
    """A run that found the same in each domain."""
    return dict.fromkeys((*demo.DOMAINS, AVERAGE), figures)


def test_stages_have_the_means_of_their_variants_seeds() -> None:
    figures = {
        "linear.plain.4": 1.5,
        "quadratic.plain.4": 2.0,
        "quadratic.plain.novel.4": 1.75,
        "quadratic.sampler.4": 9.0,
    }
    other = {**everywhere(figures), AVERAGE: {**figures, "quadratic.plain.4": 3.0}}
    runs = {"plain": {"0": everywhere(figures), "1": other}, "sampler": {"0": everywhere({"quadratic.sampler.4": 4.0})}}
    stages = summary(runs)
    assert stages.keys() == STAGES.keys()
    assert stages["linear"][AVERAGE]["all"]["4"] == {"mean": 1.5, "sd": 0.0, "seeds": [1.5, 1.5]}
    assert stages["quadratic"][AVERAGE]["all"]["4"]["mean"] == 2.5
    assert stages["quadratic"]["prose"]["all"]["4"]["mean"] == 2.0
    assert stages["quadratic"][AVERAGE]["novel"]["4"]["mean"] == 1.75
    assert stages["+ sampler head"][AVERAGE]["all"]["4"] == {"mean": 4.0, "sd": None, "seeds": [4.0]}
    assert stages[PAPERS][AVERAGE]["all"] == {}
    assert "| quadratic | all | 2.500 ± 0.707 |" in table(stages, ["4"])
    assert "| quadratic | prose | 2.000 ± 0.000 |" in table(stages, ["4"])
    assert PAPERS not in table(stages, ["4"])


def test_gains_are_over_the_papers_recipe_with_the_same_seed() -> None:
    papers, ours = (
        {seed: everywhere({"quadratic.sampler.4": value}) for seed, value in some}
        for some in ((("0", 2.0), ("1", 4.0)), (("0", 3.0), ("1", 5.0), ("2", 9.0)))
    )
    found = gains({"consistency": papers, "default": ours})
    assert found["the trainer's defaults"][AVERAGE]["4"]["seeds"] == [1.5, 1.25]
    assert found["self-distill, hard"][AVERAGE] == {}
    assert "| the trainer's defaults | 1.375 ± 0.177 |" in table_of_gains(found, ["4"])
    assert "self-distill" not in table_of_gains(found, ["4"])


def test_the_average_is_of_domains_and_of_what_all_of_them_have() -> None:
    assert average({"code": {"a": 1.0, "b": 5.0}, "prose": {"a": 2.0, "b": 7.0}, "arithmetic": {"a": 6.0}}) == {"a": 3.0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_options_of_training_at_one_rank_and_length(variant: str) -> None:
    shape = {**SHAPE, **({"groups": REGIONS} if "recipe" in VARIANTS[variant] else {})}
    config = TrainConfig.model_validate({"base": "b", "data": "d", "output": "o", **shape, **VARIANTS[variant]})
    assert (config.rank, config.length, config.mask_tokens) == (SHAPE["rank"], SHAPE["length"], 8)


def test_runs_are_gone_on_with_if_they_were_made_alike(tmp_path: Path) -> None:
    file, runs = tmp_path / "ablation.json", {"plain": {"0": everywhere({"quadratic.plain.4": 2.0})}}
    facts = {"steps": 600, "shape": {"betas": (0.9, 0.99)}}
    assert known_runs(file, facts) == {}
    file.write_text(json.dumps({**facts, "runs": runs}))
    assert known_runs(file, facts) == runs
    with pytest.raises(ValueError, match="other steps"):
        known_runs(file, {**facts, "steps": 300})
