"""Plans: who shares what, which steps draw noise, and that the number of evaluations is the closed formula's."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidtrl.diffusion.step_schedules import (
    ODE,
    Plan,
    branch_plan,
    chain_plan,
    compress_tail,
    granular_plan,
    merge_steps,
    random_steps,
    step_range,
    tree_plan,
    window,
)


def stochastic(plan):
    return (plan.branch != ODE).any(1).nonzero().flatten().tolist()


def grid(num_steps, shift=3.0):
    u = torch.linspace(1, 0, num_steps + 1)
    return (shift * u / (1 + (shift - 1) * u)).tolist()


# ---- What each plan is, and what it costs ----


def test_chain_of_own_latents_shares_nothing():
    """Flow-GRPO, and Flash-GRPO as published: G T evaluations, G decisions of one child at every stochastic step."""
    plan = chain_plan(10, 4, range(9))
    assert plan.num_evaluations() == 4 * 10
    assert [(step, children) for step, _, children in plan.decisions()] == [
        (i, [[m]]) for i in range(9) for m in range(4)
    ]


def test_chain_of_one_latent_shares_everything_before_the_first_noise():
    """MixGRPO, Flow-GRPO-Fast: one path up to the window; its first step is one decision with G children."""
    plan = chain_plan(25, 6, [3, 4, 5, 6], num_latents=1)
    assert plan.num_evaluations() == 3 + 1 + 6 * 21
    first, *rest = plan.decisions()
    assert first == (3, 0, [[m] for m in range(6)])
    assert all(len(children) == 1 for _, _, children in rest) and len(rest) == 6 * 3


@pytest.mark.parametrize("k", range(10))
def test_single_step_behind_a_shared_latent(k):
    """The paper's step with shared noise (LongCat's setting): k + 1 shared evaluations, then G each."""
    plan = chain_plan(20, 8, [k], num_latents=1)
    assert plan.num_evaluations() == (k + 1) + 8 * (20 - k - 1)
    assert plan.decisions() == [(k, 0, [[m] for m in range(8)])]


def test_the_saving_that_the_single_step_makes():
    """T=20, G=8, k uniform in the first half: at least 22 % of the rollout, 30 % of all evaluations (backward = 2)."""
    shared = [chain_plan(20, 8, [k], num_latents=1) for k in range(10)]
    own = [chain_plan(20, 8, [k]) for k in range(10)]
    rollout = [sum(plan.num_evaluations() for plan in plans) for plans in (shared, own)]
    update = [3 * sum(len(plan.decisions()) for plan in plans) for plans in (shared, own)]
    assert 1 - rollout[0] / rollout[1] == pytest.approx(0.240625)
    assert 1 - (rollout[0] + update[0]) / (rollout[1] + update[1]) == pytest.approx(0.32337, abs=1e-5)


def test_seed_groups_share_within_a_latent_only():
    plan = chain_plan(10, 8, [2], num_latents=2)
    assert plan.seed.tolist() == [0] * 4 + [1] * 4
    assert plan.decisions() == [(2, 0, [[0], [1], [2], [3]]), (2, 4, [[4], [5], [6], [7]])]
    assert plan.num_evaluations() == 2 * 3 + 8 * 7


def test_tempflow_branches_leave_a_deterministic_path():
    """At each of K steps, B branches leave each of L paths: L (max k + 1) evaluations on the paths, then one per branch."""
    steps, latents, branches, total = [1, 3], 4, 3, 10
    plan = branch_plan(total, steps, latents, branches)
    assert plan.num_members == len(steps) * latents * branches
    assert plan.num_evaluations() == latents * (max(steps) + 1) + sum(
        latents * branches * (total - k - 1) for k in steps
    )
    decisions = plan.decisions()
    assert [step for step, _, _ in decisions] == [1] * latents + [3] * latents
    assert all(len(children) == branches and all(len(c) == 1 for c in children) for _, _, children in decisions)
    for _, _, children in decisions:  # credit stays inside a latent
        assert len({int(plan.seed[c[0]]) for c in children}) == 1
    assert all(int((plan.branch[:, m] != ODE).sum()) == 1 for m in range(plan.num_members))


def test_a_tree_splits_every_path():
    """BranchGRPO: splits at 0, 3, 6, 9 make 16 leaves; paths 1, 2, 4, 8 before the splits, 16 after."""
    plan = tree_plan(16, [0, 3, 6, 9])
    assert plan.num_members == 16
    assert plan.num_evaluations() == 1 * 1 + 3 * 2 + 3 * 4 + 3 * 8 + 6 * 16
    decisions = plan.decisions()
    assert [step for step, _, _ in decisions] == [0] + [3] * 2 + [6] * 4 + [9] * 8
    assert decisions[0][2] == [list(range(8)), list(range(8, 16))]
    assert decisions[-1][2] == [[14], [15]]
    assert chain_plan(16, 16, [0, 3, 6, 9]).num_evaluations() == 256  # control: what own latents cost


def test_granularities_are_tails_of_one_decision():
    """G2RPO: a child per branch, whose members differ in their tails alone and share it up to where they part."""
    total, k, branches, strides = 20, 4, 4, (1, 2, 3)
    plan = granular_plan(total, k, branches, strides)
    assert plan.decisions() == [(k, 0, [[3 * b, 3 * b + 1, 3 * b + 2] for b in range(branches)])]
    tails = sum(math.ceil((total - k - 1) / g) for g in strides)
    assert plan.num_evaluations() == (k + 1) + branches * (tails - 2)  # the three tails share their first evaluation
    for member, stride in enumerate(strides):
        visited = plan.active()[:, member].nonzero().flatten().tolist()
        assert visited == [*range(k + 1), *range(k + 1, total, stride)]


def test_merged_steps_are_one_jump():
    """E-GRPO: the span (2, 5) is one stochastic step; steps 3 and 4 are nobody's."""
    plan = chain_plan(10, 4, [2], num_latents=1, merged=[(2, 5)])
    assert not plan.active()[3:5].any() and plan.active()[5:].all()
    assert plan.num_evaluations() == 3 + 4 * 5


