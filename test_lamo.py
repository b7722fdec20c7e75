"""Tests of lamo.py and eval.py. Each compares with something independent of what it guards: numbers recorded from the
authors' code, transformers, a plain loop, one environment at a time.
"""

import contextlib
import functools
import http.server
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import gymnasium as gym
import h5py
import minari
import numpy as np
import pyarrow
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2TokenizerFast,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
)

import atari
import eval as evaluation
import lamo
from eval import Environments
from lamo import GPT2, CausalLM, Config, InputError, LaMo, LoRALinear, Text, Trajectories

HERE = Path(__file__).resolve().parent
HISTORY = "returns_to_go", "states", "actions", "timesteps"
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # Minari's, on what our datasets leave unsaid


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No test sees the user's caches or the network, or leaves a signal handler behind."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(lamo, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(lamo.signal, "signal", lambda *_: None)


def gpt2_of(folder, *dropout, **settings):
    return GPT2.from_pretrained(lamo.load_causal_lm(folder), *dropout, **settings)


def cpu_config(**changes):
    """A Config for the CPU, also on a machine with a GPU."""
    return Config(device="cpu", **changes)


# ---------------------------------------------------------------------------- the authors' code
@functools.cache
def authors():
    """What the authors' code computes, by name."""
    return np.load(HERE / "results" / "authors.npz")


def recorded(name):
    return torch.from_numpy(authors()[name])


@pytest.fixture(scope="module")
def authors_lm(tmp_path_factory):
    """The folder of the authors' language model, as a GPT-2 checkpoint."""
    folder = tmp_path_factory.mktemp("authors")
    shape = {"vocab_size": 48, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | shape))
    weights = {
        name.removeprefix("lm/"): recorded(name)
        for name in authors().files
        if name.startswith("lm/")
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def authors_lamo(authors_lm):
    """The authors' tiny LaMo: ours with their weights. Dropout is 0, as where they recorded training steps."""
    gpt2 = gpt2_of(authors_lm, dropout=0.0)
    gpt2.add_lora(rank=16, alpha=32, dropout=0.0)
    states = authors()["state_mean"].tolist(), authors()["state_std"].tolist()
    model = LaMo(gpt2, "mlp", 6, 20, 1000.0, *states, [-1.0, -1.0], [1.0, 1.0])
    theirs = {
        name.removeprefix("lamo/"): recorded(name)
        for name in authors().files
        if name.startswith("lamo/")
    }
    ours = {}
    for name, weight in theirs.items():
        if "lora_" in name:  # rows of q, then of k, then of v
            weight = weight.view(3, 16, 16)
        name = name.replace("lora_", "").replace("predict_action.fc1", "action_head.0")
        name = (
            name.replace("predict_action.fc2", "action_head.2")
            .replace("fc1", "input")
            .replace("fc2", "residual")
        )
        ours[f"trunk.{name}" if name.startswith("h.") else name] = weight
    absent, unexpected = model.load_state_dict(ours, strict=False)
    buffers = {"return_scale", "state_mean", "state_std", "action_center", "action_radius"}
    assert not unexpected and all(name.startswith("trunk.") or name in buffers for name in absent)
    model.trunk.wpe.weight.data.zero_()  # the authors take the language loss without positions
    return model


def authors_windows(model, where):
    """A recorded batch of windows, in the environment's units, as Trajectories.batch gives it."""
    states = recorded(f"{where}/states_normalised").double()
    states = states * recorded("state_std").double() + recorded("state_mean").double()
    dtype = model.state_mean.dtype
    real = torch.arange(6) < recorded(f"{where}/length").unsqueeze(1)
    return {
        "states": states.to(dtype),
        "actions": recorded(f"{where}/actions").to(dtype),
        "returns_to_go": (recorded(f"{where}/returns_to_go_scaled").double() * 1000).to(dtype),
        "timesteps": recorded(f"{where}/timesteps"),
        "weight": real.to(dtype) / real.sum(),
    }


def test_predictions_and_losses_equal_the_authors(authors_lamo):
    model = authors_lamo.eval()
    batch = authors_windows(model, "batch")
    with torch.no_grad():
        predicted = model.predict(*(batch[name] for name in HISTORY))
        real = batch["weight"] > 0
        torch.testing.assert_close(
            predicted[real], recorded("batch/predicted")[real], atol=2e-6, rtol=0
        )
        assert model.action_loss(batch).item() == pytest.approx(
            authors()["batch/action_loss"].item(), abs=1e-6
        )
        language_loss = model.trunk.language_loss(recorded("text")[:2])
        assert language_loss.item() == pytest.approx(
            authors()["text/loss_without_positions"].item(), abs=1e-6
        )


def test_actions_equal_the_authors_after_each_step(authors_lamo):
    model = authors_lamo.eval()
    for t in range(1, 10):
        first = max(0, t - 6)
        history = [
            torch.zeros(6),
            torch.zeros(6, 3),
            torch.zeros(6, 2),
            torch.zeros(6, dtype=torch.long),
        ]
        history[0][: t - first] = recorded("history/returns_to_go_scaled")[first:t] * 1000
        history[1][: t - first] = recorded("history/states")[first:t]
        history[2][: t - first] = recorded("history/actions")[first:t]
        history[3][: t - first] = torch.arange(first, t)
        action = model.act(*(part.unsqueeze(0) for part in history), torch.tensor([t - first]))[0]
        np.testing.assert_allclose(
            action, authors()["history/action_after_t_steps"][t - 1], atol=2e-6, rtol=0
        )


def test_training_steps_equal_the_authors_in_float64(authors_lamo, tmp_path, monkeypatch):
    monkeypatch.setattr(lamo, "LOG_EVERY", 1)
    monkeypatch.setattr(lamo, "evaluate", lambda *_: {"1": {"return_mean": 0.0}})
    monkeypatch.setattr(lamo, "format_scores", lambda *_: "")
    model = authors_lamo.double()
    windows = iter([authors_windows(model, f"step{step}") for step in range(4)])
    text = iter(recorded("text").split(2))
    config = cpu_config(
        lr=0.01, warmup=2, steps=4, weight_decay=1e-5, grad_clip=0.25, lang_coef=0.1
    )
    lamo.train(
        model, SimpleNamespace(batch=lambda *_: next(windows)),
        SimpleNamespace(batch=lambda *_: next(text)), None, config, HEADER, tmp_path,
    )  # fmt: skip
    _, *lines, _ = read_log(tmp_path)
    for step, line in enumerate(lines):
        assert line["lr"] == pytest.approx(authors()["training/lr"][step])
        loss = line["action_loss"] + 0.1 * line["language_loss"]
        expected = authors()["training/loss_action_plus_0.1_language"][step]
        assert loss == pytest.approx(expected, abs=1e-12)
    trained = {
        "embed_state.fc1.weight": model.embed_state.input.weight,
        "predict_action.fc2.bias": model.action_head[2].bias,
        "h.1.attn.c_attn.lora_B": model.trunk.h[1].attn.c_attn.B.flatten(0, 1),
        "h.0.attn.c_attn.bias": model.trunk.h[0].attn.c_attn.bias,
        "embed_ln.weight": model.embed_ln.weight,
    }
    for name, weight in trained.items():
        np.testing.assert_allclose(
            weight.detach(), authors()[f"trained/{name}"], atol=1e-11, rtol=0, err_msg=name
        )


# ---------------------------------------------------------------------------- GPT-2
def tiny_config(**changes):
    dropouts = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
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
    bpe.train_from_iterator(
        [WORDS], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.save_model(str(folder))
    GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    shaken(GPT2LMHeadModel(tiny_config(initializer_range=0.3))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bf16, least, most", [(False, 0, 1e-4), (True, 0.01, 1)])
def test_logits_equal_transformers(bf16, least, most, lm_folder):
    theirs, ours = (
        GPT2LMHeadModel.from_pretrained(lm_folder).eval(),
        gpt2_of(lm_folder, bf16=bf16).eval(),
    )
    tokens = torch.randint(300, (3, 64))
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours.logits(tokens)
        torch.testing.assert_close(logits, expected, atol=most, rtol=0)
    assert (logits - expected).abs().max() >= least and expected.std() > 0.5 and ours.drop.p == 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"n_inner": 64},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
    ],
)
def test_a_gpt2_that_computes_something_else_is_left_to_transformers(change):
    assert not GPT2.represents(tiny_config(**change))
    for same in {}, {"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 4 * 32}:
        assert GPT2.represents(tiny_config(**same))


def test_random_weights_start_as_transformers_do():
    ours, theirs = GPT2(3000, 500, 64, 8, 2), GPT2Model(tiny_config(n_embd=64, n_layer=8))
    for name, parameter in ours.named_parameters():
        reference = theirs.get_parameter(name)
        assert parameter.mean().item() == pytest.approx(reference.mean().item(), abs=0.001), name
        assert parameter.std().item() == pytest.approx(reference.std().item(), rel=0.1, abs=1e-6), (
            name
        )


def test_language_loss_equals_transformers(lm_folder):
    theirs = GPT2LMHeadModel.from_pretrained(lm_folder).eval()
    trunk, tokens = gpt2_of(lm_folder).eval(), torch.randint(300, (20, 50))
    expected, loss = theirs(tokens, labels=tokens).loss, trunk.language_loss(tokens)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    loss.backward()
    ours = trunk.h[1].mlp.c_fc.weight.grad
    torch.testing.assert_close(
        ours, theirs.transformer.h[1].mlp.c_fc.weight.grad.T, atol=1e-5, rtol=1e-4
    )


# ---------------------------------------------------------------------------- LoRA
def test_lora_follows_the_formula_and_starts_as_the_original():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(16, 48), torch.randn(5, 7, 16)
    lora = LoRALinear(linear, rank=4, alpha=8, dropout=0.0, fused=3)
    assert torch.equal(lora(x), linear(x))
    torch.nn.init.normal_(lora.B)
    with torch.no_grad():
        parts = [
            2.0 * x @ A.T @ B.T for A, B in zip(lora.A, lora.B)
        ]  # alpha / r = 2; a pair each for q, k and v
        expected = linear(x) + torch.cat(parts, dim=-1)
        torch.testing.assert_close(lora(x), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(lora.eval()(x), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(lora.train()(x[0]), expected[0], atol=1e-5, rtol=0)
    lora = LoRALinear(torch.nn.Linear(400, 1200), rank=16, alpha=8, dropout=0.0, fused=3)
    assert lora.A.shape == (3, 16, 400) and lora.B.shape == (3, 400, 16) and not lora.B.any()
    bound = math.sqrt(
        1 / 400
    )  # Kaiming-uniform with a = sqrt(5), as torch.nn.Linear and loralib start
    assert 0.99 * bound < lora.A.abs().max() <= bound
    assert lora.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_fused_projections_drop_the_same_inputs():
    torch.manual_seed(0)
    lora, x = LoRALinear(torch.nn.Linear(16, 48), 4, 8, 0.5, fused=3), torch.randn(5, 16)
    with torch.no_grad():
        lora.A[:], lora.B[:] = torch.randn(4, 16), torch.randn(16, 4)  # the same three times
        q, k, v = (lora(x) - lora.eval()(torch.zeros(5, 16)) - x @ lora.weight.T).split(16, dim=-1)
    torch.testing.assert_close(q, k)
    torch.testing.assert_close(q, v)


def test_trainable_share_of_gpt2_small():
    with torch.device("meta"):
        gpt2 = GPT2()
        assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808  # as published
        gpt2.add_lora(16, 32.0, 0.1)
    assert sum(p.numel() for p in gpt2.parameters() if p.requires_grad) == 12 * (
        3 * 16 * (768 + 768) + 3 * 768
    )
    assert gpt2.drop.p == gpt2.h[0].mlp.dropout.p == 0.1


# ---------------------------------------------------------------------------- other language models
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MODERN = SHAPE | {"intermediate_size": 64, "max_position_embeddings": 64, "num_key_value_heads": 2}
FAMILIES = {  # a config, and the weights of a layer's LoRA of rank 4, with the biases of q, k and v
    "llama": (LlamaConfig(**MODERN), 4 * (3 * 32 + 32 + 16 + 16)),
    "qwen2": (Qwen2Config(**MODERN), 4 * (3 * 32 + 32 + 16 + 16) + 64),
    "gemma2": (
        Gemma2Config(**MODERN, head_dim=8, sliding_window=8, attn_logit_softcapping=2.0),
        4 * (3 * 32 + 32 + 16 + 16),
    ),
    "opt": (
        OPTConfig(
            **SHAPE, dropout=0.0, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=16
        ),
        4 * 3 * (32 + 32) + 96,
    ),
    "pythia": (GPTNeoXConfig(**SHAPE, intermediate_size=64), 4 * (32 + 96) + 96),
    "falcon": (FalconConfig(**SHAPE, multi_query=True), 4 * (32 + 48)),
    "phi3": (Phi3Config(**MODERN), 4 * (32 + 64)),
    "bloom": (BloomConfig(**SHAPE), 4 * (32 + 96) + 96),
    "mpt": (MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=300), 4 * (32 + 96)),
    "gpt2-relu": (tiny_config(activation_function="relu", n_inner=40), 4 * (32 + 96) + 96),
}


@pytest.fixture(scope="session")
def family(tmp_path_factory, lm_folder):
    """Return the folder of a random model of a family, with a tokenizer."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def made(name):
        folder = shutil.copytree(lm_folder, root / name)
        torch.manual_seed(0)
        shaken(AutoModelForCausalLM.from_config(FAMILIES[name][0])).save_pretrained(folder)
        return str(folder)

    return made


def other_trunk(folder, rank=4, **changes):
    config = cpu_config(lm=folder, lora_rank=rank, lora_alpha=12.0, context=20, **changes)
    return lamo.build_trunk(config)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_other_models_are_the_trunk_as_they_are(name, family):
    trunk, theirs = (
        other_trunk(family(name)).eval(),
        AutoModelForCausalLM.from_pretrained(family(name)),
    )
    assert isinstance(trunk, CausalLM) and trunk.vocab_size == 300
    tokens = torch.randint(300, (2, 40))
    embeddings = theirs.get_input_embeddings()(tokens)
    assert trunk.width == embeddings.shape[-1]
    with torch.no_grad():
        output = theirs.eval()(tokens, output_hidden_states=True)
        hidden = trunk(embeddings)
        torch.testing.assert_close(hidden, output.hidden_states[-1], atol=1e-5, rtol=1e-4)
        expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(trunk.language_loss(tokens), expected, atol=1e-5, rtol=1e-4)
        later = embeddings.clone()
        later[:, 20:] += 1
        torch.testing.assert_close(trunk(later)[:, :20], hidden[:, :20], atol=1e-5, rtol=1e-4)
        assert trunk(embeddings[:, :1]).shape == (2, 1, trunk.width)
        longest = min(trunk.n_positions, 64)
        assert trunk.language_loss(torch.randint(300, (1, longest))) > 0


@pytest.mark.skipif(not hasattr(transformers, "Gemma3Config"), reason="transformers is older")
def test_a_vision_tower_gets_no_lora():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    vision = shape | {"intermediate_size": 64, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1
    )
    trunk = CausalLM(AutoModelForCausalLM.from_config(config))
    trunk.add_lora(4, 8.0, 0.0)
    trunk.language_loss(torch.randint(300, (2, 9))).backward()
    adapted = [part for part in trunk.modules() if isinstance(part, LoRALinear)]
    assert len(adapted) == 6 and all(part.B.grad is not None for part in adapted)


@pytest.mark.skipif(not hasattr(transformers, "Lfm2Config"), reason="transformers is older")
def test_layers_without_lora_are_counted(capsys):
    types = ["conv", "full_attention", "conv", "conv"]
    for layer_types, counts in (types, ["1 of 4 layers"]), (4 * types[1:2], []):
        config = transformers.Lfm2Config(
            **MODERN | {"num_hidden_layers": 4, "layer_types": layer_types}
        )
        CausalLM(AutoModelForCausalLM.from_config(config)).add_lora(4, 8.0, 0.0)
        assert re.findall(r"\d of \d layers", capsys.readouterr().out) == counts


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV3Config"), reason="transformers is older")
@pytest.mark.parametrize("q_lora_rank", [None, 16])
def test_latent_attention_gets_lora(q_lora_rank):
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(
        **MODERN | latent | {"q_lora_rank": q_lora_rank, "num_key_value_heads": 4},
        first_k_dense_replace=2,
    )
    trunk = CausalLM(AutoModelForCausalLM.from_config(config))
    trunk.add_lora(4, 8.0, 0.0)
    names = {n.split(".")[-1] for n, part in trunk.named_modules() if isinstance(part, LoRALinear)}
    assert names == {"q_b_proj" if q_lora_rank else "q_proj", "kv_b_proj"}


def test_a_quantised_model_is_refused(lm_folder, monkeypatch):
    monkeypatch.setattr(GPT2LMHeadModel, "is_quantized", True, raising=False)
    with pytest.raises(InputError, match="cannot load --lm .*not supported for quantized"):
        lamo.load_causal_lm(lm_folder)


@pytest.mark.skipif(not hasattr(transformers, "Llama4TextConfig"), reason="transformers is older")
def test_a_model_that_does_not_fit_is_refused_by_name(tmp_path, lm_folder):
    """The inner model of a Llama 4 returns logits."""
    folder = shutil.copytree(lm_folder, tmp_path / "llama4")
    config = transformers.Llama4TextConfig(**MODERN, intermediate_size_mlp=64, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(InputError, match=f"cannot use --lm {folder}; choose another"):
        other_trunk(str(folder))


def plain_lora(theirs, trunk):
    """Make a model of transformers compute LoRA by hooks, with copies of a trunk's A and B."""
    copies = []
    for name, layer in trunk.model.named_modules():
        if isinstance(layer, LoRALinear):
            A, B = (torch.nn.Parameter(part.detach()[0].clone()) for part in (layer.A, layer.B))
            copies.append((layer, A, B))
            theirs.get_submodule(name).register_forward_hook(
                lambda _, x, y, A=A, B=B: y + 12.0 / 4 * (x[0] @ A.T @ B.T)
            )
    return copies


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_adapts_other_models_as_a_plain_loop_does(name, family):
    trunk = other_trunk(family(name), lora_dropout=0.0).train()
    theirs = AutoModelForCausalLM.from_pretrained(family(name)).train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for module in trunk.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    theirs.config.attention_dropout = 0.0
    trained = [p for p in trunk.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * FAMILIES[name][1]
    torch.manual_seed(1)
    for layer in trunk.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.B, std=0.1)
    copies = plain_lora(theirs, trunk)
    assert len(copies) in (2, 6)
    x, tokens = torch.randn(2, 10, trunk.width), torch.randint(300, (2, 20))
    loss = trunk(x).square().mean() + trunk.language_loss(tokens)
    hidden = theirs.base_model(inputs_embeds=x).last_hidden_state
    expected = hidden.square().mean() + theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    ours = torch.optim.SGD(trained, 0.1)
    plain = torch.optim.SGD([part for _, *parts in copies for part in parts], 0.1)
    for optimizer, value in ((ours, loss), (plain, expected)):
        value.backward()
        optimizer.step()
    for layer, A, B in copies:
        assert layer.A.grad.abs().sum() > 0 and layer.B.grad.abs().sum() > 0
        torch.testing.assert_close(layer.A[0], A, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(layer.B[0], B, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "opt", "pythia"])
def test_other_models_keep_frozen_weights_in_bfloat16(name, family):
    trunk, exact = other_trunk(family(name), bf16=True).eval(), other_trunk(family(name)).eval()
    for parameter in trunk.parameters():
        is_frozen_matrix = parameter.dim() > 1 and not parameter.requires_grad
        assert parameter.dtype == (torch.bfloat16 if is_frozen_matrix else torch.float32)
    assert all(p.dtype == torch.float32 for p in exact.parameters())
    for ours, theirs in zip(trunk.buffers(), exact.buffers(), strict=True):
        assert torch.equal(ours, theirs)  # rotary frequencies
    x, tokens = torch.randn(2, 10, trunk.width), torch.randint(300, (2, 20))
    with torch.no_grad():
        difference = (trunk(x) - exact(x)).abs().mean() / exact(x).abs().mean()
        assert 1e-4 < difference < 0.1
        difference = trunk.language_loss(tokens) - exact.language_loss(tokens)
        assert 0 < difference.abs() < 0.1
    assert trunk(x).dtype == torch.float32  # as the action head needs it
    trunk.train()(x).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in trunk.parameters() if p.requires_grad)


def test_gpt2_is_the_same_both_ways_without_its_positions(lm_folder):
    theirs = lamo.load_causal_lm(str(lm_folder))
    ours, other = GPT2.from_pretrained(theirs).eval(), CausalLM(theirs).eval()
    tokens = torch.randint(300, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.language_loss(tokens), other.language_loss(tokens), atol=1e-5, rtol=1e-5
        )
        theirs.transformer.wpe.weight.zero_()  # the class GPT2 adds none to embeddings
        x = torch.randn(2, 30, 32)
        torch.testing.assert_close(ours(x), other(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2-relu"])
def test_other_models_from_start_to_end(name, family, tmp_path):
    out = tmp_path / "run"
    lamo.main(f"{SHORT} --lm {family(name)} --out {out}".split())
    policy, config, _ = lamo.load(out)
    checkpoint = lamo.read_checkpoint(out)
    frozen = {name for name, p in policy.named_parameters() if not p.requires_grad}
    assert frozen and not frozen & set(checkpoint["weights"])
    assert not [key for key in checkpoint["weights"] if "lm_head" in key]
    scores = read_scores(out)
    assert scores["text_loss_before"] > 1 and scores["best"]["failed"] == 0
    evaluation.main([str(out)])
    weights = Path(family(name)) / "model.safetensors"
    moved = shutil.copytree(family(name), tmp_path / "other")
    tensors = load_file(weights)
    key = sorted(tensors)[0]
    save_file(tensors | {key: tensors[key] + 1}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match="language model is not the one that the run was trained on"
    ):
        lamo.load(out, lm=str(moved))


def test_a_window_must_fit_into_a_models_positions(family):
    with pytest.raises(InputError, match="--context 1000 makes 3000 tokens, but --lm has"):
        lamo.build_trunk(cpu_config(lm=family("opt"), context=1000))


# ---------------------------------------------------------------------------- LaMo, beside an independent one
BOUNDS = [[-1.0, -2.0], [1.0, 4.0]]
DROPOUT = {"dropout": 0.3, "lora_dropout": 0.2}


def tiny_lamo(
    embed="mlp", lora=True, S=3, bounds=BOUNDS, max_timesteps=100, dropout=0.0, lora_dropout=0.0,
    discrete=False, image_shape=None,
):  # fmt: skip
    torch.manual_seed(0)
    gpt2 = GPT2(300, 64, 32, 2, 4, dropout)
    if lora:
        gpt2.add_lora(4, 12.0, lora_dropout)
    states = torch.randn(S).tolist(), (torch.rand(S) + 0.5).tolist()
    if discrete:
        bounds = [0.0] * 4, [1.0] * 4
    kind = {"discrete": discrete, "image_shape": image_shape}
    model = LaMo(gpt2, embed, 5, max_timesteps, 10.0, *states, *bounds, **kind)
    return shaken(model, 0.2)


class Reference(torch.nn.Module):
    """A Decision Transformer by the book: transformers' GPT2Model around the weights of a LaMo, one step at a time."""

    def __init__(self, lamo, dropout=0.0, lora_dropout=0.0):
        super().__init__()
        dropouts = {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
        self.lamo, self.lora_dropout = lamo, lora_dropout
        self.gpt2 = GPT2Model(tiny_config(**dropouts, attn_implementation="eager"))
        weights = {
            name: weight
            for name, weight in lamo.trunk.state_dict().items()
            if not name.endswith((".A", ".B"))
        }
        for name, weight in weights.items():
            weights[name] = weight.T if ("c_" in name and weight.dim() == 2) else weight
        self.gpt2.load_state_dict(weights)
        self.gpt2.wpe.weight.data.zero_()  # the timestep embedding tells the time
        for ours, theirs in zip(lamo.trunk.h, self.gpt2.h):
            theirs.attn.c_attn.register_forward_hook(
                lambda _, x, y, lora=ours.attn.c_attn: self.adapt(lora, x[0], y)
            )

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

    def features(self, image):
        """Those of an image, by correlating patches with kernels one by one."""
        encoder = self.lamo.embed_state[0]
        x = image.double().numpy() / 255
        if image.shape[-1] <= image.shape[0]:
            x = x.transpose(2, 0, 1)  # channels, height, width
        for layer in encoder.layers:
            if isinstance(layer, torch.nn.Conv2d):
                kernel, stride = layer.weight.detach().double().numpy(), layer.stride[0]
                patches = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (1, 2))
                x = np.einsum("chwij,ocij->ohw", patches[:, ::stride, ::stride], kernel)
                x = np.maximum(x + layer.bias.detach().double().numpy()[:, None, None], 0)
        return torch.from_numpy(x.flatten())

    def forward(self, returns_to_go, states, actions, timesteps):
        """One window without padding: (k,), (k, S), (k, A), (k,) -> predicted actions (k, A), in [-1, 1], or logits."""
        lamo, tokens = self.lamo, []
        low, high = torch.tensor([[0.0] * 4, [1.0] * 4] if lamo.discrete else BOUNDS)
        for R, s, a, t in zip(returns_to_go, states, actions, timesteps):
            if lamo.image_shape:
                state, embed_state = self.features(s), lamo.embed_state[1]
            else:
                state, embed_state = (s - lamo.state_mean) / lamo.state_std, lamo.embed_state
            inputs = R.view(1) / 10.0, state, 2 * (a - low) / (high - low) - 1
            for embedder, x in zip((lamo.embed_return, embed_state, lamo.embed_action), inputs):
                token = self.mlp(embedder, x.float())
                token = (token - token.mean()) / torch.sqrt(token.var(correction=0) + 1e-5)
                token = token * lamo.embed_ln.weight + lamo.embed_ln.bias
                tokens.append(token + lamo.embed_timestep.weight[t])
        hidden = self.gpt2(inputs_embeds=torch.stack(tokens).unsqueeze(0)).last_hidden_state[0]
        layers = [
            layer
            for layer in lamo.action_head.modules()
            if not isinstance(layer, torch.nn.Sequential)
        ]
        first, last = layers[0], layers[-1]
        predicted = []
        for h in hidden[1::3]:
            if first is last:
                predicted.append(first.weight @ h + first.bias)
            elif isinstance(last, torch.nn.Tanh):
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
        for b, length in enumerate((batch["weight"] > 0).sum(dim=1).tolist()):
            predicted = self(*(batch[name][b, :length] for name in HISTORY))
            for k in range(length):
                if self.lamo.discrete:
                    chosen = batch["actions"][b, k].tolist().index(1)
                    errors.append(predicted[k].exp().sum().log() - predicted[k][chosen])
                    continue
                target = 2 * (batch["actions"][b, k] - low) / (high - low) - 1
                errors.append(((predicted[k] - target.float()) ** 2).mean())
        return torch.stack(errors).mean()


def some_trajectories(lengths=(7, 1, 12, 30), S=3, A=2, discrete=False, image_shape=None):
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(n, S)) for n in lengths]
    actions = [rng.uniform(-1, 4, size=(n, A)) for n in lengths]
    rewards = [rng.normal(size=n) * 10 for n in lengths]
    if image_shape:
        states = [rng.integers(256, size=(n, *image_shape), dtype=np.uint8) for n in lengths]
    if discrete:
        actions = [np.eye(4, dtype=np.float32)[rng.integers(4, size=n)] for n in lengths]
    return states, actions, rewards


def a_batch(size=8, seed=0, **kind):
    torch.manual_seed(seed)
    return Trajectories(*some_trajectories(**kind)).batch(size, 5)


VARIANTS = [
    {"embed": "mlp", "lora": True},
    {"embed": "linear", "lora": False},
    {"embed": "mlp", "lora": False},
]
KINDS = [  # of actions and states
    {"discrete": True},
    {"discrete": True, "image_shape": (10, 9, 3)},
    {"image_shape": (2, 36, 40)},
]
MANY = [variant | kind for variant in VARIANTS[:2] for kind in KINDS]


def kind_of(variant):
    return {name: value for name, value in variant.items() if name in ("discrete", "image_shape")}


@pytest.mark.parametrize("variant", VARIANTS + MANY)
def test_predictions_equal_an_independent_decision_transformer(variant):
    model = tiny_lamo(**variant).eval()
    reference, batch = Reference(model).eval(), a_batch(**kind_of(variant))
    assert (batch["weight"] == 0).any()  # padded windows, too
    with torch.no_grad():
        predicted = model.predict(*(batch[name] for name in HISTORY))
        for b, length in enumerate((batch["weight"] > 0).sum(dim=1).tolist()):
            window = [batch[name][b, :length] for name in HISTORY]
            torch.testing.assert_close(
                predicted[b, :length], reference(*window), atol=1e-4, rtol=1e-4
            )
        torch.testing.assert_close(
            model.action_loss(batch), reference.action_loss(batch), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_actions_are_clamped_and_in_the_environments_units(variant):
    model = tiny_lamo(**variant).eval()
    model.action_head[0 if variant["embed"] == "linear" else 2].weight.data.mul_(
        2
    )  # predictions beyond the bounds
    reference, batch = Reference(model).eval(), a_batch(40)
    lengths = (batch["weight"] > 0).sum(dim=1)
    history = [batch[name] for name in HISTORY]
    acts = model.act(*history, lengths)
    low, high = torch.tensor(BOUNDS)
    beyond = 0
    with torch.no_grad():
        for b, length in enumerate(lengths.tolist()):
            last = reference(*(part[b, :length] for part in history))[-1]
            beyond += (last.abs() > 1).any()
            expected = low + (high - low) * (last.clamp(-1, 1) + 1) / 2
            torch.testing.assert_close(acts[b].float(), expected, atol=1e-4, rtol=1e-4)
    assert (beyond > 5) == (variant["embed"] == "mlp")  # tanh stays within
    unknown = [part.clone() for part in history]
    unknown[2][torch.arange(40), lengths - 1] = 100.0  # the action that is asked for
    assert torch.equal(model.act(*unknown, lengths), acts)


@pytest.mark.parametrize("variant", MANY[:2])
def test_a_discrete_action_is_the_likeliest_one_hot(variant):
    model, kind = tiny_lamo(**variant).eval(), kind_of(variant)
    reference, batch = Reference(model).eval(), a_batch(40, **kind)
    lengths = (batch["weight"] > 0).sum(dim=1)
    history = [batch[name] for name in HISTORY]
    acts = model.act(*history, lengths)
    assert len(acts.unique(dim=0)) > 1
    with torch.no_grad():
        for b, length in enumerate(lengths.tolist()):
            logits = reference(*(part[b, :length] for part in history))[-1]
            assert acts[b].tolist() == [float(i == logits.argmax()) for i in range(4)]


@pytest.mark.parametrize("embed", ["mlp", "linear"])
def test_logits_have_no_bounds(embed):
    model, batch = tiny_lamo(embed=embed, discrete=True).eval(), a_batch(discrete=True)
    with torch.no_grad():
        for layer in model.action_head.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(10)
        assert model.predict(*(batch[name] for name in HISTORY)).abs().max() > 3


def test_the_encoder_of_large_images_is_that_of_the_authors():
    shapes = [tuple(layer.weight.shape) for layer in lamo.ImageEncoder((4, 84, 84)).layers[::2][:3]]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    encoder = lamo.ImageEncoder((84, 84, 4))  # 64 channels of 7 x 7
    assert encoder.features == 3136
    assert encoder(torch.zeros(2, 5, 84, 84, 4, dtype=torch.uint8)).shape == (2, 5, 3136)


def test_the_encoder_of_small_images_is_that_of_minatar():
    encoder = lamo.ImageEncoder((10, 10, 3))
    weight, _ = encoder.parameters()
    assert weight.shape == (16, 3, 3, 3) and encoder.features == 16 * 8 * 8  # a stride of 1
    sizes = [len(lamo.ImageEncoder((1, 40, pixels)).layers) for pixels in (35, 36)]
    assert sizes == [3, 7]  # layers, ReLUs and the flattening


def test_an_action_that_has_one_value_is_no_error():
    model = tiny_lamo(bounds=[[-1.0, 2.0], [1.0, 2.0]])
    batch = a_batch()
    batch["actions"][..., 1] = 2.0
    assert model.action_loss(batch).isfinite()


def test_steps_beyond_the_data_take_its_last_timestep():
    model, batch = tiny_lamo(max_timesteps=31).eval(), a_batch()
    history = [batch[name] for name in HISTORY]
    late = [*history[:3], torch.full_like(history[3], 5000)]
    last = [*history[:3], torch.full_like(history[3], 30)]
    before = [*history[:3], torch.full_like(history[3], 29)]
    with torch.no_grad():
        assert torch.equal(model.predict(*late), model.predict(*last))
        assert not torch.equal(model.predict(*last), model.predict(*before))


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
    torch.testing.assert_close(
        model.action_loss(batch), reference.eval().action_loss(batch), atol=1e-4, rtol=1e-4
    )


FROZEN = {"lora_rank": 0, "lang_coef": 0.0}
ALL_TRAINED = {"lora_rank": 0, "train_trunk": True}


@pytest.mark.parametrize(
    "method, changes",
    [*((name, {}) for name in lamo.METHODS), ("lamo", FROZEN), ("lamo", ALL_TRAINED)],
)
def test_gradients_reach_exactly_what_trains(lm_folder, method, changes):
    preset = lamo.METHODS[method] | ({"lm": str(lm_folder)} if method != "dt" else {})
    config = cpu_config(context=5, dropout=0.05, **preset | changes)
    trunk, _ = lamo.build_trunk(config)
    assert trunk.drop.p == trunk.h[0].attn.dropout.p == 0.05
    model = LaMo(trunk, config.embed, 5, 50, 1.0, [1.0] * 3, [1.0] * 3, *BOUNDS)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)  # at zero, no gradient would reach A
    tokens = torch.randint(300, (2, 64)) if config.lang_coef else None
    action_loss, language_loss = model(a_batch(), tokens)
    assert (language_loss > 0) == (config.lang_coef > 0)
    (action_loss + 0.1 * language_loss).backward()
    for name, parameter in model.named_parameters():
        trains = not name.startswith("trunk.") or config.train_trunk
        if config.lora_rank:
            trains = trains or name.endswith(("c_attn.A", "c_attn.B", "c_attn.bias"))
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == (trains and parameter.numel() > 0), name
    if method == "dt":
        assert len(trunk.h) == 3 and trunk.width == 128 and trunk.h[0].attn.n_head == 1


class Recurrent(torch.nn.Module):
    """A trunk of another kind: all that LaMo asks of one."""

    def __init__(self, width=16, vocab_size=300):
        super().__init__()
        self.width, self.vocab_size, self.n_positions = width, vocab_size, 1024
        self.wte = torch.nn.Embedding(vocab_size, width)
        self.gru = torch.nn.GRU(width, width, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0]

    def language_loss(self, tokens):
        logits = self(self.wte(tokens[:, :-1])) @ self.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_another_trunk_takes_the_place_of_gpt2(tmp_path):
    run = hopper_run(tmp_path / "run", lr_schedule="cosine")
    torch.manual_seed(0)
    states = run["trajectories"].state_mean.tolist(), run["trajectories"].state_std.tolist()
    model = LaMo(Recurrent(), "mlp", 5, 1000, 1000.0, *states, [-1.0] * 3, [1.0] * 3)
    config = replace(run["config"], steps=60, eval_every=60, batch=32)
    lamo.train(**run | {"model": model, "config": config})
    lines = [line for line in read_log(tmp_path / "run") if "action_loss" in line]
    assert lines[-1]["action_loss"] < 0.8 * lines[0]["action_loss"]
    assert lines[-1]["language_loss"] < lines[0]["language_loss"]


@pytest.mark.slow
def test_the_losses_compile_whole():
    """In one graph, so that torch.compile(model) has nothing to fall back from."""
    model, tokens = tiny_lamo(**DROPOUT).eval(), torch.randint(300, (2, 16))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(compiled(a_batch(), tokens), model(a_batch(), tokens)):
        torch.testing.assert_close(ours, expected)


# ---------------------------------------------------------------------------- trajectories
HOPPER = HERE / "demo" / "lamo" / "hopper" / "demo-v0" / "data"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 8))
def test_windows_equal_a_brute_force_loop(lengths, context):
    observations, actions, rewards = some_trajectories(lengths)
    rows = np.concatenate(observations)
    trajectories = Trajectories([*observations], actions, rewards)
    np.testing.assert_allclose(trajectories.state_mean, rows.mean(0))
    spread = np.sqrt(((rows - rows.mean(0)) ** 2).mean(0))
    np.testing.assert_allclose(trajectories.state_std, spread + 1e-6 if len(rows) > 1 else [1] * 3)
    assert trajectories.lengths.tolist() == lengths
    np.testing.assert_allclose(trajectories.returns, [sum(reward) for reward in rewards])
    torch.manual_seed(0)
    batch = trajectories.batch(60, context)
    starts = {
        float(o[0]): (i, t) for i, part in enumerate(observations) for t, o in enumerate(part)
    }
    assert batch["timesteps"].dtype == torch.int64
    for b in range(60):
        i, t = starts[float(batch["states"][b, 0, 0])]
        real = min(context, len(rewards[i]) - t)
        real_everywhere = (batch["weight"] > 0).sum()
        weights = [1 / real_everywhere] * real + [0.0] * (context - real)
        np.testing.assert_allclose(batch["weight"][b], weights, rtol=1e-6)
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
    assert (
        len(counts) == 50 and 23 < chi_square < 86
    )  # 99.9 % of a chi-square with 49 degrees of freedom


