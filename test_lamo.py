"""Tests of lamo.py and eval.py. Each compares with something independent of what it guards: numbers recorded from the
authors' code, transformers, a plain loop, one environment at a time.
"""

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, GPT2TokenizerFast

import eval as evaluation
import lamo
from eval import Environments
from lamo import GPT2, Config, InputError, LaMo, LoRALinear, Text, Trajectories

HERE = Path(__file__).resolve().parent
AUTHORS = np.load(HERE / "results" / "authors.npz")
HISTORY = "returns_to_go", "states", "actions", "timesteps"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, on what our datasets leave unsaid


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No test sees the user's caches, the network or, unless it names it, a GPU, or leaves a signal handler behind."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(lamo, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: 1 / 0))
    monkeypatch.setattr(lamo.signal, "signal", lambda *_: None)
    monkeypatch.setattr(Config, "__init__", functools.partialmethod(Config.__init__, device="cpu"))  # not a GPU


# ---------------------------------------------------------------------------- the authors' code
def recorded(name):
    return torch.from_numpy(AUTHORS[name])


@pytest.fixture(scope="module")
def authors_lm(tmp_path_factory):
    """The folder of the authors' language model, as a GPT-2 checkpoint."""
    folder = tmp_path_factory.mktemp("authors")
    shape = {"vocab_size": 48, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | shape))
    weights = {name.removeprefix("lm/"): recorded(name) for name in AUTHORS.files if name.startswith("lm/")}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def authors_lamo(authors_lm):
    """The authors' tiny LaMo: ours with their weights. Dropout is 0, as where they recorded training steps."""
    gpt2 = GPT2.from_pretrained(authors_lm, dropout=0.0)
    gpt2.add_lora(rank=16, alpha=32, dropout=0.0)
    states = [AUTHORS["state_mean"], AUTHORS["state_std"]]
    model = LaMo(gpt2, "mlp", 6, 20, 1000.0, torch.tensor(np.array(states)), [[-1.0, -1.0], [1.0, 1.0]])
    theirs = {name.removeprefix("lamo/"): recorded(name) for name in AUTHORS.files if name.startswith("lamo/")}
    ours = {}
    for name, weight in theirs.items():
        if "lora_" in name:  # rows of q, then of k, then of v
            weight = weight.view(3, 16, 16)
        name = name.replace("lora_", "").replace("predict_action.fc1", "action_head.0")
        name = name.replace("predict_action.fc2", "action_head.2").replace("fc1", "input").replace("fc2", "residual")
        ours[f"gpt2.{name}" if name.startswith("h.") else name] = weight
    absent, unexpected = model.load_state_dict(ours, strict=False)
    buffers = {"return_scale", "state_mean", "state_std", "action_center", "action_radius"}
    assert not unexpected and all(name.startswith("gpt2.") or name in buffers for name in absent)
    model.gpt2.wpe.weight.data.zero_()  # the authors take the language loss without positions
    return model


def authors_windows(model, where):
    """A recorded batch of windows, in the environment's units, as Trajectories.batch gives it."""
    states = recorded(f"{where}/states_normalised").double()
    states = states * recorded("state_std").double() + recorded("state_mean").double()
    dtype = model.state_mean.dtype
    return {
        "states": states.to(dtype),
        "actions": recorded(f"{where}/actions").to(dtype),
        "returns_to_go": (recorded(f"{where}/returns_to_go_scaled").double() * 1000).to(dtype),
        "timesteps": recorded(f"{where}/timesteps"),
        "mask": torch.arange(6) < recorded(f"{where}/length").unsqueeze(1),
    }


def test_predictions_and_losses_equal_the_authors(authors_lamo):
    model = authors_lamo.eval()
    batch = authors_windows(model, "batch")
    with torch.no_grad():
        predicted = model.predict(*(batch[name] for name in HISTORY))
        real = batch["mask"]
        torch.testing.assert_close(predicted[real], recorded("batch/predicted")[real], atol=2e-6, rtol=0)
        assert model.action_loss(batch).item() == pytest.approx(AUTHORS["batch/action_loss"].item(), abs=1e-6)
        language_loss = model.language_loss(recorded("text")[:2])
        assert language_loss.item() == pytest.approx(AUTHORS["text/loss_without_positions"].item(), abs=1e-6)


def test_actions_equal_the_authors_after_each_step(authors_lamo):
    model = authors_lamo.eval()
    for t in range(1, 10):
        first = max(0, t - 6)
        history = [torch.zeros(6), torch.zeros(6, 3), torch.zeros(6, 2), torch.zeros(6, dtype=torch.long)]
        history[0][: t - first] = recorded("history/returns_to_go_scaled")[first:t] * 1000
        history[1][: t - first] = recorded("history/states")[first:t]
        history[2][: t - first] = recorded("history/actions")[first:t]
        history[3][: t - first] = torch.arange(first, t)
        action = model.act(*(part.unsqueeze(0) for part in history), torch.tensor([t - first]))[0]
        np.testing.assert_allclose(action, AUTHORS["history/action_after_t_steps"][t - 1], atol=2e-6, rtol=0)


def test_training_steps_equal_the_authors_in_float64(authors_lamo):
    model = authors_lamo.double().train()
    config = replace(Config(), lr=0.01, warmup=2, steps=4, weight_decay=1e-5, grad_clip=0.25, lang_coef=0.1)
    optimizer = lamo.make_optimizer(model, config)
    for step in range(4):
        trajectories = SimpleNamespace(batch=lambda size, context, step=step: authors_windows(model, f"step{step}"))
        text = SimpleNamespace(batch=lambda size, step=step: recorded("text")[2 * step : 2 * step + 2])
        values = lamo.training_step(model, optimizer, trajectories, text, step, config)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(AUTHORS["training/lr"][step])
        loss = values["action_loss"] + 0.1 * values["language_loss"]
        assert loss == pytest.approx(AUTHORS["training/loss_action_plus_0.1_language"][step], abs=1e-12)
    trained = {
        "embed_state.fc1.weight": model.embed_state.input.weight,
        "predict_action.fc2.bias": model.action_head[2].bias,
        "h.1.attn.c_attn.lora_B": model.gpt2.h[1].attn.c_attn.B.flatten(0, 1),
        "h.0.attn.c_attn.bias": model.gpt2.h[0].attn.c_attn.bias,
        "embed_ln.weight": model.embed_ln.weight,
    }
    for name, weight in trained.items():
        np.testing.assert_allclose(weight.detach(), AUTHORS[f"trained/{name}"], atol=1e-11, rtol=0, err_msg=name)


