"""LaMo: a pre-trained language model as a decision transformer for offline reinforcement learning.

Reference implementation of "Unleashing the Power of Pre-trained Language Models for Offline
Reinforcement Learning" (Shi et al., ICLR 2024, https://arxiv.org/abs/2310.20587) in one file.

    L = mean squared error of the actions + lang_coef * cross-entropy of the next token of text

Four parts make it LaMo, each in one place below:
  1. the trunk starts from a language model's weights    GPT2.from_pretrained
  2. it stays frozen and is adapted through LoRA         LoRALinear, GPT2.add_lora
  3. MLPs embed returns, states and actions              Embedder, LaMo.__init__
  4. a language loss on text is kept beside the actions  LaMo.language_loss, LaMo.loss

    python lamo.py --env hopper --ratio 0.1                # GPU if there is one, else CPU
    python lamo.py --env hopper --ratio 0.1 --offline      # no network: small demo assets, minutes on a CPU
    python eval.py runs/hopper-lamo-0.1-0                  # evaluate the checkpoint again, --video out.gif

Shapes: B batch, K context in time steps, D model width, S state size, A action size, T tokens.
Everything outside the model is in the environment's own units; the model normalises inside.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import threading
import time
import typing
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from pydoc_data.topics import topics

import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache
from pyarrow import parquet
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2Model
from transformers.utils.logging import disable_progress_bar

from eval import (
    InputError,
    Parser,
    best_target,
    command_line,
    environment,
    evaluate,
    explained,
    format_scores,
    observed,
    pick_device,
    recorded_rewards,
    references,
)

# ---------------------------------------------------------------------------- configuration


def option(default, help, low=None, high=None, choices=None):
    """A field of Config, with the help text of its flag and the values it may take."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting; the command line is made from it. The defaults are those of the original runs."""

    # the task and its data
    env: str = option("hopper", "task: hopper, halfcheetah, walker2d, ...; the rows of TASKS")
    data: str | None = option(None, "Minari dataset id, or folder; default: the task's")
    ratio: float = option(1.0, "share of the dataset's trajectories to train on, in (0, 1]", 0, 1)
    context: int | None = option(None, "K, time steps that the policy sees; default: the task's", 1)
    delayed: bool = option(False, "move each trajectory's reward to its last step (Chen et al. 2021)")
    # the method
    method: str = option("lamo", "preset for the options of this block", choices=("lamo", "dt", "wiki-rl"))
    lm: str = option(
        "gpt2", "GPT-2 checkpoint, hub name or folder; none: random weights, frozen too without --train-trunk"
    )
    lora_rank: int = option(16, "r of LoRA; 0: no LoRA", 0)
    lora_alpha: float = option(32.0, "LoRA adds alpha / r * B A x", 0)
    lora_dropout: float = option(0.1, "dropout on the input of LoRA", 0, 1)
    train_trunk: bool = option(False, "train all of GPT-2's weights; goes with --lora-rank 0")
    embed: str = option("mlp", "embedders and action head", choices=("mlp", "linear"))
    lang_coef: float = option(0.1, "lambda, weight of the language loss; 0: no text", 0)
    text: str | None = option(None, "UTF-8 text file for the language loss; default: WikiText-103")
    text_batch: int = option(2, "crops of text per training step", 1)
    text_block: int = option(1024, "tokens per crop; at most the language model's positions", 2)
    layers: int = option(12, "transformer blocks, for --lm none", 1)
    width: int = option(768, "D, model width, for --lm none", 1)
    heads: int = option(12, "attention heads, for --lm none", 1)
    dropout: float = option(0.1, "GPT-2's dropout on embeddings, attention and residuals", 0, 1)
    # the optimisation
    steps: int = option(100_000, "training steps", 1)
    batch: int = option(64, "B, windows of trajectories per training step", 1)
    lr: float = option(1e-4, "learning rate of AdamW", 0)
    lr_schedule: str = option("constant", "learning rate after the warm-up", choices=("constant", "cosine"))
    warmup: int = option(2500, "training steps of linear warm-up", 0)
    weight_decay: float = option(1e-5, "weight decay of AdamW", 0)
    grad_clip: float = option(0.25, "largest norm of the gradient", 1e-6)
    seed: int = option(0, "seeds the choice of trajectories, weights, batches and simulator", 0)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    # the evaluation
    targets: tuple[float, ...] | None = option(None, "returns to ask for; default: the task's")
    episodes: int = option(20, "evaluation episodes per target", 1)
    eval_every: int = option(2500, "training steps between evaluations; the end is always evaluated", 1)
    # where things are
    out: str | None = option(None, "folder of the run; default: runs/<env>-<method>-<ratio>-<seed>")
    offline: bool = option(False, "use no network: demo assets for what is not named")


METHODS = {
    "lamo": {},
    # Decision Transformer (Chen et al. 2021): small, from scratch, no text
    "dt": {
        "lm": "none", "layers": 3, "width": 128, "heads": 1, "lora_rank": 0, "train_trunk": True, "embed": "linear",
        "lang_coef": 0.0,
    },
    # "Can Wikipedia Help Offline Reinforcement Learning?" (Reid et al. 2022): fine-tunes the whole language model
    "wiki-rl": {"lora_rank": 0, "train_trunk": True, "embed": "linear"},
}  # fmt: skip