def test_minari_share_is_seeded_and_whole():
    dataset = minari.MinariDataset(HOPPER)
    some = lamo.read_trajectories(dataset, 0.1, seed=0)
    assert len(some.returns) == int(0.1 * dataset.total_episodes)
    assert np.array_equal(some.returns, lamo.read_trajectories(dataset, 0.1, seed=0).returns)
    assert not np.array_equal(some.returns, lamo.read_trajectories(dataset, 0.1, seed=1).returns)
    assert len(np.unique(some.returns)) == len(some.returns)  # without replacement
    first = some.returns_to_go[: some.lengths[0]]
    assert first[0].item() == pytest.approx(some.returns[0]) and first[-1] < first[0]  # not delayed
    every = lamo.read_trajectories(dataset, 1.0, seed=0)
    np.testing.assert_allclose(
        every.returns, [e.rewards.astype(np.float64).sum() for e in dataset], rtol=1e-6
    )
    assert torch.equal(
        every.states, torch.from_numpy(np.concatenate([e.observations[:-1] for e in dataset]))
    )
    assert len(lamo.read_trajectories(dataset, 1 / dataset.total_episodes, 0).returns) == 1
    with pytest.raises(InputError, match="of 183 trajectories leaves none"):
        lamo.read_trajectories(dataset, 0.005, 0)
    plain, delayed = (
        lamo.read_trajectories(dataset, 0.05, 0, delayed) for delayed in (False, True)
    )
    np.testing.assert_allclose(plain.returns, delayed.returns)
    assert torch.equal(plain.states, delayed.states) and not torch.equal(
        plain.returns_to_go, delayed.returns_to_go
    )
    first = 0
    for length, total in zip(plain.lengths, plain.returns):
        np.testing.assert_allclose(delayed.returns_to_go[first : first + length], total, rtol=1e-5)
        first += length


def test_a_constant_dimension_is_only_centred():
    observations, actions, rewards = some_trajectories()
    for part in observations:
        part[:, 1] = 1e6
        part[:, 2] = 1e-4 * np.sign(part[:, 2])
    trajectories = Trajectories(observations, actions, rewards)
    assert trajectories.state_mean[1] == 1e6 and trajectories.state_std[1] == 1
    assert trajectories.state_std[2] == pytest.approx(1e-4, rel=0.1)  # small is not constant


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(part, value):
    trajectories = some_trajectories()
    trajectories[part][2][3] = value
    with pytest.raises(InputError, match="is not finite"):
        Trajectories(*trajectories)


# ---------------------------------------------------------------------------- text
def test_text_is_cropped_and_held_out(tmp_path, lm_folder):
    (tmp_path / "words.txt").write_text((WORDS + "\n") * 200)
    text = lamo.load_text(str(lm_folder), str(tmp_path / "words.txt"), 16)
    whole = np.concatenate([text.tokens, text.held_out])
    assert (
        Tokenizer.from_file(str(lm_folder / "tokenizer.json")).decode(whole.tolist())
        == (WORDS + "\n") * 200
    )
    assert len(text.held_out) == len(whole) - len(whole) * 9 // 10
    crops = {tuple(text.tokens[i : i + 16].tolist()): i for i in range(len(text.tokens) - 15)}
    batch = text.batch(50)
    assert batch.shape == (50, 16) and batch.dtype == torch.int64
    assert all(tuple(row.tolist()) in crops for row in batch)
    assert text.first is None  # GPT-2's texts just begin
    tokens = np.arange(20, dtype=np.uint16)
    text = Text(tokens, tokens, 16)
    torch.manual_seed(0)
    assert set(text.batch(500)[:, 0].tolist()) == {0, 1, 2, 3, 4}
    assert Text(tokens[:16], tokens, 16).batch(2).tolist() == [list(range(16))] * 2
    for short in ((tokens[:15], tokens), (tokens, tokens[:15])):
        with pytest.raises(InputError, match="--text-block 16 is longer than the text"):
            Text(*short, 16)


