"""Signatures are checked while tests run: shapes and types that are wrong are noticed where they are passed."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import layers
from tests.signatures import check_signatures
from zoo.blocks import Linear


def test_a_wrong_rank_and_a_wrong_size_are_noticed():
    x = jnp.zeros((1, 4, 2, 8))
    layers.linear_attention(x, x, x)
    with pytest.raises(TypeCheckError, match="query"):
        layers.linear_attention(x[0], x, x)
    with pytest.raises(TypeCheckError, match="value"):
        layers.linear_attention(x, x, jnp.zeros((1, 5, 2, 8)))


def test_modules_of_flax_are_checked_too():
    with pytest.raises(TypeCheckError, match="x"):
        Linear(3).init(jax.random.key(0), jnp.zeros((2, 4), int))


def test_only_what_is_defined_by_a_module_is_decorated(tmp_path, monkeypatch):
    (tmp_path / "checked_module.py").write_text(
        "def outer(n: int):\n"
        "    def inner(m: int):\n"
        "        return m\n"
        "    return inner\n"
        "def bare(n):\n"
        "    return n\n"
        "class Thing:\n"
        "    def method(self, n: int) -> int:\n"
        "        return n\n"
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Sizes:\n"
        "    width: int = 1\n"
        "@dataclass(frozen=True)\n"
        "class More(Sizes):\n"
        "    part: str = ''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.meta_path", list(__import__("sys").meta_path))
    check_signatures(["checked_module"])
    module = __import__("checked_module")
    assert module.More(width=2, part="b").part == "b"
    for wrong in (
        lambda: module.outer("a"),
        lambda: module.Thing().method("a"),
        lambda: module.Sizes(width="a"),
        lambda: module.More(part=2),
    ):
        with pytest.raises(TypeCheckError):
            wrong()
    assert module.outer(1)("a") == "a"
    assert module.bare("a") == "a"