@pytest.mark.parametrize(("stochastic_step", "merged"), [(3, ()), (3, [(3, 6)])])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.5, 1.0])
def test_compressed_tail(stochastic_step, merged, ratio):
    """MixGRPO-Flash keeps a share of the steps behind the last stochastic one, from where that one leads."""
    total, start = 25, merged[0][1] if merged else stochastic_step + 1
    plan = compress_tail(chain_plan(total, 4, [stochastic_step], 1, merged), ratio)
    kept = plan.active()[start:, 0]
    assert int(kept.sum()) == math.ceil(ratio * (total - start)) and bool(kept[0])
    assert plan.num_evaluations() == stochastic_step + 1 + 4 * int(kept.sum())
    position = 0
    while position < total:  # everyone arrives
        position = int(plan.target[position, 0])
    assert position == total


def test_compressed_tail_wants_a_share():
    for ratio in (0.0, 1.5):
        with pytest.raises(ValueError, match="tail_ratio"):
            compress_tail(chain_plan(10, 2, [1]), ratio)


# ---- The numbering of nodes, for any plan ----


@st.composite
def plans(draw):
    """Any plan: random sharing of seeds and noises, random jumps that the children of a node take together."""
    num_steps, num_members = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    row = st.lists(st.integers(0, 2), min_size=num_members, max_size=num_members)
    seed = torch.tensor(draw(row))
    jumps = draw(st.lists(st.integers(1, 3), min_size=num_steps, max_size=num_steps))
    noisy = draw(st.lists(st.booleans(), min_size=num_steps, max_size=num_steps))
    # at a noisy step some members may stay deterministic (ODE is -1), as TempFlow's do
    branch = torch.stack([torch.tensor(draw(row)) - 1 if on else torch.full((num_members,), ODE) for on in noisy])
    target = torch.tensor([min(i + jump, num_steps) for i, jump in enumerate(jumps)])[:, None].repeat(1, num_members)
    for i in range(num_steps):
        if not noisy[i] and draw(st.booleans()):  # deterministic steps may part members, as granularities do
            own = torch.tensor(draw(row)) + 1
            target[i] = (i + own).clamp(max=num_steps)
    return Plan(seed, branch, target, torch.zeros(num_members, dtype=torch.long))


def histories(plan):
    """What each member did before each step, told without any of the plan's own methods."""
    rows = []
    for m in range(plan.num_members):
        position, done, at = 0, (int(plan.seed[m]),), []
        for i in range(plan.num_steps):
            at.append(done)
            if position == i:
                done += ((i, int(plan.branch[i, m]), int(plan.target[i, m])),)
                position = int(plan.target[i, m])
        rows.append([*at, done])
    return rows


@settings(max_examples=150, deadline=None)
@given(plan=plans())
def test_a_node_is_a_history(plan):
    nodes, told = plan.nodes(), histories(plan)
    for i in range(plan.num_steps + 1):
        for a in range(plan.num_members):
            assert int(nodes[i, a]) == min(b for b in range(plan.num_members) if told[b][i] == told[a][i])


