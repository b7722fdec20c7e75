"""LaMo: a pre-trained language model becomes a decision transformer for offline reinforcement learning.

A reference implementation of "Unleashing the Power of Pre-trained Language Models for Offline Reinforcement Learning"
(Shi et al., ICLR 2024, https://arxiv.org/abs/2310.20587) in one file. It minimises

    L = mean squared error of the actions + lang_coef * cross-entropy of the next token of text

and four parts make it LaMo, each in one place below:

  1. the trunk starts from the weights of GPT-2          GPT2.from_pretrained
  2. LoRA adapts it while it stays frozen                LoRALinear, GPT2.add_lora
  3. MLPs embed returns, states and actions              Embedder
  4. a language loss on text joins the action loss       LaMo.language_loss, training_step

B batch, K context in steps, D model width, S state size, A action size, T tokens or steps; in the environment's units.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from pyarrow import parquet
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tqdm import tqdm

from eval import Environments, add_up, best_target, evaluate, format_scores, join_processes, rank_and_world, vector

HERE = Path(__file__).resolve().parent
NOTICE = "DEMO ASSETS, NOT COMPARABLE TO THE PAPER"


class InputError(ValueError):
    """A mistake that the user can correct; its message is one line that says what is wrong and what to do."""


@contextmanager
def on_error(advice):
    """Turn whatever goes wrong inside into an InputError: the advice, and the cause in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the libraries around us raise many kinds
        while error.__cause__:
            error = error.__cause__
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{advice} ({cause})") from error


# ---------------------------------------------------------------------------- configuration
# Tasks, with the authors' targets, scales and contexts: Gymnasium's id, Minari dataset, target returns for evaluation, what
# returns are divided by, K, and the returns that score 0 and 100 if the dataset names none (D4RL's; Fu et al. 2020).
Task = namedtuple("Task", "env_id data targets return_scale context reference")
KITCHEN = "gymnasium_robotics:FrankaKitchen-v1"
TASKS = {
    "hopper": Task("Hopper-v5", "mujoco/hopper/medium-v0", (3600, 2600, 2200, 1800), 1000, 20, (-20.272305, 3234.3)),
    "halfcheetah": Task("HalfCheetah-v5", "mujoco/halfcheetah/medium-v0", (12000, 8000, 6000, 4500), 1000, 20, (-280.178953, 12135.0)),
    "walker2d": Task("Walker2d-v5", "mujoco/walker2d/medium-v0", (5000, 4000, 3000, 2500), 1000, 20, (1.629008, 4592.3)),
    "kitchen-complete": Task(KITCHEN, "D4RL/kitchen/complete-v2", (5, 4, 3, 2, 1), 1, 20, (0, 4)),
    "kitchen-partial": Task(KITCHEN, "D4RL/kitchen/partial-v2", (5, 4, 3, 2, 1), 1, 20, (0, 4)),
    "kitchen-mixed": Task(KITCHEN, "D4RL/kitchen/mixed-v2", (5, 4, 3, 2, 1), 1, 20, (0, 4)),
    "reacher2d": Task("demo.reacher2d:lamo/Reacher2d-v0", "demo/lamo/reacher2d/demo-v0", (76, 40), 10, 5, (0, 100)),  # our data: Minari has none
}  # fmt: skip

METHODS = {  # Decision Transformer: Chen et al. 2021. Wiki-RL: Reid et al. 2022; of its losses, the language loss alone
    "lamo": {},
    "dt": {"lm": "none", "lang_coef": 0.0, "layers": 3, "width": 128, "heads": 1, "lora_rank": 0, "train_trunk": True, "embed": "linear"},
    "wiki-rl": {"lora_rank": 0, "train_trunk": True, "embed": "linear"},
}  # fmt: skip


