"""LaMo turns a pre-trained language model into a decision transformer for offline RL.

A reference implementation, in one file, of "Unleashing the Power of Pre-trained Language Models for
Offline Reinforcement Learning" (Shi et al., ICLR 2024, https://arxiv.org/abs/2310.20587).

    L = mean squared error of the actions + lambda * cross-entropy of the next token of text

LaMo has four parts:

  1. the trunk starts from the weights of a language model    GPT2.from_pretrained, CausalLM
  2. the trunk stays frozen, and LoRA adapts it               LoRALinear, GPT2.add_lora
  3. MLPs embed returns, states and actions                   Embedder
  4. a language loss on text joins the action loss            LaMo.forward, train_step

    python lamo.py --env hopper --ratio 0.1                                      # one GPU
    torchrun --standalone --nproc-per-node 2 lamo.py --env hopper --ratio 0.1    # two GPUs

Without a GPU, the first command runs a small demo and says so.

`main` reads the options, `prepare` loads the data and builds the model (`build_trunk` puts parts 1
and 2 together), and `train` is the loop: `draw` a batch, take a `train_step`.

Shapes: B windows in a batch, K steps in a window, D the width of the model, S the size of a state,
A the size of an action, T tokens of text, or steps of a trajectory. Returns, states and actions are
in the environment's units, except where a comment says otherwise. A state may also be an image, and
an action one of A choices, which is then a one-hot vector.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import enable_progress_bars
from minari.dataset.minari_storage import is_image_space
from pyarrow import parquet
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import atari
import demo
from eval import (
    Environments,
    best_target,
    evaluate,
    format_scores,
    policy_observation,
    policy_spaces,
    spec_from_json,
    spec_of,
    spec_to_json,
)

HERE = Path(__file__).resolve().parent


class InputError(ValueError):
    """A user error. The command line prints it as one line, and exits with code 2."""


# -------------------------------------------------------------------------------- tasks and methods
@dataclass(frozen=True)
class Task:
    """A task. Those of the paper have the authors' targets, return scale and context.

    The targets of Qbert and Pong are those of Chen et al. (2021).
    """

    env_id: str | None  # Gymnasium's id of the environment, or module:id
    data: str | None  # Minari's id of the dataset, or a folder
    targets: list[float] | None  # returns to condition on in an evaluation
    return_scale: float | None  # returns are divided by it
    context: int  # K
    reference: tuple[float, float]  # returns that score 0 and 100, unless the data has its own
    settings: dict = field(default_factory=dict)  # what the task changes in the defaults of Config


KITCHEN = "gymnasium_robotics:FrankaKitchen-v1"

# fmt: off
TASKS = {
    "hopper": Task(
        "Hopper-v5", "mujoco/hopper/medium-v0",
        [3600, 2600, 2200, 1800], 1000, 20, (-20.272305, 3234.3),
    ),
    "halfcheetah": Task(
        "HalfCheetah-v5", "mujoco/halfcheetah/medium-v0",
        [12000, 8000, 6000, 4500], 1000, 20, (-280.178953, 12135.0),
    ),
    "walker2d": Task(
        "Walker2d-v5", "mujoco/walker2d/medium-v0",
        [5000, 4000, 3000, 2500], 1000, 20, (1.629008, 4592.3),
    ),
    "kitchen-complete": Task(KITCHEN, "D4RL/kitchen/complete-v2", [5, 4, 3, 2, 1], 1, 20, (0, 4)),
    "kitchen-partial": Task(KITCHEN, "D4RL/kitchen/partial-v2", [5, 4, 3, 2, 1], 1, 20, (0, 4)),
    "kitchen-mixed": Task(KITCHEN, "D4RL/kitchen/mixed-v2", [5, 4, 3, 2, 1], 1, 20, (0, 4)),
}
TASKS |= {name: Task(**row) for name, row in (demo.TASKS | atari.TASKS).items()}

METHODS = {  # what each method changes in the defaults of Config
    "lamo": {},
    # Decision Transformer, from scratch (Chen et al. 2021)
    "dt": {
        "lm": "none", "layers": 3, "width": 128, "heads": 1,
        "lora_rank": 0, "train_trunk": True, "embed": "linear", "lang_coef": 0.0,
    },
    # Wiki-RL (Reid et al. 2022): its language loss, without its cosine similarity loss
    "wiki-rl": {"lora_rank": 0, "train_trunk": True, "embed": "linear"},
}
# fmt: on

# For --data without a task in --env. None means: taken from the data.
OTHER_TASK = Task(None, None, None, return_scale=None, context=20, reference=(0, 100))


# -------------------------------------------------------------------------------- configuration
def option(default, help, **keywords):
    """Return a field of Config; the keywords are those of argparse's add_argument.

    Another keyword, `group`, is the heading in --help of this option and those after it.
    """
    return field(default=default, metadata={"help": help, **keywords})


def number(kind, low, high=math.inf):
    """Return an argparse type: an int or a float from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its messages
    return parse


COUNT = number(int, 1, 10**9)
COUNT_OR_ZERO = number(int, 0, 10**9)
EPISODES = number(int, 1, 10_000)
AMOUNT = number(float, 0, 1e9)
SHARE = number(float, 0, 1)
TARGET = number(float, -1e9, 1e9)


@dataclass(frozen=True)
class Config:
    """The settings of a run, and the options of the command line.

    The defaults are those of the authors' runs on D4RL.
    """

    env: str | None = option(
        "hopper",
        f"{', '.join(TASKS)}; or any environment, as a Gymnasium id or module:id; none: do not"
        " evaluate; eval: the one that the dataset names for evaluations; default: hopper; with"
        " --data, the one in which the dataset was recorded",
        group="data",
    )
    data: str | None = option(None, "Minari dataset, id or folder; default: the task's")
    ratio: float = option(1.0, "share of the trajectories to train on", type=number(float, 1e-9, 1))
    delayed: bool = option(False, "move all reward to the last step", action="store_true")

    method: str = option(
        "lamo", "LaMo, Decision Transformer or Wiki-RL", choices=[*METHODS], group="model"
    )
    lm: str = option(
        "gpt2",
        "language model, hub name or folder; none: random weights, which needs --lang-coef 0",
    )
    lora_rank: int = option(16, "rank r of LoRA; 0: no LoRA", type=COUNT_OR_ZERO)
    lora_alpha: float = option(32.0, "LoRA adds alpha / r * B A x", type=AMOUNT)
    lora_dropout: float = option(0.1, "dropout on LoRA's input", type=SHARE)
    train_trunk: bool = option(False, "train all weights of the trunk", action="store_true")
    embed: str = option("mlp", "kind of embedders and action head", choices=["mlp", "linear"])
    context: int | None = option(
        None, "K, steps that the policy sees; default: the task's, or 20", type=COUNT
    )
    dropout: float = option(0.1, "dropout of the trunk, if it is a GPT-2", type=SHARE)
    layers: int = option(12, "transformer blocks, with --lm none", type=COUNT)
    width: int = option(768, "model width D, with --lm none", type=COUNT)
    heads: int = option(12, "attention heads, with --lm none", type=COUNT)

    lang_coef: float = option(
        0.1, "weight lambda of the language loss; 0: no text", type=AMOUNT, group="text"
    )
    text: str = option("wikitext", "wikitext (WikiText-103, raw), or a file of UTF-8 text")
    text_batch: int = option(2, "crops of text in a training step", type=COUNT)
    text_block: int = option(1024, "tokens in a crop", type=number(int, 2))

    steps: int = option(100_000, "training steps", type=COUNT, group="training")
    batch: int = option(64, "windows of trajectories in a training step", type=COUNT)
    lr: float = option(1e-4, "learning rate of AdamW", type=number(float, 0, 1))
    lr_schedule: str = option(
        "constant", "learning rate after the warm-up", choices=["constant", "cosine"]
    )
    warmup: int = option(2500, "training steps of linear warm-up", type=COUNT_OR_ZERO)
    weight_decay: float = option(1e-5, "weight decay of AdamW", type=AMOUNT)
    grad_clip: float = option(0.25, "clip the gradient to this norm", type=number(float, 1e-9))
    bf16: bool = option(False, "run the trunk's blocks in bfloat16", action="store_true")

    targets: list[float] | None = option(
        None,
        "target returns (-1000, not -1e3); default: the task's, or from the data",
        type=TARGET,
        nargs="+",
        group="evaluation",
    )
    episodes: int = option(20, "episodes per target", type=EPISODES)
    max_steps: int | None = option(
        None,
        "longest episode of an evaluation; default: the environment's, or the data's",
        type=COUNT,
    )
    eval_every: int = option(2500, "training steps between two evaluations", type=COUNT)

    seed: int = option(0, "seed of all randomness", type=number(int, 0, 400_000), group="run")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, ...")
    out: str | None = option(
        None, "folder; default: runs/<env or data>-<method>-<ratio>-<seed>[-demo]"
    )
    demo: bool = option(False, "use demo/ for everything not given", action="store_true")