# What defaults become with demo assets, so that a run ends in minutes on two CPU cores.
DEMO_SETTINGS = {
    "layers": 3, "width": 128, "heads": 4, "dropout": 0.0, "text_block": 256, "steps": 1000, "batch": 32, "lr": 1e-3,
    "lr_schedule": "cosine", "warmup": 100, "eval_every": 1000,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task of the paper (its appendix; the authors' code)."""

    env_id: str  # Gymnasium's
    data: str  # Minari dataset id, or folder
    targets: tuple[float, ...]  # returns to ask for in evaluation
    return_scale: float  # divides returns
    context: int  # K
    reference: tuple[float, float]  # returns that score 0 and 100: D4RL's random and expert (Fu et al. 2020)


TASKS = {
    "hopper": Task("Hopper-v5", "mujoco/hopper/medium-v0", (3600, 2600, 2200, 1800), 1000, 20, (-20.272305, 3234.3)),
    "halfcheetah": Task("HalfCheetah-v5", "mujoco/halfcheetah/medium-v0", (12000, 8000, 6000, 4500), 1000, 20, (-280.178953, 12135.0)),
    "walker2d": Task("Walker2d-v5", "mujoco/walker2d/medium-v0", (5000, 4000, 3000, 2500), 1000, 20, (1.629008, 4592.3)),
    "kitchen-complete": Task("gymnasium_robotics:FrankaKitchen-v1", "D4RL/kitchen/complete-v2", (5, 4, 3, 2, 1), 1, 20, (0, 4)),
    "kitchen-partial": Task("gymnasium_robotics:FrankaKitchen-v1", "D4RL/kitchen/partial-v2", (5, 4, 3, 2, 1), 1, 20, (0, 4)),
    "kitchen-mixed": Task("gymnasium_robotics:FrankaKitchen-v1", "D4RL/kitchen/mixed-v2", (5, 4, 3, 2, 1), 1, 20, (0, 4)),
    # The paper's data for it is not on Minari; ours is used whether there is a network or not.
    "reacher2d": Task("eval:lamo/Reacher2d-v0", "demo/lamo/reacher2d/demo-v0", (76, 40), 10, 5, (0, 100)),
}  # fmt: skip

# ---------------------------------------------------------------------------- LoRA: part 2


class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A dropout(x), with W frozen, b, A, B trained: LaMo's part 2 (Hu et al. 2021, equation 3).

    A fused projection such as GPT-2's [q; k; v] gets a rank-r pair of its own for each part. B starts
    at zero, so that the layer starts as the linear layer it was made from.

    Args:
        linear: the pre-trained layer, in_features -> out_features; its tensors are shared, not copied.
        parts: equal slices of out_features, each with its own A (r, in) and B (out / parts, r).
    """

    def __init__(self, linear, rank, alpha, dropout, parts=3):
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias.requires_grad_(True)
        self.A = nn.Parameter(linear.weight.new_empty(parts, rank, in_features))
        self.B = nn.Parameter(linear.weight.new_zeros(parts, out_features // parts, rank))
        for A in self.A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(..., in_features) -> (..., out_features)"""
        low = self.dropout(x) @ self.A.flatten(0, 1).T  # (..., parts * r)
        low = low.unflatten(-1, self.A.shape[:2])  # (..., parts, r)
        update = torch.einsum("...pr,por->...po", low, self.B).flatten(-2)  # (..., out_features)
        return F.linear(x, self.weight, self.bias) + self.scale * update

    @torch.no_grad()
    def merge(self):
        """Fold the update into W -> a plain nn.Linear that gives the same outputs."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, device="meta")
        linear.weight = nn.Parameter(self.weight + self.scale * (self.B @ self.A).flatten(0, 1))
        linear.bias = self.bias
        return linear


# ---------------------------------------------------------------------------- GPT-2: part 1


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.c_attn(x).split(D, dim=-1)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))  # (B, heads, T, D / heads)
        dropout = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, D)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """D -> 4 D -> D with GPT-2's tanh-approximated GELU."""

    def __init__(self, config):
        super().__init__()
        hidden = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, hidden)
        self.c_proj = nn.Linear(hidden, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Pre-LayerNorm transformer block."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), with the names of its parameters as in the published checkpoints.

    Args:
        config: transformers' GPT2Config. `vocab_size=0, n_positions=0` makes a trunk without text.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # what a block adds to the residual stream starts smaller
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def trunk(self, x):
        """Embeddings (B, T, D) -> hidden states (B, T, D), token t of which has seen tokens 0 to t."""
        x = self.drop(x)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def forward(self, tokens):
        """Token ids (B, T) -> logits of the next token (B, T, vocabulary)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.trunk(self.wte(tokens) + self.wpe(positions))
        return hidden @ self.wte.weight.T

    @classmethod
    def from_pretrained(cls, name, dropout=0.1, local_files_only=False):
        """GPT-2 with the weights of a checkpoint: LaMo's part 1.

        Args:
            name: hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, ...) or folder with config.json and
                safetensors weights.
        Raises:
            InputError: it cannot be had, is not a GPT-2, or lacks weights.
        """
        with explained(
            f"no GPT-2 for --lm {name}; give a folder with config.json and model.safetensors, or --offline alone"
        ):
            config = AutoConfig.from_pretrained(name, local_files_only=local_files_only)
            if config.model_type != "gpt2":
                raise InputError(f"--lm {name} is of the architecture {config.model_type}, not gpt2; try distilgpt2")
            options = (config.activation_function, config.tie_word_embeddings, config.scale_attn_weights)
            if options != ("gelu_new", True, True) or config.scale_attn_by_inverse_layer_idx:
                raise InputError(
                    f"--lm {name} is of an architecture that differs from the original GPT-2's; try distilgpt2"
                )
            source, report = GPT2Model.from_pretrained(
                name,
                local_files_only=local_files_only,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if missing:
            raise InputError(f"the weights of --lm {name} lack {missing[0]}; save or download the whole model again")
        config.embd_pdrop = config.attn_pdrop = config.resid_pdrop = dropout
        with torch.device("meta"):
            model = cls(config)
        weights = source.state_dict()
        for key in weights:
            if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                weights[key] = weights[key].T.contiguous()  # the checkpoints hold (in, out), nn.Linear (out, in)
        model.load_state_dict(weights, assign=True)
        return model

    def add_lora(self, rank, alpha, dropout):
        """Freeze all of GPT-2, then adapt each block's q, k and v through LoRA: LaMo's part 2."""
        self.requires_grad_(False)
        for block in self.h:
            block.attn.c_attn = LoRALinear(block.attn.c_attn, rank, alpha, dropout)

    def merge_lora(self):
        """Fold LoRA into the weights, after training: same outputs, fewer operations."""
        for block in self.h:
            if isinstance(block.attn.c_attn, LoRALinear):
                block.attn.c_attn = block.attn.c_attn.merge()


# ---------------------------------------------------------------------------- LaMo: parts 3 and 4


class Embedder(nn.Module):
    """h = W1 x, e = h + W2 gelu(h): LaMo's part 3 (paper, section 4). (..., size) -> (..., D)"""

    def __init__(self, size, width):
        super().__init__()
        self.input = nn.Linear(size, width)
        self.residual = nn.Linear(width, width)

    def forward(self, x):
        h = self.input(x)
        return h + self.residual(F.gelu(h))


class LaMo(nn.Module):
    """A policy conditioned on the return to go, on a GPT-2 trunk.

    A window of K steps becomes 3 K tokens R_0, s_0, a_0, R_1, ...; the output at s_t predicts a_t
    (Decision Transformer, Chen et al. 2021). The timestep embedding tells the time, so GPT-2's position
    embedding is left to text.

    Args:
        gpt2: the trunk, a GPT2.
        action_low, action_high: (A,) bounds of the environment's actions.
        max_timesteps: longest episode, in steps.
        context: K, the steps that `act` looks back on.
        return_scale: divides returns, to bring them to order one.
        embed: "mlp" or "linear", for the embedders and the action head.
        state_mean, state_std: (S,) of the training data.
    """

    def __init__(
        self, gpt2, action_low, action_high, max_timesteps, context, return_scale, embed, state_mean, state_std
    ):
        super().__init__()
        D, S, A = gpt2.config.n_embd, len(state_mean), len(action_low)
        self.gpt2 = gpt2
        self.context = context
        self.max_timesteps = max_timesteps
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
        self.register_buffer("state_mean", torch.as_tensor(state_mean, dtype=torch.float32))
        self.register_buffer("state_std", torch.as_tensor(state_std, dtype=torch.float32))
        low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in (action_low, action_high))
        self.register_buffer("action_center", (high + low) / 2)
        self.register_buffer("action_radius", (high - low) / 2)

    def scale_actions(self, actions):
        """Actions of the environment -> actions in [-1, 1], which the model reads and predicts."""
        return (actions - self.action_center) / self.action_radius

    def forward(self, returns_to_go, states, actions, timesteps):
        """Predict the action of each step from what came before it.

        Args:
            returns_to_go: (B, K), states: (B, K, S), actions: (B, K, A), in the environment's units.
            timesteps: (B, K) integers. Windows that are shorter than K are padded on the right, where
                causal attention does not look from any real step.
        Returns:
            (B, K, A) predicted actions, in [-1, 1] where the environment's bounds lie.
        """
        B, K = timesteps.shape
        states = (states - self.state_mean) / self.state_std
        states = states.nan_to_num(nan=math.nan, posinf=0.0, neginf=0.0)  # an infinite entry says nothing
        tokens = torch.stack(
            [
                self.embed_return(returns_to_go.unsqueeze(-1) / self.return_scale),
                self.embed_state(states),
                self.embed_action(self.scale_actions(actions)),
            ],
            dim=2,
        )  # (B, K, 3, D)
        tokens = self.embed_ln(tokens) + self.embed_timestep(timesteps).unsqueeze(2)
        hidden = self.gpt2.trunk(tokens.view(B, 3 * K, -1)).view(B, K, 3, -1)
        return self.action_head(hidden[:, :, 1])  # from the state's token

    @torch.no_grad()
    def act(self, returns_to_go, states, actions, timesteps):
        """The next action (B, A), in the environment's units, after a history of at most K steps.

        Arguments as in `forward`; the last entry of `actions` is not known yet and is not looked at.
        """
        predicted = self(returns_to_go, states, actions, timesteps)[:, -1]
        return predicted.clamp(-1, 1) * self.action_radius + self.action_center

    def action_loss(self, batch):
        """Mean over the real steps of a batch of Trajectories, and over A, of the squared error in actions."""
        predicted = self(batch["returns_to_go"], batch["states"], batch["actions"], batch["timesteps"])
        error = (predicted - self.scale_actions(batch["actions"])).square().mean(dim=-1)  # (B, K)
        return (error * batch["mask"]).sum() / batch["mask"].sum()

    def language_loss(self, tokens):
        """Mean cross-entropy in nats of each next token of text (B, T): LaMo's part 4."""
        logits = self.gpt2(tokens)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def loss(self, batch, tokens, lang_coef):
        """L = action loss + lang_coef * language loss (paper, section 4) -> L, and its parts by name: LaMo's part 4.

        Args:
            batch: of Trajectories.
            tokens: (B, T) of text, or None where there is no language loss.
        """
        parts = {"action_loss": self.action_loss(batch)}
        if tokens is None:
            return parts["action_loss"], parts
        parts["language_loss"] = self.language_loss(tokens)
        return parts["action_loss"] + lang_coef * parts["language_loss"], parts