def option(default, help, least=None, most=math.inf, **how):
    """A field of Config, with argparse's keywords for its flag; with `least`, a number from `least` to `most`."""
    kind = float if default is None else type(default)  # None: --targets, a list of floats

    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return kind(text)

    if least is not None:
        how["type"] = number
    return field(default=default, metadata={"help": f"{help} (default: {default})"} | how)


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is made from it. The defaults are those of the authors' runs."""

    env: str | None = option("hopper", "task; with --data alone, taken from the dataset", choices=TASKS)
    data: str | None = option(None, "Minari dataset id, or folder; None: the task's")
    ratio: float = option(1.0, "share of the dataset's trajectories to train on", 1e-9, 1)
    context: int = option(0, "K, time steps that the policy sees; 0: the task's", 0)
    delayed: bool = option(False, "move each trajectory's reward to its last step", action="store_true")
    method: str = option("lamo", "preset: LaMo, Decision Transformer, or Wiki-RL", choices=METHODS)
    lm: str = option("gpt2", "GPT-2 checkpoint, hub name or folder; none: random weights, without text")
    lora_rank: int = option(16, "r of LoRA; 0: no LoRA", 0)
    lora_alpha: float = option(32.0, "LoRA adds alpha / r * B A x", 0)
    lora_dropout: float = option(0.1, "dropout on the input of LoRA", 0, 1)
    train_trunk: bool = option(False, "train all weights of GPT-2; needs --lora-rank 0", action="store_true")
    embed: str = option("mlp", "embedders and action head", choices=("mlp", "linear"))
    lang_coef: float = option(0.1, "lambda, weight of the language loss; 0: no text", 0)
    text: str = option("wikitext", "text of the language loss: wikitext (103, raw), or a UTF-8 file")
    text_batch: int = option(2, "crops of text per training step", 1)
    text_block: int = option(1024, "tokens per crop, at most the language model's positions", 2)
    layers: int = option(12, "transformer blocks, for --lm none", 1)
    width: int = option(768, "D, model width, for --lm none", 1)
    heads: int = option(12, "attention heads, for --lm none", 1)
    dropout: float = option(0.1, "GPT-2's dropout on embeddings, attention and residuals", 0, 1)
    steps: int = option(100_000, "training steps", 1)
    batch: int = option(64, "B, windows of trajectories per training step", 1)
    lr: float = option(1e-4, "learning rate of AdamW", 0)
    lr_schedule: str = option("constant", "learning rate after the warm-up", choices=("constant", "cosine"))
    warmup: int = option(2500, "training steps of linear warm-up", 0)
    weight_decay: float = option(1e-5, "weight decay of AdamW", 0)
    grad_clip: float = option(0.25, "gradients are clipped to this norm", 1e-9)
    seed: int = option(0, "seed of trajectories, weights, batches and simulator", 0, 10**6)
    bf16: bool = option(False, "blocks of GPT-2 compute in bfloat16, by torch.autocast", action="store_true")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    targets: tuple[float, ...] | None = option(None, "target returns; None: the task's", -1e9, 1e9, nargs="+")
    episodes: int = option(20, "evaluation episodes per target", 1, 10_000)
    eval_every: int = option(2500, "training steps between evaluations; the end is always evaluated", 1)
    out: str | None = option(None, "folder of the run; None: runs/<env>-<method>-<ratio>-<seed>")
    demo: str | None = option(None, "demo/ for all that is not given", action="store_const", const=f"{NOTICE} (--demo)")


DEMO = {  # minutes on two CPU cores; a task's dataset is demo/lamo/<env>/demo-v0; DEMO_TUNED is from results/make.py
    "lm": "demo/gpt2-tiny", "text": "demo/text.txt", "layers": 3, "width": 128, "heads": 4, "dropout": 0.0,
    "text_block": 256, "steps": 1000, "batch": 32, "lr_schedule": "cosine", "warmup": 100, "eval_every": 1000,
}  # fmt: skip
DEMO_TUNED = {"lamo": {"lr": 1e-2, "lora_rank": 64}, "dt": {"lr": 1e-2, "dropout": 0.1}, "wiki-rl": {"lr": 3e-3}}


# ---------------------------------------------------------------------------- LoRA: part 2
class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A dropout(x), with W frozen, b, A, B trained: LaMo's part 2 (Hu et al. 2021, eq. 3).

    Each of the `parts` of a fused layer, such as GPT-2's q, k and v, has its own A (r, in) and B (out / parts, r).
    """

    def __init__(self, linear, rank, alpha, dropout, parts=3):
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias.requires_grad_(True)
        self.A = nn.Parameter(linear.weight.new_empty(parts, rank, in_features))
        self.B = nn.Parameter(linear.weight.new_zeros(parts, out_features // parts, rank))  # zero: starts as `linear`
        for A in self.A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(..., in) -> (..., out)"""
        if not self.training:  # merged into one layer
            return F.linear(x, self.weight + self.scale * (self.B @ self.A).flatten(0, 1), self.bias)
        low = F.linear(self.dropout(x), self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2])  # (..., parts, r)
        update = torch.einsum("...pr,por->...po", low, self.B).flatten(-2)  # (..., out)
        return F.linear(x, self.weight, self.bias) + self.scale * update


# ---------------------------------------------------------------------------- GPT-2: part 1
class Attention(nn.Module):
    """Causal self-attention. (B, T, D) -> output of tokens that `keep` picks; each attends to itself and those before."""

    def __init__(self, n_embd, n_head, dropout):
        assert n_embd % n_head == 0, f"a width of {n_embd} is not a multiple of {n_head} heads"
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)  # q, k and v at once
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head = n_head
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, keep):
        B, T, D = x.shape
        q, k, v = self.c_attn(x).split(D, dim=-1)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))  # (B, heads, T, D / heads)
        p = self.dropout.p if self.training else 0.0
        if p == 0 or x.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:  # with dropout, PyTorch has no fast kernel for a CPU; strips of rows skip most of what is masked
            strips = []
            for start in range(0, T, 128):
                end = min(start + 128, T)
                mask = q.new_ones(end - start, end, dtype=torch.bool).tril(start)
                strips.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask, p))
            y = torch.cat(strips, dim=2)
        return self.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, D)[keep]))