# -------------------------------------------------------------------------------- LoRA: part 2
class LoRALinear(nn.Module):
    """y = W x + b + (alpha / r) B A dropout(x): W is frozen, A and B train (Hu et al. 2021).

    As in the authors' code, b trains, too. `fused` projections share the layer, each with an A
    (r, in) and a B (out / fused, r) of its own: three in GPT-2, where one layer makes queries, keys
    and values. A layer of any other model counts as one.
    """

    def __init__(self, linear, rank, alpha, dropout, fused):
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias  # some models have none
        if self.bias is not None:
            self.bias.requires_grad_(True)
        self.A = nn.Parameter(torch.empty(fused, rank, in_features))
        # B starts at zero: at first, the layer computes what `linear` did.
        self.B = nn.Parameter(torch.zeros(fused, out_features // fused, rank))
        for A in self.A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(..., in) -> (..., out)"""
        dropped = self.dropout(x)
        updates = [dropped @ A.T @ B.T for A, B in zip(self.A, self.B)]  # (..., out / fused)
        return F.linear(x, self.weight, self.bias) + self.scale * torch.cat(updates, dim=-1)


# -------------------------------------------------------------------------------- GPT-2: part 1
class Attention(nn.Module):
    """Causal self-attention. (B, T, D) -> (B, T, D)"""

    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)  # queries, keys and values at once
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head = n_head
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.c_attn(x).split(D, dim=-1)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in (q, k, v))
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, D)  # from (B, heads, T, D / heads)
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    """D -> 4 D -> D, with the tanh approximation of GELU that GPT-2 was trained with."""

    def __init__(self, n_embd, dropout):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Transformer block with LayerNorm before attention and MLP. (B, T, D) -> (B, T, D)"""

    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd, dropout)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), with the parameter names of its published checkpoints.

    It is the trunk of LaMo. CausalLM wraps other language models; to use another kind of trunk,
    return it from `build_trunk`. A replacement needs

        width                            D
        forward(x)                       embeddings (B, T, D) -> hidden states (B, T, D), causal
        add_lora(rank, alpha, dropout)   unless --lora-rank is 0
        language_loss(tokens)            token ids (B, T) -> mean cross-entropy of the next token
        vocab_size, n_positions          bounds of token ids, and of the length of a text

    language_loss, vocab_size and n_positions are only for the language loss.
    """

    def __init__(
        self, vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, dropout=0.1,
        bf16=False,
    ):  # fmt: skip
        super().__init__()
        self.width, self.vocab_size, self.n_positions = n_embd, vocab_size, n_positions
        self.bf16 = bf16
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(n_positions, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)

        # GPT-2's initialisation: what a block adds to the residual stream starts smaller.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * n_layer) if "c_proj" in name else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @staticmethod
    def represents(config):
        """Return whether this class computes what transformers' model with a config does."""
        return config.model_type == "gpt2" and all(
            (
                config.activation_function in ("gelu_new", "gelu_pytorch_tanh"),  # the same
                config.layer_norm_epsilon == 1e-5,
                config.n_inner in (None, 4 * config.n_embd),
                config.scale_attn_weights,
                not config.scale_attn_by_inverse_layer_idx,
                config.tie_word_embeddings,
            )
        )

    @classmethod
    def from_pretrained(cls, theirs, dropout=0.1, bf16=False):
        """Return a GPT2 with the weights of transformers' GPT2LMHeadModel: LaMo's part 1."""
        config = theirs.config
        model = cls(
            config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head,
            dropout, bf16,
        )  # fmt: skip
        weights = theirs.transformer.state_dict()
        for key, weight in weights.items():
            if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                weights[key] = weight.T  # theirs are (in, out), those of nn.Linear (out, in)
        model.load_state_dict(weights)
        return model

    def add_lora(self, rank, alpha, dropout):
        """Freeze all weights, then add LoRA to queries, keys and values: LaMo's part 2."""
        self.requires_grad_(False)
        for block in self.h:
            block.attn.c_attn = LoRALinear(block.attn.c_attn, rank, alpha, dropout, fused=3)

    def forward(self, x):
        """Embeddings (B, T, D) -> hidden states (B, T, D), each from its token and those before.

        Adds no positions: text gets them in `logits`, trajectories in `LaMo.embed_window`.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.drop(x)
            for block in self.h:
                x = block(x)
            return self.ln_f(x)

    def logits(self, tokens):
        """Token ids (B, T) -> logits of each next token (B, T, vocabulary)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self(self.wte(tokens) + self.wpe(positions))
        return F.linear(hidden, self.wte.weight)  # input and output embeddings are the same

    def language_loss(self, tokens):
        """Return the mean cross-entropy, in nats, of each next token of text (B, T)."""
        logits = self.logits(tokens[:, :-1])  # nothing follows the last token
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class CausalLM(nn.Module):
    """Any other causal language model of transformers as a trunk: Llama, Qwen, Gemma, OPT, Pythia.

    It has the methods of GPT2 that LaMo uses. Positions, learned or rotary, sliding windows and
    dropout are the model's own. Raises InputError if the model is not causal.
    """

    # Queries, keys and values: separate, fused in one layer, or those of latent attention
    PROJECTIONS = (
        "q_proj", "k_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn", "Wqkv",
        "in_proj_qkv", "in_proj_qkvz", "q_b_proj", "kv_b_proj",
    )  # fmt: skip

    def __init__(self, theirs, bf16=False):
        super().__init__()
        self.model, self.bf16 = theirs, bf16
        self.vocab_size, self.width = theirs.get_input_embeddings().weight.shape
        self.n_positions = getattr(theirs.config, "max_position_embeddings", None) or math.inf

        # Two inputs that differ only in their second token must give the same first output. With an
        # encoder, such as BERT, they do not: it sees the future.
        x = torch.zeros(2, 2, self.width)
        x[1, 1] = torch.linspace(-9, 9, self.width)  # a LayerNorm would remove a constant
        with torch.no_grad():
            outputs = self.eval()(x)[:, 0]  # (2, D)
        if not torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-3):
            raise InputError(f"--lm is a {theirs.config.model_type}, which is not causal")
        self.train()

    def add_lora(self, rank, alpha, dropout):
        """Freeze all weights, then add LoRA to queries, keys and values: LaMo's part 2.

        With bf16, the frozen weights are kept in bfloat16, and so are the embeddings of text; those
        of trajectories stay in float32. Raises InputError if the model has no layer whose name says
        that it projects to queries, keys and values.
        """
        self.requires_grad_(False)
        if self.bf16:
            for parameter in self.parameters():
                if parameter.dim() > 1:  # norms and biases stay in float32
                    parameter.data = parameter.data.bfloat16()
        # Only the part that reads text: some models also have a vision tower.
        decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model
        adapted = set()  # the attention of each layer
        for parent in [*decoder.modules()]:
            for name, layer in [*parent.named_children()]:
                if name in self.PROJECTIONS:
                    lora = LoRALinear(as_linear(layer), rank, alpha, dropout, fused=1)
                    setattr(parent, name, lora)
                    adapted.add(parent)
        if not adapted:
            names = ", ".join(self.PROJECTIONS)
            raise InputError(
                f"LoRA finds none of {names} in --lm; to train it whole, add --lora-rank 0"
                " --train-trunk; to leave it frozen, --lora-rank 0 --lang-coef 0"
            )
        layers = self.model.config.get_text_config().num_hidden_layers
        if len(adapted) < layers:
            print(f"LoRA finds queries, keys and values in {len(adapted)} of {layers} layers")

    def forward(self, x):
        """Embeddings (B, T, D) -> hidden states (B, T, D), each from its token and those before."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.model.base_model(inputs_embeds=x, use_cache=False)
        return outputs.last_hidden_state.to(x.dtype)

    def language_loss(self, tokens):
        """Return the mean cross-entropy, in nats, of each next token of text (B, T)."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


def as_linear(layer):
    """Return a layer of transformers as nn.Linear. GPT-2's own have their weight transposed."""
    if isinstance(layer, nn.Linear):
        return layer
    linear = nn.Linear(*layer.weight.shape, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.T), layer.bias
    return linear


# -------------------------------------------------------------------------------- LaMo: part 3
class Embedder(nn.Module):
    """h = W1 x + b1, e = h + W2 gelu(h) + b2: LaMo's part 3 (paper, section 4).

    (..., size) -> (..., D)
    """

    def __init__(self, size, width):
        super().__init__()
        self.input = nn.Linear(size, width)
        self.residual = nn.Linear(width, width)

    def forward(self, x):
        h = self.input(x)
        return h + self.residual(F.gelu(h))


class ImageEncoder(nn.Module):
    """Convolutions over images. (..., H, W, C) or (..., C, H, W), uint8 -> (..., features)

    The channels are the shorter of the first and the last axis. The layers are those of Mnih et al.
    (2015), as in the authors' Atari code. Images of fewer than 36 pixels a side have the one layer
    of MinAtar (Young and Tian 2019), whose stride of 1 keeps every position. Raises InputError
    below 3 x 3.
    """

    def __init__(self, shape):
        super().__init__()
        self.channels_last = shape[2] <= shape[0]
        if self.channels_last:
            *pixels, C = shape
        else:
            C, *pixels = shape
        if min(pixels) < 3:
            raise InputError(
                f"images of shape {tuple(shape)} are too small; the least is 3 x 3 pixels"
            )
        sizes = [(32, 8, 4), (64, 4, 2), (64, 3, 1)]  # channels, kernel, stride
        if min(pixels) < 36:
            sizes = [(16, 3, 1)]
        layers = []
        for channels, kernel, stride in sizes:
            layers += [nn.Conv2d(C, channels, kernel, stride), nn.ReLU()]
            C = channels
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.features = self(torch.zeros(1, *shape, dtype=torch.uint8)).shape[-1]

    def forward(self, images):
        x = images.flatten(0, -4)  # one axis in front of those of an image
        if self.channels_last:
            x = x.movedim(-1, 1)
        x = x.to(self.layers[0].weight.dtype) / 255
        return self.layers(x).view(*images.shape[:-3], -1)


