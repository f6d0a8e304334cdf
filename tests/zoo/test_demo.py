"""Papers whose claims are computed: that they hold, that a wrong one is noticed, and the `zoo demo` command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.trainers.test_cli import one_line, run
from trainers.demo import plot
from zoo.demo import Check, Findings, exponent

DEMOS = [e.slug for e in zoo.papers(status="works") if zoo.paper(e.slug).demo is not None]


@pytest.mark.parametrize("slug", DEMOS)
def test_every_claim_holds(slug):
    demo = zoo.paper(slug).demo
    assert "tiny" in demo.configs
    with jax.enable_x64(True):
        findings = demo.run(demo.configs["tiny"], jax.random.key(0))
    assert [check.claim for check in findings.checks if not check.holds] == []
    assert plot(findings.checks) is not None
    assert len({check.claim for check in findings.checks}) == len(findings.checks)


def test_a_claim_holds_between_its_bounds_and_nowhere_else():
    assert Check("", 1.0, 0.5, 1.5).holds
    assert Check("", [1.0, 2.0], 0.5, [1.0, 2.0]).holds
    assert not Check("", [1.0, 2.1], 0.5, [1.0, 2.0]).holds
    assert not Check("", 0.4, 0.5).holds
    assert not Check("", np.nan).holds
    assert not Findings((Check("", 1.0), Check("", 1.0, high=0.0))).holds
    assert exponent([1, 10, 100], [3.0, 0.3, 0.03]) == pytest.approx(-1.0)


class TestTheCommand:
    @pytest.fixture
    def claims(self):
        """Two claims instead of a paper's own; the second can be made to fail."""
        found = [Check("one", 1.0, 0.0, 2.0, 1.0), Check("two", [1.0, 2.0], 0.0, 3.0, over=("n", [10, 20]))]
        demo = zoo.paper("partition_of_unity").demo
        object.__setattr__(demo, "run", lambda config, key: Findings(tuple(found)))
        return found

    @pytest.fixture(autouse=True)
    def _restore(self):
        demo = zoo.paper("partition_of_unity").demo
        before = demo.run
        yield
        object.__setattr__(demo, "run", before)

    def test_prints_and_writes(self, claims, tmp_path, capsys):
        assert run("demo", "partition_of_unity", "--seed", "3", "--output", str(tmp_path)) == 0
        printed = capsys.readouterr().out
        assert "holds  one" in printed
        assert "measured 1 2; must lie in [0, 3]" in printed
        written = json.loads((tmp_path / "partition_of_unity.json").read_text())
        assert [row["holds"] for row in written] == [True, True]
        assert written[1]["over"] == {"name": "n", "sizes": [10.0, 20.0]}
        assert (tmp_path / "partition_of_unity-claims.png").stat().st_size > 1000

    def test_what_does_not_hold_is_said_and_written_and_fails(self, claims, tmp_path, capsys):
        claims[1] = Check("two", float("nan"), 0.0, float("inf"))
        assert run("demo", "partition_of_unity", "--output", str(tmp_path)) == 1
        output = capsys.readouterr()
        assert "FAILS  two" in output.out
        assert "partition_of_unity: 1 of 2 claims do not hold: two" in output.err
        assert json.loads((tmp_path / "partition_of_unity.json").read_text())[1]["measured"] == "nan"


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["demo"], "zoo demo needs the name of a paper, for example: zoo demo covariance_readout", 2),
        (["demo", "ister"], "ister has no demonstration: it is trained, with `zoo train ister`", 1),
        (["demo", "covariance_readot"], "no paper is called 'covariance_readot'; did you mean 'covariance_readout'", 1),
        (["demo", "covariance_readout", "--config", "crd"], "covariance_readout has no config 'crd'", 1),
        (["demo", "covariance_readout", "--seeed", "1"], "has no option --seeed; did you mean --seed", 2),
        (["train", "covariance_readout"], "covariance_readout has claims to compute and nothing to train: zoo demo", 1),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == code
    assert sentence in one_line(capsys.readouterr())
    assert not list(tmp_path.iterdir())


