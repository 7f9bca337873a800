"""The model is its reference: logits, every gradient, cached decoding, router losses and the count of parameters, against transformers.

Reference weights are random, saved by save_pretrained and loaded by hf.load; gradients are compared by the names that hf.save writes.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a1jax import params
from a1jax.models import decode, hf, hf_names, transformer
from a1jax.models.config import qwen3_5_35b_a3b

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
L, F = "linear_attention", "full_attention"


def sizes(d, heads, head_dim, rotary, linear, experts, widths, layers, vocab=61, conv=4, tied=False, **more):
    """Configuration of the reference. heads: query, key/value; linear: key heads, value heads, key dim, value dim; experts: all, active."""
    rope = {"rope_type": "default", "rope_theta": more.pop("theta", 1e4), "partial_rotary_factor": rotary, "mrope_section": [1, 1, 0]}
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    return dict(
        hidden_size=d, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim, rope_parameters=rope,
        **dict(zip(names, linear, strict=True)), num_experts=experts[0], num_experts_per_tok=experts[1], moe_intermediate_size=widths[0],
        shared_expert_intermediate_size=widths[1], layer_types=layers, num_hidden_layers=len(layers), vocab_size=vocab,
        linear_conv_kernel_dim=conv, tie_word_embeddings=tied, pad_token_id=None, **more,
    )  # fmt: skip


# name: (reference's configuration, fields of ours, tokens in a row, seed). The routers decide clearly with these seeds: see routed_clearly.
CASES = {
    "as published": (sizes(32, (4, 2), 16, 0.25, (2, 4, 8, 8), (8, 2), (12, 16), [L, L, L, F]), {}, 37, 0),
    "tied, two blocks": (
        sizes(24, (2, 1), 8, 0.5, (1, 3, 8, 12), (4, 1), (16, 8), [L, F] * 2, conv=3, tied=True), {"moe": "dense", "delta_chunk": 16},
        13, 0,
    ),
    "irregular, 64 experts": (
        sizes(32, (3, 3), 16, 0.75, (2, 2, 16, 4), (64, 8), (8, 8), [L, F, F], conv=2), {"delta_chunk": 32}, 65, 0,
    ),
    "attention only": (
        sizes(20, (6, 2), 8, 1.0, (1, 1, 4, 4), (16, 4), (8, 12), [F] * 3, tied=True), {"moe": "dense", "attention_chunk": 8}, 31, 0,
    ),
    "delta nets only": (sizes(32, (2, 2), 8, 0.5, (2, 2, 8, 16), (5, 3), (16, 16), [L] * 3, conv=5, vocab=33), {}, 131, 0),
    "wide heads, short row": (
        sizes(24, (8, 4), 10, 0.6, (3, 6, 4, 8), (32, 6), (6, 10), [L, L, F] * 2, theta=1e7), {"moe": "dense", "delta_chunk": 8}, 7, 0,
    ),
    "attention first, all experts": (
        sizes(16, (4, 1), 32, 0.25, (2, 8, 8, 4), (8, 8), (8, 4), [F, L], rms_norm_eps=1e-5), {"remat": "block"}, 64, 0,
    ),
}  # fmt: skip


class Case:
    """One reference model, saved and loaded, with its logits, router margins and gradients of loss()."""

    def __init__(self, reference, folder, name):
        config, changes, self.length, seed = CASES[name]
        torch, rng = reference.torch, np.random.default_rng(seed)
        model = reference.model(seed, **config)
        model.save_pretrained(folder)
        self.params, cfg = hf.load(folder)
        self.cfg, self.model = dataclasses.replace(cfg, **{"remat": "none", **changes}), model  # loaded for training, it compiles longer
        self.tokens = rng.integers(0, cfg.vocab_size, (2, self.length))
        self.weights = rng.standard_normal((2, self.length, cfg.vocab_size)).astype(np.float32)
        out = model(torch.tensor(self.tokens), output_router_logits=True, use_cache=False)
        loss = (torch.tensor(self.weights) * torch.sin(out.logits)).mean()
        loss.backward()
        self.logits, self.router = out.logits.detach().numpy(), [x.detach() for x in out.router_logits]
        self.gradients = {name: weight.grad.numpy() for name, weight in model.named_parameters()}

    @functools.cached_property
    def ours(self):
        """(logits, aux, gradients) of our model."""

        def loss(p):
            hidden, aux = transformer.apply(p, *self.row(), self.cfg)
            logits = transformer.head(p, hidden, self.cfg)
            return jnp.mean(jnp.asarray(self.weights) * jnp.sin(logits)), (logits, aux)

        (_, (logits, aux)), gradients = jit(jax.value_and_grad(loss, has_aux=True))(self.params)
        return logits, aux, gradients

    def row(self):
        positions = jnp.tile(jnp.arange(self.length, dtype=jnp.int32), (2, 1))
        return jnp.asarray(self.tokens, jnp.int32), positions, jnp.ones_like(positions)


@pytest.fixture(scope="module")
def case(reference, tmp_path_factory):
    return functools.cache(lambda name: Case(reference, tmp_path_factory.mktemp("reference"), name))


def routed_clearly(case):
    """Smallest distance, over tokens and layers, between the router logits of the last expert chosen and of the first that is not.

    A near tie would let rounding choose another expert, and then nothing after it is comparable.
    """
    active = case.cfg.num_experts_active
    if active == case.cfg.num_experts:
        return np.inf
    ordered = [np.sort(logits.numpy(), axis=-1)[:, ::-1] for logits in case.router]
    return min((layer[:, active - 1] - layer[:, active]).min() for layer in ordered)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_every_gradient(case, name):
    it = case(name)
    assert routed_clearly(it) > 1e-4

    logits, _, gradients = it.ours
    assert np.abs(logits - it.logits).max() <= 2e-4 and np.abs(it.logits).max() > 1

    leaves = hf_names.flat(gradients)
    pieces = hf_names.pieces(it.cfg)
    assert {piece.name for piece in pieces} == set(it.gradients)
    worst = 0.0
    for piece in pieces:
        part = np.asarray(leaves[piece.path])[tuple(slice(*pair) for pair in piece.box)]
        got, wanted = piece.oriented(part).reshape(piece.shape), it.gradients[piece.name]
        if it.cfg.num_experts_active == 1 and piece.name.endswith("mlp.gate.weight"):
            assert max(np.abs(got).max(), np.abs(wanted).max()) < 1e-8  # the weight of a single expert is 1 whatever the router says
            continue
        assert np.linalg.norm(wanted) > 1e-6, piece.name
        assert np.linalg.norm(got - wanted) <= 1e-3 * np.linalg.norm(wanted), piece.name
        assert np.abs(got - wanted).max() <= 1e-3 * np.abs(wanted).max(), piece.name
        worst = max(worst, np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    print(f"logits {np.abs(logits - it.logits).max():.1e}, gradients {worst:.1e}, margin {routed_clearly(it):.1e}")


@pytest.mark.parametrize("name", ["as published", "irregular, 64 experts"])
def test_decoding_with_a_cache(reference, case, name):
    """Our step against the reference with its own cache: eleven tokens at once, then one by one."""
    it, torch = case(name), reference.torch
    known = inspect.signature(inspect.unwrap(it.model.forward)).parameters
    argument = "cache" if "cache" in known else "past_key_values"  # its name from transformers 5.24 on
    with torch.no_grad():
        out = it.model(torch.tensor(it.tokens[:, :11]), use_cache=True)
        wanted = [out.logits]
        for t in range(11, it.length):
            out = it.model(torch.tensor(it.tokens[:, t : t + 1]), **{argument: out.past_key_values}, use_cache=True)
            wanted.append(out.logits)
    wanted = torch.log_softmax(torch.cat(wanted, dim=1), dim=-1).numpy()

    @functools.partial(jit, donate_argnums=1)
    def step(p, cache, tokens):
        hidden, cache = decode.step(p, cache, tokens, it.cfg, jnp.zeros(2, bool), jnp.ones(2, bool))
        return jax.nn.log_softmax(transformer.head(p, hidden, it.cfg)), cache

    cache, got = decode.init_cache(it.cfg, 2, it.length), []
    for t in range(it.length):
        logp, cache = step(it.params, cache, jnp.asarray(it.tokens[:, t], jnp.int32))
        got.append(logp)
    assert np.abs(np.stack(got, axis=1) - wanted).max() <= 2e-4


def test_router_losses(reference, case):
    """The load-balance loss of a layer is the reference's. Over layers ours is the mean of the layers' losses, while the reference
    first pools the layers' counts and probabilities, which lets one layer's imbalance hide behind another's."""
    it, loss = case("irregular, 64 experts"), reference.modeling.load_balancing_loss_func
    experts, active = it.cfg.num_experts, it.cfg.num_experts_active
    _, aux, _ = it.ours
    each = [float(loss((logits,), experts, active)) for logits in it.router]
    np.testing.assert_allclose(aux["router/load_balance"], np.mean(each), rtol=1e-5)
    assert float(loss(tuple(it.router), experts, active)) < 0.99 * np.mean(each)
    np.testing.assert_allclose(aux["loss"], it.cfg.load_balance_coef * np.mean(each), rtol=1e-5)

    z = np.mean([float((reference.torch.logsumexp(logits, dim=-1) ** 2).mean()) for logits in it.router])
    np.testing.assert_allclose(aux["router/z"], z, rtol=1e-5)