class LaMo(nn.Module):
    """A return-conditioned policy on the trunk of a language model.

    A window of K steps becomes 3 K tokens: R_0, s_0, a_0, R_1, s_1, and so on. The output at s_t
    predicts a_t (Decision Transformer, Chen et al. 2021). The tokens of a step share a timestep
    embedding.

    Args:
        trunk: a GPT2, or what has the same methods; see its docstring.
        embed: "mlp" (LaMo) or "linear" (Decision Transformer).
        context: K.
        max_timesteps: length of the longest episode, in steps.
        return_scale: returns are divided by it.
        state_mean, state_std: statistics of the data, lists of S floats.
        action_low, action_high: bounds of the actions, lists of A floats.
        discrete: whether an action is one of A choices.
        image_shape: the shape of a state that is an image, which has no statistics; else None.
    """

    def __init__(
        self, trunk, embed, context, max_timesteps, return_scale, state_mean, state_std, action_low,
        action_high, discrete=False, image_shape=None,
    ):  # fmt: skip
        super().__init__()
        self.trunk, self.context, self.max_timesteps = trunk, context, max_timesteps
        self.discrete, self.image_shape = discrete, image_shape
        D, S, A = trunk.width, len(state_mean), len(action_low)

        embedder = Embedder if embed == "mlp" else nn.Linear
        self.embed_return = embedder(1, D)
        if image_shape:
            encoder = ImageEncoder(image_shape)
            self.embed_state = nn.Sequential(encoder, embedder(encoder.features, D))
        else:
            self.embed_state = embedder(S, D)
        self.embed_action = embedder(A, D)
        self.embed_timestep = nn.Embedding(max_timesteps, D)
        self.embed_ln = nn.LayerNorm(D)
        # As in the authors' code, only the linear head ends in a tanh; `act` clamps the actions.
        if embed == "mlp":
            self.action_head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, A))
        elif discrete:
            self.action_head = nn.Linear(D, A)
        else:
            self.action_head = nn.Sequential(nn.Linear(D, A), nn.Tanh())

        # Buffers, so that they move with the model to its device. They are float64, so that numbers
        # are centred before they are rounded to float32.
        low, high = torch.tensor([action_low, action_high], dtype=torch.float64)
        self.register_buffer("return_scale", torch.tensor(return_scale, dtype=torch.float64))
        self.register_buffer("state_mean", torch.tensor(state_mean, dtype=torch.float64))
        self.register_buffer("state_std", torch.tensor(state_std, dtype=torch.float64))
        self.register_buffer("action_center", (high + low) / 2)
        self.register_buffer("action_radius", ((high - low) / 2).clamp(min=1e-6))

    def scale(self, x, center, radius):
        """Return (x - center) / radius in the precision of the weights."""
        return ((x - center) / radius).to(self.embed_ln.weight.dtype)

    def scale_actions(self, actions):
        """Scale actions so that their bounds are -1 and 1."""
        return self.scale(actions, self.action_center, self.action_radius)

    def embed_window(self, returns_to_go, states, actions, timesteps):
        """Return the tokens (B, 3 K, D) of windows.

        The windows are returns_to_go (B, K), states (B, K, S), actions (B, K, A), timesteps (B, K).
        A window of fewer than K steps is padded on the right, where causal attention never looks.
        """
        if not self.image_shape:  # an image is scaled by its encoder
            states = self.scale(states, self.state_mean, self.state_std)
        parts = [
            self.embed_return(self.scale(returns_to_go.unsqueeze(-1), 0, self.return_scale)),
            self.embed_state(states),
            self.embed_action(self.scale_actions(actions)),
        ]
        x = torch.stack(parts, dim=2)  # (B, K, 3, D)
        timesteps = timesteps.clamp(max=self.max_timesteps - 1)  # later ones are not in the data
        # Timesteps are added after the LayerNorm, as in the authors' D4RL code; in Decision
        # Transformer, before it.
        x = self.embed_ln(x) + self.embed_timestep(timesteps).unsqueeze(2)
        return x.flatten(1, 2)  # R_0, s_0, a_0, R_1, ...

    def predict(self, returns_to_go, states, actions, timesteps):
        """Predict the action of each step from what precedes it.

        Returns (B, K, A), scaled so that the bounds of the actions are -1 and 1, but not clamped;
        for discrete actions, logits.
        """
        hidden = self.trunk(self.embed_window(returns_to_go, states, actions, timesteps))
        return self.action_head(hidden[:, 1::3])  # the outputs at the states

    @torch.no_grad()
    def act(self, returns_to_go, states, actions, timesteps, lengths):
        """Return the next actions (B, A) after histories of at most K steps.

        The first `lengths` (B,) steps of a window are real. The next action is that of the last of
        them; what `actions` holds in its place is ignored.
        """
        predicted = self.predict(returns_to_go, states, actions, timesteps)
        rows = torch.arange(len(lengths), device=lengths.device)
        predicted = predicted[rows, lengths - 1]  # (B, A)
        if self.discrete:
            return F.one_hot(predicted.argmax(dim=-1), predicted.shape[-1])
        return predicted.clamp(-1, 1) * self.action_radius + self.action_center

    def action_loss(self, batch):
        """Return the mean error of the actions over the real steps of a batch.

        The error of a step is the mean squared error of its A scaled numbers; for discrete actions,
        the cross-entropy.
        """
        predicted = self.predict(
            batch["returns_to_go"], batch["states"], batch["actions"], batch["timesteps"]
        )
        if self.discrete:
            error = -(predicted.log_softmax(dim=-1) * batch["actions"]).sum(dim=-1)  # (B, K)
        else:
            error = predicted - self.scale_actions(batch["actions"])
            error = error.square().mean(dim=-1)  # (B, K)
        return (error * batch["weight"]).sum()  # the weights add up to 1

    def forward(self, batch, tokens=None):
        """Return the two losses of LaMo: on a batch of Trajectories, and on text (B, T).

        Without text, the language loss is zero.
        """
        action_loss = self.action_loss(batch)
        if tokens is None:
            return action_loss, torch.zeros_like(action_loss)
        return action_loss, self.trunk.language_loss(tokens)


# -------------------------------------------------------------------------------- data
class Trajectories:
    """Trajectories as flat tensors of N steps, so that drawing a batch is one indexing operation.

    Args:
        observations, actions, rewards: an array (T, S), (T, A), (T,) for each trajectory. Numbers
            keep their precision, images stay uint8. `observations` is emptied, to save memory.
        terminated: whether each trajectory ended in a final state.
        stack: how many observations make a state; see `states_at`.
    """

    def __init__(self, observations, actions, rewards, device="cpu", terminated=(), stack=1):
        self.terminated, self.stack = np.array(terminated), stack
        self.lengths = np.array([len(reward) for reward in rewards])
        self.returns = np.array([reward.sum() for reward in rewards])
        self.longest = int(self.lengths.max())
        for part in (*observations, *actions, self.returns):
            if not np.isfinite(part).all():
                raise InputError("an observation, an action or a reward in the data is not finite")
        states, actions = concatenate(observations), np.concatenate(actions)
        self.state_mean = self.state_std = np.empty(0)  # images have none
        if states.ndim == 2:
            self.state_mean = states.mean(axis=0, dtype=np.float64)  # (S,)
            std = states.std(axis=0, dtype=np.float64)
            self.state_std = np.where(std > 1e-6, std + 1e-6, 1.0)  # a constant is only centred

        returns_to_go = [reward[::-1].cumsum()[::-1] for reward in rewards]
        timesteps = [np.arange(length) for length in self.lengths]
        last = self.lengths.cumsum() - 1  # of each trajectory
        self.states = torch.as_tensor(states, device=device)  # (N, S), or images
        self.actions = torch.tensor(actions, device=device)  # (N, A)
        self.returns_to_go = torch.tensor(np.concatenate(returns_to_go), device=device)  # (N,)
        self.timesteps = torch.tensor(np.concatenate(timesteps), device=device)  # (N,)
        # For each step, the index of the last step of its trajectory
        self.last = torch.tensor(np.repeat(last, self.lengths), device=device)  # (N,)
        parts = self.states, self.actions, self.returns_to_go, self.timesteps, self.last
        assert len({len(part) for part in parts}) == 1, "the parts differ in length"

    @property
    def longest_was_cut(self):
        """Whether a trajectory of the greatest length was truncated, not terminated."""
        return not self.terminated[self.lengths == self.longest].all()

    def batch(self, size, context):
        """Draw random windows: a start uniformly over all steps, and the steps that follow it.

        Returns a dict: returns_to_go (B, K), states (B, K, S), actions (B, K, A), timesteps (B, K),
        weight (B, K). Where a trajectory ends inside a window, its last step fills the rest with
        weight 0. The real steps have equal weights, which add up to 1.
        """
        start = torch.randint(len(self.states), (size, 1), device=self.states.device)
        steps = start + torch.arange(context, device=start.device)  # (B, K)
        last = self.last[start]  # (B, 1)
        real = steps <= last
        steps = torch.minimum(steps, last)
        return {
            "returns_to_go": self.returns_to_go[steps],
            "states": self.states_at(steps),
            "actions": self.actions[steps],
            "timesteps": self.timesteps[steps],
            "weight": real / real.sum(),
        }

    def states_at(self, steps):
        """Return the states of steps (B, K): the last `stack` observations, on their own axis.

        Before the first observation of a trajectory, that one is repeated. A stack of one has no
        such axis.
        """
        if self.stack == 1:
            return self.states[steps]
        back = torch.arange(self.stack - 1, -1, -1, device=steps.device)
        first = steps - self.timesteps[steps]
        return self.states[torch.maximum(steps.unsqueeze(-1) - back, first.unsqueeze(-1))]


