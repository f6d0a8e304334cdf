"""The certificate of definability, and the bounds that follow."""

import jax
import jax.numpy as jnp

from zoo.theory.ominimal import Structure, certify, sauer, vc_bound


class TestTheCertificateOfDefinability:
    def test_jit_and_remat_change_nothing(self):
        def f(x, w):
            return jax.nn.softmax(jnp.tanh(x @ w), axis=-1)

        x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
        plain = certify(f, x, w)
        assert plain.counts == {"tanh": 15, "exp": 15, "div": 3, "branches": plain.counts["branches"]}
        for other in (jax.jit(f), jax.checkpoint(f)):
            found = certify(other, x, w)
            assert (found.structure, found.counts, found.reasons) == (plain.structure, plain.counts, plain.reasons)

    def test_a_scan_is_its_steps(self):
        def step(h, _):
            return jnp.exp(-jnp.square(h)), None

        looped = certify(lambda h: jax.lax.scan(step, h, length=3)[0], jnp.ones(4))
        unrolled = certify(lambda h: step(step(step(h, 0)[0], 0)[0], 0)[0], jnp.ones(4))
        assert looped.counts == unrolled.counts == {"exp": 12}
        assert looped.structure == unrolled.structure

    def test_what_is_not_definable_is_named(self):
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
        base = vc_bound(10, 5)
        assert all(base < larger for larger in (vc_bound(11, 5), vc_bound(10, 6), vc_bound(10, 5, degree=3)))
        assert base < vc_bound(10, 5, atoms=2)
        assert vc_bound(20, 0, degree=1, atoms=4) == 2 * vc_bound(10, 0, degree=1, atoms=4) == 20 * 20
        assert [sauer(4, v) for v in (0, 1, 2, 4, 9)] == [1, 5, 11, 16, 16]