@pytest.mark.parametrize("lines", [True, False])
def test_tokens_are_those_of_the_whole_text(lines):
    """Cut into pieces, with lines or without, as tokenised at once."""
    text = (HERE / "demo" / "text.txt").read_text("utf-8")
    text = text if lines else " ".join(text.split())
    tokenizer = Tokenizer.from_file(str(HERE / "demo" / "gpt2-tiny" / "tokenizer.json"))
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    fast = lamo.from_transformers("AutoTokenizer", "demo/gpt2-tiny")
    assert lamo.tokenize(text, fast).tolist() == whole


@pytest.mark.slow
def test_one_huge_line_takes_no_more_memory_than_many_lines(tmp_path):
    code = """
import sys, lamo
from results.timing import peak_memory
lamo.hub_is_reachable = lambda: False
lamo.load_text("demo/gpt2-tiny", "demo/text.txt", 256)
before = peak_memory("cpu")
lamo.load_text("demo/gpt2-tiny", sys.argv[1], 256)
print((peak_memory("cpu") - before) / 2**20)
"""
    text, peaks = 20 * (HERE / "demo" / "text.txt").read_text("utf-8"), []
    for content in (text, " ".join(text.split())):
        (tmp_path / "text.txt").write_text(content, "utf-8")
        result = command("-c", code, tmp_path / "text.txt")
        peaks.append(float(result.stdout))
    assert peaks[1] < 1.2 * peaks[0] + 10 and peaks[1] < 300, peaks  # MiB


def test_held_out_loss_is_the_mean_over_its_blocks(lm_folder):
    trunk = gpt2_of(lm_folder, 0.5).eval()
    theirs = GPT2LMHeadModel.from_pretrained(lm_folder).eval()
    held_out = np.random.default_rng(0).integers(300, size=40 * 32 + 7).astype(np.uint16)
    for length, starts in (
        (70, [0, 38]),
        (40 * 32 + 7, np.linspace(0, 39 * 32 + 7, 32).astype(int)),
    ):
        text = Text(np.zeros(64, np.uint16), held_out[:length], 32)
        blocks = torch.from_numpy(np.stack([held_out[i : i + 32] for i in starts]).astype(np.int64))
        with torch.no_grad():
            expected = theirs(blocks, labels=blocks).loss.item()
        assert text.held_out_loss(trunk) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------- training
def test_learning_rate_warms_up_then_stays_or_falls():
    config = cpu_config(lr=2.0, warmup=10, steps=110)
    rates = [lamo.learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)]) and set(
        rates[10:]
    ) == {2.0}
    config = replace(config, lr_schedule="cosine")
    rates = [lamo.learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * step / 100) for step in range(100)])


HEADER = {"reference": (0, 100), "config": {"lm": "none", "env": None}, "lm_checksum": None}


def hopper_run(out, **changes):
    """The arguments of lamo.train for a short run on the demo's hopper."""
    out.mkdir(exist_ok=True)
    tokens = np.random.default_rng(0).integers(300, size=200).astype(np.uint16)
    return {
        "model": tiny_lamo(S=11, bounds=[[-1.0] * 3, [1.0] * 3], max_timesteps=1000, **DROPOUT),
        "trajectories": lamo.read_trajectories(minari.MinariDataset(HOPPER), 0.05, 0),
        "text": Text(tokens, tokens, 16),
        "environments": Environments(gym.spec("Hopper-v5")),
        "config": cpu_config(
            **{"steps": 7, "warmup": 2, "lr": 1e-2, "batch": 4, "context": 5, "lang_coef": 0.5}
            | {"grad_clip": 0.1, "weight_decay": 0.3, "eval_every": 3, "episodes": 1}
            | {"targets": [300.0, 50.0], "seed": 5}
            | changes
        ),
        "header": HEADER,
        "out": out,
    }  # fmt: skip


def test_training_equals_a_plain_loop(tmp_path, monkeypatch):
    run, saved, save = hopper_run(tmp_path / "run"), [], lamo.write_checkpoint

    def remember(path, model, header, state):
        saved.append(state["step"])
        save(path, model, header, state)

    monkeypatch.setattr(lamo, "write_checkpoint", remember)
    model, trajectories, text = run["model"].eval(), run["trajectories"], run["text"]
    scores = lamo.train(**run)
    assert saved == [0, 3, 6, 7]

    expected = hopper_run(tmp_path / "run")["model"].train()
    trained = [parameter for parameter in expected.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.3, eps=1e-6)
    losses = []
    for step in range(7):
        torch.manual_seed(5 * 7 + step)
        optimizer.param_groups[0]["lr"] = 0.5e-2 if step == 0 else 1e-2
        windows, crops = trajectories.batch(4, 5), text.batch(2)
        action_loss = expected.action_loss(windows)
        language_loss = expected.trunk.language_loss(crops)
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

    lines = read_log(tmp_path / "run")
    assert lines[0] == json.loads(json.dumps(HEADER)) and len(lines) == 7
    periods = (0, 3), (3, 6), (6, 7)
    for (begin, end), line, evaluated in zip(periods, lines[1::2], lines[2::2]):
        means = np.mean(losses[begin:end], axis=0)
        assert line["step"] == evaluated["step"] == end
        logged = [line[name] for name in ("action_loss", "language_loss", "gradient_norm")]
        assert logged == pytest.approx(means, rel=1e-4)
        assert line["lr"] == 1e-2 and 0 < line["seconds_per_step"] < 5
    assert lines[-1]["evaluation"] == scores and set(scores) == {"300", "50"}
    again = evaluation.evaluate(expected, run["environments"], [300.0, 50.0], 1, 50_000, (0, 100))
    for name, row in scores.items():
        assert again[name]["return_mean"] == pytest.approx(row["return_mean"], rel=0.01)
    assert expected.training


def test_losses_are_logged_every_50_steps(tmp_path):
    run = hopper_run(tmp_path / "run")
    config = replace(run["config"], steps=101, eval_every=500, batch=1, text_batch=1)
    lamo.train(**run | {"config": config})
    assert [line.get("step") for line in read_log(tmp_path / "run")] == [None, 50, 100, 101, 101]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = hopper_run(tmp_path / "run")
    config = replace(run["config"], lr=1e30, warmup=0, eval_every=1000)
    with pytest.raises(
        InputError, match=r"became (nan|inf) in step [23]; .* lower --lr .*of step 0\)"
    ):
        lamo.train(**run | {"config": config})
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["weights"]
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    run = hopper_run(tmp_path / "run")
    config = replace(run["config"], lr=1e30, warmup=0, eval_every=1000)
    monkeypatch.setattr(lamo, "SAVE_EVERY", 0)  # at each step
    with pytest.raises(InputError, match="became (nan|inf)"):
        lamo.train(**run | {"config": config})
    losses = lamo.read_checkpoint(tmp_path / "run")["losses"]
    assert all(math.isfinite(loss) for step in losses for loss in step.values())


def test_processes_share_a_batch_and_have_dropout_of_their_own(monkeypatch):
    model, window = tiny_lamo(**DROPOUT).train(), a_batch(1)
    window = {name: part.expand(8, *part.shape[1:]) for name, part in window.items()}
    window["weight"] = window["weight"] / 8
    trajectories, config = SimpleNamespace(batch=lambda *_: window), cpu_config()
    losses = []
    for rank in (0, 0, 1):
        monkeypatch.setattr(lamo, "rank_and_world", lambda rank=rank: (rank, 2))
        batch, _ = lamo.draw(trajectories, None, config, 0)
        assert len(batch["states"]) == 4 and batch["weight"].sum() == pytest.approx(1)
        losses.append(model.action_loss(batch).item())
    assert losses[0] == losses[1] != losses[2]


# ---------------------------------------------------------------------------- evaluation
class Script(torch.nn.Module):
    """A policy that depends on all of its window, row by row, so that a batch changes no bit of it."""

    context = 4

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * torch.linspace(-1, 1, 33).view(3, 11).sin())

    def act(self, returns_to_go, states, actions, timesteps, lengths):
        rows = []
        for i, k in enumerate(lengths.tolist()):
            memory = (
                0.1 * actions[i, : k - 1].sum(0)
                + 1e-3 * returns_to_go[i, :k].sum()
                + 0.01 * timesteps[i, k - 1]
            )
            rows.append(1.3 * torch.tanh((self.weight * states[i, :k].mean(0)).sum(1) + memory))
        return torch.stack(rows)


@pytest.mark.parametrize("delayed, limit", [(False, 99), (True, 99), (False, 20)])
def test_rollout_equals_one_environment_at_a_time(delayed, limit):
    policy, targets, episodes, seed = Script(), (300.0, 50.0), 4, 7
    spec = gym.make("Hopper-v5", max_episode_steps=limit).spec
    environments = Environments(spec, num_envs=3)  # more episodes than environments
    results = evaluation.rollout(policy, environments, targets, episodes, seed, delayed)
    returns, lengths, successes = results
    assert len(environments.envs) == 3 and np.isnan(successes).all()  # Hopper reports none
    assert len(set(lengths.flatten())) > 1 and (lengths.max() == 20) == (limit == 20)
    env = gym.make(spec)
    for i, target in enumerate(targets):
        for episode in range(episodes):
            observation, _ = env.reset(seed=seed + episode)
            rtg, states, actions, total = [target], [observation], [], 0.0
            for t in range(limit):
                parts = [
                    np.array(part, np.float32) for part in (rtg, states, [*actions, np.zeros(3)])
                ]
                window = [
                    torch.from_numpy(part)[None, max(0, t - 3) :]
                    for part in [*parts, np.arange(t + 1)]
                ]
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
    some = [Environments(gym.spec("Hopper-v5"), num_envs) for num_envs in (1, 4, 10, 20)]
    results = [evaluation.rollout(policy, environments, (3.0, 1.0), 5, 3) for environments in some]
    for returns, lengths, _ in results[1:]:
        assert np.array_equal(returns, results[0][0]) and np.array_equal(lengths, results[0][1])


@torch.no_grad()
def test_a_history_has_the_action_that_is_taken_though_the_batch_repeats_its_row():
    class Uneven(Script):
        """As if rounding depended on the place in a batch."""

        def act(self, *window):
            actions = super().act(*window)
            return actions + 0.01 * torch.arange(len(actions)).unsqueeze(1)

    histories = evaluation.Histories(3, 4, *evaluation.policy_spaces(gym.make("Hopper-v5")))
    for row in range(3):
        histories.add(row, 1.0, np.full(11, row))
    window = [torch.as_tensor(array[[0, 2]]) for array in histories.arrays()]
    expected = Script().act(*window, torch.tensor([1, 1])) + torch.tensor([[0.0], [0.01]])
    actions = histories.act(Uneven(), [0, 2], 20)
    assert np.array_equal(actions, expected.clamp(-1, 1).float())
    assert np.array_equal(histories.actions[[0, 2], 0], actions)


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
    gym.register(
        "FailingHopper-v0",
        lambda **options: FailingHopper(gym.make("Hopper-v5", **options).unwrapped),
    )
    failing, sound = (Environments(gym.spec(name), 3) for name in ("FailingHopper-v0", "Hopper-v5"))
    policy = Script()
    returns, *_ = evaluation.rollout(policy, failing, (300,), 8, 0)
    expected, *_ = evaluation.rollout(policy, sound, (300,), 8, 0)
    assert np.isnan(returns[0]).tolist() == [False, True] * 4
    assert np.array_equal(returns[0, ::2], expected[0, ::2])
    row = evaluation.evaluate(policy, failing, (300,), 8, 0, (0, 100))["300"]
    assert row["failed"] == 4 and row["return_mean"] == pytest.approx(expected[0, ::2].mean())
    printed = capsys.readouterr()
    assert (
        printed.out.count("an episode of FailingHopper-v0 failed: RuntimeError('broke down')") == 2
    )
    assert "4 failed" in evaluation.format_scores({"300": row}, (0, 100))
    row = evaluation.evaluate(policy, failing, (300, 50), 1, 1, (0, 100))["300"]
    assert row["failed"] == 1 and row["return_mean"] is None


def test_an_environment_that_cannot_be_made_again_fails_no_other_episode():
    made = []

    def make(**options):
        if len(made) == 3:
            raise RuntimeError("no licence left")
        made.append(FailingHopper(gym.make("Hopper-v5", **options).unwrapped))
        return made[-1]

    gym.register("OnceHopper-v0", make)
    returns, *_ = evaluation.rollout(
        Script(), Environments(gym.spec("OnceHopper-v0"), 3), (300,), 3, 0
    )
    assert np.isnan(returns[0]).tolist() == [False, True, False]
    environments = Environments(gym.spec("Hopper-v5"), 3)
    environments.envs[0] = None  # as after a failure
    again, *_ = evaluation.rollout(Script(), environments, (300,), 1, 0)
    assert again[0, 0] == returns[0, 0]


def test_evaluation_scores():
    environments = Environments(gym.spec("Hopper-v5"))
    policy = Script().train()
    scores = evaluation.evaluate(policy, environments, (300, 50), 5, 0, (10.0, 60.0))
    assert policy.training
    returns, lengths, _ = evaluation.rollout(policy, environments, (300, 50), 5, 0)
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
    assert (
        row["return_mean"] == max(row["return_mean"] for row in scores.values())
        and scores[best] is row
    )
    table = evaluation.format_scores(scores, (10.0, 60.0)).splitlines()
    assert [line.endswith("best") for line in table[1:-1]] == [name == best for name in scores]


# ---------------------------------------------------------------------------- the command line
SHORT = "--demo --device cpu --ratio 0.1 --steps 4 --batch 4 --text-block 32 --episodes 1 --targets 1500 800"


def command(script, *arguments, **environment):
    """A script of this folder in a process of its own, without a network or a GPU."""
    refused = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PYTHONPATH": str(HERE),
        "CUDA_VISIBLE_DEVICES": "",
    }
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


def timeless_log(folder):
    """A log without what a clock measured."""
    lines = read_log(folder)
    for line in lines:
        line.pop("seconds_per_step", None)
    return lines


def test_command_line_from_start_to_end(trained, lm_folder):
    folder, printed = trained
    scores, (header, *lines) = read_scores(folder), read_log(folder)
    assert set(scores) == {
        "best",
        "targets",
        "dataset",
        "lm",
        "demo",
        "text_loss_before",
        "text_loss_after",
    }
    assert (
        set(scores["targets"]) == {"1500", "800"}
        and scores["demo"] is True
        and scores["lm"] == str(lm_folder)
    )
    text = lamo.load_text(str(lm_folder), "demo/text.txt", 32)
    trunks = gpt2_of(lm_folder).eval(), lamo.load(folder)[0].trunk
    expected = [text.held_out_loss(trunk) for trunk in trunks]  # without dropout
    losses = [scores[f"text_loss_{when}"] for when in ("before", "after")]
    assert losses == pytest.approx(expected, abs=1e-6) and losses[0] != losses[1]
    config = header["config"]
    assert (config["steps"], config["lora_alpha"], config["lr"]) == (
        4,
        32,
        1e-2,
    )  # given, default, demo
    assert set(header["versions"]) == {"torch", "transformers", "gymnasium", "mujoco", "minari"}
    assert len(header["lm_checksum"]) == len(header["data_checksum"]) == 64
    assert header["trajectories"] == 18 and config["device"] == "cpu"
    assert any("action_loss" in line and "language_loss" in line for line in lines)
    assert lines[-1]["evaluation"] == scores["targets"]
    assert printed.count("DEMO ASSETS") == 2 and f"{scores['best']['return_mean']:.1f}" in printed
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.pt",
        "log.jsonl",
        "scores.json",
    ]
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]
    assert "trunk.h.0.attn.c_attn.A" in weights and "trunk.wte.weight" not in weights
    policy, config, header = lamo.load(folder)
    assert not policy.training
    environments = Environments(evaluation.spec_from_json(header["env_spec"]))
    again = evaluation.evaluate(
        policy, environments, config.targets, 1, config.seed, header["reference"]
    )
    assert again == read_scores(folder)["targets"]


def test_options_reach_every_rollout(tmp_path, monkeypatch):
    """In training, in an evaluation of the run, and in one with options of its own."""
    asked, filmed, rollout = [], [], evaluation.rollout

    def spy(policy, environments, *options):
        asked.append(options)
        return rollout(policy, environments, *options)

    monkeypatch.setattr(evaluation, "rollout", spy)
    monkeypatch.setattr(evaluation, "record", lambda *options: filmed.append(options) or (0.0, 1))
    out, film = str(tmp_path / "run"), str(tmp_path / "film.gif")
    options = [*SHORT_DT.split(), "--max-steps", "5", "--delayed", "--seed", "3", "--targets", "9"]
    lamo.main([*options, "--out", out])
    evaluation.main([out])
    given = ["--targets", "7", "--episodes", "1", "--seed", "5", "--video", film]
    evaluation.main([out, *given])
    of_the_run = [9.0], 2, 30_000, True
    assert asked == [of_the_run, of_the_run, ([7.0], 1, 5, True)]
    assert filmed[0][2:] == (7.0, 5, film, True)


def test_seed_and_delayed_reach_the_data_and_the_weights():
    def prepare(**given):
        given = {"demo": True, "device": "cpu", "method": "dt", "ratio": 0.1} | given
        _, _, model, trajectories, *_ = lamo.prepare(*lamo.configure(given))
        return model.embed_return.weight, trajectories

    weights, plain = prepare()
    other_weights, others = prepare(seed=1)
    assert not torch.equal(weights, other_weights)
    assert set(plain.returns) != set(others.returns)
    _, delayed = prepare(delayed=True)
    expected = np.repeat(plain.returns, plain.lengths)  # all reward is still to come
    np.testing.assert_allclose(delayed.returns_to_go, expected, rtol=1e-9)


def test_the_defaults_are_the_authors():
    """Those of their runs on D4RL; LoRA's and the text's, too."""
    authors = {"lr": 1e-4, "weight_decay": 1e-5, "warmup": 2500, "grad_clip": 0.25, "batch": 64}
    authors |= {"steps": 100_000, "eval_every": 2500, "episodes": 20, "dropout": 0.1}
    authors |= {"lora_rank": 16, "lora_alpha": 32, "lang_coef": 0.1, "text_batch": 2}
    authors |= {"text_block": 1024, "lm": "gpt2", "text": "wikitext", "lr_schedule": "constant"}
    config = Config()
    assert {name: getattr(config, name) for name in authors} == authors


