"""The train step against its parts by hand; microbatches change nothing, it compiles once, NaN changes nothing."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from rlhf_jax.training.optimizer import Optimizer
from rlhf_jax.training.step import init_state, make_train_step, split_batch


@struct.dataclass
class Batch:
    """Rows of a regression, a scalar that all rows share, and something static."""

    x: jax.Array
    y: jax.Array
    shift: jax.Array
    weights: jax.Array | None = None
    name: str = struct.field(pytree_node=False, default="train")


def with_weights(batch):
    # Uneven on purpose: a microbatch that normalised by itself would give another loss.
    mass = jnp.arange(1.0, batch.x.shape[0] + 1)
    return batch.replace(weights=mass / mass.sum())


def loss(params, batch, key):
    prediction = jnp.tanh(batch.x @ params["dense"]["kernel"] + params["dense"]["bias"])
    error = jnp.sum((prediction - batch.y) ** 2, axis=-1) + batch.shift
    value = jnp.sum(error * batch.weights)
    return value, {"mse": value, "worst_weight": jnp.sum(batch.weights**2)}


def make_batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, 3)), rng.normal(size=(rows, 2))
    return Batch(jnp.array(x, jnp.float32), jnp.array(y, jnp.float32), jnp.array(0.25))


def make_params():
    kernel = jax.random.normal(jax.random.key(1), (3, 2))
    return {"dense": {"kernel": kernel, "bias": jnp.zeros(2)}}


OPTIMIZER = Optimizer(0.1, weight_decay=0.01, schedule="linear").build(100)


def test_one_step_equals_the_parts_by_hand():
    params, batch, key = make_params(), make_batch(), jax.random.key(0)
    step = make_train_step(loss, OPTIMIZER, with_weights=with_weights, ema_decay=0.9)
    state, metrics = step(init_state(params, OPTIMIZER, ema=True), batch, key)

    weighted = with_weights(batch)
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, weighted, key)
    updates, _ = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
    expected = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-6)
    chex.assert_trees_all_close(state.ema, jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, params, expected), rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose([metrics["loss"], metrics["mse"]], [value, value], rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1, rtol=1e-6)
    assert metrics["nonfinite"] == 0 and state.step == 1


def test_the_number_of_microbatches_changes_nothing():
    results = []
    for count in (1, 2, 4, 8):
        step = make_train_step(loss, OPTIMIZER, with_weights=with_weights, microbatches=count)
        state = init_state(make_params(), OPTIMIZER)
        # The scalar of the batch is in every microbatch, under weights that add to one.
        for _ in range(3):
            state, metrics = step(state, make_batch(), jax.random.key(0))
        results.append((state, metrics))
    for other in results[1:]:
        chex.assert_trees_all_close(results[0], other, rtol=1e-6, atol=1e-6)


def test_microbatches_hold_each_row_once():
    split = split_batch({"x": jnp.arange(6), "none": None, "scalar": jnp.array(3)}, 2)
    np.testing.assert_array_equal(split["x"], [[0, 2, 4], [1, 3, 5]])
    assert split["none"] is None and split["scalar"] == 3


def test_microbatches_draw_different_keys():
    def noisy(params, batch, key):
        return jnp.sum(params["w"] * 0.0 + batch["weights"]), {"draw": jax.random.normal(key)}

    params = {"w": jnp.zeros(1)}
    key = jax.random.key(3)
    step = make_train_step(noisy, optax.sgd(0.1), microbatches=2)
    _, metrics = step(init_state(params, optax.sgd(0.1)), {"weights": jnp.ones(4) / 4}, key)
    expected = sum(jax.random.normal(jax.random.fold_in(key, i)) for i in range(2))
    np.testing.assert_allclose(metrics["draw"], expected, rtol=1e-6)
    assert "learning_rate" not in metrics


def test_it_is_traced_once_and_donates():
    traced = chex.assert_max_traces(loss, n=1)
    chex.clear_trace_counter()
    step = make_train_step(traced, OPTIMIZER, with_weights=with_weights, ema_decay=0.99)
    params = make_params()
    state = init_state(params, OPTIMIZER, ema=True)
    for i in range(4):
        before = state
        state, _ = step(state, make_batch(seed=i), jax.random.fold_in(jax.random.key(0), i))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert step._cache_size() == 1
    # What the state was made of is still there.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(microbatches, fault):
    def faulty(params, batch, key):
        value, metrics = loss(params, batch, key)
        if fault == "loss":
            return jnp.where(batch.shift > 1, jnp.inf, 1.0) * value, metrics
        # The value is 0, its gradient 0 * inf.
        zero = jnp.sqrt(jnp.where(batch.shift > 1, 0.0, 1.0) * params["dense"]["bias"][0] ** 2)
        return value + zero, metrics

    params = make_params()
    params["dense"]["bias"] += 0.5
    step = make_train_step(faulty, OPTIMIZER, with_weights=with_weights, microbatches=microbatches, ema_decay=0.9)
    state, metrics = step(init_state(params, OPTIMIZER, ema=True), make_batch(), jax.random.key(0))
    assert metrics["nonfinite"] == 0
    before = jax.device_get(state)
    state, metrics = step(state, make_batch().replace(shift=jnp.array(2.0)), jax.random.key(1))
    assert metrics["nonfinite"] == 1
    chex.assert_trees_all_equal(jax.device_get(state), before)
    state, metrics = step(state, make_batch(), jax.random.key(2))
    assert metrics["nonfinite"] == 0 and state.step == 2
    chex.assert_tree_all_finite(state)


def test_parameters_of_low_precision_keep_their_dtype():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    for count in (1, 2):
        step = make_train_step(loss, OPTIMIZER, with_weights=with_weights, microbatches=count, ema_decay=0.5)
        state = init_state(params, OPTIMIZER, ema=True)
        dtypes = jax.tree.map(jnp.dtype, state)
        for _ in range(2):
            state, _ = step(state, make_batch(), jax.random.key(0))
        assert jax.tree.map(jnp.dtype, state) == dtypes
        assert step._cache_size() == 1
        assert state.ema["dense"]["kernel"].dtype == jnp.float32


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="7 rows of a minibatch do not split into 2 equal microbatches"):
        split_batch({"x": jnp.zeros((7, 2))}, 2)
    with pytest.raises(ValueError, match=r"leading axes \[3, 4\]"):
        split_batch({"x": jnp.zeros(3), "y": jnp.zeros((4, 2))}, 1)
    with pytest.raises(ValueError, match="microbatches is 0; expected at least 1"):
        make_train_step(loss, OPTIMIZER, microbatches=0)
    with pytest.raises(ValueError, match="ema_decay is 1.0"):
        make_train_step(loss, OPTIMIZER, ema_decay=1.0)
    step = make_train_step(loss, OPTIMIZER, with_weights=with_weights, ema_decay=0.9)
    with pytest.raises(ValueError, match="ema_decay is 0.9, but the state was made with ema=False"):
        step(init_state(make_params(), OPTIMIZER), make_batch(), jax.random.key(0))