class MLP(nn.Module):
    """D -> 4 D -> D with GPT-2's tanh-approximated GELU."""

    def __init__(self, n_embd, dropout):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Transformer block with LayerNorm first. (B, T, D) -> output of the tokens that `keep` picks by indexing (B, T)"""

    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd, dropout)

    def forward(self, x, keep=...):
        x = x[keep] + self.attn(self.ln_1(x), keep)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), with the names of its published checkpoints. For --lm none, 0 tokens and 0 positions."""

    def __init__(self, vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, dropout=0.1, bf16=False):
        super().__init__()
        self.sha256, self.bf16 = None, bf16  # of the checkpoint; whether blocks compute in bfloat16
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(n_positions, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        for name, parameter in self.named_parameters():  # what a block adds to the residual stream starts smaller
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def from_pretrained(cls, name, dropout=0.1, bf16=False):
        """GPT-2 with the weights of a checkpoint, by hub name or folder, or an InputError: LaMo's part 1."""
        config = json.loads(find_file(name, "config.json").read_text())
        original = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
        original |= {"tie_word_embeddings": True, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        for key, value in original.items():
            if config.get(key, value) != value:
                raise InputError(f"--lm {name} has {key} {config[key]}, the original GPT-2 {value}; try distilgpt2")
        shape = {key: config[key] for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
        with torch.device("meta"):  # takes neither memory nor random numbers
            model = cls(**shape, dropout=dropout, bf16=bf16)
        path = find_file(name, "model.safetensors")
        model.sha256 = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
        with on_error(f"{path} does not hold the weights of a GPT-2; delete it and fetch it again"):
            weights = {key.removeprefix("transformer."): weight.float() for key, weight in load_file(path).items()}
            for key, weight in weights.items():
                if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                    weights[key] = weight.T.contiguous()  # checkpoints hold (in, out), nn.Linear (out, in)
            model.load_state_dict({key: weights[key] for key in model.state_dict()}, assign=True)
        return model

    def add_lora(self, rank, alpha, dropout):
        """Freeze all of GPT-2, then add LoRA to q, k and v of each block, and train their biases: LaMo's part 2."""
        self.requires_grad_(False)
        for block in self.h:
            block.attn.c_attn = LoRALinear(block.attn.c_attn, rank, alpha, dropout)

    def trunk(self, x, keep=...):
        """Embeddings (B, T, D) -> hidden states of the tokens that `keep` picks; token t attends to tokens 0 to t."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.drop(x)
            for block in self.h[:-1]:
                x = block(x)
            return self.ln_f(self.h[-1](x, keep))

    def hidden(self, tokens):
        """Token ids (B, T) -> hidden states (B, T, D), which wte turns into logits of the next token."""
        return self.trunk(self.wte(tokens) + self.wpe.weight[: tokens.shape[1]])


# ---------------------------------------------------------------------------- LaMo: parts 3 and 4
class Embedder(nn.Module):
    """h = W1 x + b1, e = h + W2 gelu(h) + b2: LaMo's part 3 (paper, section 4). (..., size) -> (..., D)"""

    def __init__(self, size, width):
        super().__init__()
        self.input = nn.Linear(size, width)
        self.residual = nn.Linear(width, width)

    def forward(self, x):
        h = self.input(x)
        return h + self.residual(F.gelu(h))


class LaMo(nn.Module):
    """A policy conditioned on the return to go, on a GPT-2 trunk.

    A window of K steps becomes 3 K tokens R_0, s_0, a_0, R_1, ...; the output at s_t predicts a_t (Decision
    Transformer, Chen et al. 2021). A step's tokens share a timestep embedding; GPT-2's position embeddings are for text.

    Args:
        embed: "mlp" or "linear", for the embedders and the action head.
        max_timesteps: the longest episode, in steps. return_scale: what returns are divided by.
        state_stats: (2, S) mean and standard deviation of the data. action_bounds: (2, A) lower and upper bounds.
    """

    def __init__(self, gpt2, embed, context, max_timesteps, return_scale, state_stats, action_bounds):
        super().__init__()
        (state_mean, state_std), (low, high) = torch.as_tensor(state_stats), torch.as_tensor(action_bounds)
        D, S, A = len(gpt2.ln_f.weight), len(state_mean), len(low)
        self.gpt2, self.context, self.max_timesteps = gpt2, context, max_timesteps
        embedder = Embedder if embed == "mlp" else nn.Linear
        self.embed_return = embedder(1, D)
        self.embed_state = embedder(S, D)
        self.embed_action = embedder(A, D)
        self.embed_timestep = nn.Embedding(max_timesteps, D)
        self.embed_ln = nn.LayerNorm(D)
        if embed == "mlp":
            self.action_head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, A))
        else:
            self.action_head = nn.Sequential(nn.Linear(D, A), nn.Tanh())
        self.register_buffer("return_scale", torch.tensor(float(return_scale)))
        self.register_buffer("state_mean", state_mean.float())
        self.register_buffer("state_std", state_std.float())
        self.register_buffer("action_center", (high + low).float() / 2)
        self.register_buffer("action_radius", ((high - low).float() / 2).clamp(min=1e-6))  # 0 if an action is constant

    def tokens(self, returns_to_go, states, actions, timesteps):
        """Windows (B, K), (B, K, S), (B, K, A), (B, K), in the environment's units -> their tokens (B, 3 K, D).

        Windows of fewer than K steps are padded on the right, where no real step attends to them.
        """
        states = (states - self.state_mean) / self.state_std
        states = states.nan_to_num(nan=math.nan, posinf=0.0, neginf=0.0)  # infinite entries count as the mean
        tokens = [
            self.embed_return(returns_to_go.unsqueeze(-1) / self.return_scale),
            self.embed_state(states),
            self.embed_action((actions - self.action_center) / self.action_radius),
        ]
        tokens = self.embed_ln(torch.stack(tokens, dim=2)) + self.embed_timestep(timesteps).unsqueeze(2)  # (B, K, 3, D)
        return tokens.flatten(1, 2)

    def predict(self, returns_to_go, states, actions, timesteps):
        """The action of each step, predicted from what comes before it: (B, K, A), with bounds scaled to -1 and 1."""
        state_tokens = slice(None), slice(1, None, 3)
        return self.action_head(self.gpt2.trunk(self.tokens(returns_to_go, states, actions, timesteps), state_tokens))

    @torch.no_grad()
    def act(self, returns_to_go, states, actions, timesteps, lengths):
        """The next action (B, A), in the environment's units, after a history of at most K steps; see `tokens`.

        Of each window, `lengths` (B,) steps are real; the action of the last one is unknown, and ignored.
        """
        tokens = self.tokens(returns_to_go, states, actions, timesteps)[:, :-1]
        newest_state = torch.arange(len(tokens), device=tokens.device), 3 * lengths - 2
        predicted = self.action_head(self.gpt2.trunk(tokens, newest_state))
        return predicted.clamp(-1, 1) * self.action_radius + self.action_center

    def action_loss(self, batch):
        """Mean over the real steps of a batch of Trajectories, and over A, of the squared error in actions."""
        predicted = self.predict(batch["returns_to_go"], batch["states"], batch["actions"], batch["timesteps"])
        actions = (batch["actions"] - self.action_center) / self.action_radius  # -1 and 1 at the bounds
        error = (predicted - actions).square().mean(dim=-1)  # (B, K)
        return (error * batch["mask"]).sum() / batch["mask"].sum()

    def language_loss(self, tokens):
        """Mean cross-entropy in nats of each next token of text (B, T): LaMo's part 4."""
        hidden = self.gpt2.hidden(tokens)[:, :-1].flatten(0, 1)
        chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=512)  # all logits at once would take the most memory
        return F.linear_cross_entropy(hidden, self.gpt2.wte.weight, tokens[:, 1:].flatten(), options=chunks)