# ---------------------------------------------------------------------------- GPT-2
def tiny_config(**changes):
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    shape = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2Config(**dropouts | shape | changes)


def shaken(model, amount=0.1):
    """The model with noise on all of its weights, also on biases and LayerNorms."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model


WORDS = "the policy takes an action and the environment gives a reward ; the state of the leg is a vector . "


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory):
    """A GPT-2 with saved weights and a tokenizer, in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([WORDS], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    shaken(GPT2LMHeadModel(tiny_config(initializer_range=0.3))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bf16, least, most", [(False, 0, 1e-4), (True, 0.01, 1)])
def test_logits_equal_transformers(bf16, least, most, lm_folder):
    theirs, ours = GPT2LMHeadModel.from_pretrained(lm_folder).eval(), GPT2.from_pretrained(lm_folder, bf16=bf16).eval()
    tokens = torch.randint(300, (3, 64))
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours.hidden(tokens) @ ours.wte.weight.T
        torch.testing.assert_close(logits, expected, atol=most, rtol=0)
    assert (logits - expected).abs().max() >= least and expected.std() > 0.5 and ours.drop.p == 0.1


def test_random_weights_start_as_transformers_do():
    ours, theirs = GPT2(3000, 500, 64, 8, 2), GPT2Model(tiny_config(n_embd=64, n_layer=8))
    for name, parameter in ours.named_parameters():
        reference = theirs.get_parameter(name)
        assert parameter.mean().item() == pytest.approx(reference.mean().item(), abs=0.001), name
        assert parameter.std().item() == pytest.approx(reference.std().item(), rel=0.1, abs=1e-6), name


def test_language_loss_equals_transformers(lm_folder):
    theirs = GPT2LMHeadModel.from_pretrained(lm_folder).eval()
    model = LaMo(GPT2.from_pretrained(lm_folder), "mlp", 5, 10, 1.0, [[0.0], [1.0]], [[-1.0], [1.0]]).eval()
    tokens = torch.randint(300, (20, 50))  # several chunks
    expected = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(model.language_loss(tokens), expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    model.language_loss(tokens).backward()
    ours = model.gpt2.h[1].mlp.c_fc.weight.grad
    torch.testing.assert_close(ours, theirs.transformer.h[1].mlp.c_fc.weight.grad.T, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------- LoRA
def test_lora_follows_the_formula_and_starts_as_the_original():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(16, 48), torch.randn(5, 7, 16)
    lora = LoRALinear(linear, rank=4, alpha=8, dropout=0.0)
    assert torch.equal(lora(x), linear(x))
    torch.nn.init.normal_(lora.B)
    with torch.no_grad():
        parts = [2.0 * x @ A.T @ B.T for A, B in zip(lora.A, lora.B)]  # alpha / r = 2; a pair each for q, k and v
        expected = linear(x) + torch.cat(parts, dim=-1)
        torch.testing.assert_close(lora(x), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(lora.eval()(x), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(lora.train()(x[0]), expected[0], atol=1e-5, rtol=0)
    lora = LoRALinear(torch.nn.Linear(400, 1200), rank=16, alpha=8, dropout=0.0)
    assert lora.A.shape == (3, 16, 400) and lora.B.shape == (3, 400, 16) and not lora.B.any()
    bound = math.sqrt(1 / 400)  # Kaiming-uniform with a = sqrt(5), as torch.nn.Linear and loralib start
    assert 0.99 * bound < lora.A.abs().max() <= bound
    assert lora.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_trainable_share_of_gpt2_small():
    with torch.device("meta"):
        gpt2 = GPT2()
        assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808  # as published
        gpt2.add_lora(16, 32.0, 0.1)
    assert sum(p.numel() for p in gpt2.parameters() if p.requires_grad) == 12 * (3 * 16 * (768 + 768) + 3 * 768)
    assert gpt2.drop.p == gpt2.h[0].mlp.dropout.p == 0.1


# ---------------------------------------------------------------------------- LaMo, beside an independent one
BOUNDS = [[-1.0, -2.0], [1.0, 4.0]]
DROPOUT = {"dropout": 0.3, "lora_dropout": 0.2}


def tiny_lamo(embed="mlp", lora=True, S=3, bounds=BOUNDS, max_timesteps=100, dropout=0.0, lora_dropout=0.0):
    torch.manual_seed(0)
    gpt2 = GPT2(300, 64, 32, 2, 4, dropout)
    if lora:
        gpt2.add_lora(4, 12.0, lora_dropout)
    model = LaMo(gpt2, embed, 5, max_timesteps, 10.0, [torch.randn(S).tolist(), (torch.rand(S) + 0.5).tolist()], bounds)
    return shaken(model, 0.2)


class Reference(torch.nn.Module):
    """A Decision Transformer by the book: transformers' GPT2Model around the weights of a LaMo, one step at a time."""

    def __init__(self, lamo, dropout=0.0, lora_dropout=0.0):
        super().__init__()
        dropouts = {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
        self.lamo, self.lora_dropout = lamo, lora_dropout
        self.gpt2 = GPT2Model(tiny_config(**dropouts, attn_implementation="eager"))
        weights = {name: weight for name, weight in lamo.gpt2.state_dict().items() if not name.endswith((".A", ".B"))}
        for name, weight in weights.items():
            weights[name] = weight.T if ("c_" in name and weight.dim() == 2) else weight
        self.gpt2.load_state_dict(weights)
        self.gpt2.wpe.weight.data.zero_()  # the timestep embedding tells the time
        for ours, theirs in zip(lamo.gpt2.h, self.gpt2.h):
            theirs.attn.c_attn.register_forward_hook(lambda _, x, y, lora=ours.attn.c_attn: self.adapt(lora, x[0], y))

    def adapt(self, lora, x, y):
        if not isinstance(lora, LoRALinear):
            return y
        x = F.dropout(x, self.lora_dropout, self.training)
        return y + torch.cat([12.0 / 4 * (x @ lora.A[i].T @ lora.B[i].T) for i in range(3)], dim=-1)

    def mlp(self, embedder, x):
        if isinstance(embedder, torch.nn.Linear):
            return embedder.weight @ x + embedder.bias
        h = embedder.input.weight @ x + embedder.input.bias
        gelu = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        return h + embedder.residual.weight @ gelu + embedder.residual.bias

    def forward(self, returns_to_go, states, actions, timesteps):
        """One window without padding: (k,), (k, S), (k, A), (k,) -> predicted actions (k, A), in [-1, 1]."""
        lamo, tokens = self.lamo, []
        low, high = torch.tensor(BOUNDS)
        for R, s, a, t in zip(returns_to_go, states, actions, timesteps):
            inputs = R.view(1) / 10.0, (s - lamo.state_mean) / lamo.state_std, 2 * (a - low) / (high - low) - 1
            for embedder, x in zip((lamo.embed_return, lamo.embed_state, lamo.embed_action), inputs):
                token = self.mlp(embedder, x)
                token = (token - token.mean()) / torch.sqrt(token.var(correction=0) + 1e-5)
                token = token * lamo.embed_ln.weight + lamo.embed_ln.bias
                tokens.append(token + lamo.embed_timestep.weight[t])
        hidden = self.gpt2(inputs_embeds=torch.stack(tokens).unsqueeze(0)).last_hidden_state[0]
        first, last = lamo.action_head[0], lamo.action_head[-1]
        predicted = []
        for h in hidden[1::3]:
            if isinstance(last, torch.nn.Tanh):
                predicted.append(torch.tanh(first.weight @ h + first.bias))
            else:
                h = first.weight @ h + first.bias
                gelu = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
                predicted.append(last.weight @ gelu + last.bias)
        return torch.stack(predicted)

    def action_loss(self, batch):
        """Over the real steps of a batch, one by one."""
        low, high = torch.tensor(BOUNDS)
        errors = []
        for b, length in enumerate(batch["mask"].sum(dim=1).tolist()):
            predicted = self(*(batch[name][b, :length] for name in HISTORY))
            for k in range(length):
                target = 2 * (batch["actions"][b, k] - low) / (high - low) - 1
                errors.append(((predicted[k] - target) ** 2).mean())
        return torch.stack(errors).mean()


def some_trajectories(lengths=(7, 1, 12, 30), S=3, A=2):
    rng = np.random.default_rng(0)
    return (
        [rng.normal(size=(n, S)) for n in lengths],
        [rng.uniform(-1, 4, size=(n, A)) for n in lengths],
        [rng.normal(size=n) * 10 for n in lengths],
    )


def a_batch(size=8, seed=0):
    torch.manual_seed(seed)
    return Trajectories(*some_trajectories()).batch(size, 5)


VARIANTS = [{"embed": "mlp", "lora": True}, {"embed": "linear", "lora": False}, {"embed": "mlp", "lora": False}]


@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_equal_an_independent_decision_transformer(variant):
    model = tiny_lamo(**variant).eval()
    reference, batch = Reference(model).eval(), a_batch()
    assert not batch["mask"].all()  # padded windows, too
    with torch.no_grad():
        predicted = model.predict(*(batch[name] for name in HISTORY))
        for b, length in enumerate(batch["mask"].sum(dim=1).tolist()):
            window = [batch[name][b, :length] for name in HISTORY]
            torch.testing.assert_close(predicted[b, :length], reference(*window), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.action_loss(batch), reference.action_loss(batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_actions_are_clamped_and_in_the_environments_units(variant):
    model = tiny_lamo(**variant).eval()
    model.action_head[0 if variant["embed"] == "linear" else 2].weight.data.mul_(2)  # predictions beyond the bounds
    reference, batch = Reference(model).eval(), a_batch(40)
    lengths = batch["mask"].sum(dim=1)
    history = [batch[name] for name in HISTORY]
    acts = model.act(*history, lengths)
    low, high = torch.tensor(BOUNDS)
    beyond = 0
    with torch.no_grad():
        for b, length in enumerate(lengths.tolist()):
            last = reference(*(part[b, :length] for part in history))[-1]
            beyond += (last.abs() > 1).any()
            expected = low + (high - low) * (last.clamp(-1, 1) + 1) / 2
            torch.testing.assert_close(acts[b], expected, atol=1e-4, rtol=1e-4)
    assert (beyond > 5) == (variant["embed"] == "mlp")  # tanh stays within
    unknown = [part.clone() for part in history]
    unknown[2][torch.arange(40), lengths - 1] = 100.0  # the action that is asked for
    assert torch.equal(model.act(*unknown, lengths), acts)


def smooth_dropout(x, p=0.5, training=True, inplace=False):
    """Stands in for dropout: nothing random, so that two models that drop in the same places agree."""
    return x * (1 + p * torch.sin(5 * x)) if training else x


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = attn_mask if attn_mask is not None else torch.ones(scores.shape[-2:]).tril().bool()
    scores = scores.masked_fill(~mask, -math.inf)
    return smooth_dropout(scores.softmax(dim=-1), dropout_p) @ v


def test_dropouts_sit_where_transformers_and_lora_have_them(monkeypatch):
    monkeypatch.setattr(F, "dropout", smooth_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    model = tiny_lamo(**DROPOUT).train()
    reference, batch = Reference(model, **DROPOUT).train(), a_batch()
    dropped = model.action_loss(batch)
    torch.testing.assert_close(dropped, reference.action_loss(batch), atol=1e-4, rtol=1e-4)
    assert abs(dropped - model.eval().action_loss(batch)) > 1e-3  # and nowhere in evaluation
    torch.testing.assert_close(model.action_loss(batch), reference.eval().action_loss(batch), atol=1e-4, rtol=1e-4)


def test_attention_with_dropout_on_a_cpu_is_causal_attention():
    torch.manual_seed(0)
    attention, x = lamo.Attention(32, 4, 1e-9).train(), torch.randn(2, 300, 32)  # three strips, nothing dropped
    torch.testing.assert_close(attention(x, ...), attention.eval()(x, ...))


@pytest.mark.parametrize("method", lamo.METHODS)
def test_gradients_reach_exactly_what_trains(lm_folder, method):
    preset = lamo.METHODS[method] | ({"lm": str(lm_folder)} if method != "dt" else {})
    config = replace(Config(), context=5, device="cpu", batch=8, text_block=64, **preset)
    arguments = {"max_timesteps": 50, "return_scale": 1.0, "state_stats": torch.ones(2, 3), "action_bounds": BOUNDS}
    model = lamo.build_model(config, arguments)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)  # at zero, no gradient would reach A
    tokens = np.random.default_rng(0).integers(300, size=2000)
    optimizer, text = lamo.make_optimizer(model, config), Text(tokens, tokens, 64) if config.lang_coef else None
    losses = lamo.training_step(model, optimizer, Trajectories(*some_trajectories()), text, 0, config)
    assert ("language_loss" in losses) == (method != "dt")
    for name, parameter in model.named_parameters():
        adapted = not name.startswith("gpt2.") or name.endswith(("c_attn.A", "c_attn.B", "c_attn.bias"))
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == ((adapted or method != "lamo") and parameter.numel() > 0), name
    if method == "dt":
        assert len(model.gpt2.h) == 3 and len(model.gpt2.ln_f.weight) == 128 and model.gpt2.h[0].attn.n_head == 1


# ---------------------------------------------------------------------------- trajectories
HOPPER = HERE / "demo" / "lamo" / "hopper" / "demo-v0" / "data"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 8))
def test_windows_equal_a_brute_force_loop(lengths, context):
    observations, actions, rewards = some_trajectories(lengths)
    trajectories, rows = Trajectories(observations, actions, rewards), np.concatenate(observations)
    np.testing.assert_allclose(trajectories.state_mean, rows.mean(0))
    spread = np.sqrt(((rows - rows.mean(0)) ** 2).mean(0))
    np.testing.assert_allclose(trajectories.state_std, spread + 1e-6 if len(rows) > 1 else [1] * 3)
    assert trajectories.lengths.tolist() == lengths
    np.testing.assert_allclose(trajectories.returns, [sum(reward) for reward in rewards])
    torch.manual_seed(0)
    batch = trajectories.batch(60, context)
    starts = {float(o[0]): (i, t) for i, part in enumerate(observations) for t, o in enumerate(part.astype(np.float32))}
    assert batch["timesteps"].dtype == torch.int64
    for b in range(60):
        i, t = starts[float(batch["states"][b, 0, 0])]
        real = min(context, len(rewards[i]) - t)
        assert batch["mask"][b].tolist() == [True] * real + [False] * (context - real)
        for k in range(context):
            step = min(t + k, len(rewards[i]) - 1)  # the last step fills the rest
            np.testing.assert_allclose(batch["states"][b, k], observations[i][step], rtol=1e-6)
            np.testing.assert_allclose(batch["actions"][b, k], actions[i][step], rtol=1e-6)
            assert batch["timesteps"][b, k] == step
            expected = sum(rewards[i][j] for j in range(step, len(rewards[i])))
            np.testing.assert_allclose(batch["returns_to_go"][b, k], expected, rtol=1e-4, atol=1e-4)


def test_starts_are_uniform_over_steps():
    trajectories = Trajectories(*some_trajectories())
    first = []
    for seed in range(50):  # each training step has a seed of its own
        torch.manual_seed(seed)
        first.append(trajectories.batch(1000, 1)["states"][:, 0, 0])
    _, counts = torch.unique(torch.cat(first), return_counts=True)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert len(counts) == 50 and 23 < chi_square < 86  # 99.9 % of a chi-square with 49 degrees of freedom


def test_minari_share_is_seeded_and_whole():
    dataset = minari.MinariDataset(HOPPER)
    some = Trajectories.from_minari(dataset, 0.1, seed=0)
    assert len(some.returns) == int(0.1 * dataset.total_episodes)
    assert np.array_equal(some.returns, Trajectories.from_minari(dataset, 0.1, seed=0).returns)
    assert not np.array_equal(some.returns, Trajectories.from_minari(dataset, 0.1, seed=1).returns)
    assert len(np.unique(some.returns)) == len(some.returns)  # without replacement
    first = some.returns_to_go[: some.lengths[0]]
    assert first[0].item() == pytest.approx(some.returns[0]) and first[-1] < first[0]  # not delayed
    every = Trajectories.from_minari(dataset, 1.0, seed=0)
    np.testing.assert_allclose(every.returns, [e.rewards.astype(np.float64).sum() for e in dataset], rtol=1e-6)
    assert torch.equal(every.states, torch.from_numpy(np.concatenate([e.observations[:-1] for e in dataset])))
    assert len(Trajectories.from_minari(dataset, 1 / dataset.total_episodes, 0).returns) == 1
    with pytest.raises(InputError, match="of 183 trajectories is none"):
        Trajectories.from_minari(dataset, 0.005, 0)
    plain, delayed = (Trajectories.from_minari(dataset, 0.05, 0, delayed) for delayed in (False, True))
    np.testing.assert_allclose(plain.returns, delayed.returns)
    assert torch.equal(plain.states, delayed.states) and not torch.equal(plain.returns_to_go, delayed.returns_to_go)
    first = 0
    for length, total in zip(plain.lengths, plain.returns):
        np.testing.assert_allclose(delayed.returns_to_go[first : first + length], total, rtol=1e-5)
        first += length


def test_infinite_and_constant_dimensions_give_finite_actions():
    observations, actions, rewards = some_trajectories()
    for part in observations:
        part[:, 0], part[:, 1] = np.inf, 1e6
    observations[2][3, 2] = -np.inf
    trajectories = Trajectories(observations, actions, rewards)
    assert trajectories.state_mean[:2].tolist() == [0, 1e6] and trajectories.state_std[:2].tolist() == [1, 1]
    rest = np.concatenate(observations)[:, 2]
    assert trajectories.state_std[2] == pytest.approx(rest[np.isfinite(rest)].std() + 1e-6)
    model = tiny_lamo()
    model.state_mean, model.state_std = torch.tensor(
        np.array([trajectories.state_mean, trajectories.state_std])
    ).float()
    batch = trajectories.batch(64, 5)
    loss = model.action_loss(batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    finite = torch.where(batch["states"].isfinite(), batch["states"], model.state_mean)
    assert loss == model.action_loss(batch | {"states": finite})  # an infinite entry counts as the mean
    batch["states"][0, 2, 1] = math.nan  # what is no number is not hidden
    inputs = [batch[name] for name in HISTORY]
    assert model.eval().predict(*inputs)[0, 2].isnan().all()
    rewards[0][2] = math.nan
    with pytest.raises(InputError, match="NaN"):
        Trajectories(observations, actions, rewards)


# ---------------------------------------------------------------------------- text
def test_text_is_cropped_and_held_out(tmp_path, lm_folder):
    (tmp_path / "words.txt").write_text((WORDS + "\n") * 200)
    text = lamo.load_text(str(lm_folder), str(tmp_path / "words.txt"), 16)
    whole = np.concatenate([text.tokens, text.held_out])
    assert Tokenizer.from_file(str(lm_folder / "tokenizer.json")).decode(whole.tolist()) == (WORDS + "\n") * 200
    assert len(text.held_out) == len(whole) - len(whole) * 9 // 10
    crops = {tuple(text.tokens[i : i + 16]): i for i in range(len(text.tokens) - 15)}
    batch = text.batch(50)
    assert batch.shape == (50, 16) and batch.dtype == torch.int64
    assert all(tuple(row.tolist()) in crops for row in batch)
    tokens = np.arange(20, dtype=np.uint16)
    text = Text(tokens, tokens, 16)
    torch.manual_seed(0)
    assert set(text.batch(500)[:, 0].tolist()) == {0, 1, 2, 3, 4}
    assert Text(tokens[:16], tokens, 16).batch(2).tolist() == [list(range(16))] * 2
    for short in ((tokens[:15], tokens), (tokens, tokens[:15])):
        with pytest.raises(InputError, match="lower --text-block 16"):
            Text(*short, 16)


def test_held_out_loss_is_the_mean_over_its_blocks(lm_folder):
    model = LaMo(GPT2.from_pretrained(lm_folder, 0.5), "mlp", 5, 10, 1.0, [[0.0], [1.0]], [[-1.0], [1.0]])
    theirs = GPT2LMHeadModel.from_pretrained(lm_folder).eval()
    held_out = np.random.default_rng(0).integers(300, size=40 * 32 + 7).astype(np.uint16)
    for length, starts in ((70, [0, 38]), (40 * 32 + 7, np.linspace(0, 39 * 32 + 7, 32).astype(int))):
        text = Text(np.zeros(64, np.uint16), held_out[:length], 32)
        blocks = torch.from_numpy(np.stack([held_out[i : i + 32] for i in starts]).astype(np.int64))
        with torch.no_grad():
            expected = theirs(blocks, labels=blocks).loss.item()
        assert text.held_out_loss(model.eval()) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------- training
def test_learning_rate_warms_up_then_stays_or_falls():
    config = replace(Config(), lr=2.0, warmup=10, steps=110)
    rates = [lamo.learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)]) and set(rates[10:]) == {2.0}
    config = replace(config, lr_schedule="cosine")
    rates = [lamo.learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * step / 100) for step in range(100)])


def hopper_run(out, **changes):
    """What lamo.train needs for a short run on the demo's hopper."""
    config = replace(
        Config(), steps=7, warmup=2, lr=1e-2, batch=4, context=5, lang_coef=0.5, grad_clip=0.1, weight_decay=0.3,
        eval_every=3, episodes=1, targets=(300.0, 50.0), seed=5, device="cpu", **changes,
    )  # fmt: skip
    out.mkdir(exist_ok=True)
    trajectories = Trajectories.from_minari(minari.MinariDataset(HOPPER), 0.05, 0)
    tokens = np.random.default_rng(0).integers(300, size=200).astype(np.uint16)
    header = {"reference": (0, 100), "config": {"lm": "none"}, "lm_sha256": None}
    model = tiny_lamo(S=11, bounds=[[-1.0] * 3, [1.0] * 3], max_timesteps=1000, **DROPOUT)
    return model, trajectories, Text(tokens, tokens, 16), Environments(gym.spec("Hopper-v5")), config, header, out


def test_training_equals_a_plain_loop(tmp_path, monkeypatch):
    model, trajectories, text, environments, config, header, out = hopper_run(tmp_path / "run")
    saved, save = [], lamo.save
    monkeypatch.setattr(lamo, "save", lambda *arguments: saved.append(arguments[3]["step"]) or save(*arguments))
    scores = lamo.train(model.eval(), trajectories, text, environments, config, header, out)
    assert saved == [0, 3, 6, 7]
    expected = hopper_run(tmp_path / "run")[0].train()
    trained = [parameter for parameter in expected.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.3, eps=1e-6)
    losses = []
    for step in range(7):
        torch.manual_seed(5 * 7 + step)
        optimizer.param_groups[0]["lr"] = 0.5e-2 if step == 0 else 1e-2
        windows, crops = trajectories.batch(4, 5), text.batch(2)
        action_loss, language_loss = expected.action_loss(windows), expected.language_loss(crops)
        optimizer.zero_grad()
        (action_loss + 0.5 * language_loss).backward()
        norm = torch.stack([parameter.grad.norm() for parameter in trained]).norm()
        assert norm > 0.1  # is clipped
        for parameter in trained:
            parameter.grad *= 0.1 / (norm + 1e-6)
        optimizer.step()
        losses.append((action_loss.item(), language_loss.item(), norm.item()))
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, msg=name)

    lines = read_log(out)
    assert lines[0] == json.loads(json.dumps(header)) and len(lines) == 7
    for (begin, end), line, evaluated in zip(((0, 3), (3, 6), (6, 7)), lines[1::2], lines[2::2]):
        means = np.mean(losses[begin:end], axis=0)
        assert line["step"] == evaluated["step"] == end
        logged = [line[name] for name in ("action_loss", "language_loss", "gradient_norm")]
        assert logged == pytest.approx(means, rel=1e-4)
    assert lines[-1]["evaluation"] == scores and set(scores) == {"300", "50"}
    again = evaluation.evaluate(expected, environments, (300.0, 50.0), 1, 50_000, (0, 100))
    assert all(
        again[name]["return_mean"] == pytest.approx(row["return_mean"], rel=0.01) for name, row in scores.items()
    )
    assert expected.training


def test_loss_is_logged_every_50_steps(tmp_path):
    run = hopper_run(tmp_path / "run")
    lamo.train(*run[:4], replace(run[4], steps=101, eval_every=500, batch=1, text_batch=1), *run[5:])
    assert [line.get("step") for line in read_log(tmp_path / "run")] == [None, 50, 100, 101, 101]


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = hopper_run(tmp_path / "run")
    with pytest.raises(InputError, match="is (nan|inf) in step .; lower --lr .*has step 0"):
        lamo.train(*run[:4], replace(run[4], lr=1e30, warmup=0, eval_every=1000), *run[5:])
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["weights"]
    assert all(weight.isfinite().all() for weight in weights.values())


def test_each_process_has_dropout_of_its_own(monkeypatch):
    """Of the same window many times, shares of the same size differ by nothing but dropout."""
    model, text = tiny_lamo(**DROPOUT).train(), None
    window = {name: part[:1].expand(8, *part.shape[1:]) for name, part in a_batch().items()}
    config = replace(Config(), lr=0.0, weight_decay=0.0, lang_coef=0.0)
    monkeypatch.setattr(lamo, "add_up", lambda tensor: tensor)
    losses = []
    for rank in (0, 0, 1):
        monkeypatch.setattr(lamo, "rank_and_world", lambda rank=rank: (rank, 2))
        optimizer, trajectories = lamo.make_optimizer(model, config), SimpleNamespace(batch=lambda *_: window)
        losses.append(lamo.training_step(model, optimizer, trajectories, text, 0, config)["action_loss"])
    assert losses[0] == losses[1] != losses[2]


# ---------------------------------------------------------------------------- evaluation
class Script(torch.nn.Module):
    """A policy that depends on all of its window, row by row, so that a batch changes no bit of it."""

    context, max_timesteps = 4, 99

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * torch.linspace(-1, 1, 33).view(3, 11).sin())

    def act(self, returns_to_go, states, actions, timesteps, lengths):
        rows = []
        for i, k in enumerate(lengths.tolist()):
            memory = 0.1 * actions[i, : k - 1].sum(0) + 1e-3 * returns_to_go[i, :k].sum() + 0.01 * timesteps[i, k - 1]
            rows.append(1.3 * torch.tanh((self.weight * states[i, :k].mean(0)).sum(1) + memory))
        return torch.stack(rows)


@pytest.mark.parametrize("delayed, limit, longest", [(False, 99, 99), (True, 99, 99), (False, 20, 99), (False, 99, 20)])
def test_rollout_equals_one_environment_at_a_time(delayed, limit, longest):
    policy, targets, episodes, seed = Script(), (300.0, 50.0), 4, 7
    policy.max_timesteps = longest
    spec = gym.make("Hopper-v5", max_episode_steps=limit).spec
    environments = Environments(spec, alive=3)  # more episodes than environments
    returns, lengths = evaluation.rollout(policy, environments, targets, episodes, seed, delayed)
    assert len(environments.envs) == 3
    assert len(set(lengths.flatten())) > 1 and (lengths.max() == 20) == (20 in (limit, longest))  # ends of all kinds
    env = gym.make(spec)
    for i, target in enumerate(targets):
        for episode in range(episodes):
            observation, _ = env.reset(seed=seed + episode)
            rtg, states, actions, total = [target], [observation], [], 0.0
            for t in range(policy.max_timesteps):
                parts = [np.array(part, np.float32) for part in (rtg, states, [*actions, np.zeros(3)])]
                window = [torch.from_numpy(part)[None, max(0, t - 3) :] for part in [*parts, np.arange(t + 1)]]
                action = policy.act(*window, torch.tensor([min(t + 1, 4)]))
                action = np.clip(action[0].detach().numpy(), -1, 1)
                observation, reward, terminated, truncated, _ = env.step(action)
                total += reward
                actions.append(action)
                states.append(observation)
                rtg.append(rtg[-1] if delayed else rtg[-1] - reward)
                if terminated or truncated:
                    break
            assert lengths[i, episode] == t + 1
            assert returns[i, episode] == pytest.approx(total, rel=1e-5)


def test_returns_do_not_depend_on_how_many_environments_there_are():
    policy = tiny_lamo(S=11, bounds=[[-1.0] * 3, [1.0] * 3]).eval()
    alive = [Environments(gym.spec("Hopper-v5"), alive) for alive in (1, 4, 10, 20)]
    results = [evaluation.rollout(policy, environments, (3.0, 1.0), 5, 3) for environments in alive]
    for returns, lengths in results[1:]:
        assert np.array_equal(returns, results[0][0]) and np.array_equal(lengths, results[0][1])


class FailingHopper(gym.Wrapper):
    """Hopper with a simulator that breaks down in episodes that start from an uneven seed."""

    def reset(self, seed, **options):
        if seed == 5:
            raise RuntimeError("cannot start")
        self.fails, self.t = seed % 4, 0
        return self.env.reset(seed=seed, **options)

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        self.t += 1
        if self.t == 6 and self.fails == 1:
            raise RuntimeError("broke down")
        return observation, math.nan if self.t == 6 and self.fails == 3 else reward, *rest


def test_an_episode_that_fails_is_counted_and_has_no_part_in_the_mean(capsys):
    gym.register("FailingHopper-v0", lambda **options: FailingHopper(gym.make("Hopper-v5", **options).unwrapped))
    failing, sound = (Environments(gym.spec(name), 3) for name in ("FailingHopper-v0", "Hopper-v5"))
    policy = Script()
    returns, _ = evaluation.rollout(policy, failing, (300,), 8, 0)
    expected, _ = evaluation.rollout(policy, sound, (300,), 8, 0)
    assert np.isnan(returns[0]).tolist() == [False, True] * 4
    assert np.array_equal(returns[0, ::2], expected[0, ::2])
    row = evaluation.evaluate(policy, failing, (300,), 8, 0, (0, 100))["300"]
    assert row["failed"] == 4 and row["return_mean"] == pytest.approx(expected[0, ::2].mean())
    printed = capsys.readouterr()
    assert printed.out.count("an episode of FailingHopper-v0 failed: RuntimeError('broke down')") == 2
    assert "4 failed" in evaluation.format_scores({"300": row}, (0, 100))
    row = evaluation.evaluate(policy, failing, (300, 50), 1, 1, (0, 100))["300"]
    assert row["failed"] == 1 and math.isnan(row["return_mean"])


def test_evaluation_scores():
    environments = Environments(gym.spec("Hopper-v5"))
    policy = Script().train()
    scores = evaluation.evaluate(policy, environments, (300, 50), 5, 0, (10.0, 60.0))
    assert policy.training
    returns, lengths = evaluation.rollout(policy, environments, (300, 50), 5, 0)
    for i, name in enumerate(("300", "50")):
        row = scores[name]
        assert row["return_mean"] == pytest.approx(returns[i].mean())
        assert row["return_std"] == pytest.approx(returns[i].std())
        assert row["length_mean"] == lengths[i].mean()
        assert row["score"] == pytest.approx((returns[i].mean() - 10) * 2) and row["failed"] == 0
        every_resample = [np.mean(sample) for sample in itertools.product(returns[i], repeat=5)]
        error = row["return_interval"] - np.percentile(every_resample, (2.5, 97.5))
        assert np.abs(error).max() < 0.05 * returns[i].std()
    best, row = evaluation.best_target(scores)
    assert row["return_mean"] == max(row["return_mean"] for row in scores.values()) and scores[best] is row
    table = evaluation.format_scores(scores, (10.0, 60.0)).splitlines()
    assert [line.endswith("best") for line in table[1:-1]] == [name == best for name in scores]


# ---------------------------------------------------------------------------- the command line
SHORT = "--demo --ratio 0.1 --steps 4 --batch 4 --text-block 32 --episodes 1 --targets 1500 800"


def command(script, *arguments, **environment):
    """A script of this folder in a process of its own, without a network or a GPU."""
    refused = {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *script.split(), *map(str, arguments)],
        cwd=HERE, capture_output=True, text=True, env=os.environ | refused | environment, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory, lm_folder):
    """A short run with a language model of our own, through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = command("lamo.py", *SHORT.split(), "--lm", lm_folder, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def read_scores(folder):
    return json.loads((folder / "scores.json").read_text())


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_command_line_from_start_to_end(trained, lm_folder):
    folder, printed = trained
    scores, (header, *lines) = read_scores(folder), read_log(folder)
    assert set(scores) == {"best", "targets", "dataset", "lm", "demo", "text_loss_before", "text_loss_after"}
    assert set(scores["targets"]) == {"1500", "800"} and scores["demo"] is True and scores["lm"] == str(lm_folder)
    assert 0 < scores["text_loss_before"] and scores["text_loss_before"] != scores["text_loss_after"]
    config = header["config"]
    assert (config["steps"], config["lora_alpha"], config["lr"]) == (4, 32, 1e-2)  # given, default, demo
    assert set(header["versions"]) == {"torch", "gymnasium", "mujoco", "minari"} and header["trajectories"] == 18
    assert len(header["lm_sha256"]) == len(header["data_sha256"]) == 64 and header["device"] == "cpu"
    assert any("action_loss" in line and "language_loss" in line for line in lines)
    assert lines[-1]["evaluation"] == scores["targets"]
    assert printed.count("DEMO ASSETS") == 2 and f"{scores['best']['return_mean']:.1f}" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "log.jsonl", "scores.json"]
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]
    assert "gpt2.h.0.attn.c_attn.A" in weights and "gpt2.wte.weight" not in weights
    policy, config, header = lamo.load(folder)
    assert not policy.training
    environments = Environments(evaluation.EnvSpec.from_json(header["env_spec"]))
    again = evaluation.evaluate(policy, environments, config.targets, 1, config.seed, header["reference"])
    assert again == read_scores(folder)["targets"]


def test_what_is_given_goes_before_the_method_and_that_before_the_demo():
    expected = {"lamo": (1e-2, 0.0, 64, 4, 0.1), "dt": (1e-2, 0.1, 0, 1, 0.0), "wiki-rl": (3e-3, 0.0, 0, 4, 0.1)}
    for method, values in expected.items():
        config = lamo.configure({"demo": "demo", "method": method})
        assert (config.lr, config.dropout, config.lora_rank, config.heads, config.lang_coef) == values
        assert lamo.configure({"demo": "demo", "method": method, "lr": 5.0}).lr == 5.0


def test_two_processes_equal_one(tmp_path, lm_folder):
    """Gradients of half a batch each add up to those of one: with windows that end early, text, and shared episodes."""
    options = f"{SHORT} --context 100 --lora-dropout 0 --lm {lm_folder} --episodes 2 --seed 1 --out"
    for script, out in ("lamo.py", "one"), ("-m torch.distributed.run --standalone --nproc-per-node 2 lamo.py", "two"):
        result = command(script, *options.split(), tmp_path / out, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("DEMO ASSETS") == 2  # one process speaks
    one, two = (lamo.read_checkpoint(tmp_path / out)["weights"] for out in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    one, two = (read_scores(tmp_path / out)["targets"]["1500"]["return_mean"] for out in ("one", "two"))
    assert two == pytest.approx(one, rel=0.01)


# ---------------------------------------------------------------------------- stopping and going on
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path, monkeypatch):
    """It dies each time it evaluates or saves, and goes on from what is in its folder."""
    monkeypatch.setattr(lamo, "LOG_EVERY", 2)
    whole = hopper_run(tmp_path / "whole")
    scores = lamo.train(*whole)
    rng, resumed = np.random.default_rng(23), []

    def mortal(function):
        def dies(*arguments):
            luck = rng.random()
            result = function(*arguments) if luck > 0.2 else None  # dies before its work is done, or after it
            if luck < 0.4:
                raise KeyboardInterrupt
            return result

        return dies

    monkeypatch.setattr(lamo, "SAVE_EVERY", 0)  # at each step
    monkeypatch.setattr(lamo, "evaluate", mortal(lamo.evaluate))
    monkeypatch.setattr(lamo, "save", mortal(lamo.save))
    while True:
        model, *rest = hopper_run(tmp_path / "run")
        checkpoint = lamo.read_checkpoint(rest[-1]) if (rest[-1] / "checkpoint.pt").exists() else None
        resumed.append(checkpoint and checkpoint["recent"])
        model.load_state_dict(checkpoint["weights"] if checkpoint else {}, strict=False)
        try:
            assert lamo.train(model, *rest, checkpoint) == scores
            break
        except KeyboardInterrupt:
            pass
    assert len(resumed) > 5 and any(resumed)  # also between two lines of the log
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in whole[0].state_dict().items())
    assert (tmp_path / "run" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_a_signal_lets_the_step_finish_and_a_second_one_does_not(tmp_path, monkeypatch):
    handlers, run = {}, hopper_run(tmp_path / "run")
    monkeypatch.setattr(lamo.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(lamo, "evaluate", lambda *_: handlers[signal.SIGTERM](signal.SIGTERM, None) or {})
    monkeypatch.setattr(lamo, "format_scores", lambda *_: "")
    with pytest.raises(SystemExit, match="stopped after 4 steps; resume with: python lamo.py --resume"):
        lamo.train(*run)
    assert lamo.read_checkpoint(tmp_path / "run")["step"] == 4
    with pytest.raises(SystemExit, match="1"):
        handlers[signal.SIGINT](signal.SIGINT, None)


def test_a_signal_to_another_process_stops_this_one_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lamo, "add_up", lambda stops: stops + 1)
    with pytest.raises(SystemExit, match="stopped after 0 steps"):
        lamo.train(*hopper_run(tmp_path / "run"))
    assert lamo.read_checkpoint(tmp_path / "run")["step"] == 0


# ---------------------------------------------------------------------------- other tasks
def save_dataset(name, env, episodes, **spaces):
    """Write (observations, actions, rewards) as a Minari dataset; people's demonstrations end in truncation."""
    buffers = [
        EpisodeBuffer(
            observations=observations, actions=np.array(actions), rewards=np.array(rewards),
            terminations=np.zeros(len(rewards), bool), truncations=np.arange(len(rewards)) == len(rewards) - 1,
        )
        for observations, actions, rewards in episodes
    ]  # fmt: skip
    minari.create_dataset_from_buffers(
        name, buffers, env=env, algorithm_name="test", author="test", author_email="test", code_permalink="test",
        description="test", **spaces,
    )  # fmt: skip
    return Path(os.environ["MINARI_DATASETS_PATH"]) / name


def stack(observations):
    """Observations, dicts or arrays, -> the same with time as first axis."""
    if isinstance(observations[0], dict):
        return {key: stack([observation[key] for observation in observations]) for key in observations[0]}
    return np.array(observations)


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory):
    """A dataset with the spec and the spaces of D4RL/kitchen/complete-v2, recorded in the real environment.

    Nobody demonstrates here: the objects are put where they belong, some of them away again.
    """
    goals = ["microwave", "kettle", "light switch", "slide cabinet"]
    published = {"remove_task_when_completed": False, "terminate_on_tasks_completed": False}

    def play(env, length):
        rng = np.random.default_rng(length)
        observations, actions, rewards = [env.reset(seed=length)[0]], [], []
        robot = env.unwrapped.robot_env
        for t in range(length):
            if t in (3, 6, 9):
                qpos, qvel = robot.data.qpos.copy(), robot.data.qvel.copy()
                qpos[22] = -0.75 if t != 6 else 0.0  # microwave open, closed, open
                qpos[19] = 0.37 if t >= 6 else 0.0  # slide cabinet
                robot.set_state(qpos, qvel)
            actions.append(rng.uniform(-0.2, 0.2, 9))
            observation, reward, *_ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        return stack(observations), actions, rewards

    lengths = (15, 22, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        env = gym.make(lamo.KITCHEN, tasks_to_complete=goals, max_episode_steps=280, **published)
        folder = save_dataset("D4RL/kitchen/complete-v2", env, [play(env, length) for length in lengths])
        scored = gym.make(lamo.KITCHEN, tasks_to_complete=goals)
        expected = [play(scored, length)[2] for length in lengths]
    return folder, expected


def test_kitchen_pays_once_for_each_subtask(kitchen):
    folder, expected = kitchen
    dataset = minari.MinariDataset(folder / "data")
    for episode, rewards in zip(dataset, expected):
        assert episode.rewards.sum() > 4  # as published: pays in every step
        assert lamo.recorded_rewards(dataset, episode).tolist() == rewards
    assert sum(map(sum, expected)) == 6


def test_kitchen_from_start_to_end(kitchen, tmp_path, lm_folder, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(kitchen[0].parents[2]))  # found there by its id
    options = f"{SHORT} --ratio 1 --env kitchen-complete --data D4RL/kitchen/complete-v2 --targets 4 --bf16"
    lamo.main(f"{options} --lm {lm_folder} --out {tmp_path / 'run'}".split())
    policy, config, header = lamo.load(tmp_path / "run")
    spec = evaluation.EnvSpec.from_json(header["env_spec"])
    assert header["reference"] == (0, 4) and policy.gpt2.bf16
    assert len(policy.state_mean) == 59 and policy.max_timesteps == spec.max_episode_steps == 280
    assert spec.kwargs["tasks_to_complete"] == ["microwave", "kettle", "light switch", "slide cabinet"]
    assert spec.kwargs["remove_task_when_completed"] is True
    best = read_scores(tmp_path / "run")["best"]
    assert best["score"] == 25 * best["return_mean"]


@pytest.mark.parametrize("name, method", [*((name, "lamo") for name in lamo.TASKS), ("hopper", "dt"), ("hopper", "wiki-rl")])  # fmt: skip
def test_every_task_and_method_runs_on_the_demo(name, method, tmp_path, lm_folder):
    lm = f"--lm {lm_folder}" if method != "dt" else "--bf16"
    lamo.main(f"{SHORT} --targets 1 --env {name} --method {method} {lm} --out {tmp_path / 'run'}".split())
    policy, config, header = lamo.load(tmp_path / "run")
    task, spec = lamo.TASKS[name], evaluation.EnvSpec.from_json(header["env_spec"])
    assert spec.id == task.env_id.split(":")[-1] and config.data == f"demo/lamo/{name}/demo-v0"
    assert config.context == task.context and header["arguments"]["return_scale"] == task.return_scale
    assert any(isinstance(module, LoRALinear) for module in policy.modules()) == (method == "lamo")
    assert (config.embed == "mlp") == (method == "lamo") and policy.gpt2.bf16 == (method == "dt")
    scores = read_scores(tmp_path / "run")
    assert (scores["text_loss_before"] is None) == (method == "dt")
    assert 1 <= scores["best"]["length_mean"] <= spec.max_episode_steps and math.isfinite(scores["best"]["return_mean"])


# ---------------------------------------------------------------------------- where assets come from
def test_without_a_gpu_the_demo_is_taken_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = lamo.configure({})
    assert "no CUDA GPU" in config.demo and config.lm == "demo/gpt2-tiny" and config.steps == 1000
    lamo.main(f"{SHORT.removeprefix('--demo ')} --method dt --out {tmp_path / 'run'}".split())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("DEMO ASSETS, NOT COMPARABLE TO THE PAPER (no CUDA") and printed.count(printed[0]) == 2
    assert read_log(tmp_path / "run")[0]["config"]["demo"] == printed[0]


# ---------------------------------------------------------------------------- CUDA
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu(trained):
    on_cpu, _, _ = lamo.load(trained[0], "cpu")
    on_cuda, _, header = lamo.load(trained[0], "cuda")
    trajectories = Trajectories.from_minari(minari.MinariDataset(HOPPER), 0.05, 0, device="cuda")
    batch = trajectories.batch(8, 20)
    history = [*(batch[name] for name in HISTORY), batch["mask"].sum(dim=1)]
    torch.testing.assert_close(on_cuda.act(*history).cpu(), on_cpu.act(*(x.cpu() for x in history)), atol=1e-3, rtol=0)
    returns, _ = evaluation.rollout(on_cuda, Environments(gym.spec("Hopper-v5")), (1500,), 2, 0)
    assert np.isfinite(returns).all()