# ---------------------------------------------------------------------------- data


class Trajectories:
    """Trajectories as flat tensors, one after the other; a batch of windows is one gather.

    Args:
        observations, actions, rewards: lists of arrays (T, S), (T, A), (T,), one per trajectory.
    Attributes:
        states (N, S), actions (N, A), returns_to_go (N,), timesteps (N,): all N steps.
        ends: (N,) index one past the last step of the trajectory that a step is in.
        state_mean, state_std: (S,).
        returns: array with the return of each trajectory.
    Raises:
        InputError: a value is not a number.
    """

    def __init__(self, observations, actions, rewards, device="cpu"):
        for name, arrays in {"observation": observations, "action": actions, "reward": rewards}.items():
            for i, array in enumerate(arrays):
                if np.isnan(array).any():
                    raise InputError(
                        f"trajectory {i} of those kept has an {name} that is NaN; remove it from the dataset"
                    )
        lengths = np.array([len(reward) for reward in rewards])
        self.returns = np.array([reward.sum() for reward in rewards])
        self.longest = int(lengths.max())
        states = np.concatenate(observations).astype(np.float64)
        finite = np.ma.masked_invalid(states)  # infinities have no part in the statistics
        self.state_mean = finite.mean(axis=0).filled(0.0).astype(np.float32)
        std = finite.std(axis=0).filled(0.0).astype(np.float32)
        self.state_std = np.where(std > 1e-6, std + 1e-6, 1.0).astype(np.float32)  # 1: a constant stays as it is
        tensor = functools.partial(torch.as_tensor, dtype=torch.float32, device=device)
        self.states = tensor(states)
        self.actions = tensor(np.concatenate(actions))
        self.returns_to_go = tensor(np.concatenate([reward[::-1].cumsum()[::-1] for reward in rewards]))
        self.timesteps = torch.as_tensor(np.concatenate([np.arange(n) for n in lengths]), device=device)
        self.ends = torch.as_tensor(np.repeat(lengths.cumsum(), lengths), device=device)

    @classmethod
    def from_minari(cls, dataset, ratio, seed, delayed=False, device="cpu"):
        """A random share `ratio` of the trajectories of a MinariDataset, drawn without replacement.

        With `delayed`, all of a trajectory's reward comes at its last step: the return-to-go is its return throughout.

        Raises:
            InputError: the share is less than one trajectory.
        """
        count = int(ratio * dataset.total_episodes + 1e-9)
        if count < 1:
            raise InputError(
                f"--ratio {ratio:g} of {dataset.total_episodes} trajectories is none; "
                f"give at least {1 / dataset.total_episodes:.2g}"
            )
        kept = np.sort(np.random.default_rng(seed).permutation(dataset.episode_indices)[:count])
        episodes = dataset.iterate_episodes(kept)
        episodes = list(tqdm(episodes, desc="reading trajectories", total=count, leave=False, disable=None))
        rewards = [recorded_rewards(dataset, episode).astype(np.float64) for episode in episodes]
        if delayed:
            rewards = [np.append(np.zeros(len(reward) - 1), reward.sum()) for reward in rewards]
        states = [observed(episode.observations)[:-1] for episode in episodes]  # after the last no action was taken
        return cls(states, [episode.actions for episode in episodes], rewards, device)

    def batch(self, size, context):
        """Random windows: a start uniform over all steps, then up to `context` steps of its trajectory.

        Returns:
            states (B, K, S), actions (B, K, A), returns_to_go, timesteps and mask (B, K). Where a
            trajectory ends within the window, its last step fills the rest, and mask is False.
        """
        start = torch.randint(len(self.states), (size, 1), device=self.states.device)
        step = start + torch.arange(context, device=start.device)  # (B, K)
        last = self.ends[start] - 1
        index = torch.minimum(step, last)
        return {
            "states": self.states[index],
            "actions": self.actions[index],
            "returns_to_go": self.returns_to_go[index],
            "timesteps": self.timesteps[index],
            "mask": step <= last,
        }


