"""Options: what is misspelt or out of range is refused, what is written as JSON is read as the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_mtp.config import MAX_LAYERS, MAX_MASK_TOKENS, AdapterConfig, BaseFacts, SamplerConfig, ServingDefaults, ServingOptions

sizes = st.integers(1, 2**20)
facts = st.builds(
    BaseFacts,
    name_or_path=st.text(min_size=1),
    model_type=st.text(min_size=1),
    hidden_size=sizes,
    num_hidden_layers=st.integers(1, MAX_LAYERS),
    vocab_size=sizes,
    fingerprint=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
)
ks = st.integers(1, MAX_MASK_TOKENS)
layouts = st.sampled_from(["quadratic", "linear", "auto"]) | st.lists(st.integers(0, MAX_MASK_TOKENS), min_size=1).map(tuple)
defaults = st.builds(
    ServingDefaults,
    num_speculative_tokens=st.none() | ks,
    layout=st.none() | layouts,
    candidates=st.none() | sizes,
    draft_sample_method=st.sampled_from([None, "greedy", "probabilistic"]),
)
configs = st.builds(
    AdapterConfig,
    num_mask_tokens=ks,
    base=facts,
    sampler=st.none() | st.builds(SamplerConfig, residual=st.booleans()),
    serving=st.none() | defaults,
    training=st.dictionaries(st.text(), st.integers() | st.text() | st.none()),
)


@given(configs)
def test_an_adapters_configuration_survives_json(config: AdapterConfig) -> None:
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config


@given(ks, st.data())
def test_a_layout_has_one_group_behind_each_row_and_none_longer_than_the_drafts(k: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, MAX_MASK_TOKENS), min_size=1, max_size=k + 3))
    options = {"adapter": "a", "num_speculative_tokens": k, "layout": lengths}
    if len(lengths) == k + 1 and max(lengths) <= k:
        assert ServingOptions.model_validate(options).layout == tuple(lengths)
    else:
        with pytest.raises(ValidationError, match="group"):
            ServingOptions.model_validate(options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_speculative_tokens", 0),
        ("num_speculative_tokens", MAX_MASK_TOKENS + 1),
        ("layout", "cubic"),
        ("layout", []),
        ("candidates", 0),
        ("draft_sample_method", "random"),
        ("layuot", "linear"),
    ],
)
def test_a_wrong_option_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(ValidationError, match=option):
        ServingOptions.model_validate({"adapter": "a", "num_speculative_tokens": 4, option: value})


def test_options_cannot_change_after_they_were_checked() -> None:
    options = ServingOptions(adapter="a", num_speculative_tokens=4)
    with pytest.raises(ValidationError, match="frozen"):
        options.num_speculative_tokens = 99  # type: ignore[misc]