def concatenate(arrays):
    """Return the arrays of a list as one; each is freed as soon as it is copied."""
    steps = sum(len(array) for array in arrays)
    dtype = np.result_type(*{array.dtype for array in arrays})  # an episode may have integers
    whole = np.empty((steps, *arrays[0].shape[1:]), dtype)
    start = 0
    while arrays:
        array = arrays.pop(0)
        whole[start : start + len(array)] = array
        start += len(array)
    return whole


class Text:
    """Text as flat tensors of token ids: one to train on, one held out.

    Args:
        tokens, held_out: arrays of token ids.
        block: T, the tokens in a crop.
        first: the id that replaces the first token of each crop, for a model whose texts all start
            with it; else None.
    """

    def __init__(self, tokens, held_out, block, device="cpu", first=None):
        if min(len(tokens), len(held_out)) < block:
            raise InputError(
                f"--text-block {block} is longer than the text ({len(tokens)} tokens to train on,"
                f" {len(held_out)} held out); lower --text-block, or give more --text"
            )
        self.tokens = torch.tensor(tokens, dtype=torch.int32, device=device)
        self.held_out = torch.tensor(held_out, dtype=torch.int32, device=device)
        self.block, self.first = block, first

    def crops(self, tokens, starts):
        """Return the crops (B, T) of a text that begin at `starts` (B,)."""
        positions = torch.arange(self.block, device=starts.device)
        crops = tokens[starts.unsqueeze(-1) + positions].long()
        if self.first is not None:
            crops[:, 0] = self.first
        return crops

    def batch(self, size):
        """Draw random crops of the text to train on: (B, T) token ids."""
        count = len(self.tokens) - self.block + 1
        return self.crops(self.tokens, torch.randint(count, (size,), device=self.tokens.device))

    @torch.no_grad()
    def held_out_loss(self, trunk):
        """Return the language loss on up to 32 evenly spaced blocks of the held-out text.

        The trunk should be in evaluation mode.
        """
        count = min(32, len(self.held_out) // self.block)
        starts = np.linspace(0, len(self.held_out) - self.block, count).astype(int)
        blocks = self.crops(self.held_out, torch.tensor(starts, device=self.held_out.device))
        return float(np.mean([trunk.language_loss(block).item() for block in blocks.split(1)]))


# -------------------------------------------------------------------------------- training: part 4
LOG_EVERY = 50  # training steps
SAVE_EVERY = 60  # seconds


def make_optimizer(model, config):
    """Return AdamW over the parameters that train, with the authors' epsilon."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, config.lr, weight_decay=config.weight_decay, eps=1e-6, fused=trained[0].is_cuda
    )


def learning_rate(step, config):
    """Return the learning rate of a step, counted from 0: a linear warm-up, then the schedule."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def draw(trajectories, text, config, step):
    """Return a training step's batch of windows, and of text (None without it).

    Each step has a seed of its own, so that a resumed run draws what it would have drawn. Runs of
    the same length with another --seed share none. Under torchrun all processes draw the same
    batch, and each takes its share: together they do what one would.
    """
    seed = config.seed * config.steps + step
    torch.manual_seed(seed)
    batch = trajectories.batch(config.batch, config.context)
    tokens = text.batch(config.text_batch) if text else None
    rank, world = rank_and_world()
    if world > 1:
        batch = {name: part[rank::world] for name, part in batch.items()}
        batch["weight"] = batch["weight"] * world  # because the gradients are averaged
        tokens = tokens[rank::world] if text else None
    if rank > 0:
        torch.manual_seed(seed + rank * 10**9)  # each process has dropout of its own
    return batch, tokens


def train_step(model, optimizer, batch, tokens, config, step):
    """Take a training step on windows of trajectories and crops of text.

    Here the two losses of LaMo become one: part 4 (paper, section 4). Returns a dict of the losses
    and of the gradient's norm, before it is clipped.
    """
    # L = action loss + lambda * language loss
    action_loss, language_loss = model(batch, tokens)
    loss = action_loss + config.lang_coef * language_loss

    optimizer.zero_grad()
    loss.backward()
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)

    # Update with the learning rate of this step.
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()

    losses = {"action_loss": action_loss, "gradient_norm": gradient_norm}
    if tokens is not None:
        losses["language_loss"] = language_loss
    return losses


def train(model, trajectories, text, environments, config, header, out, checkpoint=None):
    """Train a LaMo and evaluate it; return the scores of the last evaluation.

    The folder `out` gets log.jsonl and checkpoint.pt; both contain `header`, which describes the
    run. From a checkpoint, a run goes on as if it had never stopped. Without text (None), it has no
    language loss; without environments, no evaluation.
    """
    optimizer = make_optimizer(model, config)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    recorder = Recorder(out, header, checkpoint)
    learner = distribute(model, text)
    can_evaluate = environments is not None and rank_and_world()[0] == 0
    scores = {}
    model.train()

    steps = range(recorder.start, config.steps + 1)  # step: how many were taken so far
    # An iteration logs, saves and evaluates the model as it is, then takes the next step.
    for step in tqdm(steps, "training", config.steps, initial=recorder.start, mininterval=1):
        evaluating = step == config.steps or (step > 0 and step % config.eval_every == 0)

        # Log the mean losses. Until then they stay on the device, so that a GPU need not wait.
        if evaluating or step % LOG_EVERY == 0:
            recorder.log_losses(step, optimizer.param_groups[0]["lr"])

        # Save before anything long: a run that is stopped loses at most a minute of training.
        if evaluating or recorder.save_is_due():
            recorder.save(step, model, optimizer)

        # Evaluate in the simulator. Under torchrun the other processes wait.
        if evaluating and can_evaluate:
            scores = evaluate(
                model, environments, config.targets, config.episodes, first_seed(config),
                header["reference"], config.delayed,
            )  # fmt: skip
            recorder.log_scores(step, scores)
        if step == config.steps:
            return scores

        # Take the next step.
        batch, tokens = draw(trajectories, text, config, step)
        recorder.add(train_step(learner, optimizer, batch, tokens, config, step))


def first_seed(config):
    """Return the simulator's seed of the first evaluation episode; the others follow it.

    Runs with different --seed share no episode.
    """
    return 10_000 * config.seed  # --episodes is at most 10,000, and seeds stay below 2**32


def run_argument(out, env):
    """Return the arguments that name a run to a command: its folder, and an --env of the user's.

    A module of the user's is imported only if the command line names it.
    """
    folder = shlex.quote(out.as_posix())  # quotes around backslashes would fail on Windows
    return f"{folder} --env {env}" if ":" in str(env) else folder


class Recorder:
    """Writes a run's log.jsonl and checkpoint.pt, and knows where a resumed run continues.

    All that is logged passes through `log`. To use another logger, call it there. Only the first
    process of torchrun writes.
    """

    def __init__(self, out, header, checkpoint=None):
        self.out, self.header = out, header
        self.start = checkpoint["step"] if checkpoint else 0
        self.losses = checkpoint["losses"] if checkpoint else []  # since the last line of the log
        # The first save is due at once: `run_folder` keeps only a folder with a checkpoint.
        self.saved_step, self.saved_at = self.start, -math.inf
        self.logged_step, self.logged_at = self.start, time.perf_counter()
        self.writes = rank_and_world()[0] == 0
        if not self.writes:
            return
        self.path = out / "log.jsonl"
        if checkpoint:
            size = checkpoint["log_size"]
            kept = self.path.read_bytes()[:size]  # forget what came after the checkpoint
            if len(kept) < size:
                raise InputError(f"{self.path} has lost lines; start again, with another --out")
            # The log becomes another file: a process that still trains here sees that in `save`.
            with replacing(self.path) as file:
                file.write(kept)
        self.file = open(self.path, "a", newline="\n")  # on Windows, too
        if not checkpoint:
            self.log(header)

    def log(self, values):
        """Write a dict as a line of log.jsonl."""
        if self.writes:
            print(json.dumps(values), file=self.file, flush=True)

    def add(self, losses):
        """Keep the losses of a step, which may still be on the device."""
        self.losses.append({name: loss.detach() for name, loss in losses.items()})

    def read_losses(self, step):
        """Read the kept losses of the last steps from the device.

        Raises InputError if one is not finite.
        """
        self.losses = [{key: float(loss) for key, loss in losses.items()} for losses in self.losses]
        for taken, losses in enumerate(self.losses, step - len(self.losses) + 1):
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    raise InputError(
                        f"{name} became {loss} in step {taken}; start again with a lower --lr and"
                        f" another --out ({self.out} has the checkpoint of step {self.saved_step})"
                    )

    def log_losses(self, step, lr):
        """Log the mean losses since the last time, the learning rate, and the time of a step.

        Under torchrun, the losses are those of the first process's share of each batch.
        """
        self.read_losses(step)
        if not self.losses:
            return
        line = {"step": step, "lr": lr}
        for name in self.losses[0]:
            line[name] = float(np.mean([losses[name] for losses in self.losses]))
        seconds = time.perf_counter() - self.logged_at
        line["seconds_per_step"] = seconds / (step - self.logged_step)
        self.log(line)
        self.losses = []
        self.logged_step, self.logged_at = step, time.perf_counter()

    def log_scores(self, step, scores):
        """Log and print the scores of an evaluation."""
        self.log({"step": step, "evaluation": scores})
        tqdm.write(f"\nstep {step}\n{format_scores(scores, self.header['reference'])}")
        self.logged_at = time.perf_counter()

    def save_is_due(self):
        return time.perf_counter() > self.saved_at + SAVE_EVERY

    def save(self, step, model, optimizer):
        """Save all that a resumed run needs."""
        self.read_losses(step)
        state = {"optimizer": optimizer.state_dict(), "step": step, "losses": self.losses}
        if self.writes:
            log = os.fstat(self.file.fileno())
            if not os.path.samestat(log, self.path.stat()):
                raise InputError(f"another process has resumed {self.out}; this one stops")
            os.fsync(self.file.fileno())
            state["log_size"] = log.st_size  # bytes
            write_checkpoint(self.out / "checkpoint.pt", model, self.header, state)
        self.saved_step, self.saved_at = step, time.perf_counter()