class Text:
    """Tokens of a corpus as one flat array; a batch is random crops.

    Args:
        tokens: (N,) integers to train on; may be a memory map.
        held_out: (M,) integers that are never trained on.
        block: T, tokens per crop.
    Raises:
        InputError: either part is shorter than a block.
    """

    HELD_OUT_BLOCKS = 32  # at most, to measure the loss on

    def __init__(self, tokens, held_out, block, seed=0):
        if min(len(tokens), len(held_out)) < block:
            raise InputError(
                f"the text has {len(tokens)} tokens to train on and {len(held_out)} to hold out, one block has {block}; "
                "give a longer text or a smaller --text-block"
            )
        self.tokens, self.held_out, self.block = tokens, held_out, block
        self.rng = np.random.default_rng(seed)

    def batch(self, size):
        """Random crops of the training part: (B, T) int64 tensor on the CPU."""
        starts = self.rng.integers(len(self.tokens) - self.block + 1, size=size)
        return torch.from_numpy(np.stack([self.tokens[i : i + self.block] for i in starts]).astype(np.int64))

    @torch.no_grad()
    def held_out_loss(self, model, device):
        """Language loss of a LaMo on evenly spaced blocks of the held-out part, in nats per token."""
        was_training = model.training
        model.eval()
        blocks = min(self.HELD_OUT_BLOCKS, len(self.held_out) // self.block)
        starts = np.linspace(0, len(self.held_out) - self.block, blocks).astype(int)
        losses = [
            model.language_loss(
                torch.from_numpy(self.held_out[None, i : i + self.block].astype(np.int64)).to(device)
            ).item()
            for i in starts
        ]
        model.train(was_training)
        return float(np.mean(losses))


WIKITEXT = {"repo_id": "Salesforce/wikitext", "repo_type": "dataset"}  # on the Hugging Face hub
WIKITEXT_FILES = [
    f"wikitext-103-raw-v1/{name}.parquet"
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")
]


def load_text(source, tokenizer, block, seed):
    """The corpus of the language loss: "wikitext" (WikiText-103, raw), "pydoc" (Python's own) or a UTF-8 file.

    WikiText holds out its validation split, the others the last tenth.

    Raises:
        InputError: it cannot be read, or is too short.
    """
    with explained(f"cannot read the text {source}; give a UTF-8 file with --text"):
        if source == "wikitext":
            offline = not hub_reachable()
            paths = [hf_hub_download(**WIKITEXT, filename=name, local_files_only=offline) for name in WIKITEXT_FILES]
            train = tokenize(lambda: read_parquet(paths[:2]), tokenizer, paths[0])
            return Text(train, tokenize(lambda: read_parquet(paths[2:]), tokenizer, paths[2]), block, seed)
        if source == "pydoc":
            tokens = tokenize(lambda: [text for _, text in sorted(topics.items())], tokenizer, f"pydoc {sys.version}")
        else:
            path, status = Path(source).resolve(), os.stat(source)
            key = f"{path} {status.st_size} {status.st_mtime_ns}"
            tokens = tokenize(lambda: path.read_text("utf-8").splitlines(keepends=True), tokenizer, key)
    split = len(tokens) - max(len(tokens) // 10, min(block, len(tokens)))
    return Text(tokens[:split], tokens[split:], block, seed)


def read_parquet(paths):
    """The rows of WikiText's files: a list of strings."""
    return [row for path in paths for row in parquet.read_table(path, columns=["text"])["text"].to_pylist()]


def tokenize(read, tokenizer, key):
    """Token ids of a corpus in one flat array; made once, then a memory map of the user's cache.

    Args:
        read: returns the documents, a list of strings; called when the tokens are not in the cache.
        key: names the corpus and its version.
    """
    digest = hashlib.sha256(f"{key} {tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()[:16]
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamo" / f"{digest}.npy"
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        pass  # not there yet, or damaged
    documents = read()
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    parts = []
    for start in tqdm(range(0, len(documents), 1000), desc="tokenising", unit="k lines", leave=False, disable=None):
        parts += [
            np.array(ids, dtype) for ids in tokenizer(documents[start : start + 1000], verbose=False)["input_ids"]
        ]
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: np.save(file, tokens))
    except (OSError, InputError) as error:
        print(f"note: the tokens are not kept for the next run: {error}", file=sys.stderr)
    return tokens


# ---------------------------------------------------------------------------- training

LOG_EVERY = 50  # training steps


def learning_rate(step, config):
    """Learning rate of a step, counted from 0: linear warm-up, then constant or a cosine down to 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def train(model, trajectories, text, config, device, after):
    """Minimise LaMo.loss with AdamW.

    Args:
        text: a Text, or None where lang_coef is 0.
        after: called as after(steps done, {"action_loss", "language_loss"}, evaluation due) with both losses'
            means since the last call: every LOG_EVERY steps, and when an evaluation is due.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.lr, weight_decay=config.weight_decay, eps=1e-6, fused=device.type == "cuda"
    )
    model.train()
    sums, count = defaultdict(float), 0  # sums stay on the device, so that no step waits for them
    progress = tqdm(range(1, config.steps + 1), desc="training", unit="step", mininterval=1)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, config)
        tokens = text.batch(config.text_batch).to(device) if text else None
        loss, parts = model.loss(trajectories.batch(config.batch, config.context), tokens, config.lang_coef)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, config.grad_clip)
        optimizer.step()

        count += 1
        for name, value in parts.items():
            sums[name] += value.detach()
        due = step % config.eval_every == 0 or step == config.steps
        if step % LOG_EVERY == 0 or due:
            means = {name: (total / count).item() for name, total in sums.items()}
            progress.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
            after(step, means, due)
            sums.clear()
            count = 0


