"""The ablation's counting: stages take their figures from their variant, over the seeds that there are."""

import pytest

from benchmarks.ablation import STAGES, VARIANTS, summary, table
from vllm_mtp.train.config import TrainConfig


def test_stages_have_the_means_of_their_variants_seeds() -> None:
    figures = {
        "linear.plain.4": 1.5,
        "quadratic.plain.4": 2.0,
        "quadratic.plain.novel.4": 1.75,
        "quadratic.sampler.4": 9.0,
        "texts": 3,
    }
    runs = {"plain": {"0": figures, "1": {**figures, "quadratic.plain.4": 3.0}}, "sampler": {"0": {"quadratic.sampler.4": 4.0}}}
    stages = summary(runs)
    assert stages.keys() == STAGES.keys()
    assert stages["linear"]["all"]["4"] == {"mean": 1.5, "sd": 0.0, "seeds": [1.5, 1.5]}
    assert stages["quadratic"]["all"]["4"]["mean"] == 2.5
    assert stages["quadratic"]["novel"]["4"]["mean"] == 1.75
    assert stages["+ sampler head"]["all"]["4"] == {"mean": 4.0, "sd": None, "seeds": [4.0]}
    assert stages["+ consistency loss"]["all"] == {}
    assert "| quadratic | all | 2.500 ± 0.707 |" in table(stages, ["4"])
    assert "| + consistency loss | all | - |" in table(stages, ["4"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_options_of_training(variant: str) -> None:
    TrainConfig.model_validate({"base": "b", "data": "d", "output": "o", **VARIANTS[variant]})
