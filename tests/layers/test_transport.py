"""Sinkhorn and event transport against plain float64 loops, their own optimality conditions and finite differences."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from layers import transport

RANDOM = np.random.default_rng(2)
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def masses(*shape):
    mass = RANDOM.uniform(0.2, 1.0, size=shape)
    return jnp.asarray(mass / mass.sum(-1, keepdims=True), jnp.float32)


COST = jnp.abs(draw(2, 4, 5))
A, B = masses(2, 4), masses(2, 5)
converged = partial(transport.sinkhorn_plan, regularization=0.3, num_iterations=200)


# ---- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
def test_normalisation_is_the_plain_loop(epsilon):
    scores = draw(3, 4, 4)
    expected = np.exp(np.asarray(scores, np.float64))
    for _ in range(6):
        expected = expected / (expected.sum(-1, keepdims=True) + epsilon)
        expected = expected / (expected.sum(-2, keepdims=True) + epsilon)
    close(transport.sinkhorn_normalize(scores, num_iterations=6, epsilon=epsilon), expected)


def test_normalisation_is_doubly_stochastic_and_ranks_the_diagonal_first():
    ours = transport.sinkhorn_normalize(500 * jnp.eye(5) + draw(5, 5), num_iterations=20)
    close(jnp.sum(ours, 0), jnp.ones(5))
    close(jnp.sum(ours, 1), jnp.ones(5), atol=1e-3)
    chex.assert_trees_all_equal(jnp.argmax(ours, 1), jnp.arange(5))


def test_normalisation_leaves_masked_pairs_rows_and_columns_at_zero():
    mask = jnp.ones((4, 4), bool).at[3].set(False).at[:, 3].set(False).at[0, 1].set(False)
    scores = draw(4, 4)
    ours = transport.sinkhorn_normalize(scores, mask=mask, num_iterations=40)
    assert not jnp.any(ours[~mask])
    close(jnp.sum(ours, 0), jnp.array([1.0, 1, 1, 0]))
    close(ours[:3, :3], transport.sinkhorn_normalize(scores[:3, :3], mask=mask[:3, :3], num_iterations=40))
    gradient = jax.grad(lambda s: jnp.sum(transport.sinkhorn_normalize(s, mask=mask) ** 2))(scores)
    assert jnp.all(jnp.isfinite(gradient))
    assert not jnp.any(gradient[~mask])


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_balanced_plan_has_its_marginals_and_the_form_of_the_optimum():
    plan = converged(COST, row_mass=A, column_mass=B)
    close(jnp.sum(plan, -1), A)
    close(jnp.sum(plan, -2), B)
    # log P + C / eps = f_i + g_j: all second differences vanish.
    potential = jnp.log(plan) + COST / 0.3
    mixed = potential[:, 1:, 1:] - potential[:, 1:, :-1] - potential[:, :-1, 1:] + potential[:, :-1, :-1]
    close(mixed, jnp.zeros_like(mixed), atol=1e-4)


def test_an_unbalanced_plan_meets_its_optimality_conditions():
    a, b, rho = 2 * A, B, 0.7
    plan = converged(COST, row_mass=a, column_mass=b, relaxation=rho)
    force = COST + 0.3 * jnp.log(plan)
    force = force + rho * jnp.log(jnp.sum(plan, -1) / a)[:, :, None] + rho * jnp.log(jnp.sum(plan, -2) / b)[:, None]
    close(force, jnp.zeros_like(force), atol=1e-4)
    stiff = converged(COST, row_mass=A, column_mass=B, relaxation=1e5)
    close(stiff, converged(COST, row_mass=A, column_mass=B), atol=1e-4)


def test_little_regularisation_gives_the_best_matching():
    cost = jnp.array([[0.0, 3, 3], [3, 3, 0], [3, 0, 3]])
    plan = transport.sinkhorn_plan(cost, regularization=0.02, num_iterations=100)
    close(3 * plan, (cost == 0).astype(jnp.float32))


def test_masked_points_are_as_good_as_absent():
    rows, columns = jnp.arange(4) < 3, jnp.arange(5) < 2
    masks = {"row_mask": jnp.stack([rows] * 2), "column_mask": jnp.stack([columns] * 2)}
    plan = converged(COST, **masks)
    close(plan[:, :3, :2], converged(COST[:, :3, :2]))
    assert not jnp.any(plan[:, 3:])
    assert not jnp.any(plan[:, :, 2:])
    zero_mass = {"row_mass": jnp.stack([rows / 3.0] * 2), "column_mass": jnp.stack([columns / 2.0] * 2)}
    close(converged(COST, **zero_mass), plan)
    gradient = jax.grad(lambda c: jnp.sum(jnp.sin(converged(c, num_iterations=5, **masks))))(COST)
    assert jnp.all(jnp.isfinite(gradient))
    assert not jnp.any(gradient[:, 3:])
    nothing = converged(COST, row_mask=jnp.zeros((2, 4), bool))
    assert not jnp.any(nothing)


def test_the_plan_differentiates_through_its_iterations():
    few = partial(transport.sinkhorn_plan, num_iterations=4)

    def loss(cost, mass, regularization):
        return jnp.sum(WEIGHTS * few(cost, row_mass=mass, column_mass=B, regularization=regularization))

    check_grads(loss, (COST, A, jnp.float32(0.4)), 1, modes=["rev"], rtol=3e-2, atol=3e-3)


WEIGHTS = draw(2, 4, 5)


@pytest.mark.parametrize("relaxation", [None, 0.7])
def test_the_value_is_the_primal_one_and_its_gradient_that_of_the_envelope(relaxation):
    a = A if relaxation is None else 2 * A
    given = {"row_mass": a, "column_mass": B, "relaxation": relaxation}

    def primal(cost, regularization):
        plan = converged(cost, regularization=regularization, **given)
        total = jnp.sum(plan * cost + regularization * plan * (jnp.log(plan) - 1), (-2, -1))
        if relaxation is not None:
            for sums, mass in ((jnp.sum(plan, -1), a), (jnp.sum(plan, -2), B)):
                total = total + relaxation * jnp.sum(sums * jnp.log(sums / mass) - sums + mass, -1)
        return total

    value = partial(transport.sinkhorn_cost, num_iterations=200, **given)
    close(value(COST, regularization=0.3), primal(COST, 0.3))
    ours = jax.grad(lambda c: jnp.sum(value(c, regularization=0.3)))(COST)
    close(ours, converged(COST, **given))
    through = jax.grad(lambda c, e: jnp.sum(primal(c, e)), argnums=(0, 1))(COST, 0.3)
    close(ours, through[0], atol=1e-4)
    slope = jax.grad(lambda e: jnp.sum(value(COST, regularization=e)))(0.3)
    close(slope, through[1], rtol=1e-3)


def test_the_gradient_of_the_value_in_the_masses_is_the_potential():
    # Balanced potentials are known up to a constant: compare along a direction that keeps the total.
    def value(a):
        return jnp.sum(transport.sinkhorn_cost(COST, regularization=0.3, row_mass=a, column_mass=B, num_iterations=300))

    step = jnp.zeros((2, 4)).at[:, 0].set(1e-2).at[:, 1].set(-1e-2)
    ours = jnp.sum(jax.grad(value)(A) * step)
    close(ours, (value(A + step) - value(A - step)) / 2, rtol=2e-2, atol=1e-5)


# ---- events ----------------------------------------------------------------------------------------------------------

FRAMES, PITCHES = 12, 3
EVENTS = np.zeros((2, FRAMES, PITCHES), bool)
EVENTS[0, [2, 6, 9], 0] = True  # frame 4 is as far from two
EVENTS[0, 5, 2] = True
MASS = jnp.asarray(RANDOM.uniform(0, 0.6, size=(2, FRAMES, PITCHES)), jnp.float32).at[0, 5:8, 0].set(0.1)
events_loss = transport.event_transport_loss


def loss_by_loop(mass, events, cap=5.0, unit=None, mismatch=None, weight=1.0):
    unit, mismatch = (1 / cap if unit is None else unit), (10 * cap if mismatch is None else mismatch)
    losses = []
    for m, roll in zip(np.asarray(mass, np.float64), events, strict=True):
        targets = [tuple(place) for place in np.argwhere(roll)]
        moved, received = 0.0, dict.fromkeys(targets, 0.0)
        for t, f in np.ndindex(*m.shape):
            costs = [(min(abs(t - s), cap) if f == g else mismatch, abs(t - s), s, g) for s, g in targets]
            cost, _, s, g = min(costs) if costs else (mismatch, 0, -1, -1)
            moved += m[t, f] * cost * unit
            if g == f:
                received[s, g] += m[t, f]
        missing = sum(abs(x - 1) for x in received.values())
        losses.append((moved + weight * missing) / max(1, len(targets)))
    return np.array(losses)


@pytest.mark.parametrize("options", [{}, {"cap": 2.0, "unit": 1.0, "mismatch": 7.0}])
def test_event_loss_is_a_loop_over_all_targets(options):
    close(events_loss(MASS, jnp.asarray(EVENTS), **options), loss_by_loop(MASS, EVENTS, **options))


def test_event_loss_of_simple_predictions():
    events = jnp.asarray(EVENTS[:1])
    spikes = events.astype(jnp.float32)
    close(events_loss(spikes, events), jnp.zeros(1))
    close(events_loss(spikes.at[0, 5, 2].set(0.0), events), jnp.array([1 / 4]))
    late = spikes.at[0, 5, 2].set(0.0).at[0, 8, 2].set(1.0)
    close(events_loss(late, events), jnp.array([3 / 5 / 4]))
    far = spikes.at[0, 5, 2].set(0.0).at[0, 11, 2].set(1.0)
    close(events_loss(far, events), jnp.array([1 / 4]))
    split = spikes.at[0, 5, 2].set(0.5).at[0, 6, 2].set(0.5)
    close(events_loss(split, events), jnp.array([0.5 / 5 / 4]))
    silent = spikes.at[0, 3, 1].set(0.2)
    close(events_loss(silent, events), jnp.array([50 / 5 * 0.2 / 4]))


def test_event_loss_gradient_is_cost_less_what_is_missing():
    events = jnp.asarray(EVENTS)
    ours = jax.grad(lambda m: jnp.sum(events_loss(m, events)))(MASS)
    step = 1e-3
    for place in [(0, 4, 0), (0, 5, 0), (0, 5, 2), (0, 3, 1), (1, 0, 0)]:
        up, down = (loss_by_loop(MASS.at[place].add(s), EVENTS).sum() for s in (step, -step))
        close(ours[place], (up - down) / (2 * step), atol=1e-3)


# ---- every function: bfloat16, jit = eager, vmap ---------------------------------------------------------------------

SWEEP = {
    "normalize": (transport.sinkhorn_normalize, (COST,)),
    "plan": (partial(transport.sinkhorn_plan, regularization=0.5, num_iterations=5), (COST,)),
    "cost": (partial(transport.sinkhorn_cost, regularization=0.5, num_iterations=5, relaxation=1.0), (COST,)),
    "events": (partial(events_loss, events=jnp.asarray(EVENTS)), (MASS,)),
}


@pytest.mark.parametrize("name", SWEEP)
def test_bfloat16_eager_and_vmap(name):
    function, arguments = SWEEP[name]
    expected = function(*arguments)
    with jax.disable_jit():
        close(function(*arguments), expected)
    half = jax.vmap(function)(*jax.tree.map(lambda x: jnp.stack([x, x * 0.5]).astype(jnp.bfloat16), arguments))[0]
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), expected, rtol=0.05, atol=0.05)