# ---------------------------------------------------------------------------- checkpoints


def write_whole(path, write):
    """Call write(another path), then move the file to `path`, which is never half-written.

    Raises:
        InputError: the disk is full or the folder cannot be written; what was at `path` is still there.
    """
    partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
    try:
        with explained(f"cannot write {path}; free some space, or choose another --out"):
            write(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save(model, config, facts, path):
    """Write what trains, the buffers, and what rebuilds the rest: a frozen language model is named, not copied.

    Args:
        facts: what an evaluation must know beside the Config, of plain types.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if config.lm == "none":
        frozen = set()  # random weights could not be had again
    state = model.state_dict()
    checkpoint = {
        "config": asdict(config),
        "facts": facts,
        "model": {name: tensor for name, tensor in state.items() if name not in frozen},
        "frozen": {name: float(state[name].cpu().double().abs().sum()) for name in frozen},  # to know them again
    }
    write_whole(path, lambda file: torch.save(checkpoint, file))


def load(folder, device="cpu"):
    """The trained policy in a run's folder, LoRA merged -> LaMo, its Config, and `facts` as in `save`.

    Raises:
        InputError: there is no checkpoint, it is damaged, or its language model is not the one it was trained on.
    """
    path = Path(folder) / "checkpoint.pt"
    with explained(f"{path} cannot be read; name the folder of a run of lamo.py"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, state = Config(**checkpoint["config"]), checkpoint["model"]
        gpt2 = build_gpt2(config, *(len(state.get(f"gpt2.{table}.weight", ())) for table in ("wte", "wpe")))
        center, radius = state["action_center"], state["action_radius"]
        model = LaMo(
            gpt2, center - radius, center + radius, len(state["embed_timestep.weight"]), config.context,
            state["return_scale"], config.embed, state["state_mean"], state["state_std"],
        )  # fmt: skip
        absent, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(absent) != set(checkpoint["frozen"]):
            raise InputError(
                f"--lm {config.lm} has another shape than the model that {path} was trained on; train again"
            )
    whole = model.state_dict()
    for name, total in checkpoint["frozen"].items():
        if not math.isclose(float(whole[name].cpu().double().abs().sum()), total, rel_tol=1e-5):
            raise InputError(f"--lm {config.lm} is not the model that {path} was trained on; train again")
    model.gpt2.merge_lora()
    return model.to(device).eval(), config, checkpoint["facts"]


# ---------------------------------------------------------------------------- command line


@functools.cache
def hub_reachable():
    """Whether the Hugging Face hub answers; found out once, within three seconds."""
    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask():
        try:
            answers.append(get_session().head(f"{constants.ENDPOINT}/gpt2/resolve/main/config.json", timeout=3))
        except Exception:  # of whichever HTTP library huggingface_hub uses
            pass

    # In a thread of its own, because looking up a host's name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout=3)
    return bool(answers) and answers[0].status_code < 400


def in_hub_cache(filename, **repository):
    """Whether a file of the hub is on this machine already."""
    return isinstance(try_to_load_from_cache(filename=filename, **repository), str)


def folder(name):
    """The folder of this name, from here or, as the demo's, beside lamo.py; None if there is none."""
    return next((path for path in (Path(name), Path(__file__).resolve().parent / name) if path.is_dir()), None)


def dataset_folder(name):
    """A folder of this name, or where Minari keeps the dataset; Minari's own function would make that folder."""
    return (
        folder(name)
        or Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets") / name / "data"
    )


def configure(arguments):
    """Command line -> Config with nothing left open but the targets of an unknown task, and a notice or None.

    What was given goes before the method's preset, that before the demo's settings, those before the defaults.
    """
    given = parse(arguments)
    chosen = METHODS[given.get("method", "lamo")] | given
    config = replace(Config(), **chosen)
    check(config)
    if "data" in given and "env" not in given:
        config = replace(config, env=None)  # the dataset knows
    config, notice = choose_assets(config, chosen)
    if config.lm == "none" and config.width % config.heads:
        raise InputError(f"--width {config.width} is not a multiple of --heads {config.heads}; change one of them")
    if config.env:
        task = TASKS[config.env]
        config = replace(config, targets=config.targets or task.targets, context=config.context or task.context)
    config = replace(config, context=config.context or 20)
    if config.out is None:
        name = config.env or config.data.strip("/").replace("/", "-")
        stem = f"runs/{name}-{config.method}-{config.ratio:g}-{config.seed}{'-demo' if notice else ''}"
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        config = replace(config, out=next(name for name in names if not Path(name).exists()))
    return config, notice


def choose_assets(config, chosen):
    """Config with language model, dataset and text, and a notice if some come from demo/, or None.

    What was chosen is never replaced. The rest is what the paper used, or the demo's where that is neither cached
    nor can be fetched, with settings for a small machine.
    """
    if config.lang_coef == 0:
        config = replace(config, text=None)
    wanted = {}  # what the paper used, whether it is cached, what the demo has
    if "lm" not in chosen:
        files = "config.json", "model.safetensors", "tokenizer.json"
        wanted["lm"] = "gpt2", all(in_hub_cache(name, repo_id="gpt2") for name in files), "demo/gpt2-tiny"
    if "data" not in chosen:
        data = TASKS[config.env].data
        wanted["data"] = data, dataset_folder(data).is_dir(), f"demo/lamo/{config.env}/demo-v0"
    if "text" not in chosen and config.lang_coef > 0:
        wanted["text"] = "wikitext", all(in_hub_cache(name, **WIKITEXT) for name in WIKITEXT_FILES), "pydoc"
    if config.offline:
        constants.HF_HUB_OFFLINE = True  # huggingface_hub's own switch
    why = "--offline" if config.offline else "the Hugging Face hub cannot be reached"
    missing = [name for name, (_, cached, _) in wanted.items() if config.offline or not (cached or hub_reachable())]
    for name, (paper, _, demo) in wanted.items():
        if name in missing and demo != "pydoc" and not folder(demo):
            raise InputError(f"{paper} cannot be fetched ({why}), and there is no {demo}; name one with --{name}")
        config = replace(config, **{name: demo if name in missing else paper})
    if missing:
        what = ", ".join(f"{name} {getattr(config, name)}" for name in missing)
        settings = {name: value for name, value in DEMO_SETTINGS.items() if name not in chosen}
        notice = f"DEMO ASSETS, NOT COMPARABLE TO THE PAPER ({why}): {what}, and smaller settings"
        return replace(config, **settings), notice
    if config.data.startswith("demo/"):
        return config, f"DEMO ASSETS, NOT COMPARABLE TO THE PAPER: data {config.data}"
    return config, None


def parse(arguments):
    """Command line -> those fields of Config that were given."""
    parser = Parser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS, allow_abbrev=False)
    hints = typing.get_type_hints(Config)
    for item in fields(Config):
        kind = (typing.get_args(hints[item.name]) or (hints[item.name],))[0]  # str | None -> str
        how = {"type": kind, "choices": item.metadata["choices"]}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif item.name == "targets":
            how = {"type": float, "nargs": "+"}
        default = "" if item.default is None or item.default is False else f" (default {item.default})"
        parser.add_argument(f"--{item.name.replace('_', '-')}", help=item.metadata["help"] + default, **how)
    given = vars(parser.parse_args(arguments))
    return given | ({"targets": tuple(given["targets"])} if "targets" in given else {})


