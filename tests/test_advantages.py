"""Advantages against numbers of the original implementations (tests/data/objectives.safetensors) and their invariances."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vidtrl.diffusion.advantages import aggregate_rewards, group_advantages, zero_std_groups


VECTORS = load_file(Path(__file__).parent / "data" / "objectives.safetensors")
NAN = math.nan
SCALES = ["group", "batch", "max_group", "none"]
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
REWARDS = st.lists(st.integers(-1000, 1000), min_size=12, max_size=12).map(lambda r: torch.tensor(r) / 100)


@pytest.mark.parametrize(
    "scale, key", [("group", "adv.group_std"), ("batch", "adv.global_std"), ("max_group", "adv.max_group_std")]
)
def test_agrees_with_the_original_implementation(scale, key):
    rewards, groups = VECTORS["adv.rewards"], VECTORS["adv.group"]
    torch.testing.assert_close(group_advantages(rewards, groups, scale).double(), VECTORS[key], rtol=1e-5, atol=1e-7)
    # neither another eps nor the sample standard deviation would pass
    other = group_advantages(rewards, groups, scale, eps=1e-3)
    assert (other - VECTORS[key]).abs().max() > 1e-4
    assert (group_advantages(rewards, groups, scale) * math.sqrt(3 / 4) - VECTORS[key]).abs().max() > 0.05


@settings(deadline=None)
@given(REWARDS, st.sampled_from(SCALES), st.permutations(range(12)))
def test_advantages_ignore_order_offset_and_group_names(rewards, scale, order):
    expected = group_advantages(rewards, GROUPS, scale)
    order = torch.tensor(order)
    torch.testing.assert_close(group_advantages(rewards[order], GROUPS[order], scale), expected[order])
    names = torch.tensor([70, -3, 12])
    torch.testing.assert_close(group_advantages(rewards, names[GROUPS], scale), expected)
    if scale != "batch":  # the batch's std sees differences between prompts
        offset = torch.tensor([10.0, -20.0, 0.5])[GROUPS].double()
        torch.testing.assert_close(group_advantages(rewards + offset, GROUPS, scale), expected, atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(REWARDS, st.sampled_from(SCALES))
def test_advantages_of_a_group_sum_to_zero(rewards, scale):
    advantages = group_advantages(rewards, GROUPS, scale)
    assert advantages.dtype == torch.float32
    assert advantages.reshape(3, 4).double().sum(1).abs().max() < 1e-4


@settings(deadline=None)
@given(REWARDS)
def test_what_the_std_is_of(rewards):
    """Population std of every group, by the definition."""
    values = rewards.double().reshape(3, 4)
    centered = values - values.mean(1, keepdim=True)
    stds = values.std(1, correction=0)
    divisors = {
        "group": stds[:, None] + 1e-4,
        "batch": values.std(correction=0) + 1e-4,
        "max_group": stds.max() + 1e-4,
        "none": 1.0,
    }
    for scale, divisor in divisors.items():
        expected = (centered / divisor).flatten().float()
        torch.testing.assert_close(group_advantages(rewards, GROUPS, scale), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(st.floats(-100, 100), st.sampled_from(SCALES))
@example(0.1, "none")
def test_equal_rewards_give_exactly_zero(value, scale):
    """Also where the mean of equal numbers is not that number, as for three times 0.1."""
    rewards = torch.tensor([value] * 3 + [1.0, 2.0, 3.0], dtype=torch.float64)
    groups = torch.tensor([0] * 3 + [1] * 3)
    assert (group_advantages(rewards, groups, scale)[:3] == 0).all()
    assert (group_advantages(rewards, groups, scale)[3:] != 0).any()
    assert zero_std_groups(rewards, groups).tolist() == [True] * 3 + [False] * 3


@settings(deadline=None)
@given(REWARDS, st.sampled_from(SCALES), st.integers(0, 11))
def test_a_reward_that_does_not_apply_is_as_if_the_sample_were_absent(rewards, scale, missing):
    with_nan = rewards.clone()
    with_nan[missing] = NAN
    rest = torch.arange(12) != missing
    advantages = group_advantages(with_nan, GROUPS, scale)
    assert advantages[missing] == 0
    torch.testing.assert_close(advantages[rest], group_advantages(rewards[rest], GROUPS[rest], scale))


@pytest.mark.parametrize("scale", SCALES)
def test_groups_without_anything_to_compare(scale):
    """One member, one applicable member, none at all."""
    rewards = torch.tensor([3.0, 1.0, NAN, NAN, NAN])
    groups = torch.tensor([0, 1, 1, 2, 2])
    assert (group_advantages(rewards, groups, scale) == 0).all()
    assert zero_std_groups(rewards, groups).all()


def test_zero_std_groups_of_several_rewards():
    """A group is silent only if all its rewards are."""
    rewards = torch.tensor([[1.0, 5.0], [1.0, 5.0], [1.0, 5.0], [1.0, 6.0], [1.0, NAN], [1.0, 7.0]])
    groups = torch.tensor([4, 4, 9, 9, 2, 2])
    assert zero_std_groups(rewards, groups).tolist() == [True, True, False, False, True, True]


# ---- several rewards


@settings(deadline=None)
@given(REWARDS, REWARDS, st.floats(0.1, 100))
def test_advantage_aggregation_ignores_units_and_reward_aggregation_does_not(first, second, unit):
    weights = torch.tensor([1.0, 0.5])
    rewards = torch.stack([first, second], 1).double()
    scaled = rewards * torch.tensor([1.0, unit])
    options = dict(group_ids=GROUPS, clip=None, eps=0.0)
    torch.testing.assert_close(
        aggregate_rewards(scaled, weights, **options), aggregate_rewards(rewards, weights, **options)
    )
    rewards = torch.stack([torch.arange(12.0) % 4, (torch.arange(12.0) * 7) % 5], 1)
    scaled = rewards * torch.tensor([1.0, 100.0])
    results = [aggregate_rewards(r, weights, aggregation="reward", **options) for r in (rewards, scaled)]
    assert (results[0] - results[1]).abs().max() > 0.1


def test_both_aggregations_by_hand():
    rewards = torch.tensor([[0.0, 10.0], [2.0, 10.0], [1.0, 40.0]])
    groups, weights = torch.zeros(3, dtype=torch.long), torch.tensor([2.0, 0.1])
    columns = [group_advantages(rewards[:, i], groups) for i in range(2)]
    expected = 2 * columns[0] + 0.1 * columns[1]
    torch.testing.assert_close(aggregate_rewards(rewards, weights, groups), expected)
    total = torch.tensor([1.0, 5.0, 6.0])
    result = aggregate_rewards(rewards, weights, groups, aggregation="reward")
    torch.testing.assert_close(result, group_advantages(total, groups))
    assert (result - expected).abs().max() > 0.1


@pytest.mark.parametrize("aggregation", ["advantage", "reward"])
def test_one_reward_of_weight_one_is_the_plain_advantage(aggregation):
    rewards = VECTORS["adv.rewards"]
    result = aggregate_rewards(rewards[:, None], torch.ones(1), GROUPS, aggregation=aggregation)
    torch.testing.assert_close(result, group_advantages(rewards, GROUPS))


@pytest.mark.parametrize("aggregation", ["advantage", "reward"])
def test_missing_rewards(aggregation):
    """Each prompt has its own reward function; the last sample has none."""
    rewards = torch.tensor([[1.0, NAN], [3.0, NAN], [NAN, 5.0], [NAN, 9.0], [NAN, NAN]])
    groups = torch.tensor([0, 0, 1, 1, 1])
    result = aggregate_rewards(rewards, torch.tensor([1.0, 2.0]), groups, scale="none", aggregation=aggregation)
    assert result.tolist() == [-1.0, 1.0, -4.0, 4.0, 0.0]


@settings(deadline=None)
@given(REWARDS, st.floats(0.1, 3))
def test_clipping(rewards, clip):
    free = aggregate_rewards(rewards[:, None], torch.tensor([4.0]), GROUPS, clip=None)
    clipped = aggregate_rewards(rewards[:, None], torch.tensor([4.0]), GROUPS, clip=clip)
    torch.testing.assert_close(clipped, free.clamp(-clip, clip))
    assert clipped.abs().max() <= clip + 1e-6


def test_default_clip_is_five():
    rewards = torch.zeros(100, 1)
    rewards[0] = 1.0
    result = aggregate_rewards(rewards, torch.ones(1), torch.zeros(100, dtype=torch.long))
    assert result[0] == 5.0
    assert group_advantages(rewards[:, 0], torch.zeros(100, dtype=torch.long))[0] > 9


def test_bad_options_say_what_is_valid():
    rewards, groups = torch.rand(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="'max_group' or 'none', got 'std'"):
        group_advantages(rewards[:, 0], groups, scale="std")
    with pytest.raises(ValueError, match="'advantage' or 'reward', got 'sum'"):
        aggregate_rewards(rewards, torch.ones(2), groups, aggregation="sum")
    with pytest.raises(ValueError, match=r"one number per reward \(2\), got 3"):
        aggregate_rewards(rewards, torch.ones(3), groups)
