"""State vectors of a few qubits as recurrent memory: gates, circuits, unitary recurrence, observables.

A state of n qubits is a complex64 vector of 2^n amplitudes; qubit 0 is the most significant bit of the index.
"""

import itertools
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

__all__ = [
    "apply_cnot",
    "apply_gate",
    "encoding_layer",
    "entangling_layer",
    "pauli_z_expectations",
    "query_observables",
    "rotation_gate",
    "unitary_recurrence",
    "zero_state",
]


def zero_state(num_qubits: int) -> Complex[Array, " A"]:
    """|0...0>: amplitude 1 at index 0. Source: card qlam, Mechanism."""
    return jnp.zeros((2**num_qubits,), jnp.complex64).at[0].set(1.0)


@partial(jax.jit, static_argnames=("axis",))
def rotation_gate(angle: Float[Array, "*B"], *, axis: str) -> Complex[Array, "*B 2 2"]:
    """exp(-i angle P / 2) for P the Pauli matrix of `axis` "x", "y" or "z"; angles in radians.

    Source: card qlam, Mechanism 3.
    """
    half = angle.astype(jnp.float32) / 2
    cos, sin = jnp.cos(half), jnp.sin(half)
    zero = jnp.zeros_like(cos)
    entries = {
        "x": (cos, -1j * sin, -1j * sin, cos),
        "y": (cos, -sin, sin, cos),
        "z": (cos - 1j * sin, zero, zero, cos + 1j * sin),
    }
    if axis not in entries:
        raise ValueError(f"rotation_gate: axis {axis!r} is not one of x, y, z")
    flat = jnp.stack([jnp.asarray(entry, jnp.complex64) for entry in entries[axis]], axis=-1)
    return flat.reshape(*angle.shape, 2, 2)


def _qubits(state) -> int:
    count = state.shape[-1].bit_length() - 1
    if 2**count != state.shape[-1]:
        raise ValueError(f"a state of {state.shape[-1]} amplitudes is not one of whole qubits: use a power of 2")
    return count


@partial(jax.jit, static_argnames=("qubit",))
def apply_gate(state: Complex[Array, "*B A"], gate: Complex[Array, "*#B 2 2"], *, qubit: int) -> Complex[Array, "*B A"]:
    """U_qubit |state> for a 2 x 2 gate on one qubit; `gate` may have fewer leading axes than `state`.

    O(A). Source: card qlam, "Simulation".
    """
    count = _qubits(state)
    if not 0 <= qubit < count:
        raise ValueError(f"apply_gate: qubit {qubit} is not one of 0..{count - 1}")
    pairs = state.reshape(*state.shape[:-1], 2**qubit, 2, -1)
    return jnp.einsum("...ij,...ajb->...aib", gate, pairs).reshape(state.shape)


@lru_cache
def _cnot_order(count: int, control: int, target: int) -> np.ndarray:
    index = np.arange(2**count)
    return np.where(index >> (count - 1 - control) & 1, index ^ (1 << (count - 1 - target)), index)


@partial(jax.jit, static_argnames=("control", "target"))
def apply_cnot(state: Complex[Array, "*B A"], *, control: int, target: int) -> Complex[Array, "*B A"]:
    """|state> with qubit `target` flipped where qubit `control` is 1: a permutation of amplitudes.

    O(A). Source: card qlam, Mechanism 3.
    """
    count = _qubits(state)
    if control == target or not (0 <= control < count and 0 <= target < count):
        raise ValueError(
            f"apply_cnot: control {control} and target {target} are not two different qubits of 0..{count - 1}"
        )
    return state[..., _cnot_order(count, control, target)]


def _apply_each(state, gates):
    for qubit in range(_qubits(state)):
        state = apply_gate(state, gates[..., qubit, :, :], qubit=qubit)
    return state


@jax.jit
def encoding_layer(state: Complex[Array, "*B A"], angles: Float[Array, "*#B n 3"]) -> Complex[Array, "*B A"]:
    """prod_i RZ(a_i2) RY(a_i1) RX(a_i0) |state>: every qubit turned by its three angles, about x first.

    Source: card qlam, Mechanism 2.
    """
    x, y, z = (rotation_gate(angles[..., i], axis=axis) for i, axis in enumerate("xyz"))
    return _apply_each(state, z @ y @ x)