def check(config):
    """Refuse settings that cannot work, before anything is loaded."""
    for item in fields(Config):
        value, low, high = getattr(config, item.name), item.metadata["low"], item.metadata["high"]
        if value is not None and low is not None and not (low <= value <= (math.inf if high is None else high)):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise InputError(f"--{item.name.replace('_', '-')} {value:g} must be {limits}")
    if config.env not in TASKS:
        raise InputError(f"unknown --env {config.env}; choose one of {', '.join(TASKS)}, or give a dataset with --data")
    if config.ratio == 0:
        raise InputError("--ratio 0 keeps no trajectory; 0.1 trains on a tenth of them")
    if config.train_trunk and config.lora_rank > 0:
        raise InputError("--train-trunk trains every weight, so LoRA has nothing to adapt; add --lora-rank 0")


def load_dataset(name):
    """A MinariDataset by folder or id, from this machine or else from the hub.

    Raises:
        InputError: it cannot be had, or not be read.
    """
    with explained(f"cannot get the dataset {name}; `minari list remote` lists what there is"):
        path = dataset_folder(name)
        if not path.is_dir() and hub_reachable():
            minari.download_dataset(name)
    if not path.is_dir():
        raise InputError(
            f"the dataset {name} is not in {path.parent}, and the Hugging Face hub cannot be reached; run "
            f"`minari download {name}` where it can be, give a folder with --data, or use --offline without --data"
        )
    with explained(f"{path} is not a Minari dataset that can be read; make or download it anew"):
        return minari.MinariDataset(path / "data" if (path / "data").is_dir() else path)