# -------------------------------------------------------------------------------- several GPUs
def join_processes(device):
    """Join the processes that torchrun started, one for each GPU. Only the first of them prints.

    `device` is the --device that the user gave, or None. Raises InputError if there are too few
    GPUs.
    """
    if not dist.is_torchelastic_launched():
        return
    if torch.cuda.is_available() and device != "cpu":
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise InputError(
                f"torchrun starts {processes} processes, more than this machine has GPUs ({gpus});"
                " lower --nproc-per-node, or add --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # evaluations can take long
    if dist.get_rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def leave_processes():
    """Wait for all processes of torchrun, then part from them.

    One that ended by itself could abort in PyTorch's threads, and torchrun would stop the others.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank_and_world():
    """Return the rank of this process among those of torchrun, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def distribute(model, text):
    """Return the model; under torchrun, wrap it so that processes average their gradients."""
    if not dist.is_initialized():
        return model
    # Without text, the token embeddings of a trunk that trains get no gradient.
    return DistributedDataParallel(model, find_unused_parameters=text is None)


# -------------------------------------------------------------------------------- files
@contextmanager
def on_error(advice):
    """Turn any error inside into an InputError of one line: the advice, then the cause."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the libraries around us raise many kinds
        # Gymnasium's DependencyNotInstalled says what to install, its cause does not.
        while error.__cause__ and not isinstance(error, gym.error.DependencyNotInstalled):
            error = error.__cause__
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, LocalEntryNotFoundError):
            cause = "the hub does not answer, or HF_HUB_OFFLINE is set"
        raise InputError(f"{advice} ({cause})") from error


def find_local(name):
    """Return the path `name`, from the working directory or from beside lamo.py, or None."""
    for path in (Path(name), HERE / name):
        if path.exists():
            return path
    return None


@functools.cache
def hub_is_reachable():
    """Return whether the Hugging Face hub answers within 3 seconds; not if HF_HUB_OFFLINE=1."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return get_session().head(constants.ENDPOINT, timeout=3).status_code < 500
    except Exception:  # hub releases differ in what they raise
        return False


def find_file(dataset, filename):
    """Return the path of a file of a dataset on the Hugging Face hub; download it if need be."""
    advice = f"cannot find {filename} of {dataset} in the cache or on the Hugging Face hub"
    with on_error(f"{advice}; check the name and the network"):
        offline = not hub_is_reachable()
        path = hf_hub_download(dataset, filename, repo_type="dataset", local_files_only=offline)
        return Path(path)


def from_transformers(kind, name, **keywords):
    """Call from_pretrained of transformers' class `kind` on a folder or a hub name."""
    import transformers  # takes seconds, and is not always needed

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading; it hides those of downloads, too
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    local = find_local(name)
    return getattr(transformers, kind).from_pretrained(
        local or name,
        local_files_only=local is not None or not hub_is_reachable(),
        trust_remote_code=False,
        **keywords,
    )


def load_causal_lm(name):
    """Return the causal language model of a folder or a hub name, in float32.

    Raises InputError if it cannot be loaded, or if it is not a causal language model.
    """
    advice = f"cannot find a language model at {name}, in the cache or on the Hugging Face hub"
    with on_error(f"{advice}; check the name and the network"):
        config = from_transformers("AutoConfig", name)
    with on_error(f"cannot load --lm {name}; download it again, or choose another"):
        if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
            raise ValueError(f"{config.model_type} has an encoder; LaMo needs a decoder-only model")
        model, problems = from_transformers("AutoModelForCausalLM", name, output_loading_info=True)
        model = model.float()  # raises an error if it is quantised
    if problems["missing_keys"]:
        missing = ", ".join(sorted(problems["missing_keys"]))
        raise InputError(f"--lm {name} lacks weights: {missing}")
    return model


def load_tokenizer(name):
    """Return the tokenizer of a folder or a hub name. Raises InputError if there is none."""
    with on_error(f"cannot load the tokenizer of --lm {name}"):
        tokenizer = from_transformers("AutoTokenizer", name)
        # Without its files, transformers may return an empty one.
        if not tokenizer("text", add_special_tokens=False)["input_ids"]:
            raise ValueError("there is none")
    return tokenizer


def first_token(tokenizer):
    """Return the id that each text starts with, as for Llama, Gemma and OPT; None for GPT-2."""
    first = tokenizer("text")["input_ids"][0]
    return first if first == tokenizer.bos_token_id else None


def tokenize(text, tokenizer):
    """Return the token ids of a text, in one flat array.

    The text is cut before words, where GPT-2's tokenizer cuts it anyway. So the tokens are those of
    the whole text, and memory does not depend on how long its lines are. Tokenizers of another kind
    may differ at a cut, once in 50,000 characters.
    """
    # The longest pieces that end before a space and a word; where there is none, 50,000 characters
    pieces = re.findall(r"(?s).{1,50000}(?<=\S)(?= \S)|.{1,50000}", text)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    parts = [np.empty(0, dtype)]
    for start in tqdm(range(0, len(pieces), 10), "tokenising", leave=False, disable=None):
        ids = tokenizer(pieces[start : start + 10], add_special_tokens=False)["input_ids"]
        parts += [np.array(part, dtype) for part in ids]
    return np.concatenate(parts)


def wikitext_files():
    """Return the paths of WikiText-103, raw: two to train on, and the validation split."""
    parts = "train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"
    files = [f"wikitext-103-raw-v1/{part}.parquet" for part in parts]
    return [find_file("Salesforce/wikitext", file) for file in files]


def load_text(lm, text, block, device="cpu"):
    """Return the Text of WikiText-103, or of a file, of which the last tenth is held out."""
    tokenizer = load_tokenizer(lm)
    first = first_token(tokenizer)
    with on_error(f"cannot read --text {text}; give a file of UTF-8 text"):
        if text == "wikitext":
            tables = [parquet.read_table(path)["text"].to_pylist() for path in wikitext_files()]
            *train, held_out = (tokenize("".join(lines), tokenizer) for lines in tables)
            return Text(np.concatenate(train), held_out, block, device, first)
        tokens = tokenize((find_local(text) or Path(text)).read_text("utf-8"), tokenizer)
        train, held_out = np.split(tokens, [len(tokens) * 9 // 10])
        return Text(train, held_out, block, device, first)


# -------------------------------------------------------------------------------- datasets
def load_dataset(name):
    """Return the MinariDataset of a folder or an id, from Minari's own folder or from the hub."""
    minari_root = os.environ.get("MINARI_DATASETS_PATH") or os.path.expanduser("~/.minari/datasets")
    for path in (Path(name), HERE / name, Path(minari_root) / name):
        if not name or not path.exists():
            continue
        named = path.parent if path.is_file() else path  # one of a dataset's files names it, too
        for folder in (named, named / "data"):
            # An interrupted download of Minari has only metadata.json.
            if (folder / "metadata.json").exists() and len(list(folder.glob("*"))) > 1:
                return open_dataset(folder)
        raise InputError(f"{path} is not a dataset of Minari 0.5{advice_on(path)}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+-v\d+", name):
        raise InputError(
            f"--data {name} is neither a folder nor an id, such as mujoco/hopper/medium-v0"
        )
    namespace, _, rest = name.partition("/")
    # The small file first: during a long download, the hub may get another version of the dataset.
    for filename in ("metadata.json", "main_data.hdf5"):
        path = find_file(f"farama-minari/{namespace}", f"{rest}/data/{filename}")
    return open_dataset(path.parent)


def open_dataset(folder):
    """Return the MinariDataset of a folder with data and metadata.json.

    Raises ValueError if a space is missing: to learn it, Minari would make the recorded
    environment, and so run any code that the file names.
    """
    metadata = json.loads((folder / "metadata.json").read_text("utf-8"))
    for space in "observation_space", "action_space":
        if space not in metadata:
            raise ValueError(f"{folder / 'metadata.json'} has no {space}; write it with Minari 0.5")
    return minari.MinariDataset(folder)


def advice_on(path):
    """Return what to do about a file or folder that may have an older format."""
    import h5py

    for file in [path, *path.glob("*.hdf5"), *path.glob("data/*.hdf5")]:
        if file.is_file() and h5py.is_hdf5(file):
            with h5py.File(file) as content:
                if "observations" in content:
                    return ", but of D4RL; take Minari's own, such as D4RL/kitchen/complete-v2"
                if "episode_0" in content:
                    return ", but of an older Minari; download it again"
    return (
        ", which is a folder with data/main_data.hdf5 and data/metadata.json; delete it if it is an"
        " unfinished download"
    )


def split_episodes(dataset, ratio, seed):
    """Return the indices of a random share of a MinariDataset's episodes, and of the others."""
    shuffled = np.random.default_rng(seed).permutation(dataset.episode_indices)
    return np.split(shuffled, [int(ratio * len(shuffled) + 1e-9)])  # 0.29 * 100 is 28.999...


def read_trajectories(dataset, ratio, seed, delayed=False, device="cpu"):
    """Return a random share of the episodes of a MinariDataset, as Trajectories.

    `delayed` moves all reward of a trajectory to its last step.
    """
    chosen, _ = split_episodes(dataset, ratio, seed)
    count = len(chosen)
    if count == 0:
        raise InputError(f"--ratio {ratio:g} of {dataset.total_episodes} trajectories leaves none")
    chosen = np.sort(chosen)
    episodes = dataset.iterate_episodes(chosen)
    metadata = dataset.storage.get_episode_metadata(chosen)

    shape, stack = policy_spaces(dataset)[0].shape, 1
    observations, actions, rewards, terminated = [], [], [], []
    progress = tqdm(episodes, "reading", count, leave=False, disable=None)
    for episode, recorded in zip(progress, metadata, strict=True):
        T, states = len(episode.actions), policy_observation(episode.observations)
        if T == 0:
            continue
        steps = recorded.get("total_steps", T)
        if T != steps:  # Minari reads only the first 32,768 rows of an Arrow or Parquet file
            raise InputError(
                f"Minari reads {T} of the {steps} steps of episode {episode.id}; give the dataset"
                " as HDF5"
            )
        if len(shape) == 3 and states.shape[1:] == shape[1:]:  # frames; several make a state
            stack = shape[0]
        elif states.shape[1:] != shape:
            raise InputError(
                f"episode {episode.id} has observations of shape {states.shape[1:]}, not {shape}"
            )
        # Some datasets lack the last state, which no action follows.
        if len(states) not in (T, T + 1) or len(episode.rewards) != T:
            lengths = f"{len(states)} states, {T} actions and {len(episode.rewards)} rewards"
            raise InputError(f"episode {episode.id} has {lengths}")
        reward = recorded_rewards(dataset, episode).reshape(T).astype(np.float64)
        if delayed:
            reward = np.append(np.zeros(T - 1), reward.sum())
        observations.append(states[:T])
        actions.append(vectors(episode.actions, dataset.action_space))
        rewards.append(reward)
        terminated.append(bool(episode.terminations[-1]))
    if len(rewards) < count:
        print(f"dropped {count - len(rewards)} of {count} trajectories, which are empty")
    if not rewards:
        raise InputError("no trajectory has any step")
    return Trajectories(observations, actions, rewards, device, terminated, stack)


def vectors(actions, space):
    """Return the actions of an episode (T, A); those of a Discrete space (T,) become one-hot.

    Raises InputError if they have another shape, or if a Discrete space does not contain them.
    """
    if not isinstance(space, gym.spaces.Discrete):
        if actions.shape[1:] != space.shape:
            raise InputError(
                f"actions of {space} must be (T, {space.shape[0]}), not {actions.shape}"
            )
        return actions
    if actions.ndim != 1 or actions.dtype.kind not in "iu":
        raise InputError(
            f"actions of {space} must be integers (T,), not {actions.dtype} {actions.shape}"
        )
    choices = actions.astype(np.int64) - space.start
    if choices.min() < 0 or choices.max() >= space.n:
        raise InputError(f"an action in the data is not in its space, {space}")
    return F.one_hot(torch.tensor(choices), int(space.n)).float().numpy()


def recorded_rewards(dataset, episode):
    """Return the rewards (T,) of an episode.

    Minari's kitchen (remove_task_when_completed=False) rewards a finished subtask in every later
    step. Here it is rewarded once.
    """
    settings = dataset.env_spec.kwargs if dataset.env_spec else {}
    if settings.get("remove_task_when_completed", True):
        return episode.rewards
    achieved, desired = (episode.observations[key] for key in ("achieved_goal", "desired_goal"))
    finished = np.zeros(len(episode.rewards), int)  # subtasks finished so far, at each step
    for subtask in desired:
        distance = np.linalg.norm(achieved[subtask][1:] - desired[subtask][1:], axis=-1)
        finished += np.maximum.accumulate(distance < 0.3)  # the environment's threshold
    return np.diff(finished, prepend=0)


def evaluation_spec(dataset, env):
    """Return the EnvSpec to evaluate in: the user's, else the one in which the data was recorded.

    `--env eval` takes the one that the dataset names for evaluations. The two can differ: for
    Minari's antmaze/umaze-diverse, they are two mazes (its issue 304). If the environment cannot be
    made, the library's error passes through.
    """
    metadata = dataset.storage.metadata
    recorded, for_evaluation = metadata.get("env_spec"), metadata.get("eval_env_spec")
    chosen = recorded or for_evaluation
    if env == "eval":
        if not for_evaluation:
            raise InputError(
                "the dataset names no environment for evaluations; leave out --env eval"
            )
        chosen = for_evaluation
    if env in (None, "eval", *TASKS):
        if for_evaluation not in (None, chosen):
            print("the dataset has another environment for evaluations; to take it, add --env eval")
        return recorded_spec(chosen, env)
    if not chosen:
        print(
            "the dataset does not say in which environment, settings and wrappers it was recorded"
        )
    return spec_of(env, chosen)


def recorded_spec(recorded, env):
    """Return the EnvSpec that a dataset recorded, from text.

    If it cannot be made, a task brings its own, except for a kitchen, whose subtasks only the
    dataset knows. Raises InputError if the task has another environment.
    """
    task = TASKS.get(env, OTHER_TASK)
    try:
        spec = spec_from_json(recorded)
        gym.make(spec).close()
    except Exception as error:  # environments raise anything
        if task.env_id in (None, KITCHEN):
            raise
        print(f"evaluating in {task.env_id}, not in the dataset's own environment: {error}")
        spec = spec_of(task.env_id)
    if task.env_id and spec.name != spec_of(task.env_id).name:
        raise InputError(f"the dataset was recorded in {spec.id}, not in {env}; leave out --env")
    return spec


# -------------------------------------------------------------------------------- checkpoints
VERSION = 5  # of the format


def checksum(arrays):
    """Return the SHA-256 of arrays or tensors."""
    digest = hashlib.sha256()
    for array in arrays:
        for part in torch.as_tensor(array).flatten().split(2**24):  # copies no large array whole
            digest.update(part.cpu().contiguous().numpy())
    return digest.hexdigest()


@contextmanager
def replacing(path):
    """Open a new file in a run's folder; it replaces the one at `path` once all is written."""
    partial = path.with_suffix(".partial")
    folder = shlex.quote(path.parent.as_posix())
    with on_error(f"cannot write {path}; free some space, then start again, or --resume {folder}"):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_checkpoint(path, model, header, state):
    """Write a checkpoint. It has a frozen language model's checksum, not its weights."""
    weights = model.state_dict()
    if header["lm_checksum"]:
        # Tied weights have several names.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                del weights[name]
    with replacing(path) as file:
        torch.save({"version": VERSION, "header": header, "weights": weights} | state, file)


def read_checkpoint(folder):
    """Return the checkpoint of a run: a dict of header, weights and the state of training."""
    path = Path(folder) / "checkpoint.pt"
    with on_error(f"cannot read {path}; give the folder of a run"):
        if zipfile.ZipFile(path).testzip():  # PyTorch does not look for damage
            raise ValueError("the file is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["version"] != VERSION:
            raise ValueError(f"it has version {checkpoint['version']}; this code reads {VERSION}")
        return checkpoint


def load_weights(model, checkpoint, lm_checksum):
    """Load a checkpoint into a model that has the language model's own weights already."""
    if checkpoint["header"]["lm_checksum"] != lm_checksum:
        raise InputError("the language model is not the one that the run was trained on: give --lm")
    with on_error("the checkpoint does not fit this code"):
        model.load_state_dict(model.state_dict() | checkpoint["weights"])


def load(folder, device="cpu", lm=None):
    """Return the policy of a run's folder, its Config, and the header that `prepare` made.

    The policy is a LaMo in evaluation mode. `lm` says where its language model is now, if it has
    moved. Raises InputError if there is no checkpoint, or if the language model has changed.
    """
    checkpoint = read_checkpoint(folder)
    header = checkpoint["header"]
    config = Config(**header["config"])
    config = replace(config, device=device, lm=lm or config.lm)
    set_up_device(device)
    trunk, lm_checksum = build_trunk(config)
    model = LaMo(trunk, config.embed, config.context, **header["arguments"]).to(device)
    load_weights(model, checkpoint, lm_checksum)
    return model.eval(), config, header


# -------------------------------------------------------------------------------- runs
def set_up_device(device):
    """Let a GPU multiply in TF32. Raises InputError if this machine lacks the device."""
    with on_error(f"cannot use --device {device}; name one that this machine has"):
        torch.zeros(1, dtype=torch.float64, device=device).item()  # Apple's has no float64
    torch.set_float32_matmul_precision("high")


def build_trunk(config):
    """Return the trunk of a Config, and the checksum of its weights (None if they are random)."""
    if config.lm == "none":
        if config.width % config.heads > 0:
            raise InputError(f"--width {config.width} is not a multiple of --heads {config.heads}")
        no_text = {"vocab_size": 0, "n_positions": 0}
        shape = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads}
        trunk = GPT2(**no_text, **shape, dropout=config.dropout, bf16=config.bf16)
        lm_checksum = None
    else:
        theirs = load_causal_lm(config.lm)
        if GPT2.represents(theirs.config):
            trunk = GPT2.from_pretrained(theirs, config.dropout, config.bf16)
        else:
            with on_error(f"cannot use --lm {config.lm}; choose another"):
                trunk = CausalLM(theirs, config.bf16)
            if 3 * config.context > trunk.n_positions:
                raise InputError(
                    f"--context {config.context} makes {3 * config.context} tokens, but --lm has"
                    f" {trunk.n_positions} positions"
                )
        lm_checksum = checksum(trunk.state_dict().values())
    trunk.requires_grad_(config.train_trunk)
    if config.lora_rank > 0:
        with on_error(f"cannot add LoRA to --lm {config.lm}; add --lora-rank 0 --lang-coef 0"):
            trunk.add_lora(config.lora_rank, config.lora_alpha, config.lora_dropout)
    return trunk, lm_checksum


def prepare(config, title):
    """Load and build all that a run needs, and print what it is.

    Returns the Config, with targets from the data if it had none, the header of the run (a dict
    that says what it was made from), LaMo, Trajectories, Text (None without it) and Environments
    (None without evaluations).
    """
    set_up_device(config.device)
    torch.manual_seed(config.seed)

    # The language model comes first: a wrong name shows before anything large is downloaded.
    trunk, lm_checksum = build_trunk(config)
    if config.lang_coef > 0 and config.text_block > trunk.n_positions:
        raise InputError(
            f"--text-block {config.text_block} exceeds --lm's {trunk.n_positions} positions"
        )

    # The data, and the environment that it brings
    with on_error(f"cannot use the dataset --data {config.data}"):
        dataset = atari.preprocess_data(load_dataset(config.data))
        trajectories = read_trajectories(
            dataset, config.ratio, config.seed, config.delayed, config.device
        )
    environments = None
    if config.env != "none":
        environments = evaluation_environments(config, dataset, trajectories)
    print_data(config, dataset, trajectories, environments)
    if config.targets is None:
        config = replace(config, targets=default_targets(trajectories.returns))

    # The policy
    arguments = policy_arguments(config, dataset, trajectories, environments)
    model = LaMo(trunk, config.embed, config.context, **arguments).to(config.device)
    if model.scale_actions(trajectories.actions).abs().max() > 1.01:
        print("the data has actions out of bounds; those of the policy are clipped")
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model   {config.method} on {config.lm}: {trained:,} of {total:,} parameters train")

    # Text, for the language loss
    text, text_loss = None, None
    if config.lang_coef > 0:
        text = load_text(config.lm, config.text, config.text_block, config.device)
        if max(text.tokens.max(), text.held_out.max()) >= trunk.vocab_size:
            raise InputError(
                f"the tokenizer exceeds --lm's vocabulary of {trunk.vocab_size} tokens"
            )
        model.eval()
        text_loss = text.held_out_loss(trunk)
        print(f"text    {config.text}: {len(text.tokens):,} tokens to train on, ", end="")
        print(f"{len(text.held_out):,} held out")

    # All that the run is made from, and what eval.py needs
    env_spec = dataset.storage.metadata.get("env_spec")
    if environments:
        env_spec = spec_to_json(environments.spec)
    arrays = [trajectories.states, trajectories.actions, trajectories.returns_to_go]
    if text:
        arrays += [text.tokens, text.held_out]
    header = {
        "title": title,
        "config": asdict(config),
        "arguments": arguments,
        "reference": reference_returns(config, dataset),
        "env_spec": env_spec,
        "longest_was_cut": trajectories.longest_was_cut,
        "trajectories": len(trajectories.returns),
        "text_loss": text_loss,
        "lm_checksum": lm_checksum,
        "data_checksum": checksum(arrays),
        **describe_code(),
    }
    return config, header, model, trajectories, text, environments


def evaluation_environments(config, dataset, trajectories):
    """Return the Environments to evaluate in. Raises InputError if they do not suit the data."""
    with on_error(
        "cannot make the environment; name one with --env ID or --env module:ID, or train without:"
        " --env none"
    ):
        spec = evaluation_spec(dataset, config.env)
        spec.max_episode_steps = episode_limit(
            config, spec, trajectories.longest, trajectories.longest_was_cut
        )
        environments = Environments(spec)
        check_spaces(dataset, environments.envs[0])
        return environments


def print_data(config, dataset, trajectories, environments):
    """Print what the data is, and where the policy is evaluated."""
    returns = trajectories.returns
    count = f"{len(returns)} of {dataset.total_episodes} trajectories"
    print(f"data    {config.data}: {count}, {len(trajectories.states)} steps, ", end="")
    print(f"returns {returns.min():.1f} to {returns.max():.1f}, mean {returns.mean():.1f}")
    is_compressed = getattr(dataset.storage, "jpeg_encoding", True)  # in Minari 0.5.3, always
    if is_image_space(dataset.storage.observation_space) and is_compressed:
        print("its images are compressed (JPEG), those of the environment are not")
    if environments:
        spec = environments.spec
        print(f"env     {spec.id}, episodes of at most {spec.max_episode_steps} steps")


def policy_arguments(config, dataset, trajectories, environments):
    """Return the arguments of LaMo that depend on the data, as a dict."""
    observation_space, action_space = policy_spaces(dataset)
    if environments:
        action_space = environments.action_space  # its bounds are those of rollouts
    low, high = action_bounds(action_space, trajectories.actions)

    # The task says by what returns are divided; else it is a power of ten near the largest.
    return_scale = TASKS.get(config.env, OTHER_TASK).return_scale
    if not return_scale:
        largest = max(abs(np.array([*trajectories.returns, *config.targets])))
        return_scale = 10.0 ** round(math.log10(largest)) if largest > 0 else 1.0
    return {
        "max_timesteps": trajectories.longest,
        "return_scale": float(return_scale),
        "state_mean": trajectories.state_mean.tolist(),
        "state_std": trajectories.state_std.tolist(),
        "action_low": low.tolist(),
        "action_high": high.tolist(),
        "discrete": isinstance(dataset.action_space, gym.spaces.Discrete),
        "image_shape": observation_space.shape if len(observation_space.shape) == 3 else None,
    }


def reference_returns(config, dataset):
    """Return the returns that score 0 and 100: the data's, else the task's."""
    reference = [dataset.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score")]
    # They may be missing, not finite, or equal.
    if None in reference or not np.isfinite(reference).all() or reference[0] == reference[1]:
        return TASKS.get(config.env, OTHER_TASK).reference
    return reference


def describe_code():
    """Return a dict of the packages' versions and the commit of this code, None outside a clone."""
    packages = "torch", "transformers", "gymnasium", "mujoco", "minari"
    command = "git describe --always --dirty"  # through a shell, so that a missing git is no error
    commit = subprocess.run(command, shell=True, cwd=HERE, capture_output=True, text=True)
    return {
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "commit": commit.stdout.strip() or None,
    }


def action_bounds(space, actions):
    """Return the bounds of an action space; where it has none, those of the data's actions (N, A).

    gymnasium.wrappers.ClipAction leaves a space without bounds.
    """
    low, high = space.low.astype(float), space.high.astype(float)
    has_low, has_high = abs(low) < 1e6, abs(high) < 1e6  # no bound: infinite, or a huge number
    if has_low.all() and has_high.all():
        return low, high
    print("where the actions have no bounds, those of the data are taken")
    actions = actions.cpu().numpy()
    low = np.where(has_low, low, actions.min(axis=0))
    high = np.where(has_high, high, actions.max(axis=0))
    return low, high


def episode_limit(config, spec, longest, longest_was_cut):
    """Return the step limit of an evaluation's episodes: the user's, else the environment's.

    Without either, it is the length of the longest trajectory. The same holds if the environment's
    limit is more than ten times as long and that trajectory was truncated, not terminated: Minari's
    mazes record the length of the whole dataset as their limit. A task keeps its limit.
    """
    if config.max_steps:
        return config.max_steps
    limit = spec.max_episode_steps
    if not limit or (limit > 10 * longest and longest_was_cut and config.env not in TASKS):
        return longest
    return limit


def check_spaces(dataset, env):
    """Raise InputError if an environment has other observations or actions than the data."""
    names = "observations", "actions"
    for name, ours, theirs in zip(names, policy_spaces(dataset), policy_spaces(env)):
        if ours.shape != theirs.shape:
            shapes = f"{name} of shape {ours.shape}, its environment {theirs.shape}"
            raise InputError(f"the data has {shapes}")
    data_space, env_space = dataset.observation_space, env.observation_space
    if entry_shapes(data_space) != entry_shapes(env_space):
        print(f"the data has observations {data_space}, its environment {env_space}")
        print("if their numbers differ in order or meaning, the scores are wrong")
    data_space, env_space = dataset.action_space, env.action_space
    differ = f"the data has the actions {data_space}, its environment {env_space}"
    if type(data_space) is not type(env_space):
        raise InputError(differ)
    if isinstance(data_space, gym.spaces.Discrete):
        if (data_space.n, data_space.start) != (env_space.n, env_space.start):
            raise InputError(differ)
    elif not np.allclose([data_space.low, data_space.high], [env_space.low, env_space.high]):
        print(differ)  # no error, because wrappers change bounds


def entry_shapes(space):
    """Return the shape of a space; for a Dict, its entries' by name, None for a nested Dict."""
    if isinstance(space, gym.spaces.Dict):
        return {name: part.shape for name, part in space.items()}
    return space.shape


def default_targets(returns):
    """Return the best return of the data and a worse one: half of it; if negative, twice."""
    best = float(returns.max())
    if best == 0:
        return [best]
    return [best, best / 2 if best > 0 else 2 * best]


def run(config, title, out, checkpoint=None):
    """Train and evaluate as a Config says, into the folder `out`; go on from a checkpoint."""
    started = time.time()
    config, header, model, trajectories, text, environments = prepare(config, title)
    if checkpoint:
        if checkpoint["header"]["data_checksum"] != header["data_checksum"]:
            raise InputError(f"--data {config.data} or --text {config.text} is not what it was")
        load_weights(model, checkpoint, header["lm_checksum"])
        header = checkpoint["header"] | {"config": header["config"]}  # files may have moved

    print(f"run     {config.steps:,} steps on {config.device}, into {out}", flush=True)
    try:
        scores = train(model, trajectories, text, environments, config, header, out, checkpoint)
        if rank_and_world()[0] == 0:
            report(config, header, model, text, scores, out)
    except KeyboardInterrupt:
        sys.exit(f"stopped; resume with: python lamo.py --resume {run_argument(out, config.env)}")
    print(f"{time.time() - started:.0f} s, all in {out}")


def report(config, header, model, text, scores, out):
    """Write scores.json and print the scores of a run that has ended.

    Raises InputError if it was evaluated and every episode failed.
    """
    text_loss = None
    if text:
        model.eval()
        text_loss = text.held_out_loss(model.trunk)
    target, best = best_target(scores)
    summary = {
        "best": {"target": float(target)} | best if best else None,
        "targets": scores,
        "dataset": config.data,
        "lm": config.lm,
        "demo": config.demo,
        "text_loss_before": header["text_loss"],
        "text_loss_after": text_loss,
    }
    (out / "scores.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    print(f"\n{header['title']}")
    if scores:
        print(format_scores(scores, header["reference"]))
    if text:
        print("language loss on held-out text, in nats per token: ", end="")
        print(f"{header['text_loss']:.3f} before, {text_loss:.3f} after")
    if scores and not best:
        raise InputError("every episode of the evaluation failed, see above; the weights are saved")
    if scores:
        print(f"evaluate it again: python eval.py {run_argument(out, config.env)}")


# -------------------------------------------------------------------------------- command line
def parse(arguments, program="lamo.py"):
    """Return the options that a command line gives, as a dict."""
    parser = argparse.ArgumentParser(
        program,
        usage=argparse.SUPPRESS,
        description=__doc__.split("\n")[0],
        epilog="The defaults are those of the authors' runs of LaMo. The other methods change some,"
        " and the demo, which is the default without a GPU, changes more.",
        allow_abbrev=False,
    )
    for item in fields(Config):
        keywords = dict(item.metadata)
        if "group" in keywords:
            group = parser.add_argument_group(keywords.pop("group"))
        if "default: " not in keywords["help"] and item.default is not False:
            keywords["help"] += f"; default: {item.default}"
        name = f"--{item.name.replace('_', '-')}"
        group.add_argument(name, default=argparse.SUPPRESS, **keywords)
    if program == "lamo.py":
        resume = {"metavar": "FOLDER", "help": "resume a run that was stopped"}
        group.add_argument("--resume", default=argparse.SUPPRESS, **resume)
    return vars(parser.parse_args(arguments))


def configure(given):
    """Return the Config of the given options, and the title of the run."""
    given = with_full_paths(given)
    if "data" in given:
        given = {"env": None} | given  # a dataset brings its environment
    env, method = given.get("env", Config.env), given.get("method", Config.method)
    if "data" not in given and env not in TASKS:
        tasks = ", ".join(TASKS)
        raise InputError(f"--env {env} is not one of {tasks}; it needs a dataset, too: add --data")
    task = TASKS.get(env, OTHER_TASK)
    of_task = {"data": task.data, "targets": task.targets, "context": task.context}

    def combine(settings):
        # Where several set an option, the last of them wins.
        config = Config(**of_task | settings | task.settings | METHODS[method] | given)
        check_options(config)
        return config

    config = combine({})  # invalid options show before anything is downloaded
    title = f"{method} on {config.data}"

    # Under torchrun, only --demo takes the demo: processes might disagree about the hub.
    reason = None
    if config.demo or not dist.is_initialized():
        reason = demo.reason(given, lambda: fetch(config))
    if reason:
        config = combine(demo.settings(env, method) | {"demo": True})
        title = f"{demo.NOTICE} ({reason})"
    return config, title


def with_full_paths(given):
    """Return options in which the user's files have full paths, valid from any directory."""
    given = dict(given)
    reserved = {"lm": "none", "text": Config.text}  # not a file, whatever this directory holds
    for name in given.keys() & {"lm", "data", "text"}:
        if given[name] in ("", reserved.get(name)):
            continue
        path = Path(given[name])
        # This repository's own files keep their short names.
        if path.exists() and path.resolve() != (HERE / path).resolve():
            given[name] = str(path.resolve())
    return given


def check_options(config):
    """Raise InputError if options contradict each other."""
    adapted = config.lora_rank > 0 or config.train_trunk
    if config.lang_coef > 0 and (config.lm == "none" or not adapted):
        needs = "a language model, and LoRA or --train-trunk"
        raise InputError(f"the language loss needs {needs}; to do without, add --lang-coef 0")
    if config.train_trunk and config.lora_rank > 0:
        raise InputError(
            "LoRA freezes the trunk; --train-trunk trains it, as --method dt and wiki-rl do: add"
            " --lora-rank 0, or take --method lamo without --train-trunk"
        )
    world = rank_and_world()[1]
    if config.batch % world > 0 or (config.lang_coef > 0 and config.text_batch % world > 0):
        given = f"they are {config.batch} and {config.text_batch}, for {world} processes"
        raise InputError(f"--batch and --text-batch must be multiples of {world}; {given}")


def fetch(config):
    """Download a run's files into the caches. Raises InputError if one cannot be had."""
    if config.lm != "none":
        load_causal_lm(config.lm)
    with on_error(f"cannot use the dataset {config.data}"):
        load_dataset(config.data)
    if config.lang_coef > 0:
        load_tokenizer(config.lm)
        wikitext_files()  # with another --text, `demo.reason` does not call this


@contextmanager
def run_folder(out, env):
    """Make the folder of a new run. Remove it if the run ends before its first checkpoint."""
    argument = run_argument(out, env)
    with on_error(f"cannot make {out}; choose another --out, delete it, or --resume {argument}"):
        out.mkdir(parents=True)
    try:
        yield
    finally:
        if not (out / "checkpoint.pt").exists():
            shutil.rmtree(out, ignore_errors=True)


def resume(out, given):
    """Go on with the run in a folder; `given` are the other options of the command line."""
    if given.keys() - {"device", "lm", "data", "text", "env"}:
        allowed = "--device, --env (to allow a module), and --lm, --data and --text (if moved)"
        raise InputError(f"--resume keeps the run's settings; it takes only {allowed}")
    checkpoint = read_checkpoint(out)
    header = checkpoint["header"]
    config = Config(**header["config"] | with_full_paths(given))
    check_options(config)  # torchrun may have another number of processes now

    # A module that a file names is not imported unless the user names it, too.
    given_env, run_env = given.get("env"), header["config"]["env"]
    if given_env is None and ":" in str(run_env):
        raise InputError(f"the run evaluates in {run_env}; allow it with --env {run_env}")
    if given_env is not None and (
        not run_env or given_env.split(":")[-1] != run_env.split(":")[-1]
    ):
        where = run_env or "the environment of its data"
        raise InputError(f"the run evaluates in {where}; --resume takes no other --env")

    print(header["title"], flush=True)
    if checkpoint["step"] == config.steps and (out / "scores.json").exists():
        print(
            f"the run has ended; evaluate it again: python eval.py {run_argument(out, config.env)}"
        )
        return
    run(config, header["title"], out, checkpoint)


def main(arguments):
    """Train and evaluate as the command line says."""
    given = parse(arguments)
    join_processes(given.get("device"))
    if "resume" in given:
        return resume(Path(given.pop("resume")), given)
    config, title = configure(given)
    name = config.env if config.env in TASKS else re.sub(r"[^\w.-]+", "-", config.data.strip("/"))
    name = f"{name}-{config.method}-{config.ratio:g}-{config.seed}"
    out = Path(config.out or f"runs/{name}{'-demo' if config.demo else ''}")
    print(title, flush=True)
    with run_folder(out, config.env) if rank_and_world()[0] == 0 else nullcontext():
        run(config, title, out)


def run_command(main, program):
    """Call main with the command line's arguments; a mistake ends in one line and code 2.

    `python -X dev` shows where it comes from.
    """
    # SIGTERM ends a run as Ctrl-C does, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # some consoles cannot show ±
    try:
        main(sys.argv[1:])
        leave_processes()
    except KeyboardInterrupt:
        sys.exit(1)
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        # A lack of memory has a class of its own on a GPU; on a CPU, only the message tells it.
        no_memory = isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error)
        if sys.flags.dev_mode or (isinstance(error, RuntimeError) and not no_memory):
            raise
        stream = sys.stderr if rank_and_world()[0] == 0 else sys.__stderr__
        print(f"{program}: error: {error}", file=stream)
        sys.exit(2)


# What `uv run lamo.py` installs: the first part of requirements.txt
# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = [
#     "torch>=2.6,<3",
#     "transformers>=4.46,<6",
#     "huggingface_hub>=0.26,<3",
#     "gymnasium[mujoco]>=1.2,<1.5",
#     "mujoco>=3.5,<3.9",
#     "gymnasium-robotics>=1.4,<1.5",
#     "farama-notifications>=0.0.4",
#     "minari[arrow,hdf5,hf]>=0.5.3,<0.6",
#     "numpy>=1.26",
#     "pyarrow>=17",
#     "imageio[ffmpeg]>=2.34",
#     "tqdm>=4.66",
# ]
# ///

if __name__ == "__main__":
    run_command(main, "lamo.py")