def test_a_paper_without_a_model_says_so():
    with pytest.raises(zoo.UserError, match="covariance_readout has claims to compute and no model: zoo demo"):
        zoo.create("covariance_readout")


# ---- what the demonstrations rest on, against something independent --------------------------------------------------


def test_the_pieces_of_a_context_are_read_as_a_whole():
    from zoo.theory.covariance_readout import read

    keys = jax.random.split(jax.random.key(0), 3)
    tilt, x, v = (jax.random.normal(k, (n, 3)) for k, n in zip(keys, (2, 37, 37), strict=True))
    expected = jax.nn.softmax(tilt @ x.T, axis=-1) @ v
    for chunk in (5, 37, 64):
        np.testing.assert_allclose(read(tilt, x, v, chunk=chunk), expected, rtol=1e-5, atol=1e-6)


def test_the_factor_of_the_sphere_is_that_of_quadrature():
    from zoo.theory.covariance_readout import elliptical_factor

    # In three dimensions a coordinate of the sphere is uniform: the tilted mean is one integral.
    for s in (0.3, 2.0):
        t = np.linspace(-1, 1, 200_001)
        radius, a = np.sqrt(3), np.sqrt(s)
        weights = np.exp(radius * a * t)
        mean = radius * np.trapezoid(weights * t, t) / np.trapezoid(weights, t)
        assert elliptical_factor(3, s) == pytest.approx(mean / a, rel=1e-6)


def test_the_velocity_is_the_gradient_of_the_energy_for_one_head():
    from zoo.theory.wasserstein_flow import energy, measure

    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (7, 3))
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    weights = jax.random.normal(keys[1], (4, 3, 3))
    weights = weights + jnp.swapaxes(weights, 1, 2)
    rotation = jnp.linalg.qr(jax.random.normal(keys[0], (3, 3)))[0]
    m = measure(x, weights, jnp.ones_like(weights))
    np.testing.assert_allclose(jnp.sum(m.velocity * x, axis=-1), 0.0, atol=1e-5)
    gradient = jax.grad(energy)(x, weights)
    np.testing.assert_allclose(m.exact_dissipation, jnp.sum(gradient * m.velocity), rtol=1e-4)
    turned = measure(x @ rotation.T, rotation @ weights @ rotation.T, jnp.ones_like(weights))
    np.testing.assert_allclose((turned.energy, turned.slope), (m.energy, m.slope), rtol=1e-4)
    # For one head slope and dissipation are the same number.
    alone = measure(x, weights[:1], weights[:1])
    np.testing.assert_allclose(alone.slope, alone.exact_dissipation, rtol=1e-4)


def test_the_noise_term_is_the_mean_change_of_energy():
    from zoo.theory.wasserstein_flow import energy, measure

    x = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    weights = jnp.array([[[0.3, 0.1], [0.1, -0.2]]])
    variance, dt = 2.0, 1e-3
    z = jax.random.normal(jax.random.key(0), (200_000, 1, 2, 2))
    kicks = jnp.sqrt(variance * dt) * (z + jnp.swapaxes(z, 2, 3)) / 2
    # With each kick its opposite, so that the first order is gone.
    changes = jax.vmap(lambda k: (energy(x, weights + k) + energy(x, weights - k)) / 2 - energy(x, weights))(kicks)
    rate = measure(x, weights, jnp.zeros_like(weights), variance).energy_rate
    assert float(jnp.mean(changes)) / dt == pytest.approx(float(rate), rel=0.05)


def test_a_partition_sums_to_one_keeps_constants_and_tends_to_the_nearest_centre():
    from zoo.theory.partition_of_unity import affine_logits, glue, grid_centres

    centres = grid_centres(5, 2)
    x = jax.random.uniform(jax.random.key(0), (50, 2))
    np.testing.assert_allclose(glue(x, centres, jnp.full(25, 3.0), 7.0), 3.0, rtol=1e-5)
    line = affine_logits(jnp.linspace(0, 1, 5)[:, None] * jnp.ones(2), centres, 2.0)
    np.testing.assert_allclose(jnp.diff(line, n=2, axis=0), 0.0, atol=1e-5)
    nearest = jnp.argmin(jnp.sum(jnp.square(x[:, None] - centres), axis=-1), axis=-1)
    values = jnp.arange(25.0)
    np.testing.assert_allclose(glue(x, centres, values, 1e6), values[nearest], atol=0.5)