def load_tokenizer(config):
    """The language model's tokenizer; for random weights GPT-2's, or the demo's where that cannot be had."""
    name = config.lm
    if name == "none":
        have = not config.offline and (in_hub_cache("tokenizer.json", repo_id="gpt2") or hub_reachable())
        name = "gpt2" if have else "demo/gpt2-tiny"
    with explained(f"no tokenizer for --lm {name}; put its files beside the weights"):
        return AutoTokenizer.from_pretrained(
            folder(name) or name, local_files_only=bool(folder(name)) or not hub_reachable()
        )


def build_gpt2(config, vocab_size, n_positions):
    """The trunk that a Config asks for, with its LoRA; both sizes are for random weights, 0 where there is no text."""
    if config.lm == "none":
        p = config.dropout
        gpt2 = GPT2(
            GPT2Config(
                vocab_size=vocab_size, n_positions=n_positions, n_embd=config.width, n_layer=config.layers,
                n_head=config.heads, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p,
            )
        )  # fmt: skip
    else:
        disable_progress_bar()  # of reading weights from the disk, which takes a moment
        here = folder(config.lm)
        gpt2 = GPT2.from_pretrained(
            here or config.lm, config.dropout, local_files_only=bool(here) or not hub_reachable()
        )
    gpt2.requires_grad_(config.train_trunk)
    if config.lora_rank > 0:
        gpt2.add_lora(config.lora_rank, config.lora_alpha, config.lora_dropout)
    return gpt2