# ---------------------------------------------------------------------------- data
class Trajectories:
    """Trajectories, from lists of arrays (T, S), (T, A), (T,), as flat tensors of N steps; a batch is one gather."""

    def __init__(self, observations, actions, rewards, device="cpu"):
        self.returns = np.array([reward.sum() for reward in rewards])  # of each trajectory
        self.lengths = np.array([len(reward) for reward in rewards])
        states, actions = np.concatenate(observations), np.concatenate(actions)
        if np.isnan(states).any() or not (np.isfinite(actions).all() and np.isfinite(self.returns).all()):
            raise InputError("a trajectory has an observation that is NaN, or an action or a reward that is not finite")
        columns = (column[np.isfinite(column)].astype(np.float64) for column in states.T)  # infinities do not count
        statistics = [(column.mean(), column.std()) if len(column) else (0.0, 0.0) for column in columns]
        self.state_mean, std = np.transpose(statistics)  # (S,) each
        self.state_std = np.where(std > 1e-6, std + 1e-6, 1.0)  # (S,); a constant is only centred
        tensor = functools.partial(torch.as_tensor, dtype=torch.float32, device=device)
        self.states, self.actions = tensor(states), tensor(actions)  # (N, S), (N, A)
        self.returns_to_go = tensor(np.concatenate([reward[::-1].cumsum()[::-1] for reward in rewards]))  # (N,)
        self.timesteps = torch.as_tensor(np.concatenate([np.arange(n) for n in self.lengths]), device=device)
        self.last = torch.as_tensor(np.repeat(self.lengths.cumsum() - 1, self.lengths), device=device)  # (N,)

    @classmethod
    def from_minari(cls, dataset, ratio, seed, delayed=False, device="cpu"):
        """A random share `ratio` of the trajectories of a MinariDataset; `delayed` moves all reward to the last step."""
        total = dataset.total_episodes
        count = int(ratio * total + 1e-9)
        if count < 1:
            raise InputError(f"--ratio {ratio:g} of {total} trajectories is none")
        chosen = np.sort(np.random.default_rng(seed).permutation(dataset.episode_indices)[:count])
        episodes = list(tqdm(dataset.iterate_episodes(chosen), "reading", count, leave=False, disable=None))
        rewards = [recorded_rewards(dataset, episode).astype(np.float64) for episode in episodes]
        if delayed:
            rewards = [np.append(np.zeros(len(reward) - 1), reward.sum()) for reward in rewards]
        states = [vector(episode.observations)[:-1] for episode in episodes]  # after the last, no action was taken
        return cls(states, [episode.actions for episode in episodes], rewards, device)

    def batch(self, size, context):
        """Random windows: a start uniform over all steps, then up to `context` steps of its trajectory.

        By name: states (B, K, S), actions (B, K, A), returns_to_go, timesteps and mask (B, K). Where a trajectory ends
        within the window, its last step fills the rest, and mask is False.
        """
        start = torch.randint(len(self.states), (size, 1), device=self.states.device)
        step = start + torch.arange(context, device=start.device)  # (B, K)
        last = self.last[start]  # index of the trajectory's last step
        names = "states", "actions", "returns_to_go", "timesteps"
        return {name: getattr(self, name)[torch.minimum(step, last)] for name in names} | {"mask": step <= last}


