"""The second-order meta-step in JAX: ``jit(grad(vmap(episode)))`` of a BERT as a function.

All parameters adapt. Its weights are those of the torch model, so that losses can be compared.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import BertForSequenceClassification

import fastmeta as fm
from bench.cases import LR


def jax_step(
    model: BertForSequenceClassification, batch: fm.TaskBatch, steps: int
) -> Callable[[], float]:
    """A compiled meta-step; the first call compiles.

    Raises:
        ImportError: JAX is not installed.
    """
    import jax
    import jax.numpy as jnp

    config = model.config
    heads, eps = config.num_attention_heads, config.layer_norm_eps
    weights = {n: jnp.asarray(p.detach().numpy()) for n, p in model.named_parameters()}

    def linear(w, name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(w, name, x):
        centred = x - x.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps)
        return centred * scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(w, name, x, bias):  # x [B, L, D], bias [B, 1, 1, L]
        q, k, v = (
            linear(w, f"{name}.self.{part}", x).reshape(*x.shape[:2], heads, -1)
            for part in ("query", "key", "value")
        )
        scores = jnp.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5 + bias
        mixed = jnp.einsum("bhlm,bmhd->blhd", jax.nn.softmax(scores, -1), v).reshape(x.shape)
        return norm(w, f"{name}.output.LayerNorm", linear(w, f"{name}.output.dense", mixed) + x)

    def loss_of(w, ids, mask, labels):
        table = "bert.embeddings"
        x = w[f"{table}.word_embeddings.weight"][ids]
        x = x + w[f"{table}.token_type_embeddings.weight"][0]
        x = x + w[f"{table}.position_embeddings.weight"][: ids.shape[1]]
        x = norm(w, f"{table}.LayerNorm", x)
        bias = jnp.where(mask[:, None, None, :] > 0, 0.0, jnp.finfo(jnp.float32).min)
        for i in range(config.num_hidden_layers):
            name = f"bert.encoder.layer.{i}"
            x = attention(w, f"{name}.attention", x, bias)
            wide = jax.nn.gelu(linear(w, f"{name}.intermediate.dense", x), approximate=False)
            x = norm(w, f"{name}.output.LayerNorm", linear(w, f"{name}.output.dense", wide) + x)
        pooled = jnp.tanh(linear(w, "bert.pooler.dense", x[:, 0]))
        chances = jax.nn.log_softmax(linear(w, "classifier", pooled), -1)
        return -jnp.take_along_axis(chances, labels[:, None], 1).mean()

    def episode(w, support, query):
        for _ in range(steps):
            gradients = jax.grad(loss_of)(w, *support)
            w = {n: p - LR * gradients[n] for n, p in w.items()}
        return loss_of(w, *query)

    def mean_loss(w, support, query):
        return jax.vmap(episode, in_axes=(None, 0, 0))(w, support, query).mean()

    meta_step = jax.jit(jax.value_and_grad(mean_loss))
    sets = [
        tuple(jnp.asarray(s[k].numpy()) for k in ("input_ids", "attention_mask", "labels"))
        for s in (batch.support, batch.query)
    ]

    def step() -> float:
        loss, _ = jax.block_until_ready(meta_step(weights, *sets))
        return float(loss)

    return step