def warn_if_slow(model, trajectories, config):
    """Say at once if training on this CPU takes hours; judged by one forward and backward pass of two windows."""
    windows = trajectories.batch(2, config.context)
    start = time.perf_counter()
    model.action_loss(windows).backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    tokens = config.batch * 3 * config.context + config.text_batch * config.text_block * (config.lang_coef > 0)
    hours = seconds / (2 * 3 * config.context) * tokens * config.steps / 3600
    if hours > 1:
        print(
            f"NOTE: {config.steps} steps take about {hours:,.0f} hours on this CPU. Use a GPU, fewer --steps, a smaller "
            "--lm, or the demo's assets and settings, which take minutes: --offline",
            flush=True,
        )


def run(arguments):
    """Train and evaluate as the command line says; everything is in the run's folder then.

    Raises:
        InputError: something that the user can mend.
    """
    start = time.time()
    config, notice = configure(arguments)
    if notice:
        print(notice, flush=True)
    out = Path(config.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"--out {out} is there already; choose another folder, nothing is overwritten")
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(config.seed)

    dataset = load_dataset(config.data)
    task = TASKS.get(config.env)
    spec, action_space = environment(dataset, task.env_id if task else None)
    trajectories = Trajectories.from_minari(dataset, config.ratio, config.seed, config.delayed, device)
    returns, best = trajectories.returns, float(trajectories.returns.max())
    half = best / 2 if best > 0 else 2 * best  # of a negative return, half as good is more
    config = replace(config, targets=config.targets or tuple(dict.fromkeys((best, half))))
    return_scale = task.return_scale if task else 10.0 ** round(math.log10(max(abs(returns).max(), 1e-3)))
    (low, high), reference_source = references(dataset, task and task.reference)

    if config.text is None:
        text, gpt2 = None, build_gpt2(config, 0, 0)
    else:
        tokenizer = load_tokenizer(config)
        gpt2 = build_gpt2(config, len(tokenizer), config.text_block)
        if len(tokenizer) > gpt2.config.vocab_size:
            raise InputError(f"the tokenizer of --lm {config.lm} has more tokens than the model; take the model's own")
        text = load_text(config.text, tokenizer, min(config.text_block, gpt2.config.n_positions), config.seed)
    max_timesteps = max(trajectories.longest, spec.max_episode_steps or 0)
    model = LaMo(
        gpt2, action_space.low, action_space.high, max_timesteps, config.context, return_scale, config.embed,
        trajectories.state_mean, trajectories.state_std,
    ).to(device)  # fmt: skip

    facts = {
        "kept": f"{len(returns)} of {dataset.total_episodes} trajectories, "
        f"{len(trajectories.states)} steps, returns {returns.min():.1f} to {best:.1f}, mean {returns.mean():.1f}",
        "env_spec": spec.to_json(), "return_scale": return_scale, "reference": [low, high],
        "reference_source": reference_source, "demo": notice is not None, "notice": notice,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }  # fmt: skip
    print(f"data    {config.data}: {facts['kept']}")
    print(f"model   {config.method} on {config.lm}: {facts['trainable']:,} of {facts['parameters']:,} parameters train")
    if text:
        print(f"text    {config.text}: {len(text.tokens):,} tokens to train on, {len(text.held_out):,} held out")
    print(f"run     {config.steps:,} steps on {device}, into {out}", flush=True)
    if device.type == "cpu":
        warn_if_slow(model, trajectories, config)
    parent = next(path for path in out.absolute().parents if path.exists())
    saved = facts["parameters" if config.lm == "none" else "trainable"]
    if shutil.disk_usage(parent).free < 10 * saved:  # 4 bytes each, once more while it is replaced
        raise InputError(f"the disk of {out} is too full for a checkpoint; free some space, or choose another --out")
    with explained(f"cannot make the folder {out}; choose another one with --out"):
        out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", lambda file: file.write_text(json.dumps(asdict(config) | facts, indent=2) + "\n"))

    lines, scores = [], {}

    def log(line):
        lines.append(json.dumps({"seconds": round(time.time() - start, 1)} | line) + "\n")
        write_whole(out / "log.jsonl", lambda file: file.write_text("".join(lines)))

    def after(step, losses, due):
        log({"step": step} | losses)
        if due:
            save(model, config, facts, out / "checkpoint.pt")
            scores.update(
                evaluate(model, spec, config.targets, config.episodes, config.seed, (low, high), config.delayed)
            )
            log({"step": step, "evaluation": scores})
            if step < config.steps:
                tqdm.write(f"\nstep {step}\n{format_scores(scores)}")

    log({"notice": notice} if notice else {"dataset": config.data})
    text_loss_before = text and text.held_out_loss(model, device)
    train(model, trajectories, text, config, device, after)
    text_loss_after = text and text.held_out_loss(model, device)

    target, row = best_target(scores)
    summary = {
        "best": {"target": float(target)} | row, "targets": scores, "dataset": config.data, "lm": config.lm,
        "demo": facts["demo"], "text_loss_before": text_loss_before, "text_loss_after": text_loss_after,
        "seconds": round(time.time() - start, 1),
    }  # fmt: skip
    write_whole(out / "scores.json", lambda file: file.write_text(json.dumps(summary, indent=2) + "\n"))
    print(f"\n{notice or config.data}\n{format_scores(scores)}\nscore: {reference_source}")
    if text:
        print(
            f"language loss on held-out text: {text_loss_before:.3f} before, {text_loss_after:.3f} after (nats per token)"
        )
    print(f"{summary['seconds']:.0f} s, all in {out}; evaluate it again: python eval.py {out}")


if __name__ == "__main__":
    sys.exit(command_line(run, "lamo.py"))