def test_router_loss_of_one_layer_with_padding(reference, tmp_path):
    torch = reference.torch
    model = reference.model(3, **sizes(16, (2, 1), 8, 0.5, (1, 2, 8, 8), (6, 2), (8, 8), [F], output_router_logits=True))
    model.save_pretrained(tmp_path / "one")
    weights, cfg = hf.load(tmp_path / "one")
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 19))
    real = np.arange(19)[None] < np.array([[19], [8]])
    with torch.no_grad():
        wanted = float(model(torch.tensor(tokens), attention_mask=torch.tensor(real, dtype=torch.long)).aux_loss)
    positions = jnp.tile(jnp.arange(19, dtype=jnp.int32), (2, 1))
    segments = jnp.asarray(real, jnp.int32)
    _, aux = jit(lambda p: transformer.apply(p, jnp.asarray(tokens, jnp.int32), positions, segments, cfg))(weights)
    np.testing.assert_allclose(aux["router/load_balance"], wanted, rtol=1e-5)


def test_the_published_model_has_the_references_count(reference):
    with reference.torch.device("meta"):
        model = reference.modeling.Qwen3_5MoeForCausalLM(reference.transformers.Qwen3_5MoeTextConfig())
    count = sum(weight.numel() for weight in model.parameters())
    assert params.count(transformer.specs(qwen3_5_35b_a3b())) == count == transformer.parameter_counts(qwen3_5_35b_a3b())[0]
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert shapes == {piece.name: piece.shape for piece in hf_names.pieces(qwen3_5_35b_a3b())}