def test_a_compressed_cache_answers_nearly_as_the_whole_one():
    import layers
    from zoo.theory.attention_coresets import compress_cache

    keys = jax.random.split(jax.random.key(0), 4)
    key, value, query = (jax.random.normal(k, (2, 128, 3, 4)) for k in keys[:3])
    key = 2 * key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    few = compress_cache(key, value, keys[3], rounds=1)
    assert few[0].shape == (2, 64, 3, 4)
    query = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    whole = layers.dot_product_attention(query, key, value, scale=1.0)
    kept = layers.dot_product_attention(query, *few, scale=1.0)
    dropped = layers.dot_product_attention(query, key[:, :64], value[:, :64], scale=1.0)
    assert jnp.max(jnp.abs(kept - whole)) < 0.7 * jnp.max(jnp.abs(dropped - whole))
    one = compress_cache(key[1:, :, 2:], value[1:, :, 2:], keys[3], rounds=0)
    np.testing.assert_array_equal(one[0], key[1:, :, 2:])


class TestTheCertificateOfDefinability:
    def test_jit_and_remat_change_nothing(self):
        from zoo.theory.ominimal import certify

        def f(x, w):
            return jax.nn.softmax(jnp.tanh(x @ w), axis=-1)

        x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
        plain = certify(f, x, w)
        assert plain.counts == {"tanh": 15, "exp": 15, "div": 3, "branches": plain.counts["branches"]}
        for other in (jax.jit(f), jax.checkpoint(f)):
            found = certify(other, x, w)
            assert (found.structure, found.counts, found.reasons) == (plain.structure, plain.counts, plain.reasons)

    def test_a_scan_is_its_steps(self):
        from zoo.theory.ominimal import certify

        def step(h, _):
            return jnp.exp(-jnp.square(h)), None

        looped = certify(lambda h: jax.lax.scan(step, h, length=3)[0], jnp.ones(4))
        unrolled = certify(lambda h: step(step(step(h, 0)[0], 0)[0], 0)[0], jnp.ones(4))
        assert looped.counts == unrolled.counts == {"exp": 12}
        assert looped.structure == unrolled.structure

    def test_what_is_not_definable_is_named(self):
        from zoo.theory.ominimal import Structure, certify

        x = jnp.ones(3)
        unbounded = certify(lambda x: jnp.sin(3 * x), x)
        assert (unbounded.structure, unbounded.reasons) == (Structure.NOT_DEFINABLE, {"sin of an unbounded argument"})
        assert certify(lambda x: jnp.round(x), x).reasons == {"round"}
        loop = certify(lambda x: jax.lax.while_loop(lambda v: v[0] < 9, lambda v: v * 2, x), x)
        assert loop.reasons == {"while"}
        # Fixed positions are constants, whatever is done to them; a bounded argument is what a restricted sine takes.
        assert certify(lambda x: x * jnp.sin(jnp.arange(3.0)), x).structure == Structure.SEMI_ALGEBRAIC
        assert certify(lambda x: jnp.sin(jnp.tanh(x) + 1), x).structure == Structure.RESTRICTED_ANALYTIC

    def test_the_bound_grows_with_everything_and_is_linear_without_a_chain(self):
        from zoo.theory.ominimal import sauer, vc_bound

        base = vc_bound(10, 5)
        assert all(base < larger for larger in (vc_bound(11, 5), vc_bound(10, 6), vc_bound(10, 5, degree=3)))
        assert base < vc_bound(10, 5, atoms=2)
        assert vc_bound(20, 0, degree=1, atoms=4) == 2 * vc_bound(10, 0, degree=1, atoms=4) == 20 * 20
        assert [sauer(4, v) for v in (0, 1, 2, 4, 9)] == [1, 5, 11, 16, 16]