class Text:
    """Tokens to train on and to hold out, at least `block` of each, as flat arrays; a batch is random crops of `block`."""

    def __init__(self, tokens, held_out, block):
        if min(len(tokens), len(held_out)) < block:
            raise InputError(f"lower --text-block {block}: {len(tokens)} tokens of text, {len(held_out)} held out")
        self.tokens, self.held_out, self.block = tokens, held_out, block

    def batch(self, size):
        """Random crops of the training part: (B, T) int64 tensor on the CPU."""
        starts = torch.randint(len(self.tokens) - self.block + 1, (size,)).tolist()
        return torch.from_numpy(np.stack([self.tokens[i : i + self.block] for i in starts]).astype(np.int64))

    @torch.no_grad()
    def held_out_loss(self, model):
        """Language loss of a LaMo in evaluation mode on evenly spaced held-out blocks, in nats per token."""
        starts = np.linspace(0, len(self.held_out) - self.block, min(32, len(self.held_out) // self.block)).astype(int)
        crops = (torch.from_numpy(self.held_out[None, i : i + self.block].astype(np.int64)) for i in starts)
        return float(np.mean([model.language_loss(crop.to(model.state_mean.device)).item() for crop in crops]))


# ---------------------------------------------------------------------------- training
LOG_EVERY, SAVE_EVERY = 50, 60  # training steps, seconds
VERSION = 2  # of the checkpoints
SEEDS = 10_000  # a run evaluates with the simulator's seeds from SEEDS * seed on; no two values of --seed share one


def learning_rate(step, config):
    """Learning rate of a step, counted from 0: linear warm-up, then constant or a cosine down to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / (config.steps - config.warmup)))


def make_optimizer(model, config):
    """AdamW over the trainable parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay, eps=1e-6, fused=trained[0].is_cuda)


def training_step(model, optimizer, trajectories, text, step, config):
    """Take optimiser step `step`, from 0, on L: LaMo's part 4. -> the losses before it and the gradient's norm, by name.

    Under torchrun, every process draws the same batch and computes its share; gradients and losses are then summed.
    """
    seed = config.seed * config.steps + step  # of its own, so that a run can resume at any step
    torch.manual_seed(seed)
    rank, world = rank_and_world()
    group = optimizer.param_groups[0]
    group["lr"] = learning_rate(step, config)
    batch = trajectories.batch(config.batch, config.context)
    share = {name: part[rank::world] for name, part in batch.items()}
    crops = text.batch(config.text_batch)[rank::world] if text else None
    if rank > 0:
        torch.manual_seed(seed + rank * 10**9)  # each process has its own dropout
    optimizer.zero_grad()
    action_loss = model.action_loss(share) * (share["mask"].sum() / batch["mask"].sum())
    action_loss.backward()  # before the language loss, so that only one graph is in memory
    losses = {"action_loss": action_loss.detach()}
    if text:
        language_loss = model.language_loss(crops.to(config.device)) / world
        (config.lang_coef * language_loss).backward()
        losses["language_loss"] = language_loss.detach()
    if world > 1:
        for part in [*(p.grad for p in group["params"] if p.grad is not None), *losses.values()]:
            add_up(part)
    losses["gradient_norm"] = nn.utils.clip_grad_norm_(group["params"], config.grad_clip)
    optimizer.step()
    return {name: value.item() for name, value in losses.items()}


def train(model, trajectories, text, environments, config, header, out, checkpoint=None):
    """Train and evaluate, from the start or from a checkpoint that the model has loaded -> the last evaluation's scores.

    The folder `out` gets log.jsonl and checkpoint.pt; `header`, which describes the run, goes into both.
    """
    optimizer = make_optimizer(model, config)
    start, log_size, recent, saved_at = 0, 0, {}, -math.inf  # recent: losses since the last line of the log
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, log_size, recent = checkpoint["step"], checkpoint["log_size"], checkpoint["recent"]
    model.train()
    stop = []  # a first signal lets the step or evaluation finish, a second one ends the run at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1) if stop else stop.append(True))
    with open(out / "log.jsonl", "a") if rank_and_world()[0] == 0 else tempfile.TemporaryFile("w") as log:
        log.seek(log.truncate(log_size))  # without what was logged after the checkpoint
        if not checkpoint:
            print(json.dumps(header), file=log, flush=True)
        progress = tqdm(range(start, config.steps + 1), "training", config.steps, initial=start, mininterval=1)
        for step in progress:  # `step` steps have been taken
            evaluating = step == config.steps or (step > 0 and step % config.eval_every == 0)
            stopping = add_up(torch.tensor(len(stop))) > 0  # of torchrun's processes, all or none
            if recent and (evaluating or step % LOG_EVERY == 0):
                means = {name: float(np.mean(values)) for name, values in recent.items()}
                progress.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
                print(json.dumps({"step": step} | means), file=log, flush=True)
                recent = {}
            if evaluating or stopping or time.monotonic() > saved_at + SAVE_EVERY:
                state = {"optimizer": optimizer.state_dict(), "step": step, "log_size": log.tell(), "recent": recent}
                if rank_and_world()[0] == 0:
                    save(out / "checkpoint.pt", model, header, state)
                saved_at, saved = time.monotonic(), step
            if stopping:
                sys.exit(f"stopped after {step} steps; resume with: python lamo.py --resume {out}")
            if evaluating:
                asked = config.targets, config.episodes, config.seed * SEEDS, header["reference"], config.delayed
                scores = evaluate(model, environments, *asked)
                print(json.dumps({"step": step, "evaluation": scores}), file=log, flush=True)
                tqdm.write(f"\nstep {step}\n{format_scores(scores, header['reference'])}")
            if step == config.steps:
                return scores
            for name, value in training_step(model, optimizer, trajectories, text, step, config).items():
                recent.setdefault(name, []).append(value)
                if not math.isfinite(value):
                    raise InputError(f"{name} is {value} in step {step + 1}; lower --lr ({out} has step {saved})")


# ---------------------------------------------------------------------------- language models, text and datasets
def find_file(name, filename, kind="model"):
    """Path of a file in the folder `name`, or in the hub's repository of that name, downloaded unless it is cached."""
    for folder in (Path(name), HERE / name):
        if folder.is_dir():
            return (folder / filename).resolve(strict=True)
    with on_error(f"no {filename} of {name} here, nor from the Hugging Face hub; try again, or add --demo"):
        cached = try_to_load_from_cache(name, filename, repo_type=kind)
        if isinstance(cached, str):
            return Path(cached)
        get_session().head(hf_hub_url(name, filename, repo_type=kind), timeout=5)  # a download retries for minutes
        return Path(hf_hub_download(name, filename, repo_type=kind))


def tokenize(path, tokenizer):
    """Token ids of a file's text, in one flat array."""
    if path.suffix == ".parquet":
        documents = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    else:
        documents = path.read_text("utf-8").splitlines(keepends=True)
    parts = [np.empty(0, np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)]
    for start in tqdm(range(0, len(documents), 1000), f"tokenising {path.name}", leave=False, disable=None):
        encodings = tokenizer.encode_batch(documents[start : start + 1000], add_special_tokens=False)
        parts += [np.array(encoding.ids, parts[0].dtype) for encoding in encodings]
    return np.concatenate(parts)


@functools.cache
def load_text(lm, text, block):
    """The Text of a file, which holds out its last tenth, or of WikiText-103, which holds out its validation split."""
    with on_error(f"cannot use the text {text}; give a UTF-8 file with --text"):
        tokenizer = Tokenizer.from_file(str(find_file(lm, "tokenizer.json")))
        tokenizer.no_padding()  # which the file may have turned on
        tokenizer.no_truncation()
        if text == "wikitext":
            parts = "train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"
            files = [f"wikitext-103-raw-v1/{part}.parquet" for part in parts]
            paths = [find_file("Salesforce/wikitext", file, "dataset") for file in files]
            *train, held_out = (tokenize(path, tokenizer) for path in paths)
        else:
            tokens = tokenize(Path(text) if Path(text).exists() else HERE / text, tokenizer)
            *train, held_out = np.split(tokens, [len(tokens) * 9 // 10])
        return Text(np.concatenate(train), held_out, block)


def load_dataset(name):
    """A MinariDataset by folder or id: from the folder, from where Minari keeps its own, or from the hub."""
    minari_root = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    for folder in (Path(name), HERE / name, minari_root / name):
        if len(list(folder.glob("data/*"))) > 1:  # a download that Minari did not finish leaves only metadata.json
            return minari.MinariDataset(folder / "data")
    namespace, _, rest = name.partition("/")
    files = f"{rest}/data/main_data.hdf5", f"{rest}/data/metadata.json"  # the large one first: both of one commit
    paths = [find_file(f"farama-minari/{namespace}", file, "dataset") for file in files]
    return minari.MinariDataset(paths[0].parent)


def recorded_rewards(dataset, episode):
    """The rewards (T,) of an episode. Minari's kitchen rewards a finished subtask in every later step; here, only once."""
    if not dataset.env_spec or dataset.env_spec.kwargs.get("remove_task_when_completed", True):
        return episode.rewards
    achieved, desired = (episode.observations[name] for name in ("achieved_goal", "desired_goal"))
    near = [np.linalg.norm(achieved[task][1:] - desired[task][1:], axis=-1) < 0.3 for task in desired]  # (subtasks, T)
    return np.diff(np.maximum.accumulate(near, axis=1).sum(axis=0), prepend=0)


def evaluation_spec(dataset, env_id):
    """The EnvSpec of a MinariDataset's environment; if that cannot be made, of `env_id`, except for the kitchen."""
    try:
        spec = dataset.recover_environment(eval_env=True).spec
    except Exception as error:
        if env_id in (None, KITCHEN):  # only the data knows the subtasks
            raise
        print(f"evaluating in {env_id}, because the dataset's own environment cannot be made ({error})")
        spec = gym.make(env_id).spec
    if spec.id.startswith("FrankaKitchen"):
        spec.kwargs |= {"remove_task_when_completed": True, "terminate_on_tasks_completed": True}
    return spec


# ---------------------------------------------------------------------------- runs
def build_model(config, arguments, checkpoint=None):
    """The LaMo of a Config, freshly built or with a checkpoint's weights; `arguments` are the rest of LaMo's."""
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    with on_error("cannot build the model"):
        if config.lm == "none":
            gpt2 = GPT2(0, 0, config.width, config.layers, config.heads, config.dropout, config.bf16)
        else:
            gpt2 = GPT2.from_pretrained(config.lm, config.dropout, config.bf16)
        gpt2.requires_grad_(config.train_trunk)
        if config.lora_rank > 0:
            gpt2.add_lora(config.lora_rank, config.lora_alpha, config.lora_dropout)
        model = LaMo(gpt2, config.embed, config.context, **arguments)
        if checkpoint:
            if checkpoint["header"]["lm_sha256"] != gpt2.sha256:
                raise InputError(f"--lm {config.lm} is not the one that the run was trained on")
            model.load_state_dict(model.state_dict() | checkpoint["weights"])
        return model.to(config.device)


def save(path, model, header, state):
    """Write a checkpoint. Of a frozen language model it has the name and a checksum, not the weights."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad and model.gpt2.sha256}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    partial = path.with_suffix(".partial")
    with on_error(f"cannot write {path}; free some space, then start again, or --resume {path.parent}"):
        try:
            with open(partial, "wb") as file:
                torch.save({"version": VERSION, "header": header, "weights": weights} | state, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_checkpoint(folder):
    """The checkpoint in a run's folder, by name: header, weights, and the state of the training."""
    path = Path(folder) / "checkpoint.pt"
    with on_error(f"{path} is not a checkpoint that can be read; give the folder of a run"):
        if zipfile.ZipFile(path).testzip():  # compares checksums
            raise ValueError("the file has been altered")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["version"] != VERSION:
            raise ValueError(f"it has version {checkpoint['version']}, this lamo.py reads {VERSION}")
        return checkpoint


def load(folder, device="cpu"):
    """The trained policy in a run's folder -> LaMo in evaluation mode, its Config, and the header that `run` made."""
    checkpoint = read_checkpoint(folder)
    config = Config(**checkpoint["header"]["config"] | {"device": device})
    return build_model(config, checkpoint["header"]["arguments"], checkpoint).eval(), config, checkpoint["header"]


def configure(given):
    """The Config of the given options, on top of the method's preset, on top of the demo's if `out_of_reach`."""
    given = ({"env": None} if "data" in given else {}) | given  # a dataset brings its environment
    config = Config(**METHODS[given.get("method", "lamo")] | given)
    named = given.keys() & {"lm", "data", "text", "device", "demo"}  # what is named is never replaced
    why = None if named or rank_and_world()[1] > 1 else out_of_reach(config)  # torchrun's processes could disagree
    if why:
        given = given | {"demo": f"{NOTICE} ({why})"}
    if "demo" in given:
        demo = DEMO | DEMO_TUNED[config.method] | {"data": f"demo/lamo/{config.env}/demo-v0"}
        config = Config(**demo | METHODS[config.method] | given)
    if config.lang_coef > 0 and (config.lm == "none" or not (config.lora_rank or config.train_trunk)):
        raise InputError("the language loss needs a language model, and LoRA or --train-trunk; add --lang-coef 0")
    if config.train_trunk and config.lora_rank > 0:
        raise InputError("--train-trunk trains all weights, LoRA freezes them; add --lora-rank 0")
    own = TASKS[config.env]._asdict() if config.env else {"context": 20}
    return replace(config, **{name: getattr(config, name) or own.get(name) for name in ("data", "targets", "context")})


def out_of_reach(config):
    """Why the authors' run cannot start here, in words; None if it can, and then its files have been fetched."""
    if not torch.cuda.is_available():
        return "no CUDA GPU; to train with the paper's settings anyway, add --device cpu"
    try:
        with on_error("the files of the authors' run cannot be used"):
            load_dataset(TASKS[config.env].data)
            for filename in ("config.json", "model.safetensors") if config.lm != "none" else ():
                find_file(config.lm, filename)
            if config.lang_coef > 0:
                load_text(config.lm, config.text, config.text_block)
    except InputError as error:
        return str(error)


def run(config, out=None, checkpoint=None):
    """Train and evaluate as a Config says, into the folder `out`; without one, only measure where the time goes."""
    started, task = time.time(), TASKS.get(config.env)
    with on_error(f"--device {config.device} cannot be used here; give --device cpu, or one that is here"):
        torch.zeros(1, device=config.device)
    torch.manual_seed(config.seed)
    with on_error(f"--lm {config.lm} is neither a GPT-2 of the hub nor a folder with config.json and tokenizer.json"):
        for filename in ["config.json"] * (config.lm != "none") + ["tokenizer.json"] * (config.lang_coef > 0):
            find_file(config.lm, filename)  # before anything large is fetched
    with on_error(f"cannot use the dataset {config.data}"):
        dataset = load_dataset(config.data)
        environments = Environments(evaluation_spec(dataset, task and task.env_id))
        trajectories = Trajectories.from_minari(dataset, config.ratio, config.seed, config.delayed, config.device)
        shapes = trajectories.states.shape[1:], trajectories.actions.shape[1:]
        if shapes != (environments.observation_space.shape, environments.action_space.shape):
            raise InputError(f"--data {config.data} has observations and actions of {shapes}, unlike its environment")
    returns, best = trajectories.returns, float(trajectories.returns.max())
    config = replace(config, targets=config.targets or tuple(dict.fromkeys((best, best / 2 if best > 0 else 2 * best))))
    arguments = {
        "max_timesteps": max(int(trajectories.lengths.max()), environments.spec.max_episode_steps or 0),
        "return_scale": task.return_scale if task else 10.0 ** round(math.log10(max(abs(returns).max(), 1e-3))),
        "state_stats": [trajectories.state_mean.tolist(), trajectories.state_std.tolist()],
        "action_bounds": [environments.action_space.low.tolist(), environments.action_space.high.tolist()],
    }
    model = build_model(config, arguments, checkpoint)
    text = load_text(config.lm, config.text, config.text_block) if config.lang_coef > 0 else None
    recorded = [dataset.storage.metadata.get(name) for name in ("ref_min_score", "ref_max_score")]
    reference = recorded if None not in recorded else task.reference if task else (0, 100)
    arrays = [part.cpu().numpy() for part in (trajectories.states, trajectories.actions, trajectories.returns_to_go)]
    arrays += [text.tokens, text.held_out] if text else []
    vocabulary, positions = len(model.gpt2.wte.weight), len(model.gpt2.wpe.weight)
    if text and (config.text_block > positions or max(text.tokens.max(), text.held_out.max()) >= vocabulary):
        raise InputError(f"--lm {config.lm}: {positions} positions, {vocabulary} tokens; mend --text-block, tokenizer")
    header = {
        "config": asdict(config), "arguments": arguments, "reference": reference,
        "lm_sha256": model.gpt2.sha256, "env_spec": environments.spec.to_json(), "trajectories": len(returns),
        "data_sha256": hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest(),
        "device": torch.cuda.get_device_name(config.device) if model.state_mean.is_cuda else config.device,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "mujoco", "minari")},
        "commit": subprocess.getoutput(f'git -C "{HERE}" describe --always --dirty 2>{os.devnull}') or None,
    }  # fmt: skip
    total, trained = np.sum([(p.numel(), p.numel() * p.requires_grad) for p in model.parameters()], axis=0)
    chosen = f"{len(returns)} of {dataset.total_episodes} trajectories, {len(trajectories.states)} steps"
    print(f"data    {config.data}: {chosen}, returns {returns.min():.1f} to {best:.1f}, mean {returns.mean():.1f}")
    print(f"model   {config.method} on {config.lm}: {trained:,} of {total:,} parameters train")
    if text:
        print(f"text    {config.text}: {len(text.tokens):,} tokens to train on, {len(text.held_out):,} held out")
    if out is None:
        from results.timing import profile

        return profile(model, trajectories, text, environments, config)
    print(f"run     {config.steps:,} steps on {config.device}, into {out} (Ctrl-C stops after a step)", flush=True)
    if checkpoint and checkpoint["header"]["data_sha256"] != header["data_sha256"]:
        raise InputError(f"--data {config.data} or --text {config.text} has changed since then; start a new run")
    header["text_loss"] = checkpoint["header"]["text_loss"] if checkpoint else text and text.held_out_loss(model.eval())
    scores = train(model, trajectories, text, environments, config, header, out, checkpoint)
    if rank_and_world()[0] > 0:
        return
    after = text and text.held_out_loss(model.eval())
    target, row = best_target(scores)
    summary = {"best": {"target": float(target)} | row, "targets": scores, "dataset": config.data, "lm": config.lm}
    summary |= {"demo": bool(config.demo), "text_loss_before": header["text_loss"], "text_loss_after": after}
    (out / "scores.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{config.demo or config.data}\n{format_scores(scores, reference)}")
    if text:
        print(f"language loss on held-out text: {header['text_loss']:.3f} before, {after:.3f} after (nats per token)")
    print(f"{time.time() - started:.0f} s, all in {out}; evaluate it again: python eval.py {out}")


def main(arguments):
    """Train and evaluate as the command line says."""
    parser = argparse.ArgumentParser("lamo.py", argparse.SUPPRESS, __doc__.split("\n")[0], allow_abbrev=False)
    for item in fields(Config):
        parser.add_argument(f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, **item.metadata)
    parser.add_argument("--resume", metavar="FOLDER", default=argparse.SUPPRESS, help="resume a stopped run")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, and stop")
    given = vars(parser.parse_args(arguments))
    profiling = given.pop("profile")
    join_processes()
    if "resume" in given:
        out = Path(given.pop("resume"))
        if given.keys() - {"device"}:
            raise InputError("--resume uses the run's own settings; give no other option than --device")
        checkpoint = read_checkpoint(out)
        config = Config(**checkpoint["header"]["config"] | given)
    else:
        checkpoint, config = None, configure(given)
        task = config.env or str(config.data).strip("/").replace("/", "-")
        name = f"{task}-{config.method}-{config.ratio:g}-{config.seed}{'-demo' if config.demo else ''}"
        out = Path(config.out or f"runs/{name}")
    rank, world = rank_and_world()
    if config.batch % world or (config.lang_coef > 0 and config.text_batch % world):
        raise InputError(f"--batch and --text-batch must be multiples of {world}, the number of processes")
    print(config.demo or f"{config.method} on {config.data}", flush=True)
    if profiling:
        return run(config)
    if rank == 0 and not checkpoint:
        with on_error(f"cannot make the folder {out}; choose another --out, delete it, or --resume {out}"):
            out.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # until training begins
    try:
        run(config, out, checkpoint)
    except BaseException as error:
        if rank == 0 and not checkpoint and not (out / "checkpoint.pt").exists():
            shutil.rmtree(out, ignore_errors=True)  # nothing half-written
        elif isinstance(error, OSError):
            raise InputError(f"{error}; once that is fixed, --resume {out}") from error
        raise


def run_command(main):
    """Call main with the command line's arguments; a mistake of the user ends in one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        stream = sys.__stderr__ if rank_and_world()[0] > 0 else sys.stderr  # heard from any process
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=stream)
        sys.exit(2)


if __name__ == "__main__":
    run_command(main)