@jax.jit
def entangling_layer(state: Complex[Array, "*B A"], angles: Float[Array, "*#B n 3"]) -> Complex[Array, "*B A"]:
    """CNOT ring after RZ(a_i2) RY(a_i1) RZ(a_i0) on every qubit: control i, target i + 1 mod n, in order of i.

    Two qubits have a single CNOT, one qubit has none. Source: card qlam, Mechanism 3.
    """
    first, y, last = (rotation_gate(angles[..., i], axis=axis) for i, axis in enumerate("zyz"))
    state = _apply_each(state, last @ y @ first)
    return state[..., _ring_order(_qubits(state))]


@lru_cache
def _ring_order(count: int) -> np.ndarray:
    """The ring of CNOTs as one permutation of the amplitudes."""
    order = np.arange(2**count)
    for i in range(count if count > 2 else count - 1):
        order = order[_cnot_order(count, i, (i + 1) % count)]
    return order


@partial(jax.jit, static_argnames=("return_state", "renormalize_every"))
def unitary_recurrence(
    angles: Float[Array, "B L n 3"],
    weights: Float[Array, "R m 3"],
    *,
    encoding_scales: Float[Array, "R n 3"] | None = None,
    initial_state: Complex[Array, "B A"] | None = None,
    return_state: bool = False,
    renormalize_every: int = 128,
) -> Complex[Array, "B L A"] | tuple[Complex[Array, "B L A"], Complex[Array, "B A"]]:
    """|psi_t> = V_R ... V_1 E(angles_t) |psi_{t-1}>: a memory that every token turns and none can shrink.

    E is `encoding_layer`, V_r `entangling_layer` with `weights[r]`. With `encoding_scales` the token is encoded again
    before every V_r, its angles times `encoding_scales[r]` (data re-uploading). Every `renormalize_every` steps the
    rounding of the norm is undone. Starts from |0...0>. O(L R n 2^n). Source: card qlam, Mechanism.
    """
    batch, _, count, _ = angles.shape
    if weights.shape[1] != count:
        raise ValueError(f"unitary_recurrence: weights are for {weights.shape[1]} qubits, angles for {count}")
    state = jnp.broadcast_to(zero_state(count), (batch, 2**count)) if initial_state is None else initial_state

    def step(carry, token):
        state, index = carry
        if encoding_scales is None:
            state = encoding_layer(state, token)
        for layer in range(weights.shape[0]):
            if encoding_scales is not None:
                state = encoding_layer(state, token * encoding_scales[layer])
            state = entangling_layer(state, weights[layer])
        norm = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(state)), axis=-1, keepdims=True))
        state = jnp.where(index % renormalize_every == renormalize_every - 1, state / norm, state)
        return (state, index + 1), state

    rows = jnp.moveaxis(angles, 1, 0)
    (final, _), states = jax.lax.scan(jax.checkpoint(step), (state, jnp.zeros((), jnp.int32)), rows)
    states = jnp.moveaxis(states, 0, 1)
    return (states, final) if return_state else states


@lru_cache
def _signs(count: int) -> np.ndarray:
    """The values of Z_i and Z_i Z_j (i < j) at every basis state, (n + n(n-1)/2, 2^n)."""
    bits = np.arange(2**count) >> np.arange(count - 1, -1, -1)[:, None] & 1
    single = 1.0 - 2.0 * bits
    pairs = [single[i] * single[j] for i, j in itertools.combinations(range(count), 2)]
    return np.stack([*single, *pairs]).astype(np.float32)


@jax.jit
def pauli_z_expectations(state: Complex[Array, "*B A"]) -> Float[Array, "*B M"]:
    """<Z_0>, ..., <Z_{n-1}>, then <Z_i Z_j> for i < j: M = n + n (n - 1) / 2 numbers in [-1, 1].

    O(n^2 2^n). Source: card qlam, Mechanism 5.
    """
    return jnp.square(jnp.abs(state)) @ _signs(_qubits(state)).T


@jax.jit
def query_observables(state: Complex[Array, "*B A"], angles: Float[Array, "*B Q n"]) -> Float[Array, "*B Q M"]:
    """`pauli_z_expectations` after RY(angles_qi) on every qubit: what Q queries read off one state.

    Source: card qlam, Mechanism 5.
    """
    states = jnp.broadcast_to(state[..., None, :], (*angles.shape[:-1], state.shape[-1]))
    return pauli_z_expectations(_apply_each(states, rotation_gate(angles, axis="y")))