def test_what_is_given_goes_before_the_method_and_that_before_the_demo():
    expected = {
        "lamo": (1e-2, 0.1, 16, 4, 0.1),
        "dt": (1e-2, 0.0, 0, 1, 0.0),
        "wiki-rl": (1e-2, 0.1, 0, 4, 0.1),
    }
    for method, values in expected.items():
        config, _ = lamo.configure({"demo": True, "method": method})
        assert (
            config.lr,
            config.dropout,
            config.lora_rank,
            config.heads,
            config.lang_coef,
        ) == values
        assert lamo.configure({"demo": True, "method": method, "lr": 5.0})[0].lr == 5.0


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, lm_folder):
    """Gradients of half a batch each add up to those of one: with windows that end early, text, and shared episodes."""
    options = f"{SHORT} --context 100 --dropout 0 --lora-dropout 0 --lm {lm_folder} --episodes 2 --seed 1 --out"
    lamo.main([*options.split(), str(tmp_path / "one")])
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 lamo.py"
    result = command(torchrun, *options.split(), tmp_path / "two", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("DEMO ASSETS") == 2  # one process speaks
    one, two = (lamo.read_checkpoint(tmp_path / out)["weights"] for out in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    one, two = (
        read_scores(tmp_path / out)["targets"]["1500"]["return_mean"] for out in ("one", "two")
    )
    assert two == pytest.approx(one, rel=0.01)


def test_processes_part_when_a_command_ends(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    lamo.run_command(lambda _: None, "lamo.py")
    assert not torch.distributed.is_initialized()


# ---------------------------------------------------------------------------- stopping and going on
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path, monkeypatch):
    """It dies each time it evaluates or saves, and goes on from what is in its folder."""
    monkeypatch.setattr(lamo, "LOG_EVERY", 2)
    whole = hopper_run(tmp_path / "whole")
    scores = lamo.train(**whole)
    rng, resumed = np.random.default_rng(23), []

    def mortal(function):
        def dies(*arguments):
            luck = rng.random()
            result = (
                function(*arguments) if luck > 0.2 else None
            )  # dies before its work is done, or after it
            if luck < 0.4:
                raise KeyboardInterrupt
            return result

        return dies

    monkeypatch.setattr(lamo, "SAVE_EVERY", 0)  # at each step
    monkeypatch.setattr(lamo, "evaluate", mortal(lamo.evaluate))
    monkeypatch.setattr(lamo, "write_checkpoint", mortal(lamo.write_checkpoint))
    while True:
        run, checkpoint = hopper_run(tmp_path / "run"), None
        if (tmp_path / "run" / "checkpoint.pt").exists():
            checkpoint = lamo.read_checkpoint(tmp_path / "run")
            run["model"].load_state_dict(checkpoint["weights"])
            resumed.append(checkpoint["losses"])
        try:
            assert lamo.train(**run, checkpoint=checkpoint) == scores
            break
        except KeyboardInterrupt:
            pass
    assert len(resumed) > 5 and any(resumed)  # also between two lines of the log
    for name, weight in whole["model"].state_dict().items():
        assert torch.equal(weight, run["model"].state_dict()[name])
    assert timeless_log(tmp_path / "run") == timeless_log(tmp_path / "whole")


@pytest.mark.parametrize(("end", "saves"), [(3, [3]), (4, [3]), (7, [3, 6, 7])])
def test_two_processes_do_not_mix_their_logs(end, saves, tmp_path, monkeypatch):
    """A run is resumed while it still goes on; the second process is killed after `end` steps."""
    monkeypatch.setattr(lamo, "LOG_EVERY", 1)
    out, save, draw, saved = tmp_path / "run", lamo.write_checkpoint, lamo.draw, []

    def resume(path, model, header, state):
        saved.append(state["step"])
        save(path, model, header, state)
        if len(saved) == 2:
            run = hopper_run(out)
            run["model"].load_state_dict(lamo.read_checkpoint(out)["weights"])
            monkeypatch.setattr(lamo, "draw", mortal)
            with contextlib.suppress(KeyboardInterrupt):
                lamo.train(**run, checkpoint=lamo.read_checkpoint(out))
            monkeypatch.setattr(lamo, "draw", draw)
            saved.append((out / "log.jsonl").read_bytes())

    def mortal(*arguments):
        if arguments[-1] == end:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(lamo, "write_checkpoint", resume)
    with pytest.raises(InputError, match="another process has resumed .*; this one stops"):
        lamo.train(**hopper_run(out))
    log = saved.pop()
    assert saved == [0, 3, *saves]
    assert (out / "log.jsonl").read_bytes() == log
    assert lamo.read_checkpoint(out)["step"] == saved[-1]


def test_a_log_that_lost_lines_is_not_filled_up(tmp_path):
    run = hopper_run(tmp_path / "run")
    lamo.train(**run)
    log = run["out"] / "log.jsonl"
    kept = log.read_bytes()[:200]
    log.write_bytes(kept)
    with pytest.raises(InputError, match="log.jsonl has lost lines; start again"):
        lamo.train(**run, checkpoint=lamo.read_checkpoint(run["out"]))
    assert log.read_bytes() == kept


def test_the_log_is_on_the_disk_before_the_checkpoint_that_counts_on_it(tmp_path, monkeypatch):
    run, synced, sync = hopper_run(tmp_path / "run"), [], os.fsync

    def remember(descriptor):
        sync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", remember)
    lamo.train(**run)
    log = (run["out"] / "log.jsonl").stat().st_ino
    saves = 4  # after 0, 3, 6 and 7 steps
    assert len(synced) == 2 * saves and synced[::2] == saves * [log] and log not in synced[1::2]


def test_what_is_not_installed_is_named_with_its_remedy():
    error = gym.error.DependencyNotInstalled('run `pip install "gymnasium[classic-control]"`')
    with pytest.raises(InputError, match=r"cannot render it \(run .*classic-control"):
        with lamo.on_error("cannot render it"):
            raise error from ModuleNotFoundError("No module named 'pygame'")


def fail_as_on_windows(size):
    raise RuntimeError(
        f"DefaultCPUAllocator: not enough memory: you tried to allocate {size} bytes."
    )


@pytest.mark.parametrize(
    "allocate, words",
    [
        (np.empty, "error: Unable to allocate"),
        (torch.empty, "error: .*can't allocate memory"),
        (fail_as_on_windows, "error: .*not enough memory"),
    ],
)
def test_too_little_memory_ends_in_one_line(allocate, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        lamo.run_command(lambda _: allocate(10**15), "lamo.py")
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(f"lamo.py: {words}", line)


def test_a_sign_that_the_console_lacks_ends_no_run(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    lamo.run_command(lambda _: print("1 ± 2"), "lamo.py")
    assert console.buffer.getvalue().split(b"\n")[0].strip() == b"1 ? 2"

    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's cannot be reconfigured
    lamo.run_command(lambda _: print("1 ± 2"), "lamo.py")
    assert sys.stdout.getvalue() == "1 ± 2\n"


def test_suggested_commands_work_in_windows_shells():
    assert lamo.run_argument(PureWindowsPath(r"runs\hopper-lamo"), None) == "runs/hopper-lamo"


def test_an_error_of_the_code_is_no_mistake_of_the_user():
    with pytest.raises(RuntimeError, match="shape"):
        lamo.run_command(lambda _: torch.zeros(2) @ torch.zeros(3, 3), "lamo.py")


@pytest.mark.slow
def test_python_dev_mode_shows_where_a_mistake_comes_from():
    run = command("-X dev lamo.py --demo --data setup.py")
    assert run.returncode == 1 and "in load_dataset" in run.stderr


def test_torchruns_variable_alone_starts_no_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    lamo.join_processes(None)
    assert lamo.rank_and_world() == (0, 1)


def test_torchrun_needs_a_gpu_for_each_process(monkeypatch):
    """NCCL refuses two processes on one GPU, but only after all is downloaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError, match=r"starts 2 processes, more than this machine has GPUs \(1\)"
    ):
        lamo.main(["--demo"])


def stop(*_):
    """What Ctrl-C does, wherever it comes."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("function", ["draw", "report"])
def test_a_stopped_run_says_how_to_go_on(function, lm_folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(lamo, function, stop)
        words = f"stopped; resume with: python lamo.py --resume {out}$"
        with pytest.raises(SystemExit, match=words):
            lamo.main(f"{SHORT} --lm {lm_folder} --out {out}".split())
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "log.jsonl"}
    lamo.main(["--resume", str(out)])
    assert (out / "scores.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_ends_the_command_quietly(number):
    code = "import os, lamo; lamo.run_command(lambda _: os.kill(os.getpid(), {}), 'lamo.py')"
    run = subprocess.run(
        [sys.executable, "-c", code.format(int(number))], cwd=HERE, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "")


def test_a_thread_trains(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(lamo.train, **hopper_run(tmp_path / "run")).result()
    assert set(scores) == {"300", "50"}


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
        return {
            key: stack([observation[key] for observation in observations])
            for key in observations[0]
        }
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
        folder = save_dataset(
            "D4RL/kitchen/complete-v2", env, [play(env, length) for length in lengths]
        )
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
    trajectories = lamo.read_trajectories(dataset, 1.0, 0)
    assert trajectories.returns.tolist() == [sum(rewards) for rewards in expected]


def test_a_kitchen_that_is_named_pays_once_too(kitchen):
    dataset = minari.MinariDataset(kitchen[0] / "data")
    named, recorded = (lamo.evaluation_spec(dataset, env) for env in (lamo.KITCHEN, None))
    assert named.kwargs == recorded.kwargs and named.kwargs["remove_task_when_completed"]
    assert named.kwargs["terminate_on_tasks_completed"]
    assert len(named.kwargs["tasks_to_complete"]) == 4


def test_kitchen_from_start_to_end(kitchen, tmp_path, lm_folder, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(kitchen[0].parents[2]))  # found there by its id
    options = (
        f"{SHORT} --ratio 1 --env kitchen-complete --data D4RL/kitchen/complete-v2 --targets 4"
    )
    lamo.main(f"{options} --lm {lm_folder} --out {tmp_path / 'run'}".split())
    policy, config, header = lamo.load(tmp_path / "run")
    spec = evaluation.spec_from_json(header["env_spec"])
    assert header["reference"] == (0, 4)
    assert len(policy.state_mean) == 59 and spec.max_episode_steps == 280
    assert policy.max_timesteps == max(map(len, kitchen[1]))  # the longest in the data
    assert spec.kwargs["tasks_to_complete"] == [
        "microwave",
        "kettle",
        "light switch",
        "slide cabinet",
    ]
    assert spec.kwargs["remove_task_when_completed"] is True
    best = read_scores(tmp_path / "run")["best"]
    assert best["score"] == 25 * best["return_mean"]


DEMO_TASKS = [name for name in lamo.TASKS if (HERE / "demo" / "lamo" / name).exists()]
DEMO_RUNS = [(name, "lamo") for name in DEMO_TASKS] + [("hopper", "dt"), ("hopper", "wiki-rl")]


@pytest.mark.parametrize("name, method", DEMO_RUNS)
def test_every_task_and_method_runs_on_the_demo(name, method, tmp_path, lm_folder):
    lm = f"--lm {lm_folder}" if method != "dt" else "--bf16"
    options = f"{SHORT} --targets 1 --max-steps 20 --env {name} --method {method} {lm}"
    lamo.main(f"{options} --out {tmp_path / 'run'}".split())
    policy, config, header = lamo.load(tmp_path / "run")
    task, spec = lamo.TASKS[name], evaluation.spec_from_json(header["env_spec"])
    assert spec.id == task.env_id.split(":")[-1] and config.data == f"demo/lamo/{name}/demo-v0"
    assert (
        config.context == task.context and header["arguments"]["return_scale"] == task.return_scale
    )
    assert any(isinstance(module, LoRALinear) for module in policy.modules()) == (method == "lamo")
    assert (config.embed == "mlp") == (method == "lamo") and policy.trunk.bf16 == (method == "dt")
    scores = read_scores(tmp_path / "run")
    assert (scores["text_loss_before"] is None) == (method == "dt")
    assert 1 <= scores["best"]["length_mean"] <= spec.max_episode_steps == 20
    assert math.isfinite(scores["best"]["return_mean"])


# ---------------------------------------------------------------------------- what people bring
SHORT_DT = "--demo --device cpu --method dt --steps 2 --batch 4 --episodes 2"


class Point(gym.Env):
    """An environment as users write them: no render_mode, float64 bounds that it insists on."""

    reward_type = float

    def __init__(self, bound=0.1, dtype=np.float64):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = gym.spaces.Box(-bound, bound, (2,), dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=3)
        return self.state.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.state = 0.9 * self.state + np.append(action, 0)
        return self.state.copy(), self.reward_type(-np.abs(self.state).sum()), False, False, {}


class PointWithArrays(Point):
    def reward_type(self, reward):
        return np.array([reward])


class Broken(Point):
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def step(self, action):
        raise RuntimeError("broke down")

    def render(self):
        return np.zeros((2, 2, 3), np.uint8)


for name, limit in (("Point", 12), ("PointWithArrays", 12.0), ("Broken", 12)):
    gym.register(f"{name}-v0", entry_point=f"test_lamo:{name}", max_episode_steps=limit)


def play(env, episodes=4, steps=8, actions=None):
    """Record random episodes, cut off after some steps, as arrays."""
    recorded = []
    for seed in range(episodes):
        env.action_space.seed(seed)
        observations, taken, rewards = [env.reset(seed=seed)[0]], [], []
        for _ in range(steps + seed):
            taken.append(env.action_space.sample() if actions is None else actions(env))
            observation, reward, terminated, *_ = env.step(taken[-1])
            observations.append(observation)
            rewards.append(reward)
            if terminated:
                break
        recorded.append((stack(observations), taken, rewards))
    return recorded


def change_metadata(folder, **changes):
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reopen(out):
    """Make a run look as if it had been stopped in its last evaluation."""
    (out / "scores.json").unlink()


def start(data, out, *options):
    lamo.main([*SHORT_DT.split(), "--data", str(data), "--out", str(out), *options])


def test_a_share_in_percent_of_a_hundred_trajectories_is_that_many():
    dataset = lamo.load_dataset("demo/lamo/reacher2d/demo-v0")
    for percent in range(1, 101):
        chosen, others = lamo.split_episodes(dataset, percent / 100, 0)
        assert (len(chosen), len(others)) == (percent, 100 - percent)
        assert sorted([*chosen, *others]) == list(range(100))


@pytest.mark.parametrize(
    "given, used", [((1, 5), (1, 5)), ((5, 5), (0, 100)), ((math.nan, 5), (0, 100))]
)
def test_scores_use_the_datas_reference_returns_if_they_can(tmp_path, given, used):
    folder = save_dataset("test/rated-v0", "Hopper-v5", play(gym.make("Hopper-v5")))
    change_metadata(folder, ref_min_score=given[0], ref_max_score=given[1])
    start(folder, tmp_path / "run")
    row = read_scores(tmp_path / "run")["best"]
    low, high = used
    assert row["score"] == pytest.approx(100 * (row["return_mean"] - low) / (high - low))


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_an_episode_that_minari_cuts_is_refused(tmp_path, data_format):
    episodes = [
        (np.zeros((length + 1, 2)), np.zeros((length, 1)), np.ones(length))
        for length in (5, 33_000, 7)
    ]
    spaces = {
        "observation_space": gym.spaces.Box(-9, 9, (2,), np.float64),
        "action_space": gym.spaces.Box(-1, 1, (1,), np.float64),
    }
    folder = save_dataset("test/long-v0", None, episodes, data_format=data_format, **spaces)
    dataset = lamo.load_dataset(str(folder))
    if data_format == "hdf5":
        assert lamo.read_trajectories(dataset, 1.0, 0).returns.tolist() == [5, 33_000, 7]
    else:
        with pytest.raises(InputError, match="32767 of the 33000 steps of episode 1; give .* HDF5"):
            lamo.read_trajectories(dataset, 1.0, 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64])
def test_choices_of_any_integers_become_one_hot(dtype):
    space = gym.spaces.Discrete(3, start=4)
    assert lamo.vectors(np.array([4, 6, 5], dtype), space).tolist() == np.eye(3)[[0, 2, 1]].tolist()
    with pytest.raises(InputError, match="an action in the data is not in its space"):
        lamo.vectors(np.array([3], dtype), space)


def test_an_episode_of_integers_does_not_round_the_others(tmp_path):
    """Minari keeps each episode's own dtype."""
    episodes = [
        (np.array([[0, 1], [1, 2]]), [[0.5]], [1.0]),
        (np.array([[0.9, -0.9], [1, 2]]), [[0.5]], [1.0]),
    ]
    spaces = {
        "observation_space": gym.spaces.Box(-9, 9, (2,), np.float64),
        "action_space": gym.spaces.Box(-1, 1, (1,), np.float64),
    }
    folder = save_dataset("test/mixed-v0", None, episodes, **spaces)
    trajectories = lamo.read_trajectories(minari.MinariDataset(folder / "data"), 1.0, 0)
    assert trajectories.states.tolist() == [[0, 1], [0.9, -0.9]]


@pytest.mark.parametrize("missing", [(0, 2), (0, 1, 2, 3)])
def test_episodes_may_lack_the_last_observation(tmp_path, missing):
    folder = save_dataset("test/short-v0", "Hopper-v5", play(gym.make("Hopper-v5")))
    whole = lamo.read_trajectories(minari.MinariDataset(folder / "data"), 1.0, 0)
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        for number in missing:
            observations = file[f"episode_{number}/observations"][:-1]
            del file[f"episode_{number}/observations"]
            file[f"episode_{number}/observations"] = observations
    short = lamo.read_trajectories(minari.MinariDataset(folder / "data"), 1.0, 0)
    for part in ("states", "actions", "returns_to_go", "timesteps", "last"):
        assert torch.equal(getattr(short, part), getattr(whole, part)), part
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        observations = file["episode_3/observations"][:-1]
        del file["episode_3/observations"]
        file["episode_3/observations"] = np.concatenate([observations] * 3)
    with pytest.raises(InputError, match="episode 3 has 3[03] states, 11 actions and 11 rewards"):
        lamo.read_trajectories(minari.MinariDataset(folder / "data"), 1.0, 0)


def test_an_empty_episode_is_dropped_and_counted(tmp_path, capsys):
    folder = save_dataset("test/empty-v0", "Hopper-v5", play(gym.make("Hopper-v5")))
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        for part in ("actions", "rewards", "terminations", "truncations"):
            shape = (0, *file[f"episode_1/{part}"].shape[1:])
            del file[f"episode_1/{part}"]
            file[f"episode_1/{part}"] = np.empty(shape)
    trajectories = lamo.read_trajectories(minari.MinariDataset(folder / "data"), 1.0, 0)
    assert len(trajectories.lengths) == 3
    assert "dropped 1 of 4 trajectories, which are empty" in capsys.readouterr().out


def test_numbers_are_centred_before_they_are_rounded():
    """With an offset of a billion, float32 has a resolution of 64."""
    observations, actions, rewards = some_trajectories()
    losses = []
    for offset in (0.0, 1e9):
        data = [part + offset for part in observations]
        trajectories = Trajectories(data, actions, rewards)
        states = trajectories.state_mean.tolist(), trajectories.state_std.tolist()
        torch.manual_seed(0)
        trunk = GPT2(0, 0, 32, 2, 4, dropout=0.0)
        model = LaMo(trunk, "linear", 5, 100, 10.0, *states, *BOUNDS).eval()
        losses.append(model.action_loss(trajectories.batch(64, 5)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_history_keeps_numbers_as_the_simulator_has_them():
    box = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    history = evaluation.Histories(1, 5, box, box)
    history.add(0, 1e9 + 0.25, np.array([1e9 + 0.25]))
    assert history.states[0, 0, 0] == history.returns_to_go[0, 0] == 1e9 + 0.25


@pytest.mark.parametrize(
    "returns, targets, scale",
    [(0.0, "1", 1.0), (0.0, "0", 1.0), (1e-4, "1", 1.0), (40.0, "5", 100.0)],
)
def test_a_return_scale_fits_the_returns_and_the_targets(tmp_path, returns, targets, scale):
    episodes = [
        (o, a, np.full(len(a), returns / len(a))) for o, a, _ in play(gym.make("Hopper-v5"))
    ]
    folder = save_dataset("test/zero-v0", "Hopper-v5", episodes)
    start(folder, tmp_path / "run", "--targets", targets)
    assert read_log(tmp_path / "run")[0]["arguments"]["return_scale"] == scale


@pytest.mark.parametrize("name", ["Point-v0", "PointWithArrays-v0"])
def test_any_environment_can_be_named(tmp_path, name, capsys):
    """One without render_mode, with strict bounds, rewards in arrays, a float as time limit."""
    folder = save_dataset("test/point-v0", gym.make("Point-v0"), play(gym.make("Point-v0")))
    start(folder, tmp_path / "run", "--env", f"test_lamo:{name}")
    scores = read_scores(tmp_path / "run")
    assert scores["best"]["failed"] == 0 and scores["best"]["length_mean"] == 12
    capsys.readouterr()
    evaluation.main([str(tmp_path / "run"), "--env", f"test_lamo:{name}"])
    assert f"{scores['best']['return_mean']:.1f}" in capsys.readouterr().out


@pytest.mark.slow
def test_an_environment_of_ones_own_has_to_be_named(tmp_path):
    """In processes that do not know it."""
    module = 'import gymnasium\ngymnasium.register("Mine-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv")\n'
    (tmp_path / "mine.py").write_text(module)
    folder, out = (
        save_dataset("test/mine-v0", "Hopper-v5", play(gym.make("Hopper-v5"))),
        tmp_path / "run",
    )
    spec = json.loads(gym.spec("Hopper-v5").to_json()) | {"id": "Mine-v0"}
    change_metadata(folder, env_spec=json.dumps(spec))
    run = ["lamo.py", *SHORT_DT.split(), "--data", folder, "--out", out]
    again, resume = ["eval.py", out], ["lamo.py", "--resume", out]
    named = ["--env", "mine:Mine-v0"]
    paths = {"PYTHONPATH": f"{HERE}{os.pathsep}{tmp_path}"}
    for arguments, words in (
        (
            run,
            "or train without: --env none (Gymnasium does not know the environment Mine-v0",
        ),
        (run + named, ""),
        (again, "name one with --env"),
        (again + named, ""),
        (resume, "allow it with --env mine:Mine-v0"),
        (resume + named, ""),
    ):
        result = command(*arguments, **paths)
        assert words in result.stderr and result.returncode == (2 if words else 0), result.stderr
        if arguments in (run + named, resume + named):
            assert f"python eval.py {out} --env mine:Mine-v0" in result.stdout


def test_a_named_environment_keeps_the_settings_in_the_data(tmp_path):
    env = gym.make(
        "Hopper-v5", exclude_current_positions_from_observation=False, max_episode_steps=7
    )
    folder = save_dataset("test/positions-v0", env, play(env))
    start(folder, tmp_path / "run", "--env", "Hopper-v5")
    spec = json.loads(read_log(tmp_path / "run")[0]["env_spec"])
    assert spec["kwargs"] == {"exclude_current_positions_from_observation": False}
    assert spec["max_episode_steps"] == 7
    evaluation.main([str(tmp_path / "run"), "--env", "Hopper-v5"])  # has 12 numbers, too


class Own(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """A wrapper as users write them."""

    def __init__(self, env):
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)


def test_an_environment_keeps_the_wrappers_it_was_registered_with(tmp_path, capsys):
    wrapper = gym.wrappers.RescaleAction.wrapper_spec(min_action=-3.0, max_action=3.0)
    wrappers = wrapper, Own.wrapper_spec()
    gym.register("Wide-v0", "test_lamo:Point", additional_wrappers=wrappers, max_episode_steps=12)
    space = gym.make(evaluation.spec_of("Wide-v0")).action_space
    assert space == gym.make("Wide-v0").action_space and (space.high == 3).all()
    folder = save_dataset("test/wide-v0", "Wide-v0", play(gym.make("Wide-v0")))
    start(folder, tmp_path / "run", "--env", "Wide-v0")
    assert "without the wrapper" not in capsys.readouterr().out
    recorded = json.loads(read_log(tmp_path / "run")[0]["env_spec"])
    assert [part["name"] for part in recorded["additional_wrappers"]] == ["RescaleAction", "Own"]


def test_a_named_environment_keeps_the_wrappers_of_its_data_that_can_be_rebuilt(tmp_path, capsys):
    """Else the policy's actions, of 3 at most, would be worth a thirtieth of what they were."""
    wrapper = gym.wrappers.RescaleAction
    env = wrapper(gym.make("Point-v0"), -3.0, 3.0)
    folder = save_dataset("test/rescaled-v0", env, play(env))
    spec = json.loads(env.spec.to_json())
    lost = {
        "name": "NormalizeReward",
        "entry_point": "gymnasium.wrappers:NormalizeReward",
        "kwargs": {},
    }
    spec["additional_wrappers"].append(lost)
    change_metadata(folder, env_spec=json.dumps(spec))
    start(folder, tmp_path / "run", "--env", "test_lamo:Point-v0")
    policy, *_ = lamo.load(tmp_path / "run")
    assert policy.action_radius.tolist() == pytest.approx([3, 3])
    recorded = json.loads(read_log(tmp_path / "run")[0]["env_spec"])
    assert [part["name"] for part in recorded["additional_wrappers"]] == ["RescaleAction"]
    assert "evaluating without the wrapper NormalizeReward" in capsys.readouterr().out

    # Another environment gets none of them.
    evaluation.main([str(tmp_path / "run"), "--env", "test_lamo:PointWithArrays-v0"])
    assert "evaluating without the wrapper RescaleAction" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["human", "rgb_array_list", "rgb_array", None])
def test_data_recorded_in_a_window_opens_none(mode):
    spec = gym.spec("Hopper-v5")
    spec = replace(spec, kwargs={"render_mode": mode}) if mode else spec
    kept = evaluation.spec_from_json(spec.to_json()).kwargs
    assert kept == ({"render_mode": mode} if mode == "rgb_array" else {})
    named = evaluation.spec_of("Hopper-v5", spec.to_json()).kwargs
    assert named == kept


def test_an_environment_that_cannot_start_is_found_before_training(tmp_path):
    class Stuck(Point):
        def reset(self, *, seed=None, options=None):
            raise RuntimeError("no licence")

    gym.register("Stuck-v0", Stuck, max_episode_steps=12)
    with pytest.raises(InputError, match="cannot make the environment.*no licence"):
        start(a_set("Point"), tmp_path / "run", "--env", "Stuck-v0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "first, words",
    [(np.zeros(2), "an observation has the shape .2,."), (np.full(3, np.nan), "is not finite")],
)
def test_an_environment_that_starts_badly_is_refused_at_once(first, words):
    class Wrong(Point):
        def reset(self, **options):
            return first, {}

    gym.register("Wrong-v0", Wrong, max_episode_steps=12)
    with pytest.raises(ValueError, match=words):
        Environments(evaluation.spec_of("Wrong-v0"))


def test_if_few_copies_can_be_made_those_are_enough():
    made = []

    class Licensed(Point):
        def __init__(self):
            super().__init__()
            made.append(self)
            if len(made) > 3:
                raise RuntimeError("no licence")

    gym.register("Licensed-v0", Licensed, max_episode_steps=12)
    few, many = (Environments(evaluation.spec_of(f"{name}-v0")) for name in ("Licensed", "Point"))
    policy = tiny_lamo(S=3, bounds=[[-0.1] * 2, [0.1] * 2]).eval()
    results = [evaluation.rollout(policy, part, [0.0], 7, 0) for part in (few, many)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert len(few.envs) == 3 and len(many.envs) == 7


@pytest.mark.parametrize("name", ["success", "is_success"])
@pytest.mark.parametrize(
    "success, expected",
    [
        (True, 1.0),
        (np.array([0.0]), 0.0),
        (np.array([True, False]), math.nan),
        ({"task": 1.0}, math.nan),
        ("yes", math.nan),
    ],
)
def test_a_success_is_a_number_or_unknown(name, success, expected):
    class Vague(Point):
        def step(self, action):
            return *super().step(action)[:4], {name: success}

    gym.register("Vague-v0", Vague, max_episode_steps=12)
    environments = Environments(evaluation.spec_of("Vague-v0"), 1)
    environments.reset([0], [0])
    [(_, reward, _, said)] = environments.step([0], [np.zeros(2)])
    assert np.isfinite(reward)
    np.testing.assert_equal(said, expected)


def test_an_environment_whose_settings_are_no_text_has_to_be_named(tmp_path, capsys):
    folder = a_set("Point")
    name = "ArrayPoint-v0"
    gym.register(name, "test_lamo:Point", max_episode_steps=12, kwargs={"bound": np.full(2, 0.1)})
    for part in "entry_point", "vector_entry_point":
        spec = replace(gym.spec("Hopper-v5"), **{part: lambda: None})
        assert evaluation.spec_to_json(spec) is None
    start(folder, tmp_path / "run", "--env", name)
    assert "the dataset does not say in which environment" in capsys.readouterr().out
    assert read_log(tmp_path / "run")[0]["env_spec"] is None
    evaluation.main([str(tmp_path / "run"), "--env", name])
    with pytest.raises(InputError, match="name one with --env ID"):
        evaluation.main([str(tmp_path / "run")])


def test_a_machine_without_git_is_enough(tmp_path, monkeypatch):
    folder = a_set("Point")
    monkeypatch.setenv("PATH", str(tmp_path))
    start(folder, tmp_path / "run", "--env", "none")
    assert read_log(tmp_path / "run")[0]["commit"] is None


def test_an_environment_with_other_choices_is_refused():
    box, choices = gym.spaces.Box(-9, 9, (11,)), gym.spaces.Discrete(3, start=5)
    env = SimpleNamespace(observation_space=box, action_space=choices)
    lamo.check_spaces(env, env)
    narrow = gym.spaces.Discrete(3, start=5)
    narrow.dtype = np.dtype(np.int32)  # Minari stores all as int64
    lamo.check_spaces(env, SimpleNamespace(observation_space=box, action_space=narrow))
    for other in (
        gym.spaces.Discrete(3),
        gym.spaces.Discrete(4, start=5),
        gym.spaces.Box(0, 1, (3,)),
    ):
        with pytest.raises(InputError, match="the data has"):
            lamo.check_spaces(SimpleNamespace(observation_space=box, action_space=other), env)

    policy, sizes = (
        SimpleNamespace(image_shape=None, max_timesteps=999),
        (torch.zeros(11), torch.zeros(3)),
    )
    policy.state_mean, policy.action_center = sizes
    for policy.discrete in (False, True):
        make = functools.partial(
            evaluation.make_environments,
            "Hopper-v5",
            policy,
            Config(),
            {"env_spec": None, "longest_was_cut": True},
        )
        if policy.discrete:
            with pytest.raises(ValueError, match="actions of 3 numbers, but .* 3 choices"):
                make()
        else:
            assert make().observation_space.shape == (11,)


def test_actions_at_the_bounds_stay_within_them():
    """float32 rounds 0.1 up."""
    policy, environments = Script(), Environments(evaluation.spec_of("test_lamo:Point-v0"), 2)
    policy.weight = torch.nn.Parameter(torch.full((2, 3), 100.0))
    policy.act = lambda *inputs: torch.tensor([[1.0, -1.0]]).expand(len(inputs[0]), 2)
    returns, *_ = evaluation.rollout(policy, environments, [1.0], 2, 0)
    assert np.isfinite(returns).all()


def test_integer_actions_are_rounded():
    spaces = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-5, 5, (2,), np.int64)
    histories = evaluation.Histories(1, 4, *spaces)
    histories.add(0, 1.0, np.zeros(3))
    policy = Script()
    policy.act = lambda *_: torch.tensor([[2.6, -7.2]])
    actions = histories.act(policy, [0])
    assert actions.tolist() == [[3, -5]] and actions.dtype == np.int64
    assert histories.actions[0, 0].tolist() == [3, -5]


def test_a_dataset_without_environment_trains_without_evaluating(tmp_path, capsys):
    spaces = {
        "observation_space": gym.spaces.Box(-9, 9, (3,)),
        "action_space": gym.spaces.Box(-1, 1, (2,)),
    }
    folder = save_dataset("test/none-v0", None, play(gym.make("Point-v0")), **spaces)
    with pytest.raises(InputError, match="--env none .*no environment is recorded"):
        start(folder, tmp_path / "run")
    start(folder, tmp_path / "run", "--env", "none")
    assert read_scores(tmp_path / "run")["best"] is None
    policy, config, header = lamo.load(tmp_path / "run")
    assert "evaluate it again" not in capsys.readouterr().out
    assert header["env_spec"] is None and policy.max_timesteps == 11
    with pytest.raises(InputError, match="name one with --env"):
        evaluation.main([str(tmp_path / "run")])


@pytest.mark.parametrize("options, limit", [([], 22), (["--max-steps", "9"], 9)])
@pytest.mark.parametrize("env", [None, lamo.KITCHEN])
def test_a_run_without_evaluation_can_be_evaluated_later(env, options, limit, tmp_path, kitchen):
    # The longest trajectory has 22 steps, and was cut: without --env none, too, that is the limit.
    start(kitchen[0], tmp_path / "run", "--env", "none", *options)
    run = lamo.load(tmp_path / "run")
    spec = evaluation.make_environments(env, *run).spec
    assert spec.kwargs["tasks_to_complete"][0] == "microwave" and spec.max_episode_steps == limit
    assert spec.kwargs["remove_task_when_completed"]


def test_what_a_policy_cannot_do_is_refused_without_an_environment_too(tmp_path):
    space = gym.spaces.MultiDiscrete([2, 3])
    episodes = [(np.zeros((6, 3)), np.zeros((5, 2), int), np.ones(5))]
    spaces = {"observation_space": gym.spaces.Box(-9, 9, (3,)), "action_space": space}
    folder = save_dataset("test/multi-v0", None, episodes, **spaces)
    with pytest.raises(
        InputError, match="its actions are MultiDiscrete.*; LaMo can take only vectors"
    ):
        start(folder, tmp_path / "run", "--env", "none")


WRAPPERS = {
    "NormalizeObservation": lambda env: gym.wrappers.NormalizeObservation(env),
    "NormalizeReward": lambda env: gym.wrappers.NormalizeReward(env),
    "RecordVideo": None,  # would write files
    "Monitor": None,  # of somebody else
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_that_cannot_be_rebuilt_are_named(tmp_path, name, capsys):
    env = gym.make("InvertedPendulum-v5")
    folder = save_dataset(
        "test/wrapped-v0", WRAPPERS[name](env) if WRAPPERS[name] else env, play(env)
    )
    if not WRAPPERS[name]:
        spec = json.loads(env.spec.to_json())
        spec["additional_wrappers"] = [
            {"name": name, "entry_point": f"gymnasium.wrappers:{name}", "kwargs": {}}
        ]
        change_metadata(folder, env_spec=json.dumps(spec))
    with pytest.raises(
        InputError, match=f"--env.* .the wrapper {name} of InvertedPendulum-v5 cannot be rebuilt"
    ):
        start(folder, tmp_path / "run")
    start(folder, tmp_path / "run", "--env", "InvertedPendulum-v5")
    assert f"without the wrapper {name}" in capsys.readouterr().out


def test_wrappers_that_keep_nothing_are_rebuilt(tmp_path):
    env = gym.wrappers.RescaleAction(gym.make("InvertedPendulum-v5"), -7.0, 7.0)
    folder = save_dataset("test/rescaled-v0", env, play(env))
    start(folder, tmp_path / "run")
    policy, *_ = lamo.load(tmp_path / "run")
    assert policy.action_radius.tolist() == [7.0]
    evaluation.main([str(tmp_path / "run")])


def test_actions_without_bounds_have_those_of_the_data(tmp_path, capsys):
    env, rng = gym.wrappers.ClipAction(gym.make("Pendulum-v1")), np.random.default_rng(0)
    episodes = play(env, actions=lambda env: rng.normal(size=1).astype(np.float32))
    start(save_dataset("test/clip-v0", env, episodes), tmp_path / "run")
    policy, *_ = lamo.load(tmp_path / "run")
    taken = np.concatenate([actions for _, actions, _ in episodes])
    bounds = (
        policy.action_center - policy.action_radius,
        policy.action_center + policy.action_radius,
    )
    assert [bound.item() for bound in bounds] == pytest.approx([taken.min(), taken.max()])
    assert "where the actions have no bounds" in capsys.readouterr().out


def test_actions_have_the_bounds_of_the_environment_that_evaluates(tmp_path):
    gym.register("WidePoint-v0", "test_lamo:Point", max_episode_steps=12, kwargs={"bound": 0.2})
    start(a_set("Point"), tmp_path / "run", "--env", "WidePoint-v0")
    policy, *_ = lamo.load(tmp_path / "run")
    assert policy.action_radius.tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_the_largest_number_is_no_bound(dtype):
    limits = np.finfo(dtype) if dtype == np.float32 else np.iinfo(dtype)
    low, high = np.array([[limits.min, -2], [1, limits.max]], dtype)
    actions = torch.tensor([[-0.5, 0.0], [0.5, 7.0]])
    low, high = lamo.action_bounds(gym.spaces.Box(low, high, dtype=dtype), actions)
    assert (low.tolist(), high.tolist()) == ([-0.5, -2], [1, 7])


def test_other_bounds_in_the_environment_than_in_the_data_are_named(capsys):
    env, wide = (
        SimpleNamespace(
            observation_space=gym.spaces.Box(-9, 9, (3,)),
            action_space=gym.spaces.Box(-bound, bound, (2,)),
        )
        for bound in (1, 100)
    )
    lamo.check_spaces(env, env)
    assert not capsys.readouterr().out
    lamo.check_spaces(env, wide)
    assert "Box(-1.0, 1.0, (2,), float32), its environment Box(-100.0" in capsys.readouterr().out


def test_a_dict_with_other_entries_than_in_the_data_is_named(capsys):
    box, actions = gym.spaces.Box, gym.spaces.Box(-1, 1, (2,))
    entries = {"goal": box(-9, 9, (2,)), "state": box(-9, 9, (1,))}
    nested = {"more": gym.spaces.Dict(x=box(-1, 1, (1,)))}  # no policy sees it
    data = gym.spaces.Dict(entries)
    for other, is_named in (
        (gym.spaces.Dict(entries), False),
        (box(-9, 9, (3,)), True),
        (gym.spaces.Dict(goal=box(-9, 9, (1,)), state=box(-9, 9, (2,))), True),
        (gym.spaces.Dict(a=entries["goal"], b=entries["state"]), True),
    ):
        spaces = (SimpleNamespace(observation_space=x, action_space=actions) for x in (data, other))
        lamo.check_spaces(*spaces)
        assert ("the scores are wrong" in capsys.readouterr().out) == is_named
    data = SimpleNamespace(
        observation_space=gym.spaces.Dict(entries | nested), action_space=actions
    )
    lamo.check_spaces(data, data)
    assert not capsys.readouterr().out


def test_pictures_of_the_size_of_ataris_are_not_taken_for_a_game():
    class Large(gym.Env):
        observation_space = gym.spaces.Box(0, 255, (210, 160, 3), np.uint8)
        action_space = gym.spaces.Discrete(2)

    gym.register("Large-v0", Large)
    env = gym.make("Large-v0", disable_env_checker=True)
    assert atari.preprocess_env(env) is env
    for metadata in ({}, {"env_spec": json.dumps({"entry_point": "large:Large"})}):
        storage = SimpleNamespace(metadata=metadata)
        data = SimpleNamespace(observation_space=env.observation_space, storage=storage)
        assert atari.preprocess_data(data) is data


def test_no_film_is_made_of_an_episode_that_fails(tmp_path):
    policy, spec = tiny_lamo(S=3, bounds=[[-0.1] * 2, [0.1] * 2]).eval(), "test_lamo:Broken-v0"
    with pytest.raises(ValueError, match="the episode failed"):
        evaluation.record(policy, evaluation.spec_of(spec), 0.0, 0, tmp_path / "film.gif")
    assert not [*tmp_path.iterdir()]


def test_actions_of_the_data_that_are_out_of_bounds_are_named(tmp_path, capsys):
    episodes = play(gym.make("Point-v0"))
    for factor in (1, 10):
        scaled = [
            (states, factor * np.array(taken), rewards) for states, taken, rewards in episodes
        ]
        folder = save_dataset(f"test/times{factor}-v0", gym.make("Point-v0"), scaled)
        start(folder, tmp_path / f"run{factor}", "--env", "none", "--steps", "1")
        assert ("actions out of bounds" in capsys.readouterr().out) == (factor == 10)


@pytest.mark.parametrize("first", [True, False])
def test_that_one_of_the_longest_trajectories_was_cut_is_enough(first, tmp_path, capsys):
    env = gym.make("Hopper-v5", max_episode_steps=1000)
    folder = save_dataset("test/equal-v0", env, [play(env)[-1]] * 2)
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        file["episode_0" if first else "episode_1"]["terminations"][-1] = True
    start(folder, tmp_path / "run", "--ratio", "1")
    assert "episodes of at most 11 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "limit, terminates, options, expected",
    [
        (1_000_000, False, [], 11),  # as Minari's mazes
        (1_000_000, True, [], 1_000_000),  # the environment ends episodes by itself
        (50, False, [], 50),
        (1_000_000, False, ["--max-steps", "30"], 30),
        (1_000_000, True, ["--max-steps", "5"], 5),
    ],
)
def test_the_longest_episode_follows_the_data(
    tmp_path, capsys, limit, terminates, options, expected
):
    env = gym.make("Hopper-v5", max_episode_steps=limit)
    folder = save_dataset("test/long-v0", env, play(env))
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        for episode in file.values():
            episode["terminations"][-1] = terminates
    start(folder, tmp_path / "run", *options)
    assert f"episodes of at most {expected} steps" in capsys.readouterr().out
    policy, _, header = lamo.load(tmp_path / "run")
    assert json.loads(header["env_spec"])["max_episode_steps"] == expected
    assert policy.max_timesteps == 11  # no timestep that the data does not have
    assert read_scores(tmp_path / "run")["best"]["length_mean"] <= expected

    # Evaluated later
    start(folder, tmp_path / "later", *options, "--env", "none")
    run = lamo.load(tmp_path / "later")
    assert evaluation.make_environments(None, *run).spec.max_episode_steps == expected
    # In an environment that text cannot express; the registered limit is 1,000
    *_, header = run = lamo.load(tmp_path / "run")
    header["env_spec"] = None
    limit = evaluation.make_environments("Hopper-v5", *run).spec.max_episode_steps
    assert limit == (expected if options else 1000 if terminates else 11)


def test_a_run_in_which_every_episode_fails_has_no_best(tmp_path):
    folder = save_dataset("test/broken-v0", gym.make("Point-v0"), play(gym.make("Point-v0")))
    with pytest.raises(InputError, match="every episode of the evaluation failed"):
        start(folder, tmp_path / "run", "--env", "test_lamo:Broken-v0")

    def refuse(constant):
        raise AssertionError(constant)

    scores = json.loads((tmp_path / "run" / "scores.json").read_text(), parse_constant=refuse)
    assert scores["best"] is None
    for row in scores["targets"].values():
        assert row["failed"] == 2 and row["return_mean"] is None
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    with pytest.raises(InputError, match="every episode failed"):
        evaluation.main([str(tmp_path / "run"), "--env", "test_lamo:Broken-v0"])


def test_an_episode_that_fails_has_a_picture_of_its_start():
    environments = Environments(evaluation.spec_of("test_lamo:Broken-v0"), 1, "rgb_array")
    policy, frames = tiny_lamo(S=3, bounds=[[-0.1] * 2, [0.1] * 2]).eval(), []
    returns, _, _ = evaluation.rollout(policy, environments, [0.0], 1, 0, frames=frames)
    assert np.isnan(returns).all() and len(frames) == 1


@pytest.mark.parametrize("part", ["data", "data/main_data.hdf5"])
def test_a_dataset_may_be_named_by_its_parts(part):
    dataset = lamo.load_dataset(str(HOPPER.parent / part))
    assert dataset.id == "lamo/hopper/demo-v0"


def test_a_wrong_name_beside_a_dataset_is_none():
    with pytest.raises(InputError, match="neither a folder nor an id"):
        lamo.load_dataset(str(HOPPER / "nothing"))


@pytest.mark.parametrize(
    "kind, words",
    [
        ("d4rl", "but of D4RL; take Minari's own"),
        ("minari 0.4", "but of an older Minari"),
        ("empty folder", "not a dataset of Minari 0.5, which is a folder with"),
        ("other file", "not a dataset of Minari 0.5, which is a folder with"),
        ("nothing", "neither a folder nor an id"),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_what_is_no_dataset_is_told_by_its_contents(tmp_path, kind, words, inside):
    file = tmp_path / "some" / "data" / "main_data.hdf5"
    file.parent.mkdir(parents=True)
    if kind in ("d4rl", "minari 0.4"):
        with h5py.File(file, "w") as content:
            content["observations" if kind == "d4rl" else "episode_0/actions"] = np.zeros(3)
    elif kind == "other file":
        file.write_text("words")
    name = "some/nothing" if kind == "nothing" else "some/data/main_data.hdf5" if inside else "some"
    if kind == "empty folder":
        name = "some/data" if inside else "some"
    with pytest.raises(InputError, match=words):
        lamo.load_dataset(str(tmp_path / name))


# ---------------------------------------------------------------------------- goals, choices and images
class Goals(gym.Env):
    """A point that walks to a goal: a dict observation with one inside it, one of three steps, a success."""

    def __init__(self, lacks=()):
        box = gym.spaces.Box(-9, 9, (2,), np.float64)
        inner = gym.spaces.Dict({"clock": gym.spaces.Box(-9, 9, (1,), np.float64)})
        spaces = {"observation": box, "achieved_goal": box, "desired_goal": box, "more": inner}
        self.lacks = lacks
        self.observation_space = gym.spaces.Dict(self.visible(spaces))
        self.action_space = gym.spaces.Discrete(3, start=5)

    def visible(self, entries):
        return {name: entry for name, entry in entries.items() if name not in self.lacks}

    def observe(self):
        return self.visible(
            {
                "observation": np.array([self.time, 0.5]),
                "achieved_goal": np.array([self.x, 0.0]),
                "desired_goal": np.array([3.0, 1.0]),
                "more": {"clock": np.zeros(1)},
            }
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.x = 0, float(self.np_random.integers(3))
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        self.x += action - 6
        success = abs(self.x - 3) < 0.5
        is_known = success or self.time > 1
        info = {"is_success": success if is_known else None}
        return self.observe(), float(success), False, False, info


class Pictures(gym.Env):
    """A picture of 6 x 7 pixels in which one moves."""

    def __init__(self, shape=(6, 7, 2), dtype=np.uint8):
        self.observation_space = gym.spaces.Box(0, 255, shape, dtype)
        self.action_space = gym.spaces.Discrete(2)

    def observe(self):
        picture = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        picture.flat[self.time % picture.size] = 255
        return picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = int(self.np_random.integers(9))
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1 + action
        return self.observe(), float(action), False, False, {}


for name in ("Goals", "Pictures"):
    gym.register(f"{name}-v0", entry_point=f"test_lamo:{name}", max_episode_steps=12)


def a_set(name, env_id=None, **options):
    """Random episodes of an environment, as a folder; `env_id` is that to record."""
    env = gym.make(f"{name}-v0", **options)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    return save_dataset(f"test/{name.lower()}-v0", env_id, play(env), **spaces)


def test_a_policy_sees_all_vectors_of_a_dict_in_the_order_of_their_names(tmp_path):
    trajectories = lamo.read_trajectories(minari.MinariDataset(a_set("Goals") / "data"), 1.0, 0)
    t = trajectories.timesteps.double()
    expected = [trajectories.states[:, 0], 0 * t, 0 * t + 3, 0 * t + 1, t, 0 * t + 0.5]
    assert torch.equal(trajectories.states, torch.stack(expected, dim=1))
    choice = trajectories.actions.argmax(dim=1)  # 5, 6, 7: one step back, none, one ahead
    assert torch.equal(trajectories.actions, F.one_hot(choice, 3).float())
    moved = trajectories.states[1:, 0] - trajectories.states[:-1, 0]
    same = trajectories.last[1:] == trajectories.last[:-1]
    assert torch.equal(moved[same], (choice[:-1] - 1)[same].double())


class Walker(torch.nn.Module):
    """Walks to the goal, and by its target may wait for the second step."""

    context = 3

    def __init__(self):
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(1))

    def act(self, returns_to_go, states, actions, timesteps, lengths):
        newest = torch.arange(len(lengths)), lengths - 1
        goes = (states[newest][:, 2] - states[newest][:, 0]).sign().long() + 1
        goes[(returns_to_go[newest] < 1)] = 1  # stays
        return F.one_hot(goes, 3)


def test_success_is_that_of_any_step_and_has_a_column():
    environments = Environments(evaluation.spec_of("test_lamo:Goals-v0"), 3)
    returns, lengths, successes = evaluation.rollout(Walker(), environments, (20.0, 0.0), 6, 0)
    assert (successes[0] == 1).all() and (returns[0] >= 9).all() and (lengths == 12).all()
    assert (successes[1] == 0).all() and (returns[1] == 0).all()
    scores = evaluation.evaluate(Walker(), environments, (20.0, 0.0), 6, 0, (0, 10))
    assert [row["success"] for row in scores.values()] == [1, 0]
    title, high, low, _ = evaluation.format_scores(scores, (0, 10)).splitlines()
    assert title.endswith(" success") and high.endswith("100%  best") and low.endswith(" 0%")


def test_a_success_counts_also_if_the_goal_is_left_again():
    class Passer(Walker):
        def act(self, returns_to_go, *window):
            return torch.tensor([[0, 0, 1]]).expand(len(returns_to_go), 3)  # ahead, and past it

    environments = Environments(evaluation.spec_of("test_lamo:Goals-v0"), 3)
    returns, _, successes = evaluation.rollout(Passer(), environments, (1.0,), 4, 0)
    assert (returns == 1).all() and (successes == 1).all()


@pytest.mark.parametrize("name", ["Goals", "Pictures"])
@pytest.mark.parametrize("method", ["lamo", "dt"])
def test_goals_choices_and_images_from_start_to_end(name, method, tmp_path, lm_folder, capsys):
    folder, out = a_set(name), tmp_path / "run"
    lm = f"--text-block 32 --lm {lm_folder}" if method == "lamo" else ""
    start(folder, out, "--env", f"test_lamo:{name}-v0", "--method", method, *lm.split())
    assert ("success" in capsys.readouterr().out) == (name == "Goals")
    policy, config, header = lamo.load(out)
    state = torch.zeros(1, 20, *([6] if name == "Goals" else [6, 7, 2]))
    state = state.to(torch.uint8 if name == "Pictures" else torch.float64)
    count = 3 if name == "Goals" else 2
    window = torch.zeros(1, 20), state, torch.zeros(1, 20, count), torch.zeros(1, 20).long()
    assert policy.act(*window, torch.tensor([20])).sum() == 1
    row = read_scores(out)["best"]
    assert row["failed"] == 0 and ("success" in row) == (name == "Goals")
    evaluation.main([str(out), "--env", f"test_lamo:{name}-v0"])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(2, 5))
def test_stacks_equal_a_plain_loop(lengths, count):
    rng = np.random.default_rng(0)
    frames = [rng.integers(256, size=(n, 5, 4), dtype=np.uint8) for n in lengths]
    actions, rewards = [np.zeros((n, 1)) for n in lengths], [np.ones(n) for n in lengths]
    trajectories = Trajectories([*frames], actions, rewards, stack=count)
    assert trajectories.states.dtype == torch.uint8 and len(trajectories.states) == sum(lengths)
    expected = []
    for episode in frames:
        queue = [episode[0]] * count  # as gymnasium.wrappers.FrameStackObservation starts
        for frame in episode:
            queue = [*queue[1:], frame]
            expected.append(np.array(queue))
    states = trajectories.states_at(torch.arange(sum(lengths)).unsqueeze(0))[0]
    assert np.array_equal(states, expected)
    batch = trajectories.batch(6, 3)
    assert batch["states"].shape == (6, 3, count, 5, 4)


MEMORY = """
import sys, minari, lamo
from results.timing import peak_memory
dataset = minari.MinariDataset(sys.argv[1])
before = peak_memory("cpu")
trajectories = lamo.read_trajectories(dataset, 1.0, 0)
batch = trajectories.batch(8, 4)
lamo.checksum([trajectories.states])
print((peak_memory("cpu") - before) / trajectories.states.nbytes)
"""


@pytest.mark.parametrize("shape, is_compressed", [((31, 31, 4), False), ((32, 32, 3), True)])
def test_compressed_images_are_named(shape, is_compressed, tmp_path, capsys):
    """Minari stores images of 32 x 32 pixels and more as JPEG.

    Minari 0.5.3, the last for Python 3.10, cannot read what it writes of smaller ones in colour.
    """
    space = gym.spaces.Box(0, 255, shape, np.uint8)
    spaces = {"observation_space": space, "action_space": gym.spaces.Discrete(2)}
    episodes = [(np.zeros((6, *space.shape), np.uint8), [0] * 5, np.ones(5))]
    start(save_dataset("test/jpeg-v0", None, episodes, **spaces), tmp_path / "run", "--env", "none")
    assert ("compressed (JPEG)" in capsys.readouterr().out) == is_compressed


@pytest.mark.slow
def test_images_take_little_more_memory_than_themselves():
    rng = np.random.default_rng(0)
    space = gym.spaces.Box(0, 255, (31, 31, 30), np.uint8)  # not JPEG, which would take long
    spaces = {"observation_space": space, "action_space": gym.spaces.Discrete(2)}
    episodes = [
        (rng.integers(256, size=(201, *space.shape), dtype=np.uint8), [0] * 200, np.ones(200))
        for _ in range(60)
    ]
    folder = save_dataset("test/many-v0", None, episodes, **spaces)
    result = command("-c", MEMORY, folder / "data")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.5


def test_the_environment_is_that_of_the_data_unless_the_user_wants_the_other(tmp_path, capsys):
    env = gym.make("Hopper-v5", max_episode_steps=50)
    folder = save_dataset("test/two-v0", env, play(env))
    other = gym.make("Hopper-v5", max_episode_steps=7).spec.to_json()
    change_metadata(folder, eval_env_spec=other)
    named = ["--env", "Hopper-v5", "--max-steps", "9"]
    for options, expected in ([], 50), (["--env", "eval"], 7), (named, 9):
        start(folder, tmp_path / str(expected), *options)
        printed = capsys.readouterr().out
        assert f"episodes of at most {expected} steps" in printed
        assert ("to take it, add --env eval" in printed) == (not options)
    evaluation.main([str(tmp_path / "9"), "--env", "Hopper-v5"])
    assert " 9.0  best" in capsys.readouterr().out  # the run's --max-steps


# ---------------------------------------------------------------------------- what a file brings is data
TRAP = """
from pathlib import Path
import gymnasium
Path("trap.txt").write_text("this ran")
class Trap(gymnasium.Wrapper):
    def __init__(self, env=None, **kwargs):
        Path("trap.txt").write_text("this ran")
def load(*arguments, **keywords):
    Path("trap.txt").write_text("this ran")
"""
TRAPS = {
    "entry point": {"entry_point": "trap:load"},
    "hub": {
        "entry_point": "torch.hub:load",
        "kwargs": {"repo_or_dir": ".", "model": "load", "source": "local"},
    },
    "prefix": {"id": "trap:Hopper-v5", "entry_point": "trap:load"},
    "no such id": {"id": "Trap-v0", "entry_point": "None.load"},
    "wrapper": {
        "additional_wrappers": [{"name": "Trap", "entry_point": "trap:Trap", "kwargs": {}}]
    },
    "false name": {
        "additional_wrappers": [{"name": "ClipAction", "entry_point": "trap:Trap", "kwargs": {}}]
    },
}


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A working directory that runs code if it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("trap.py", "hubconf.py"):
        (tmp_path / name).write_text(TRAP)
    yield tmp_path / "trap.txt"
    sys.modules.pop("trap", None)


@pytest.mark.parametrize("name", TRAPS)
def test_an_environment_from_a_file_runs_no_code(name, trap, tmp_path):
    spec = json.dumps(json.loads(gym.spec("Hopper-v5").to_json()) | TRAPS[name])
    folder = save_dataset("test/trap-v0", "Hopper-v5", play(gym.make("Hopper-v5")))
    for key, options in (("env_spec", []), ("eval_env_spec", ["--env", "eval"])):
        change_metadata(
            folder,
            **{"env_spec": gym.spec("Hopper-v5").to_json(), "eval_env_spec": None, key: spec},
        )
        with pytest.raises(InputError, match="--env"):
            start(folder, tmp_path / "run", *options)
    start(folder, tmp_path / "run", "--env", "Hopper-v5")  # the user's word goes
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["header"]["env_spec"] = spec
    checkpoint["header"]["config"]["env"] = "trap:Hopper-v5"
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="name one with --env"):
        evaluation.main([str(tmp_path / "run")])
    with pytest.raises(InputError, match="allow it with --env"):
        lamo.main(["--resume", str(tmp_path / "run")])
    assert not trap.exists()


@pytest.mark.parametrize("missing", ["observation_space", "action_space"])
def test_an_environment_is_not_made_to_learn_its_spaces(missing, trap, tmp_path):
    folder = save_dataset("test/trap-v0", "Hopper-v5", play(gym.make("Hopper-v5")))
    spec = json.dumps(json.loads(gym.spec("Hopper-v5").to_json()) | TRAPS["entry point"])
    change_metadata(folder, env_spec=spec)
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata[missing]
    path.write_text(json.dumps(metadata))
    with pytest.raises(InputError, match=f"has no {missing}; write it with Minari"):
        start(folder, tmp_path / "run", "--env", "none")
    assert not trap.exists()


def test_a_pickled_object_in_a_checkpoint_is_not_made(trap, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.write_text, (trap, "this ran")

    (tmp_path / "run").mkdir()
    torch.save({"version": lamo.VERSION, "header": Trap()}, tmp_path / "run" / "checkpoint.pt")
    for command_line in (lambda: evaluation.main(["run"]), lambda: lamo.main(["--resume", "run"])):
        with pytest.raises(InputError, match="cannot read run/checkpoint.pt"):
            command_line()
    assert not trap.exists()


# ---------------------------------------------------------------------------- a run folder can move
def test_a_resumed_run_needs_batches_that_its_processes_can_share(trained, monkeypatch):
    monkeypatch.setattr(lamo, "rank_and_world", lambda: (0, 3))
    with pytest.raises(InputError, match="must be multiples of 3; they are 4 and 2"):
        lamo.main(["--resume", str(trained[0])])
    with pytest.raises(InputError, match="must be multiples of 3; they are 6 and 2"):
        lamo.check_options(cpu_config(batch=6, text_batch=2))
    lamo.check_options(cpu_config(batch=6, text_batch=2, lang_coef=0.0))


def test_a_run_finds_its_files_from_another_directory_or_is_told(tmp_path, monkeypatch, lm_folder):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lm_folder, tmp_path / "my lm")
    shutil.copytree(HOPPER.parent, tmp_path / "my data")
    (tmp_path / "my text.txt").write_text(100 * WORDS)
    options = [
        *SHORT.split(),
        "--lm",
        "my lm",
        "--data",
        "my data",
        "--text",
        "my text.txt",
        "--out",
        "my run",
    ]
    lamo.main(options)
    scores = read_scores(tmp_path / "my run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    reopen(tmp_path / "my run")
    lamo.main(["--resume", "../my run"])
    evaluation.main(["../my run"])
    for name in ("my lm", "my data", "my text.txt", "my run"):
        (tmp_path / name).rename(tmp_path / f"moved {name}")
    with pytest.raises(InputError, match="cannot find a language model"):
        evaluation.main(["../moved my run"])
    evaluation.main(["../moved my run", "--lm", "../moved my lm"])
    moved = [
        "--lm",
        "../moved my lm",
        "--data",
        "../moved my data",
        "--text",
        "../moved my text.txt",
    ]
    reopen(tmp_path / "moved my run")
    lamo.main(["--resume", "../moved my run", *moved])
    reopen(tmp_path / "moved my run")
    lamo.main(["--resume", "../moved my run"])  # knows now where they are
    evaluation.main(["../moved my run"])
    assert read_scores(tmp_path / "moved my run")["targets"] == scores["targets"]
    with pytest.raises(InputError, match="language model is not the one"):
        evaluation.main(["../moved my run", "--lm", "demo/gpt2-tiny"])

    # One's own file goes before that of the same name beside lamo.py.
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "text.txt").write_text("mine")
    assert (HERE / "demo" / "text.txt").exists()
    given = {"text": "demo/text.txt"}
    assert lamo.with_full_paths(given) == given
    monkeypatch.chdir(tmp_path)
    assert lamo.with_full_paths(given) == {"text": str(tmp_path / "demo" / "text.txt")}
    for given in {"text": "wikitext"}, {"lm": "none"}:  # a name, not a folder
        [name] = given.values()
        (tmp_path / name).mkdir()
        assert lamo.with_full_paths(given) == given
    assert lamo.with_full_paths({"data": "none"}) == {"data": str(tmp_path / "none")}


def test_the_manuals_loop_gives_the_return_of_an_evaluation(trained, capsys):
    """The code block of the manual that acts step by step, as it is written there."""
    block = (
        (HERE / "docs" / "README.md")
        .read_text("utf-8")
        .split("    import gymnasium as gym, lamo\n")[1]
        .split("\n\n")[0]
    )
    code = "import gymnasium as gym, lamo\n" + "\n".join(line[4:] for line in block.splitlines())
    code = code.replace("runs/hopper-lamo-0.1-0-demo", str(trained[0])).replace(
        ", 3600,", ", 1500,"
    )
    exec(code, names := {})
    expected = read_scores(trained[0])["targets"]["1500"]["return_mean"]
    assert names["total"] == pytest.approx(expected, rel=1e-3)


def test_the_manuals_command_that_fills_the_caches_wants_the_papers_files(monkeypatch):
    [code] = re.findall(r'python -c "(.+)"', (HERE / "docs" / "README.md").read_text("utf-8"))
    fetched = []
    monkeypatch.setattr(lamo, "fetch", fetched.append)
    exec(code, {})
    [config] = fetched
    wanted = "gpt2", "mujoco/hopper/medium-v0", "wikitext"
    assert (config.lm, config.data, config.text) == wanted and config.lang_coef > 0


# ---------------------------------------------------------------------------- where assets come from
def test_without_a_gpu_the_demo_is_taken_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, title = lamo.configure({})
    assert "no CUDA GPU" in title and config.lm == "demo/gpt2-tiny" and config.steps == 1000
    lamo.main(
        f"{SHORT.removeprefix('--demo --device cpu ')} --method dt --out {tmp_path / 'run'}".split()
    )
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[0].startswith("DEMO ASSETS, NOT COMPARABLE TO THE PAPER (no CUDA")
        and printed.count(printed[0]) == 2
    )
    assert read_log(tmp_path / "run")[0]["title"] == printed[0]


# ---------------------------------------------------------------------------- checkpoints that people have
def layout_of(name, folder):
    """Save a GPT-2 again, as people have it."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    if name == "shards":
        model.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    elif name == "pytorch_model.bin":
        torch.save(model.state_dict(), folder / name)
    elif name == "half precision":
        model.half().save_pretrained(folder)
    elif name == "without the head":
        model.transformer.save_pretrained(folder)
    elif name == "more tokens":
        model.resize_token_embeddings(310)
        shaken(model).save_pretrained(folder)
    elif name == "gelu_pytorch_tanh":  # gelu_new by another name
        model.config.activation_function = name
        model.save_pretrained(folder)


LAYOUTS = (
    "shards", "pytorch_model.bin", "half precision", "without the head", "more tokens",
    "gelu_pytorch_tanh",
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers_in_every_layout(layout, lm_folder, tmp_path):
    folder = shutil.copytree(lm_folder, tmp_path / "a model")
    layout_of(layout, folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder).float().eval()
    tokens = torch.randint(theirs.config.vocab_size, (2, 64))
    with torch.no_grad():
        ours = gpt2_of(str(folder)).eval().logits(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=0)


def test_a_tokenizer_may_be_vocab_and_merges_alone(lm_folder, tmp_path):
    folder = shutil.copytree(lm_folder, tmp_path / "lm")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (tmp_path / "words.txt").write_text((WORDS + "\n") * 50)
    text, expected = (
        lamo.load_text(str(lm), str(tmp_path / "words.txt"), 16) for lm in (folder, lm_folder)
    )
    assert torch.equal(text.tokens, expected.tokens) and len(text.tokens) > 500


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    """transformers makes an empty one."""
    folder = shutil.copytree(HERE / "demo" / "gpt2-tiny", tmp_path / "lm")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="cannot load the tokenizer of --lm"):
        lamo.load_text(str(folder), "demo/text.txt", 16)
    with pytest.raises(InputError, match="cannot load the tokenizer of --lm"):
        lamo.fetch(Config(lm=str(folder), data="demo/lamo/hopper/demo-v0"))  # else no demo


@pytest.fixture
def starting_lm(tmp_path):
    """A language model whose tokenizer adds a token to each text, as Gemma's does, and its id."""
    tokenizer = Tokenizer.from_file(str(HERE / "demo" / "gpt2-tiny" / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(8)
    tokenizer.add_special_tokens(["<|start|>"])
    start = "<|start|>", tokenizer.token_to_id("<|start|>")
    tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[start])
    folder = shutil.copytree(HERE / "demo" / "gpt2-tiny", tmp_path / "gpt2-start")
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|start|>"}))
    return folder, start[1]


def test_each_crop_starts_as_the_models_texts_do(starting_lm):
    """The tokenizer also pads and cuts, which must not show."""
    folder, start = starting_lm
    text, plain = (
        lamo.load_text(str(lm), "demo/text.txt", 256) for lm in (folder, "demo/gpt2-tiny")
    )
    assert torch.equal(text.tokens, plain.tokens) and torch.equal(text.held_out, plain.held_out)
    torch.manual_seed(0)
    crops = text.batch(4)
    torch.manual_seed(0)
    expected = plain.batch(4)
    expected[:, 0] = start
    assert crops.tolist() == expected.tolist()

    class FirstTokens(torch.nn.Module):
        def language_loss(self, tokens):
            return tokens[:, 0].float().mean()

    assert text.held_out_loss(FirstTokens()) == start


# ---------------------------------------------------------------------------- the command line, its mistakes
RANGES = {"Pusher-v5": 2.0, "InvertedPendulum-v5": 3.0, "demo.reacher2d:lamo/Reacher2d-v0": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("env_id", RANGES)
def test_any_dataset_brings_its_environment(env_id, tmp_path, lm_folder):
    env, episodes = gym.make(env_id), []
    for seed in range(4):
        env.action_space.seed(seed)
        observations, actions, rewards = [env.reset(seed=seed)[0]], [], []
        for _ in range(1 + seed):
            actions.append(env.action_space.sample())
            observation, reward, *_ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        episodes.append((np.array(observations), actions, rewards))
    folder, out = save_dataset("test/any-v0", env, episodes), tmp_path / "run"
    options = "--demo --steps 2 --ratio 0.5 --text-block 32 --episodes 1 --delayed"
    lamo.main(f"{options} --data {folder} --lm {lm_folder} --out {out}".split())
    policy, config, header = lamo.load(out)
    assert policy.action_radius.tolist() == [RANGES[env_id]] * len(policy.action_radius)
    returns = lamo.read_trajectories(minari.MinariDataset(folder / "data"), 0.5, 0).returns
    best, largest = returns.max(), max(abs(returns)) or 1  # all zero: nothing to scale
    half = best / 2 if best > 0 else 2 * best  # of a negative return, half is more
    assert config.targets == pytest.approx((best, half) if best else (0,)) and config.context == 20
    scale = header["arguments"]["return_scale"]
    assert 0.3 < largest / scale < 3.2 and math.log10(scale) == round(math.log10(scale))
    row = read_scores(out)["best"]
    assert header["reference"] == (0, 100) and row["score"] == pytest.approx(row["return_mean"])


@pytest.mark.slow
def test_a_dataset_whose_environment_cannot_be_made_takes_that_of_env(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [
        (rng.normal(size=(6, 11)), rng.uniform(-1, 1, (5, 3)), np.ones(5)) for _ in range(3)
    ]
    spaces = {
        "observation_space": gym.spaces.Box(-9, 9, (11,)),
        "action_space": gym.spaces.Box(-1, 1, (3,)),
    }
    folder = save_dataset("test/lost-v0", None, episodes, **spaces)
    lamo.main(
        f"{SHORT} --ratio 1 --env hopper --data {folder} --method dt --out {tmp_path / 'run'}".split()
    )
    assert "Hopper-v5" in read_log(tmp_path / "run")[0]["env_spec"]


def test_data_of_another_environment_than_the_tasks_is_refused(tmp_path):
    with pytest.raises(InputError, match="was recorded in Walker2d-v5, not in hopper; leave out"):
        start("demo/lamo/walker2d/demo-v0", tmp_path / "run", "--env", "hopper")


def test_a_kitchen_that_cannot_be_made_is_not_replaced(kitchen):
    """Only the data knows its subtasks."""
    dataset = minari.MinariDataset(kitchen[0] / "data")
    spec = json.loads(dataset.storage.metadata["env_spec"])
    spec["kwargs"]["tasks_to_complete"] = ["no such task"]
    with pytest.raises(Exception, match="no such task"):
        lamo.recorded_spec(json.dumps(spec), "kitchen-complete")


KITCHEN = [5, 4, 3, 2, 1], 1, 20, (0, 4), 280
PAPER = {  # targets, scale of returns, context, D4RL's reference returns, longest episode
    "hopper": ([3600, 2600, 2200, 1800], 1000, 20, (-20.272305, 3234.3), 1000),
    "halfcheetah": ([12000, 8000, 6000, 4500], 1000, 20, (-280.178953, 12135.0), 1000),
    "walker2d": ([5000, 4000, 3000, 2500], 1000, 20, (1.629008, 4592.3), 1000),
    "kitchen-complete": KITCHEN,
    "kitchen-partial": KITCHEN,
    "kitchen-mixed": KITCHEN,
    "reacher2d": ([76, 40], 10, 5, (0, 100), 100),
}


@pytest.mark.parametrize("name", PAPER)
def test_tasks_are_the_papers(name):
    task = lamo.TASKS[name]
    longest = gym.make(task.env_id).spec.max_episode_steps
    settings = task.targets, task.return_scale, task.context, task.reference
    assert (*settings, longest) == PAPER[name]


def test_a_row_in_tasks_is_all_that_a_new_task_needs(tmp_path, monkeypatch):
    """Also on the demo, which has no data for it."""
    row = lamo.Task("Hopper-v5", str(HOPPER.parent), [900], 1000, 20, (0, 3000))
    monkeypatch.setitem(lamo.TASKS, "mine", row)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options in ({"env": "mine"}, {"env": "mine", "demo": True}):
        config, _ = lamo.configure(options)
        assert (config.targets, config.data) == ([900], str(HOPPER.parent)) and config.demo
    monkeypatch.setitem(lamo.TASKS, "mine", replace(row, data="mine/hopper-v0"))
    config, title = lamo.configure({"env": "mine", "demo": True, "method": "dt"})
    with pytest.raises(InputError, match="of farama-minari/mine"):
        lamo.prepare(config, title)


def test_uv_run_installs_what_requirements_say():
    block = re.search(
        r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", (HERE / "lamo.py").read_text("utf-8")
    )[1]
    dependencies = re.findall(r'"(.+)",', block)
    for_a_run, _ = (HERE / "requirements.txt").read_text().split("\n\n")
    assert dependencies == for_a_run.splitlines()[1:]
    assert 'requires-python = ">=3.10,<3.15"' in block  # MuJoCo has no build for 3.15


@pytest.mark.slow
def test_errors_are_one_line_in_a_process_of_its_own(tmp_path):
    for script, *arguments in (
        ("lamo.py", "--env", "humanoid"),
        ("eval.py", tmp_path),
        ("eval.py", tmp_path, "--seed=-1"),
    ):
        result = command(script, *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith(f"{script}: error: ")


def test_options_are_checked_before_anything_is_downloaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lamo, "fetch", lambda _: pytest.fail("downloads"))
    with pytest.raises(InputError, match="add --lora-rank 0"):
        lamo.configure({"train_trunk": True})


@pytest.mark.slow
def test_runs_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lamo.main(f"{SHORT} --method dt".split())
    before = (tmp_path / "runs" / "hopper-dt-0.1-0-demo" / "log.jsonl").read_text()
    with pytest.raises(InputError, match="delete it, or --resume runs/hopper-dt-0.1-0-demo"):
        lamo.main(f"{SHORT} --method dt".split())
    with pytest.raises(InputError, match=r"--resume \S+runs --env mine:Arm-v0"):
        with lamo.run_folder(tmp_path / "runs", "mine:Arm-v0"):
            pass
    assert (tmp_path / "runs" / "hopper-dt-0.1-0-demo" / "log.jsonl").read_text() == before


@pytest.mark.slow
def test_import_has_no_side_effects(tmp_path):
    code = "from lamo import GPT2, LoRALinear, LaMo, Trajectories, Text; import sys; assert 'transformers' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="session")
def bad(tmp_path_factory, lm_folder, trained):
    """A folder of files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in {
        "short.txt": b"too short", "empty.txt": b"", "binary.txt": bytes(range(256)) * 40, "folder/x": b"",
        "no-json/config.json": b"{", "no-weights/config.json": (lm_folder / "config.json").read_bytes(),
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    settings = {
        "wide": {"n_embd": 64}, "untied": {"tie_word_embeddings": False}, "few-words": {"vocab_size": 100},
        "remote": {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}},
        "unknown": {"model_type": "mine"}, "decoder": {"add_cross_attention": True},
    }  # fmt: skip
    small = {"vocab_size": 300, "max_position_embeddings": 64}
    bert = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **small)
    bart = BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, **small)
    for name, model in (("bert", BertLMHeadModel(bert)), ("bart", BartForCausalLM(bart))):
        shutil.copytree(lm_folder, folder / name)
        model.config.is_encoder_decoder = name == "bart"
        shaken(model).save_pretrained(folder / name)
    shutil.copytree(lm_folder, folder / "state-space")
    mamba = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=300)
    MambaForCausalLM(mamba).save_pretrained(folder / "state-space")
    for name in (*settings, "cut-weights", "lacking-weights"):
        shutil.copytree(lm_folder, folder / name)
        config = json.loads((lm_folder / "config.json").read_text()) | settings.get(name, {})
        (folder / name / "config.json").write_text(json.dumps(config))
    weights = folder / "cut-weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    tensors = load_file(folder / "lacking-weights" / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "lacking-weights" / "model.safetensors", {"format": "pt"})
    words = load_file(folder / "few-words" / "model.safetensors")
    words["transformer.wte.weight"] = words["transformer.wte.weight"][:100]
    save_file(words, folder / "few-words" / "model.safetensors", {"format": "pt"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        rng = np.random.default_rng(0)
        episodes = [
            (rng.normal(size=(6, 11)), rng.uniform(-1, 1, (5, 3)), np.ones(5)) for _ in range(3)
        ]
        space = gym.spaces.Box(-np.inf, np.inf, (11,))
        good = save_dataset("test/good-v0", "Hopper-v5", episodes, observation_space=space)
        for name, (env_id, observations, actions, *spaces) in bad_kinds().items():
            episodes = [(observations, actions, np.ones(5))] * 3
            spaces = dict(zip(("observation_space", "action_space"), spaces))
            save_dataset(f"test/{name}-v0", env_id, episodes, **spaces)
        shutil.copytree(folder / "test" / "image-v0", folder / "frames")
        with h5py.File(folder / "frames" / "data" / "main_data.hdf5", "a") as file:
            del file["episode_1/observations"]
            file["episode_1/observations"] = np.zeros((6, 5, 7, 2), np.uint8)
        shutil.copytree(folder / "test" / "goals-v0", folder / "keys")
        with h5py.File(folder / "keys" / "data" / "main_data.hdf5", "a") as file:
            del file["episode_1/observations/desired_goal"]
    for name in (
        "cut-data",
        "empty-data",
        "no-episodes",
        "metadata-alone",
        "no-rewards",
        "nan",
        "nan-reward",
        "words",
        "narrow",
    ):
        shutil.copytree(good, folder / name)
        data = folder / name / "data" / "main_data.hdf5"
        if name in ("cut-data", "empty-data"):
            data.write_bytes(data.read_bytes()[: 3000 * (name == "cut-data")])
        elif name == "metadata-alone":
            data.unlink()
        elif name == "no-episodes":
            metadata = json.loads((data.parent / "metadata.json").read_text())
            (data.parent / "metadata.json").write_text(
                json.dumps(metadata | {"total_episodes": 0, "total_steps": 0})
            )
        else:
            with h5py.File(data, "a") as file:
                episode = file["episode_1"]
                if name == "nan":
                    episode["observations"][2, 1] = np.nan
                elif name == "nan-reward":
                    episode["rewards"][2] = np.nan
                else:
                    field = "rewards" if name == "no-rewards" else "observations"
                    del episode[field]
                    if name == "words":
                        episode[field] = np.full((6, 11), b"word")
                    elif name == "narrow":
                        episode[field] = np.zeros((6, 7))

    for name in ("cut", "altered", "old", "other-lm"):
        (folder / name).mkdir()
        path, original = folder / name / "checkpoint.pt", trained[0] / "checkpoint.pt"
        content = bytearray(original.read_bytes())
        if name == "cut":
            content = content[:-2000]
        elif name == "altered":
            middle = len(content) // 2
            content[middle : middle + 200] = bytes(200)
        path.write_bytes(content)
        if name in ("old", "other-lm"):
            checkpoint = torch.load(path, weights_only=True)
            checkpoint["version"] -= name == "old"
            checkpoint["header"]["lm_checksum"] = "0" * 64 if name == "other-lm" else None
            torch.save(checkpoint, path)
    return folder


def bad_kinds():
    """Datasets that cannot be used, by name: environment, observations, actions, their spaces."""
    Box, Discrete = gym.spaces.Box, gym.spaces.Discrete
    picture, vector = Box(0, 255, (6, 7, 2), np.uint8), Box(-9, 9, (4,))
    images, choices = np.zeros((6, 6, 7, 2), np.uint8), np.array([0, 1, 0, 1, 0])
    goals = {"achieved_goal": np.zeros((6, 2)), "desired_goal": np.zeros((6, 2))}
    words = gym.spaces.Dict({"mission": gym.spaces.Text(9), "state": vector})
    return {
        "image": ("CartPole-v1", images, choices, picture, Discrete(2)),
        "float-image": (None, images / 255.0, choices, Box(0, 1, (6, 7, 2)), Discrete(2)),
        "flat-image": (None, images[..., 0], choices, Box(0, 255, (6, 7), np.uint8), Discrete(2)),
        "tiny-image": (None, images[:, :2], choices, Box(0, 255, (2, 7, 2), np.uint8), Discrete(2)),
        "text": (None, {"mission": ["go"] * 6, "state": np.zeros((6, 4))}, choices, words, Discrete(2)),
        "goals": (None, goals, choices, gym.spaces.Dict(dict.fromkeys(goals, Box(-9, 9, (2,)))), Discrete(2)),
        "numbers": (None, np.zeros(6), choices, vector, Discrete(2)),
        "outside": (None, np.zeros((6, 4)), choices + 1, vector, Discrete(2)),
        "column": (None, np.zeros((6, 4)), choices[:, None], vector, Discrete(2)),
        "few-actions": (None, np.zeros((6, 4)), np.zeros((5, 1)), vector, Box(-1, 1, (2,))),
        "bare-actions": (None, np.zeros((6, 4)), np.zeros(5), vector, Box(-1, 1, (1,))),
        "bits": (None, np.zeros((6, 4), bool), np.zeros((5, 2)), Box(0, 1, (4,), bool), Box(-1, 1, (2,))),
        "other-kind": ("CartPole-v1", np.zeros((6, 4)), np.zeros((5, 2)), vector, Box(-1, 1, (2,))),
        "multi": (None, np.zeros((6, 4)), np.zeros((5, 2), int), vector, gym.spaces.MultiDiscrete([2, 2])),
    }  # fmt: skip


# What is asked for, and words of the one line that answers
BAD_OPTIONS = [
    ("--ratio 0", "--ratio"),
    ("--ratio 1.5", "--ratio"),
    ("--ratio nan", "--ratio"),
    ("--ratio -0.1", "--ratio"),
    ("--ratio ten", "--ratio"),
    ("--steps 0", "--steps"),
    ("--steps ten", "--steps"),
    ("--steps 1.5", "--steps"),
    ("--seed -1", "--seed"),
    ("--seed 400001", "400001 must be between 0 and 400000"),
    ("--grad-clip 0", "--grad-clip"),
    ("--nonsense", "--nonsense"),
    ("--method bc", "--method"),
    ("--embed conv", "--embed"),
    ("--lr-schedule linear", "--lr-schedule"),
    ("--dropout 2", "--dropout"),
    ("--lora-dropout -1", "--lora-dropout"),
    ("--targets", "--targets"),
    ("--targets x", "--targets"),
    ("--targets nan", "--targets"),
    ("--episodes 0", "--episodes"),
    ("--lora-rank -1", "--lora-rank"),
    ("--lr -1", "--lr"),
    ("--lr nan", "--lr"),
    ("--lr 2", "2 must be between 0 and 1"),
    ("--batch 0", "--batch"),
    ("--context -1", "--context"),
    ("--text-block 1", "--text-block"),
    ("--eval-every 0", "--eval-every"),
    ("--warmup -1", "--warmup"),
    ("--lang-coef -1", "--lang-coef"),
    ("--weight-decay -1", "--weight-decay"),
    ("--layers 0", "--layers"),
    ("--width 0", "--width"),
    ("--heads 0", "--heads"),
    ("--env", "--env"),
    ("extra", "extra"),
    ("--env humanoid", "--env humanoid is not one of hopper, .*needs a dataset"),
    ("--ratio 0.0001", "leaves none"),
    ("--device cuda:99", "--device cuda:99"),
    ("--device tpu", "--device"),
    ("--lm none", "add --lang-coef 0"),
    ("--lora-rank 0", "add --lang-coef 0"),
    ("--train-trunk", "add --lora-rank 0"),
    ("--text-block 512", "256 positions"),
    ("--lm none --lang-coef 0 --heads 3", "not a multiple of --heads 3"),
    ("--data {bad}/nowhere", "nowhere is neither a folder nor an id"),
    ("--data {bad}/folder", "folder is not a dataset of Minari"),
    ("--data {bad}/cut-data", "cut-data .*truncated file"),
    ("--data {bad}/nan", "is not finite"),
    ("--data {bad}/empty-data", "empty-data .*file signature not found"),
    ("--data {bad}/no-episodes", "leaves none"),
    ("--data {bad}/metadata-alone", "metadata-alone.*delete it if it is an unfinished download"),
    ("--data {bad}/no-rewards", "no-rewards .*'rewards'"),
    ("--data {bad}/nan-reward", "is not finite"),
    ("--data {bad}/words", "words .*not supported"),
    ("--data {bad}/narrow", "episode 1 has observations of shape"),
    ("--data {bad}/test/image-v0", r"observations of shape \(6, 7, 2\), its environment \(4,\)"),
    ("--env none --data {bad}/test/float-image-v0", "images .* of uint8"),
    ("--env none --data {bad}/test/flat-image-v0", "images .* of uint8"),
    ("--env none --data {bad}/test/tiny-image-v0", "are too small; the least is 3 x 3 pixels"),
    ("--env none --data {bad}/test/text-v0", "entry mission"),
    ("--env none --data {bad}/keys", r"episode 1 has observations of shape \(2,\), not \(4,\)"),
    ("--env none --data {bad}/frames", "episode 1 has observations of shape"),
    ("--env none --data {bad}/test/numbers-v0", r"observations of shape \(\), not \(4,\)"),
    ("--env none --data {bad}/test/outside-v0", "not in its space"),
    ("--env none --data {bad}/test/column-v0", r"must be integers \(T,\), not int64 \(5, 1\)"),
    ("--env none --data {bad}/test/few-actions-v0", r"must be \(T, 2\), not \(5, 1\)"),
    ("--env none --data {bad}/test/bare-actions-v0", r"must be \(T, 1\), not \(5,\)"),
    ("--env none --data {bad}/test/bits-v0", "LaMo can see only vectors of numbers"),
    ("--data {bad}/test/other-kind-v0", "has the actions Box.*its environment Discrete"),
    ("--env none --data {bad}/test/multi-v0", "LaMo can take only vectors"),
    (
        "--env eval --data {bad}/test/good-v0",
        "names no environment for evaluations; leave out --env",
    ),
    ("--data no-such-name", "no-such-name"),
    ("--lm {bad}/folder", "cannot find a language model"),
    ("--lm {bad}/no-json", "cannot find a language model"),
    ("--lm {bad}/no-weights", "lacks weights|no file named"),
    ("--lm {bad}/bert", "is a bert, which is not causal"),
    ("--lm {bad}/state-space", "LoRA finds none of q_proj"),
    ("--lm {bad}/bart", "bart has an encoder"),
    ("--lm {bad}/decoder", "gpt2 has an encoder"),
    ("--lm {bad}/remote", "custom code|trust_remote_code"),
    ("--lm {bad}/unknown", "cannot find a language model"),
    ("--lm {bad}/wide", "cannot load --lm"),
    ("--lm {bad}/cut-weights", "download it again, or choose another"),
    ("--lm {bad}/lacking-weights", "h.1.mlp.c_fc.weight"),
    ("--lm {bad}/untied", "lacks weights: lm_head"),
    ("--lm {bad}/few-words", "100 tokens"),
    ("--data=", "neither a folder nor an id"),
    ("--text {bad}/short.txt", "--text-block"),
    ("--text {bad}/empty.txt", "0 tokens"),
    ("--text {bad}/binary.txt", "UTF-8"),
    ("--text {bad}/missing.txt", "missing.txt; give a file .*No such file"),
    ("--text {bad}/folder", "folder; give a file .*Is a directory"),
    ("--device meta", "cannot use --device meta"),
    ("--out {bad}", "--out"),
    ("--out {bad}/short.txt/run", "--out"),
]

BAD_RESUMES = [
    ("--resume {bad}", "checkpoint.pt"),
    ("--resume {bad}/nowhere", "checkpoint.pt"),
    ("--resume {bad}/cut", "cannot read .*cut.checkpoint.pt; give the folder"),
    ("--steps 1 --resume {bad}", "only --device"),
    ("--resume {bad}/altered", "checkpoint.pt"),
    ("--resume {bad}/old", f"version {lamo.VERSION - 1}; this code reads {lamo.VERSION}"),
    ("--resume {bad}/other-lm", "language model is not the one"),
    ("--resume {run} --env none", "the run evaluates in hopper; --resume takes no other --env"),
]

BAD_EVALUATIONS = [
    ("", "folder"),
    ("{bad}", "checkpoint.pt"),
    ("{bad}/cut", "cannot read .*cut.checkpoint.pt; give the folder"),
    ("{bad}/altered", "checkpoint.pt"),
    ("{bad}/other-lm", "language model is not the one"),
    ("{run} --seed -1", "--seed"),
    ("{run} --seed 99999999999999999999", "--seed"),
    ("{run} --episodes 0", "--episodes"),
    ("{run} --episodes 1000000000", "--episodes"),
    ("{run} --video out.avi", "must end in .gif or .mp4"),
    ("{run} --video {bad}/no/out.gif", "in a folder that does not exist"),
    ("{run} --targets x", "--targets"),
    ("{run} --device tpu", "tpu"),
    ("{run} --targets nan", "--targets"),
    (
        "{run} --env Ant-v5",
        r"name one with --env .*Ant-v5 has .* \(105,\) and actions of 8 numbers, but the run",
    ),
    ("{run} {run}", "unrecognized"),
]


CASES = [(lamo, *case) for case in BAD_OPTIONS + BAD_RESUMES]
CASES += [(evaluation, *case) for case in BAD_EVALUATIONS]


@pytest.mark.slow
@pytest.mark.parametrize("module, options, words", CASES)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    module, options, words, bad, trained, tmp_path, monkeypatch, capsys
):
    options = options.format(bad=bad, run=trained[0]).split()
    if module is lamo and "--resume" not in options:
        options = ["--demo", "--steps", "1", "--text-block", "32", *options]
        if "--out" not in options:
            options += ["--out", str(tmp_path / "run")]
    before = sorted(bad.rglob("*"))
    program = f"{module.__name__}.py"
    monkeypatch.setattr(sys, "argv", [program, *options])
    with pytest.raises(SystemExit) as caught:
        lamo.run_command(module.main, program)
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and error.startswith(f"{program}: error: ")
    assert re.search(words, error), error
    assert sorted(bad.rglob("*")) == before and not (tmp_path / "run").exists()


WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)


@pytest.mark.slow
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.sampled_from([f"--{field.name.replace('_', '-')}" for field in fields(Config)]) | WORD,
        max_size=4,
    )
)
def test_any_command_line_is_refused_in_words_or_understood(arguments):
    parser_errors = (InputError, SystemExit)
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(*parser_errors),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(lamo, "run", lambda *_: None)
        # The real one removes a folder without a checkpoint, whatever its name is.
        patch.setattr(lamo, "run_folder", lambda *_: contextlib.nullcontext())
        with contextlib.redirect_stdout(io.StringIO()):
            lamo.main(["--demo", *arguments])


# ---------------------------------------------------------------------------- stopped, killed and resumed runs
KILLS = int(os.environ.get("LAMO_KILLS", 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(name, tmp_path, lm_folder, family):
    """LAMO_KILLS=100 python -m pytest -q -m slow -k killed: SIGKILL and SIGTERM at random moments, then --resume."""
    often = "import lamo; lamo.SAVE_EVERY, lamo.LOG_EVERY = 0.02, 3; lamo.run_command(lamo.main, 'lamo.py')"
    lm = lm_folder if name == "gpt2" else family(name)
    options = f"{SHORT} --steps 30 --eval-every 10 --lm {lm} --out run".split()

    def start(folder, *arguments):
        folder.mkdir(exist_ok=True)
        python = [sys.executable, "-c", often, *arguments]
        environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            python,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def wait_for_a_checkpoint(process, folder):
        while not (folder / "run" / "checkpoint.pt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    def outcome(folder):
        checkpoint = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
        scores, log = read_scores(folder / "run"), timeless_log(folder / "run")
        return [weight.tolist() for weight in checkpoint["weights"].values()], scores, log

    process = start(tmp_path / "whole", *options)
    wait_for_a_checkpoint(process, tmp_path / "whole")
    started = time.time()
    assert process.wait() == 0
    duration, expected = time.time() - started, outcome(tmp_path / "whole")
    for number, moment in enumerate(np.random.default_rng(0).uniform(0, duration, KILLS)):
        folder = tmp_path / str(number)
        process = start(folder, *options)
        wait_for_a_checkpoint(process, folder)
        time.sleep(moment)
        process.send_signal(signal.SIGTERM if number % 4 == 1 else signal.SIGKILL)
        message = process.communicate()[1]
        assert (
            process.returncode in (0, -9, -15)
            or "resume with: python lamo.py --resume run" in message
        )
        if number % 2:  # and once more, soon after it has gone on
            process = start(folder, "--resume", "run")
            time.sleep(2 + moment / 2)
            process.kill()
            process.wait()
        process = start(folder, "--resume", "run")
        assert process.wait() == 0, process.communicate()
        assert outcome(folder) == expected
        assert not list(folder.rglob("*.partial"))
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_run_stopped_before_its_first_step_leaves_nothing(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, f"{HERE}/lamo.py", *SHORT.split(), "--out", out], stdout=subprocess.PIPE
    )
    while not out.exists():
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 1 and not out.exists()


def test_a_process_that_is_not_the_first_removes_nothing(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(lamo, "rank_and_world", lambda: (1, 2))
    with pytest.raises(InputError, match="cannot find a language model at no/such"):
        lamo.main(f"--demo --lm no/such --out {tmp_path}".split())
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_run_that_has_ended_stays_as_it_is(trained, tmp_path, capsys):
    out = shutil.copytree(trained[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    lamo.main(["--resume", str(out)])
    assert f"the run has ended; evaluate it again: python eval.py {out}" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_resumed_run_that_fails_keeps_its_folder(trained, tmp_path, monkeypatch):
    out = shutil.copytree(trained[0], tmp_path / "run")
    reopen(out)

    def fail(*_):
        (out / "checkpoint.pt").unlink()
        raise InputError("the checkpoint is gone")

    monkeypatch.setattr(lamo, "run", fail)
    with pytest.raises(InputError, match="the checkpoint is gone"):
        lamo.main(["--resume", str(out)])
    assert (out / "log.jsonl").exists()


@pytest.mark.slow
def test_a_run_whose_data_or_text_has_changed_is_not_resumed(tmp_path, lm_folder):
    data, text, out = (
        shutil.copytree(HOPPER.parent, tmp_path / "data"),
        tmp_path / "text.txt",
        tmp_path / "run",
    )
    text.write_text(20 * WORDS)
    lamo.main(f"{SHORT} --data {data} --text {text} --lm {lm_folder} --out {out}".split())
    reopen(out)
    lamo.main(["--resume", str(out)])
    reopen(out)
    before = (out / "checkpoint.pt").read_bytes()
    text.write_text(20 * WORDS + "the end")
    with pytest.raises(InputError, match="text.txt is not what it was"):
        lamo.main(["--resume", str(out)])
    text.write_text(20 * WORDS)
    with h5py.File(data / "data" / "main_data.hdf5", "a") as file:
        for episode in file.values():
            episode["actions"][0] = 0
    with pytest.raises(InputError, match="--data .* is not what it was"):
        lamo.main(["--resume", str(out)])
    shorter = save_dataset("test/short-v0", "Hopper-v5", play(gym.make("Hopper-v5"), 10))
    with pytest.raises(InputError, match="--data .* is not what it was"):
        lamo.main(["--resume", str(out), "--data", str(shorter)])
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    run = hopper_run(tmp_path / "run")
    out = run["out"]
    lamo.train(**run)
    before = (out / "checkpoint.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputError, match="free some space, then start again, or --resume .*No space left on device"
    ):
        lamo.write_checkpoint(out / "checkpoint.pt", run["model"], HEADER, {})
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("*.partial"))


def test_weights_of_a_model_with_other_names_are_refused():
    model = tiny_lamo()
    weights = {
        name.replace("embed_state", "state_embedder"): weight
        for name, weight in model.state_dict().items()
    }
    checkpoint = {"header": {"lm_checksum": None}, "weights": weights}
    with pytest.raises(InputError, match="the checkpoint does not fit .*state_embedder"):
        lamo.load_weights(model, checkpoint, None)


@pytest.mark.slow
def test_eval_command_and_video(trained, tmp_path):
    folder, _ = trained
    plain = "import gymnasium as gym; env = gym.make('Hopper-v5', render_mode='rgb_array');"
    render = command("-c", plain + "env.reset(); env.render()", MUJOCO_GL="egl")
    if render.returncode != 0:
        pytest.skip("this machine has no OpenGL")
    result = command("eval.py", folder, "--targets", 1500, "--video", tmp_path / "out.gif")
    assert result.returncode == 0, result.stderr
    row = read_scores(folder)["targets"]["1500"]
    assert f"{row['return_mean']:.1f}" in result.stdout
    with Image.open(tmp_path / "out.gif") as image:
        assert image.info["duration"] == 40 and image.n_frames == math.ceil(
            row["length_mean"] / 5
        )  # Hopper: 125 Hz
        first = np.asarray(image.convert("RGB")).astype(int)
        image.seek(image.n_frames - 1)
        assert np.abs(first - np.asarray(image.convert("RGB"))).max() > 30  # it moves


@pytest.mark.slow
def test_a_policy_sees_the_pictures_that_its_data_has(tmp_path, monkeypatch):
    """MuJoCo draws black ones in another thread than the first, and others from another camera."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    make = functools.partial(gym.make, "Hopper-v5", render_mode="rgb_array", width=40, height=48)
    try:
        env = gym.wrappers.AddRenderObservation(make(max_episode_steps=5))
        first, _ = env.reset(seed=3)
    except Exception as error:
        pytest.skip(f"this machine has no OpenGL: {error!r}")
    then = env.step(np.zeros(3))[0]
    assert first.std() > 10 and (first != then).any()
    spec = evaluation.spec_from_json(env.spec.to_json())
    for render_mode in None, "rgb_array":
        environments = Environments(spec, 2, render_mode)
        environments.ready(2)
        for row in 0, 1:
            [(image, *_)] = environments.reset([row], [3])
            np.testing.assert_array_equal(image, first)
            [(image, *_)] = environments.step([row], [np.zeros(3)])
            np.testing.assert_array_equal(image, then)


def test_a_machine_that_cannot_render_evaluates_first(trained, tmp_path, monkeypatch, capsys):
    class Blind(Environments):
        def __init__(self, spec, num_envs=20, render_mode=None):
            if render_mode:
                raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")
            assert "MUJOCO_GL" not in os.environ  # MuJoCo cannot be imported with an absent one
            super().__init__(spec, num_envs)

    for variable in ("MUJOCO_GL", "DISPLAY"):
        monkeypatch.setenv(variable, "")  # so that both are as they were after the test
        monkeypatch.delenv(variable)
    monkeypatch.setattr(evaluation, "Environments", Blind)
    with pytest.raises(InputError, match="cannot render .*out.gif; .*MUJOCO_GL=.*eglQueryString"):
        evaluation.main([str(trained[0]), "--video", str(tmp_path / "out.gif"), "--episodes", "1"])
    assert "score: 0 for a return of" in capsys.readouterr().out


@pytest.mark.slow
def test_the_camera_follows_the_robot(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    env = Environments(gym.spec("Hopper-v5"), 1, "rgb_array").envs[0]
    env.reset(seed=0)
    pictures = []
    for place in (0, 100):  # metres
        position = env.unwrapped.data.qpos.copy()
        position[0] = place
        env.unwrapped.set_state(position, env.unwrapped.data.qvel)
        try:
            pictures.append(env.render().astype(int))
        except Exception as error:
            pytest.skip(f"this machine has no OpenGL ({error})")
    brown = [((picture[..., 0] - picture[..., 2]) > 50).sum() for picture in pictures]
    assert brown[0] > 1000 and brown[1] == pytest.approx(brown[0], rel=0.1)


# ---------------------------------------------------------------------------- the hub
@pytest.mark.parametrize(
    "named, words",
    [
        (
            "--lm gpt2",
            "cannot find a language model at gpt2, in the cache or on the Hugging Face hub",
        ),
        (
            "--data mujoco/hopper/medium-v0 --method dt",
            "of farama-minari/mujoco in the cache or on",
        ),
        (
            "--text wikitext --lm {lm} --text-block 32 --demo --steps 1",
            "of Salesforce/wikitext in the cache or on",
        ),
        ("--device cpu", "cannot find a language model at gpt2"),
    ],
)
def test_what_was_named_is_never_replaced(tmp_path, lm_folder, named, words):
    with pytest.raises(InputError, match=words):
        lamo.main([*named.format(lm=lm_folder).split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    config, _ = lamo.configure({"method": "dt", "data": str(HOPPER.parent)})
    assert not config.demo and config.steps == 100_000 and config.env is None


def test_without_the_hub_the_demo_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for options in ({}, {"method": "dt"}, {"env": "reacher2d"}):
        config, title = lamo.configure(options)
        assert "Hugging Face hub" in title and config.demo and config.steps == 1000
    config, _ = lamo.configure({"env": "reacher2d", "method": "dt"})
    assert (
        not config.demo and config.steps == 100_000 and config.data == lamo.TASKS["reacher2d"].data
    )
    monkeypatch.setattr(lamo.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(lamo, "rank_and_world", lambda: (0, 1))
    assert not lamo.configure({})[0].demo  # several processes of torchrun could disagree


def test_both_files_of_a_dataset_are_of_one_commit(tmp_path, monkeypatch):
    """On the hub, another commit lands while the large file is downloaded."""
    commits = ["old", "new"]

    def find_file(dataset, filename):
        path = tmp_path / commits[0] / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOPPER / path.name, path)
        if path.name == "main_data.hdf5":
            commits.pop(0)
        return path

    monkeypatch.setattr(lamo, "find_file", find_file)
    assert lamo.load_dataset("mujoco/hopper/medium-v0").total_episodes > 1


def test_a_device_without_float64_is_refused(monkeypatch):
    def zeros(*size, dtype=torch.float32, device=None):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64")
        return torch.empty(size)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(InputError, match="cannot use --device mps; .*Cannot convert a MPS Tensor"):
        lamo.set_up_device("mps")


def test_where_a_cached_dataset_is_damaged_the_demo_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = tmp_path / "minari" / lamo.TASKS["hopper"].data / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    (folder / "main_data.hdf5").write_text("not HDF5")
    config, title = lamo.configure({"method": "dt"})
    assert config.demo and "cannot use the dataset mujoco/hopper/medium-v0" in title


class Hub(http.server.BaseHTTPRequestHandler):
    """Imitates the Hugging Face hub: `files` by path; `fault` is what goes wrong."""

    files, fault = {}, None

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        data = self.files.get(self.path)
        status = self.fault if isinstance(self.fault, int) else 200 if data else 404
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        if status == 200:
            for name, value in (
                ("ETag", f'"{zlib.crc32(data)}"'),
                ("X-Repo-Commit", "c" * 40),
                ("Content-Length", len(data)),
            ):
                self.send_header(name, value)
        self.end_headers()
        if status == 200 and body:
            self.wfile.write(data if self.fault != "cut" or len(data) < 10_000 else data[:5000])

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
def test_everything_comes_from_the_hub_and_stays_in_the_caches(tmp_path, lm_folder):
    names = "train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"
    for name in names:
        table = pyarrow.table({"text": [WORDS] * (400 if "train" in name else 90)})
        parquet.write_table(table, tmp_path / name)
        Hub.files[
            f"/datasets/Salesforce/wikitext/resolve/main/wikitext-103-raw-v1/{name}.parquet"
        ] = (tmp_path / name).read_bytes()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        Hub.files[f"/gpt2/resolve/main/{name}"] = (lm_folder / name).read_bytes()
    for name in ("main_data.hdf5", "metadata.json"):
        path = f"/datasets/farama-minari/mujoco/resolve/main/hopper/medium-v0/data/{name}"
        Hub.files[path] = (HOPPER / name).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    options = "--device cpu --steps 1 --episodes 1 --ratio 0.05 --text-block 32 --targets 800 --out".split()
    for Hub.fault, words in (
        (503, "does not answer"),
        (403, "403"),
        ("cut", "complete message body|IncompleteRead"),
        (None, ""),
    ):
        result = command("lamo.py", *options, tmp_path / "run", **hub, TQDM_POSITION="-1")
        assert re.search(words, result.stderr), result.stderr
        assert (result.returncode == 2) == bool(words)
        assert result.stderr.count("Traceback") == 0
    for name in "model.safetensors", "main_data.hdf5":  # downloads show their progress
        assert f"{name}: 100%" in result.stderr
    server.shutdown()
    assert read_scores(tmp_path / "run")["dataset"] == "mujoco/hopper/medium-v0"
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = command("lamo.py", *options, tmp_path / "again", **hub | quiet)
    assert result.returncode == 0 and "Retrying" not in result.stderr, result.stderr
    assert "Warning" not in result.stderr  # on bars that cannot be shown
    assert read_scores(tmp_path / "again") == read_scores(tmp_path / "run")


# ---------------------------------------------------------------------------- CUDA
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu(trained):
    on_cpu, _, _ = lamo.load(trained[0], "cpu")
    on_cuda, _, header = lamo.load(trained[0], "cuda")
    torch.set_float32_matmul_precision("highest")  # not in TF32
    trajectories = lamo.read_trajectories(minari.MinariDataset(HOPPER), 0.05, 0, device="cuda")
    batch = trajectories.batch(8, 20)
    history = [*(batch[name] for name in HISTORY), (batch["weight"] > 0).sum(dim=1)]
    torch.testing.assert_close(
        on_cuda.act(*history).cpu(), on_cpu.act(*(x.cpu() for x in history)), atol=1e-3, rtol=0
    )
    returns, *_ = evaluation.rollout(on_cuda, Environments(gym.spec("Hopper-v5")), (1500,), 2, 0)
    assert np.isfinite(returns).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", ["", "--bf16", "--method dt", "--env catch"])
def test_a_run_on_cuda_can_be_resumed_and_evaluated_again(options, tmp_path, lm_folder, capsys):
    lm = "" if "dt" in options else f"--lm {lm_folder}"
    out = tmp_path / "run"
    lamo.main(f"{SHORT} --device cuda {lm} {options} --out {out}".split())
    scores = read_scores(out)
    reopen(out)
    lamo.main(["--resume", str(out)])
    assert read_scores(out) == scores
    capsys.readouterr()
    evaluation.main([str(out), "--device", "cuda"])
    assert f"{scores['best']['return_mean']:.1f}" in capsys.readouterr().out