@settings(max_examples=150, deadline=None)
@given(plan=plans())
def test_evaluations_and_decisions_count_histories(plan):
    told, active = histories(plan), plan.active()
    evaluated = {(i, told[m][i]) for m in range(plan.num_members) for i in range(plan.num_steps) if active[i, m]}
    assert plan.num_evaluations() == len(evaluated)
    decisions = plan.decisions()
    assert [step for step, _, _ in decisions] == sorted(step for step, _, _ in decisions)
    drawn = {
        (i, told[m][i], int(plan.branch[i, m]))
        for m in range(plan.num_members)
        for i in range(plan.num_steps)
        if active[i, m] and plan.branch[i, m] != ODE
    }
    assert sum(len(children) for _, _, children in decisions) == len(drawn)
    for step, node, children in decisions:
        members = [m for child in children for m in child]
        assert node == min(m for m in range(plan.num_members) if told[m][step] == told[members[0]][step])
        assert all(active[step, m] for m in members)


# ---- Which steps ----


def test_step_range_leaves_the_last_step_out():
    assert list(step_range(20, (0.0, 0.5))) == list(range(10))
    assert list(step_range(10, (0.0, 1.0))) == list(range(9))
    for share in ((0.5, 0.5), (0.9, 0.2), (0.0, 0.01), (0.0, 1.5)):
        with pytest.raises(ValueError, match="sde_range"):
            step_range(20, share)


def test_random_steps_are_uniform_and_distinct():
    rng, counts = random.Random(0), torch.zeros(10)
    for _ in range(4000):
        chosen = random_steps(range(10), 3, rng)
        assert len(set(chosen)) == 3 and chosen == sorted(chosen)
        counts[chosen] += 1
    assert (counts / 4000 - 0.3).abs().max() < 0.03
    for count in (0, 11):
        with pytest.raises(ValueError, match="sde_steps"):
            random_steps(range(10), count, rng)


def test_sliding_window_moves_every_interval_and_starts_over():
    """MixGRPO: width 4, stride 1, 25 iterations at each place of 25 steps (the last of them stays out)."""
    at = [window(range(24), 4, i)[0] for i in range(25 * 21 * 2)]
    assert at == [i // 25 % 21 for i in range(len(at))]
    assert window(range(24), 4, 30) == [1, 2, 3, 4]
    assert window(range(24), 4, 25, stride=3) == [3, 4, 5, 6]


def test_decaying_window_spends_less_time_at_low_noise():
    """ceil(25 exp(-0.1 relu(l - 13))) iterations at position l."""
    lengths = [math.ceil(25 * math.exp(-0.1 * max(0, left - 13))) for left in range(21)]
    assert lengths[:14] == [25] * 14 and lengths[-1] == 13
    at = [window(range(24), 4, i, "decay")[0] for i in range(sum(lengths) + 1)]
    assert [at.count(left) for left in range(1, 21)] == lengths[1:]
    assert at[-1] == 0  # and over again


def test_random_window_stays_inside():
    rng = random.Random(0)
    starts = {window(range(2, 9), 3, 0, "random", rng=rng)[0] for _ in range(200)}
    assert starts == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("size", [0, 6])
def test_window_outside_the_schedule(size):
    with pytest.raises(ValueError, match="outside the schedule"):
        window(range(5), size, 0)
    with pytest.raises(ValueError, match="outside the schedule"):
        chain_plan(5, 2, [5])
    with pytest.raises(ValueError, match="mode"):
        window(range(5), 2, 0, "sideways")


@settings(max_examples=100, deadline=None)
@given(
    num_steps=st.integers(3, 30),
    threshold=st.floats(0.01, 3.0),
    shift=st.floats(1.0, 8.0),
    share=st.floats(0.2, 0.95),
)
def test_merged_spans_cover_the_range_and_have_enough_entropy(num_steps, threshold, shift, share):
    """E-GRPO: s/(1-s) (s - s_next) > threshold for every span but the last, and for none of its proper beginnings."""
    sigmas, last = grid(num_steps, shift), max(1, int(share * num_steps))
    spans = merge_steps(sigmas, threshold, last)
    assert [i for i, _ in spans] == [0, *(j for _, j in spans[:-1])] and spans[-1][1] == last

    def entropy(i, j):
        s = min(sigmas[i], sigmas[1])
        return s / (1 - s) * (sigmas[i] - sigmas[j])

    for i, j in spans[:-1]:
        assert entropy(i, j) > threshold
    for i, j in spans:
        assert all(entropy(i, between) <= threshold for between in range(i + 1, j))


def test_a_number_of_latents_that_does_not_divide():
    with pytest.raises(ValueError, match="num_latents"):
        chain_plan(10, 8, [0], num_latents=3)
