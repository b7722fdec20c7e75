"""Tests of lamo.py and eval.py; each compares with something independent of the code that it guards.

python -m pytest -q
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from minari.data_collector import EpisodeBuffer
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

import eval as evaluation
import lamo
from eval import InputError
from lamo import GPT2, LaMo, LoRALinear, Text, Trajectories

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, on what our datasets leave unsaid
HOPPER = HERE / "demo" / "lamo" / "hopper" / "demo-v0"
WORDS = "the policy takes an action and the environment gives a reward ; the state of the leg is a vector . "


def tiny_config(**changes):
    return GPT2Config(
        **{"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0}
        | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        | changes
    )


def tiny_lamo(embed="mlp", S=3, A=2, lora_rank=4, low=(-1, -2), high=(1, 3), seed=0, **changes):
    torch.manual_seed(seed)
    gpt2 = GPT2(tiny_config(**changes))
    if lora_rank:
        gpt2.add_lora(lora_rank, 8.0, 0.0)
    mean, std = torch.randn(S), torch.rand(S) + 0.5
    low, high = torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
    return LaMo(gpt2, low[:A], high[:A], 100, 5, 10.0, embed, mean, std)


def some_trajectories(lengths=(7, 1, 12, 30), S=3, A=2):
    rng = np.random.default_rng(0)
    return (
        [rng.normal(size=(n, S)) for n in lengths],
        [rng.uniform(-1, 1, size=(n, A)) for n in lengths],
        [rng.normal(size=n) for n in lengths],
    )


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory):
    """A GPT-2 with saved weights and a tokenizer, in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([WORDS], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(1)
    GPT2LMHeadModel(tiny_config(initializer_range=0.2)).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------- GPT-2


@pytest.mark.parametrize("changes", [{}, {"n_inner": 48}, {"layer_norm_epsilon": 1e-3}, {"n_layer": 3, "n_head": 2}])
def test_logits_equal_transformers(tmp_path, changes):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(tiny_config(initializer_range=0.3, **changes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and LayerNorms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path, local_files_only=True).eval()
    tokens = torch.randint(300, (3, 40))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5  # logits that say something


def test_demo_model_equals_transformers_and_knows_english():
    theirs = GPT2LMHeadModel.from_pretrained(HERE / "demo" / "gpt2-tiny", dtype=torch.float32).eval()
    ours = GPT2.from_pretrained(HERE / "demo" / "gpt2-tiny", local_files_only=True).eval()
    tokenizer = lamo.AutoTokenizer.from_pretrained(HERE / "demo" / "gpt2-tiny")
    tokens = torch.tensor(
        [tokenizer("Return True if the object is a subclass of the given class, and False otherwise.").input_ids]
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
        loss = F.cross_entropy(ours(tokens)[0, :-1], tokens[0, 1:])
    assert loss < math.log(len(tokenizer)) - 3  # trained: far below a uniform guess


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = GPT2(tiny_config(embd_pdrop=0.5))
    tokens = torch.randint(300, (1, 8))
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


# ---------------------------------------------------------------------------- LoRA


def test_lora_starts_as_the_plain_layer_and_merges():
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 48)
    lora = LoRALinear(linear, rank=4, alpha=8, dropout=0.0)
    x = torch.randn(5, 7, 16)
    assert torch.equal(lora(x), linear(x))
    torch.nn.init.normal_(lora.B)
    with torch.no_grad():
        parts = [2.0 * x @ A.T @ B.T for A, B in zip(lora.A, lora.B)]  # alpha / r = 2, one pair each for q, k, v
        torch.testing.assert_close(lora(x), linear(x) + torch.cat(parts, dim=-1))
        merged = lora.merge()
        assert isinstance(merged, torch.nn.Linear)
        torch.testing.assert_close(merged(x), lora(x), atol=1e-5, rtol=0)
    assert (lora(x) - linear(x)).abs().max() > 0.1


def test_lora_trains_what_it_should_and_no_more():
    model = GPT2(tiny_config())
    model.add_lora(4, 8.0, 0.1)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {f"h.{i}.attn.c_attn.{name}" for i in range(2) for name in ("A", "B", "bias")}


def test_trainable_share_of_gpt2_small():
    with torch.device("meta"):
        gpt2 = GPT2(GPT2Config())
        assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808  # as published
        gpt2.add_lora(16, 32.0, 0.1)
    trains = sum(p.numel() for p in gpt2.parameters() if p.requires_grad)
    assert trains == 12 * (3 * 16 * (768 + 768) + 3 * 768)
    assert round(100 * trains / sum(p.numel() for p in gpt2.parameters()), 2) == 0.73


# ---------------------------------------------------------------------------- LaMo


def history(model, B=4, K=5, S=3, A=2):
    torch.manual_seed(3)
    timesteps = torch.randint(0, 90, (B, 1)) + torch.arange(K)
    return [torch.randn(B, K), torch.randn(B, K, S), torch.rand(B, K, A), timesteps]


@pytest.mark.parametrize("embed", ["mlp", "linear"])
def test_no_action_sees_itself_or_what_comes_later(embed):
    model = tiny_lamo(embed).eval()
    for block in model.gpt2.h:
        torch.nn.init.normal_(block.attn.c_attn.B)
    inputs = history(model)
    with torch.no_grad():
        before = model(*inputs)
        for step in range(5):
            for which, first in ((0, step), (1, step), (2, step + 1)):  # a_t is seen from a_{t+1} on only
                changed = [x.clone() for x in inputs]
                changed[which][:, step] += 1.0
                after = model(*changed)
                assert torch.equal(after[:, :first], before[:, :first])
                if first < 5:
                    assert (after[:, first] - before[:, first]).abs().max() > 1e-6


def test_right_padding_changes_nothing():
    model = tiny_lamo().eval()
    inputs = history(model)
    with torch.no_grad():
        whole = model(*inputs)
        short = model(*(x[:, :3] for x in inputs))
    torch.testing.assert_close(whole[:, :3], short, atol=1e-6, rtol=0)
    trajectories = Trajectories(*some_trajectories((3,)))
    batch = trajectories.batch(1, 5)
    with torch.no_grad():
        start = int(batch["timesteps"][0, 0])
        exact = model(*(batch[k][:, : 3 - start] for k in ("returns_to_go", "states", "actions", "timesteps")))
        error = (exact - model.scale_actions(batch["actions"][:, : 3 - start])) ** 2
        torch.testing.assert_close(model.action_loss(batch), error.mean())


def test_act_is_the_last_prediction_in_the_environments_units():
    model = tiny_lamo().eval()
    inputs = history(model)
    with torch.no_grad():
        expected = (model(*inputs)[:, -1].clamp(-1, 1) + 1) / 2 * torch.tensor([2.0, 5.0]) + torch.tensor([-1.0, -2.0])
    torch.testing.assert_close(model.act(*inputs), expected)
    unknown = [x.clone() for x in inputs]
    unknown[2][:, -1] = 0  # the action that is asked for
    assert torch.equal(model.act(*unknown), model.act(*inputs))


def test_embedders_follow_the_formula():
    embedder = lamo.Embedder(3, 8)
    x = torch.randn(5, 3)
    h = x @ embedder.input.weight.T + embedder.input.bias
    gelu = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    torch.testing.assert_close(embedder(x), h + gelu @ embedder.residual.weight.T + embedder.residual.bias)


@pytest.mark.parametrize(
    "method, frozen",
    [
        ("lamo", lambda name: name.startswith("gpt2.") and not name.endswith(("c_attn.A", "c_attn.B", "c_attn.bias"))),
        ("wiki-rl", lambda name: False),
        ("dt", lambda name: False),
    ],
)
def test_gradients_reach_exactly_what_trains(lm_folder, method, frozen):
    chosen = lamo.METHODS[method] | {"lm": str(lm_folder)} if method != "dt" else lamo.METHODS[method]
    config = replace(lamo.Config(), **chosen)
    torch.manual_seed(0)
    model = LaMo(
        lamo.build_gpt2(config, 0, 0), torch.full((2,), -1.0), torch.ones(2), 50, 5, 1.0, config.embed, [0] * 3, [1] * 3
    )
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)  # at zero, no gradient would reach A
    loss = model.action_loss(Trajectories(*some_trajectories()).batch(8, 5))
    if config.lang_coef:
        loss = loss + config.lang_coef * model.language_loss(torch.randint(300, (2, 64)))
    loss.backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == (not frozen(name) and parameter.numel() > 0), name


def test_language_loss_equals_transformers(lm_folder):
    theirs = GPT2LMHeadModel.from_pretrained(lm_folder).eval()
    model = LaMo(
        GPT2.from_pretrained(lm_folder, local_files_only=True), [-1.0], [1.0], 10, 5, 1.0, "mlp", [0], [1]
    ).eval()
    tokens = torch.randint(300, (4, 50))
    with torch.no_grad():
        torch.testing.assert_close(
            model.language_loss(tokens), theirs(tokens, labels=tokens).loss, atol=1e-5, rtol=1e-5
        )


def test_a_batch_can_be_overfitted():
    model = tiny_lamo(lora_rank=0)
    batch = Trajectories(*some_trajectories()).batch(8, 5)
    tokens = torch.randint(300, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model.action_loss(batch) + 0.1 * model.language_loss(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.action_loss(batch) < 1e-2 and model.language_loss(tokens) < 0.1


# ---------------------------------------------------------------------------- data


def test_windows_equal_a_brute_force_loop():
    observations, actions, rewards = some_trajectories()
    trajectories = Trajectories(observations, actions, rewards)
    torch.manual_seed(0)
    batch = trajectories.batch(500, 5)
    starts = {float(o[0]): (i, t) for i, part in enumerate(observations) for t, o in enumerate(part.astype(np.float32))}
    for b in range(500):
        i, t = starts[float(batch["states"][b, 0, 0])]
        real = min(5, len(rewards[i]) - t)
        assert batch["mask"][b].tolist() == [True] * real + [False] * (5 - real)
        for k in range(real):
            np.testing.assert_allclose(batch["states"][b, k], observations[i][t + k], rtol=1e-6)
            np.testing.assert_allclose(batch["actions"][b, k], actions[i][t + k], rtol=1e-6)
            assert batch["timesteps"][b, k] == t + k
            expected = sum(rewards[i][j] for j in range(t + k, len(rewards[i])))
            np.testing.assert_allclose(batch["returns_to_go"][b, k], expected, rtol=1e-5, atol=1e-6)
    assert len({starts[float(x)] for x in batch["states"][:, 0, 0]}) == 50  # every step has been a start


def test_starts_are_uniform_over_steps():
    trajectories = Trajectories(*some_trajectories())
    torch.manual_seed(0)
    draws = 50_000
    first = trajectories.batch(draws, 1)["states"][:, 0, 0]
    _, counts = torch.unique(first, return_counts=True)
    expected = draws / 50
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == 50 and 23 < chi_square < 86  # 99.9 % of a chi-square with 49 degrees of freedom


def test_normalisation_is_that_of_the_kept_trajectories():
    observations, actions, rewards = some_trajectories()
    trajectories = Trajectories(observations, actions, rewards)
    rows = np.concatenate(observations)
    np.testing.assert_allclose(trajectories.state_mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(trajectories.state_std, rows.std(0) + 1e-6, rtol=1e-5)


def test_minari_share_is_seeded_and_whole():
    dataset = minari.MinariDataset(HOPPER / "data")
    some = Trajectories.from_minari(dataset, 0.1, seed=0)
    assert len(some.returns) == int(0.1 * dataset.total_episodes)
    assert np.array_equal(some.returns, Trajectories.from_minari(dataset, 0.1, seed=0).returns)
    assert not np.array_equal(some.returns, Trajectories.from_minari(dataset, 0.1, seed=1).returns)
    every = Trajectories.from_minari(dataset, 1.0, seed=0)
    np.testing.assert_allclose(every.returns, [e.rewards.astype(np.float64).sum() for e in dataset], rtol=1e-6)
    assert len(every.states) == dataset.total_steps
    assert torch.equal(every.states[0], torch.from_numpy(dataset[0].observations[0]))


def test_delayed_reward_comes_at_the_end():
    dataset = minari.MinariDataset(HOPPER / "data")
    plain, delayed = (Trajectories.from_minari(dataset, 0.05, 0, delayed) for delayed in (False, True))
    np.testing.assert_allclose(plain.returns, delayed.returns)
    assert torch.equal(plain.states, delayed.states)
    starts = [0, *torch.unique(delayed.ends).tolist()]
    for begin, end, total in zip(starts, starts[1:], plain.returns):
        np.testing.assert_allclose(delayed.returns_to_go[begin:end], total, rtol=1e-5)


def test_infinite_and_constant_dimensions_give_finite_actions():
    observations, actions, rewards = some_trajectories()
    for part in observations:
        part[:, 0], part[:, 1] = np.inf, 1e6
    observations[2][3, 2] = -np.inf
    observations[0] = observations[0].astype(np.float32)
    trajectories = Trajectories(observations, actions, rewards)
    assert np.isfinite(trajectories.state_mean).all() and (trajectories.state_std > 0).all()
    model = tiny_lamo()
    model.state_mean, model.state_std = torch.tensor(trajectories.state_mean), torch.tensor(trajectories.state_std)
    loss = model.action_loss(trajectories.batch(64, 5))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    inputs = history(model)
    inputs[1][0, 2, 1] = math.nan
    assert model(*inputs)[0, 2].isnan().all()  # but what is no number is not hidden


def test_text_is_cropped_held_out_and_cached(tmp_path, monkeypatch, lm_folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "words.txt").write_text((WORDS + "\n") * 200)
    tokenizer = lamo.AutoTokenizer.from_pretrained(lm_folder)
    text = lamo.load_text(str(tmp_path / "words.txt"), tokenizer, 16, seed=0)
    whole = np.concatenate([text.tokens, text.held_out])
    assert tokenizer.decode(whole) == (WORDS + "\n") * 200
    assert len(text.held_out) == len(whole) // 10
    batch = text.batch(50)
    crops = {tuple(text.tokens[i : i + 16]) for i in range(len(text.tokens) - 15)}
    assert batch.shape == (50, 16) and batch.dtype == torch.int64
    assert all(tuple(row.tolist()) in crops for row in batch)
    assert len(list((tmp_path / "cache" / "lamo").iterdir())) == 1
    again = lamo.load_text(str(tmp_path / "words.txt"), tokenizer, 16, seed=0)
    assert isinstance(again.tokens, np.memmap) and np.array_equal(again.tokens, text.tokens)


def test_held_out_loss_is_the_mean_over_its_blocks(lm_folder):
    model = LaMo(GPT2.from_pretrained(lm_folder, local_files_only=True), [-1.0], [1.0], 10, 5, 1.0, "mlp", [0], [1])
    theirs = GPT2LMHeadModel.from_pretrained(lm_folder).eval()
    held_out = np.random.default_rng(0).integers(300, size=64).astype(np.uint16)
    text = Text(np.zeros(64, np.uint16), held_out, 32)
    blocks = torch.from_numpy(held_out.astype(np.int64)).view(2, 32)
    with torch.no_grad():
        expected = theirs(blocks, labels=blocks).loss.item()
    assert model.training
    assert text.held_out_loss(model, "cpu") == pytest.approx(expected, rel=1e-5)
    assert model.training


# ---------------------------------------------------------------------------- training


def test_learning_rate_warms_up_then_stays_or_falls():
    config = replace(lamo.Config(), lr=1.0, warmup=10, steps=110)
    assert [lamo.learning_rate(step, config) for step in (0, 4, 9, 10, 109)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    cosine = replace(config, lr_schedule="cosine")
    assert [lamo.learning_rate(step, cosine) for step in (4, 10, 60)] == pytest.approx([0.5, 1, 0.5])
    assert lamo.learning_rate(109, cosine) < 1e-3


def test_training_follows_the_formula():
    config = replace(
        lamo.Config(), steps=3, warmup=2, lr=1e-2, batch=4, context=5, lang_coef=0.5, grad_clip=0.1, eval_every=2
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(300, size=200).astype(np.uint16)
    trajectories = Trajectories(*some_trajectories())
    ours, expected = tiny_lamo(), tiny_lamo()
    calls = []
    torch.manual_seed(5)
    lamo.train(
        ours, trajectories, Text(tokens, tokens, 16), config, torch.device("cpu"), lambda *call: calls.append(call)
    )
    torch.manual_seed(5)
    text = Text(tokens, tokens, 16)
    trains = [parameter for parameter in expected.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-2, weight_decay=1e-5, eps=1e-6)
    losses = []
    for lr in (0.5e-2, 1e-2, 1e-2):
        optimizer.param_groups[0]["lr"] = lr
        action, language = expected.action_loss(trajectories.batch(4, 5)), expected.language_loss(text.batch(2))
        optimizer.zero_grad()
        (action + 0.5 * language).backward()
        torch.nn.utils.clip_grad_norm_(trains, 0.1)
        optimizer.step()
        losses.append((action.item(), language.item()))
    for (name, mine), theirs in zip(ours.named_parameters(), expected.parameters()):
        torch.testing.assert_close(mine, theirs, msg=name)
    assert [(step, due) for step, _, due in calls] == [(2, True), (3, True)]
    assert calls[0][1]["action_loss"] == pytest.approx((losses[0][0] + losses[1][0]) / 2, rel=1e-5)
    assert calls[1][1]["language_loss"] == pytest.approx(losses[2][1], rel=1e-5)


# ---------------------------------------------------------------------------- evaluation


class Script(torch.nn.Module):
    """A policy that depends on all of its window, row by row, so that a batch changes no bit of it."""

    context, max_timesteps = 4, 120

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * torch.linspace(-1, 1, 33).view(3, 11).sin())

    def act(self, returns_to_go, states, actions, timesteps):
        rows = []
        for i in range(len(states)):
            memory = 0.1 * actions[i, :-1].sum(0) + 1e-3 * returns_to_go[i].sum() + 0.01 * timesteps[i, -1]
            rows.append(torch.tanh((self.weight * states[i].mean(0)).sum(1) + memory))
        return torch.stack(rows)


def test_vectorised_rollout_equals_one_environment_at_a_time():
    policy, targets, episodes, seed = Script(), (300.0, 50.0), 3, 7
    returns, lengths = evaluation.rollout(policy, "Hopper-v5", targets, episodes, seed)
    assert len(set(lengths.flatten())) > 1  # episodes end at different steps
    env = gym.make("Hopper-v5")
    for i, target in enumerate(targets):
        for episode in range(episodes):
            observation, _ = env.reset(seed=seed + episode)
            rtg, states, actions, total = [target], [observation], [], 0.0
            for t in range(policy.max_timesteps):
                window = slice(max(0, t - 3), t + 1)
                padded = actions + [np.zeros(3, np.float32)]
                action = (
                    policy.act(
                        torch.tensor(rtg, dtype=torch.float32)[None, window],
                        torch.tensor(np.array(states), dtype=torch.float32)[None, window],
                        torch.tensor(np.array(padded))[None, window],
                        torch.arange(t + 1)[None, window],
                    )[0]
                    .detach()
                    .numpy()
                )
                observation, reward, terminated, truncated, _ = env.step(action)
                total += reward
                actions.append(action)
                states.append(observation)
                rtg.append(rtg[-1] - reward)
                if terminated or truncated:
                    break
            assert lengths[i, episode] == t + 1
            assert returns[i, episode] == pytest.approx(total, rel=1e-4)


def test_delayed_rollout_keeps_asking_for_the_target():
    asked = []

    class Recorder(Script):
        def act(self, returns_to_go, *history):
            asked.append(returns_to_go.clone())
            return super().act(returns_to_go, *history)

    evaluation.rollout(Recorder(), "Hopper-v5", (300.0, 50.0), 1, 0, delayed=True)
    assert all((window[0] == 300).all() for window in asked) and len(asked) > 5
    asked.clear()
    evaluation.rollout(Recorder(), "Hopper-v5", (300.0, 50.0), 1, 0)
    assert asked[3][0, 0] == 300 and (asked[3][0].diff() < 0).all()


def test_evaluation_scores():
    scores = evaluation.evaluate(Script(), "Hopper-v5", (300, 50), 2, 0, (10.0, 60.0))
    returns, lengths = evaluation.rollout(Script(), "Hopper-v5", (300, 50), 2, 0)
    assert list(scores) == ["300", "50"]
    row = scores["50"]
    assert row["return_mean"] == pytest.approx(returns[1].mean()) and row["return_std"] == pytest.approx(
        returns[1].std()
    )
    assert row["length_mean"] == lengths[1].mean()
    assert row["score"] == pytest.approx((returns[1].mean() - 10) * 2)
    best, _ = evaluation.best_target(scores)
    assert scores[best]["return_mean"] == max(row["return_mean"] for row in scores.values())


def test_reacher2d_rewards_the_fingertip_on_the_target():
    env = gym.make("eval:lamo/Reacher2d-v0")
    for distance in (0.0, 0.01, 0.0205, 0.0215, 0.03):
        env.reset(seed=0)
        arm = env.unwrapped
        arm.set_state(np.append(arm.data.qpos[:2], arm.get_body_com("fingertip")[:2] + [distance, 0]), np.zeros(4))
        observation, reward, *_ = env.step(np.zeros(2, np.float32))
        assert np.linalg.norm(observation[-2:]) == pytest.approx(distance, abs=4e-4)
        assert reward == float(distance < 0.021)
    body = arm.model.body
    assert arm.ARM_LENGTH == pytest.approx(body("body1").pos[0] + body("fingertip").pos[0])
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


# ---------------------------------------------------------------------------- the command line

SHORT = ["--offline", "--ratio", "0.1", "--steps", "4", "--batch", "4", "--episodes", "1", "--targets", "1500", "800"]


def command(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | environment, timeout=200,
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory, lm_folder):
    """A short real run with a language model of our own, through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    cache = tmp_path_factory.mktemp("cache")
    result = command(
        "lamo.py", *SHORT, "--lm", lm_folder, "--text-block", 32, "--out", folder, XDG_CACHE_HOME=str(cache)
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_command_line_from_start_to_end(trained):
    folder, printed = trained
    scores = json.loads((folder / "scores.json").read_text())
    assert set(scores) == {
        "best", "targets", "dataset", "lm", "demo", "text_loss_before", "text_loss_after", "seconds",
    }  # fmt: skip
    assert set(scores["best"]) == {"target", "return_mean", "return_std", "score", "length_mean"}
    assert set(scores["targets"]) == {"1500", "800"} and scores["demo"] is True
    assert 0 < scores["text_loss_before"] and scores["text_loss_before"] != scores["text_loss_after"]
    config = json.loads((folder / "config.json").read_text())
    assert config["steps"] == 4 and config["lora_rank"] == 16 and config["demo"] is True  # given, default, demo
    assert config["lr_schedule"] == "cosine"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any("action_loss" in line and "language_loss" in line for line in lines)
    assert lines[-1]["evaluation"] == scores["targets"]
    assert printed.count("DEMO ASSETS") == 2
    assert f"{scores['best']['return_mean']:.1f}" in printed
    assert not list(folder.glob("partial*"))


def test_checkpoint_holds_what_trains_and_acts_the_same(trained, lm_folder):
    folder, _ = trained
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert "gpt2.h.0.attn.c_attn.A" in checkpoint["model"] and "gpt2.wte.weight" not in checkpoint["model"]
    policy, config, facts = lamo.load(folder)
    scores = json.loads((folder / "scores.json").read_text())
    spec = evaluation.EnvSpec.from_json(facts["env_spec"])
    again = evaluation.evaluate(policy, spec, config.targets, config.episodes, config.seed, facts["reference"])
    for target, row in scores["targets"].items():
        assert again[target]["length_mean"] == pytest.approx(row["length_mean"], abs=1)
        assert again[target]["return_mean"] == pytest.approx(row["return_mean"], rel=0.02)


def test_eval_command_and_video(trained, tmp_path):
    folder, _ = trained
    video = tmp_path / "out.gif"
    result = command("eval.py", folder, "--targets", 1500, "--video", video)
    if "cannot render here" in result.stderr:
        pytest.skip("this machine has no OpenGL")
    assert result.returncode == 0, result.stderr
    scores = json.loads((folder / "scores.json").read_text())
    assert f"{scores['targets']['1500']['return_mean']:.0f}" in result.stdout
    from PIL import Image

    with Image.open(video) as image:
        assert image.n_frames > 1
        image.seek(image.n_frames - 1)
        later = np.asarray(image.convert("RGB")).astype(int)
        image.seek(0)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - later).max() > 30  # it moves


@pytest.mark.parametrize("method", ["dt", "wiki-rl"])
def test_other_methods_run(method, tmp_path, lm_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lm = [] if method == "dt" else ["--lm", str(lm_folder)]
    lamo.run([*SHORT, *lm, "--method", method, "--text-block", "32", "--out", str(tmp_path / "run")])
    policy, config, _ = lamo.load(tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (scores["text_loss_before"] is None) == (method == "dt")
    assert config.embed == "linear" and not any(isinstance(m, LoRALinear) for m in policy.modules())
    if method == "dt":
        assert len(policy.gpt2.h) == 3 and policy.gpt2.config.n_embd == 128


def test_same_seed_same_run(tmp_path, lm_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    results = []
    for i, seed in enumerate((0, 0, 1)):
        arguments = [
            *SHORT,
            "--lm",
            str(lm_folder),
            "--text-block",
            "32",
            "--seed",
            str(seed),
            "--out",
            str(tmp_path / str(i)),
        ]
        lamo.run(arguments)
        results.append(json.loads((tmp_path / str(i) / "scores.json").read_text())["targets"])
    assert results[0] == results[1] != results[2]


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
    root = tmp_path_factory.mktemp("minari")
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
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        env = gym.make(
            "gymnasium_robotics:FrankaKitchen-v1", tasks_to_complete=goals, max_episode_steps=280, **published
        )
        save_dataset("D4RL/kitchen/complete-v2", env, [play(env, length) for length in lengths])
        scored = gym.make("gymnasium_robotics:FrankaKitchen-v1", tasks_to_complete=goals)
        expected = [play(scored, length)[2] for length in lengths]
    return root, expected


def test_kitchen_pays_once_for_each_subtask(kitchen):
    root, expected = kitchen
    dataset = minari.MinariDataset(root / "D4RL" / "kitchen" / "complete-v2" / "data")
    for episode, rewards in zip(dataset, expected):
        assert episode.rewards.sum() > 4  # as published: pays in every step
        assert evaluation.recorded_rewards(dataset, episode).tolist() == rewards
    assert sum(map(sum, expected)) == 6


def test_kitchen_from_start_to_end(kitchen, tmp_path, lm_folder, monkeypatch):
    root, _ = kitchen
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = root / "D4RL" / "kitchen" / "complete-v2"
    arguments = [
        "--env",
        "kitchen-complete",
        "--data",
        str(folder),
        "--lm",
        str(lm_folder),
        "--offline",
        "--steps",
        "2",
    ]
    lamo.run([*arguments, "--text-block", "32", "--targets", "4", "--episodes", "1", "--out", str(tmp_path / "run")])
    policy, config, facts = lamo.load(tmp_path / "run")
    spec = evaluation.EnvSpec.from_json(facts["env_spec"])
    assert facts["reference_source"] == "0 to 100 between D4RL's reference returns"
    assert len(policy.state_mean) == 59 and policy.max_timesteps == spec.max_episode_steps == 280
    assert spec.kwargs["tasks_to_complete"] == ["microwave", "kettle", "light switch", "slide cabinet"]
    assert spec.kwargs["remove_task_when_completed"] is True and facts["reference"] == [0, 4]
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["best"]["score"] == 25 * scores["best"]["return_mean"]


@pytest.mark.parametrize(
    "env_id, action_range", [("Pusher-v5", 2.0), ("InvertedPendulum-v5", 3.0), ("eval:lamo/Reacher2d-v0", 1.0)]
)
def test_any_dataset_brings_its_environment(env_id, action_range, tmp_path, lm_folder, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    env, episodes = gym.make(env_id), []
    for seed in range(4):
        env.action_space.seed(seed)
        observations, actions, rewards = [env.reset(seed=seed)[0]], [], []
        for _ in range(3 + seed):
            actions.append(env.action_space.sample())
            observation, reward, *_ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        episodes.append((np.array(observations), actions, rewards))
    save_dataset("test/any-v0", env, episodes)
    out = tmp_path / "run"
    arguments = [
        "--data",
        str(tmp_path / "minari" / "test" / "any-v0"),
        "--lm",
        str(lm_folder),
        "--offline",
        "--steps",
        "2",
    ]
    lamo.run([*arguments, "--ratio", "0.5", "--text-block", "32", "--episodes", "1", "--delayed", "--out", str(out)])
    policy, config, facts = lamo.load(out)
    assert policy.action_radius.tolist() == [action_range] * len(policy.action_radius)
    dataset = minari.MinariDataset(tmp_path / "minari" / "test" / "any-v0" / "data")
    best = Trajectories.from_minari(dataset, 0.5, 0).returns.max()
    half = best / 2 if best > 0 else 2 * best  # of a negative return, half is more
    assert config.targets == pytest.approx((best, half) if best else (0,)) and config.context == 20
    assert "plain return" in facts["reference_source"]
    scores = json.loads((out / "scores.json").read_text())
    assert scores["best"]["score"] == pytest.approx(scores["best"]["return_mean"])
    one = Trajectories.from_minari(dataset, 0.25, 0)
    assert len(one.returns) == 1


def test_tasks_are_the_papers():
    assert list(lamo.TASKS) == [
        "hopper", "halfcheetah", "walker2d", "kitchen-complete", "kitchen-partial", "kitchen-mixed", "reacher2d",
    ]  # fmt: skip
    for name, task in lamo.TASKS.items():
        env = gym.make(task.env_id)
        assert env.spec.max_episode_steps == {"reacher2d": 100}.get(name, 280 if "kitchen" in name else 1000)
        assert 1 <= max(task.targets) / task.return_scale <= 12


@pytest.mark.parametrize("name", lamo.TASKS)
def test_every_task_runs_on_the_demo(name, tmp_path, lm_folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    task, out = lamo.TASKS[name], tmp_path / "run"
    short = ["--ratio", "0.1", "--steps", "2", "--batch", "4", "--text-block", "32", "--episodes", "1"]
    lamo.run(["--env", name, "--offline", "--lm", str(lm_folder), *short, "--targets", "1", "--out", str(out)])
    policy, config, facts = lamo.load(out)
    spec = evaluation.EnvSpec.from_json(facts["env_spec"])
    assert spec.id == task.env_id.split(":")[-1] and config.data == f"demo/lamo/{name}/demo-v0"
    assert config.context == task.context and facts["return_scale"] == task.return_scale
    env = gym.make(spec)
    assert policy.action_center.shape == env.action_space.shape
    scores = json.loads((out / "scores.json").read_text())["best"]
    assert 1 <= scores["length_mean"] <= spec.max_episode_steps and math.isfinite(scores["return_mean"])


@pytest.mark.parametrize(
    "name, steps, mean, best, spread",
    [
        ("hopper", 100_000, (1000, 1800), 3000, 0.2),
        ("halfcheetah", 50_000, (2000, 5000), 4000, 0.2),
        ("walker2d", 50_000, (1000, 4000), 2500, 0.2),
        ("reacher2d", 10_000, (20, 60), 80, 0.2),
        ("kitchen-complete", 3_000, (3, 4), 3.5, 0.1),
        ("kitchen-partial", 3_000, (2, 4), 3.5, 0.2),
        ("kitchen-mixed", 3_000, (1, 3), 2.5, 0.2),
    ],
)
def test_demo_datasets_are_whole(name, steps, mean, best, spread):
    folder = HERE / "demo" / "lamo" / name / "demo-v0"
    dataset = minari.MinariDataset(folder / "data")
    assert dataset.id == f"lamo/{name}/demo-v0" and dataset.observation_space.dtype == np.float32
    returns = np.array([episode.rewards.sum() for episode in dataset])
    assert steps <= dataset.total_steps < steps + 1000
    assert mean[0] < returns.mean() < mean[1] and returns.max() > best and returns.std() > spread * returns.mean()
    metadata = dataset.storage.metadata
    assert metadata["ref_min_score"] < returns.mean() < metadata["ref_max_score"]
    env, episode = dataset.recover_environment(), dataset[0]
    observation, _ = env.reset(seed=0)  # the first steps, simulated again, are those on file
    for t in range(3):
        seen, scale = evaluation.observed(observation), np.abs(episode.observations).max()
        np.testing.assert_allclose(seen, episode.observations[t], atol=1e-3 * scale)
        observation, reward, *_ = env.step(episode.actions[t])
        assert reward == pytest.approx(episode.rewards[t], abs=1e-3)


@pytest.mark.parametrize("name, steps", [("hopper", 300), ("reacher2d", 300), ("kitchen-mixed", 100)])
def test_demo_data_can_be_made_anew(name, steps, tmp_path):
    result = command("demo/make.py", "--only", name, "--steps", steps, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    result = command("lamo.py", "--env", name, "--data", tmp_path / "lamo" / name / "demo-v0", *SHORT[3:], "--offline",
                     "--method", "dt", "--out", tmp_path / "run")  # fmt: skip
    assert result.returncode == 0, result.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "minari.cli", "show", f"lamo/{name}/demo-v0"], capture_output=True, text=True,
        env=os.environ | {"MINARI_DATASETS_PATH": str(tmp_path)},
    )  # fmt: skip
    assert "demo" in listed.stdout


# ---------------------------------------------------------------------------- with and without the network

REFUSED = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


def empty_caches(tmp_path):
    return REFUSED | {
        "HF_HOME": str(tmp_path / "hf"),
        "MINARI_DATASETS_PATH": str(tmp_path / "minari"),
        "XDG_CACHE_HOME": str(tmp_path),
    }


def test_text_is_left_alone_without_a_language_loss():
    config, _ = lamo.configure(["--offline", "--lang-coef", "0", "--text", "any.txt"])
    assert config.text is None


def test_named_demo_data_is_called_the_demo(tmp_path):
    config, notice = lamo.configure(["--method", "dt", "--data", "demo/lamo/hopper/demo-v0"])
    assert "DEMO ASSETS" in notice and "-demo" in config.out
    assert config.steps == 100_000  # nothing was missing, so the settings are the paper's


def test_defaults_fall_back_loudly(tmp_path):
    result = command(
        "lamo.py", "--ratio", 0.1, "--steps", 2, "--targets", 900, "--episodes", 1, "--out", tmp_path / "run", **empty_caches(tmp_path)
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    notice = result.stdout.splitlines()[0]
    assert "DEMO ASSETS, NOT COMPARABLE TO THE PAPER" in notice and "cannot be reached" in notice
    assert result.stdout.count(notice) == 2
    assert notice in (tmp_path / "run" / "log.jsonl").read_text()
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["demo"] is True


@pytest.mark.parametrize(
    "named, words",
    [
        (["--lm", "gpt2"], "--lm gpt2"),
        (["--data", "mujoco/hopper/medium-v0"], "mujoco/hopper/medium-v0"),
        (["--text", "wikitext"], "wikitext"),
    ],
)
def test_what_was_named_is_never_replaced(tmp_path, named, words):
    result = command("lamo.py", *named, "--out", tmp_path / "run", **empty_caches(tmp_path))
    assert result.returncode == 2
    assert words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("silent", ["server", "name service"])
def test_silent_hub_is_given_up_in_three_seconds(monkeypatch, silent):
    with socket.socket() as server:  # accepts, and never answers
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(lamo.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(lamo.constants, "HF_HUB_OFFLINE", False)
        if silent == "name service":  # which no time limit of an HTTP library reaches
            monkeypatch.setattr(lamo, "get_session", lambda: time.sleep(8))
        lamo.hub_reachable.cache_clear()
        start = time.time()
        assert lamo.hub_reachable() is False
        assert 1 < time.time() - start < 4
    lamo.hub_reachable.cache_clear()


def test_import_has_no_side_effects(tmp_path):
    code = "from lamo import GPT2, LoRALinear, LaMo, Trajectories, Text"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE)},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- bad input


def write_dataset(monkeypatch, root, action_space=None, nan=False, S=11):
    """A dataset that is wrong in the way asked for."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(3):
        observations = rng.normal(size=(6, S)).astype(np.float32)
        if nan:
            observations[2, 1] = np.nan
        actions = rng.integers(2, size=5) if action_space else rng.uniform(-1, 1, (5, 3)).astype(np.float32)
        episodes.append((observations, actions, np.ones(5)))
    spaces = {"observation_space": gym.spaces.Box(-np.inf, np.inf, (S,), np.float32), "action_space": action_space}
    save_dataset("test/bad-v0", "CartPole-v1" if action_space else "Hopper-v5", episodes, **spaces)
    return root / "test" / "bad-v0"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--env", "humanoid"], "unknown --env humanoid; choose one of hopper"),
        (["--ratio", "0"], "--ratio"),
        (["--ratio", "1.5"], "--ratio 1.5"),
        (["--ratio", "nan"], "--ratio nan"),
        (["--ratio", "0.0001"], "trajectories"),
        (["--data", "{tmp}/nowhere"], "nowhere"),
        (["--data", "{tmp}"], "not a Minari dataset"),
        (["--lm", "{tmp}"], "--lm {tmp}"),
        (["--text", "{tmp}/short.txt"], "--text-block"),
        (["--text", "{tmp}/missing.txt"], "missing.txt"),
        (["--text", "{tmp}/binary.txt"], "UTF-8"),
        (["--out", "{tmp}/short.txt/run"], "--out"),
        (["--out", "{tmp}"], "nothing is overwritten"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--train-trunk"], "--lora-rank 0"),
        (["--steps", "0"], "--steps 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--grad-clip", "0"], "--grad-clip 0"),
        (["--lm", "none", "--heads", "12"], "--width 128 is not a multiple of --heads 12"),  # the demo's width
        (["--steps", "ten"], "invalid int value"),
        (["--nonsense"], "--nonsense"),
        (["--method", "bc"], "bc"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch, arguments, words):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lamo.constants, "HF_HUB_OFFLINE", True)
    lamo.hub_reachable.cache_clear()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 40)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "run")]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        lamo.run(["--offline", "--steps", "1", *out, *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert words.format(tmp=tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    left = [path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "cache")]
    assert sorted(set(left) - set(before) - {tmp_path / "minari"}) == []
    lamo.hub_reachable.cache_clear()


@pytest.mark.parametrize(
    "kind, words",
    [
        ({"S": 7}, "shape (7,)"),
        ({"nan": True}, "trajectory"),
        ({"action_space": gym.spaces.Discrete(2), "S": 4}, "flat vectors of real numbers"),
    ],
)
def test_bad_datasets_are_refused(tmp_path, monkeypatch, kind, words):
    folder = write_dataset(monkeypatch, tmp_path / "minari", **kind)
    with pytest.raises(InputError, match=words.replace("(", r"\(").replace(")", r"\)")):
        lamo.run(["--offline", "--data", str(folder), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_bad_language_models_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig

    GPT2LMHeadModel(tiny_config()).save_pretrained(tmp_path / "lacking")
    weights = load_file(tmp_path / "lacking" / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="h.1.mlp.c_fc.weight"):
        GPT2.from_pretrained(tmp_path / "lacking", local_files_only=True)
    tiny_config().save_pretrained(tmp_path / "empty")
    with pytest.raises(InputError, match="no GPT-2 for"):
        GPT2.from_pretrained(tmp_path / "empty", local_files_only=True)
    BertConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="architecture bert"):
        GPT2.from_pretrained(tmp_path / "other", local_files_only=True)
    GPT2LMHeadModel(tiny_config(scale_attn_by_inverse_layer_idx=True)).save_pretrained(tmp_path / "scaled")
    with pytest.raises(InputError, match="differs from the original"):
        GPT2.from_pretrained(tmp_path / "scaled", local_files_only=True)
    torch.save({"x": torch.zeros(1)}, tmp_path / "empty" / "pytorch_model.bin")  # would have to be unpickled
    with pytest.raises(InputError, match="no GPT-2 for"):
        GPT2.from_pretrained(tmp_path / "empty", local_files_only=True)


def test_bad_checkpoints_are_refused(tmp_path, trained):
    with pytest.raises(InputError, match="cannot be read"):
        lamo.load(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="cannot be read"):
        lamo.load(tmp_path)
    checkpoint = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
    checkpoint["frozen"] = {name: total + 1 for name, total in checkpoint["frozen"].items()}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="is not the model"):
        lamo.load(tmp_path)
    del checkpoint["model"]["gpt2.h.1.attn.c_attn.A"]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="another shape"):
        lamo.load(tmp_path)


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    for script, *arguments in (
        ("lamo.py", "--env", "humanoid"), ("eval.py", tmp_path / "none"), ("eval.py", tmp_path, "--seed", -1)
    ):  # fmt: skip
        result = command(script, *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith(f"{script}: error: ")


def test_full_disk_is_noticed_before_training(tmp_path, monkeypatch, lm_folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    usage = lamo.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(lamo.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="too full"):
        lamo.run([*SHORT, "--lm", str(lm_folder), "--text-block", "32", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_full_disk_loses_nothing(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("the last good one")

    def fails(file):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        lamo.write_whole(path, fails)
    assert path.read_text() == "the last good one" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu(trained):
    on_cpu, _, _ = lamo.load(trained[0], "cpu")
    on_cuda, _, _ = lamo.load(trained[0], "cuda")
    trajectories = Trajectories.from_minari(minari.MinariDataset(HOPPER / "data"), 0.05, 0, device="cuda")
    batch = trajectories.batch(8, 20)
    inputs = [batch[name] for name in ("returns_to_go", "states", "actions", "timesteps")]
    torch.testing.assert_close(on_cuda.act(*inputs).cpu(), on_cpu.act(*(x.cpu() for x in inputs)), atol=1e-2, rtol=0)
    returns, _ = evaluation.rollout(on_cuda, "Hopper-v5", (1500,), 2, 0)
    assert np.isfinite(returns).all()
