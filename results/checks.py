"""What takes longer than the tests: runs killed at random moments, an imitated hub, bad input of all kinds, demo data.

    python -m pytest -q results/checks.py
    LAMO_KILLS=100 python -m pytest -q results/checks.py -k killed

They are apart from the tests because they take minutes, and some look at files that a fork may replace.
"""

import contextlib
import csv
import http.server
import io
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import asdict, fields
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pyarrow
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

import eval as evaluation
import lamo
from lamo import GPT2, Config, InputError, Trajectories
from results import plot, timing
from test_lamo import HERE, HOPPER, SHORT, WORDS, command, hopper_run, read_log, read_scores, save_dataset

pytest_plugins = "test_lamo"  # for its fixtures

KILLS = int(os.environ.get("LAMO_KILLS", 2))


def test_profile_measures_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for method, count in ("lamo", 8), ("dt", 7):
        lamo.main(f"{SHORT} --method {method} --profile".split())
        lines = capsys.readouterr().out.splitlines()[-count:]
        assert [line.split()[0] for line in lines[-4:]] == ["whole", "speed", "peak", "evaluation"]
        parts = {line[:12].strip(): float(line[12:].split()[0]) for line in lines[:-3] if " ms " in line}
        whole = parts.pop("whole step")
        assert 0.5 * whole < sum(parts.values()) < 2 * whole
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frozen", [True, False])
def test_profile_counts_the_products_of_all_logits_too(frozen):
    gpt2 = GPT2(50, 16, 8, 1, 2, dropout=0.0).requires_grad_(not frozen)
    gpt2.add_lora(4, 8, 0.0)
    gpt2.wte.weight.requires_grad_(not frozen)
    model = lamo.LaMo(gpt2, "mlp", 5, 10, 1.0, [[0.0], [1.0]], [[-1.0], [1.0]])
    tokens = torch.randint(50, (3, 16))

    def plain():
        logits = gpt2.hidden(tokens)[:, :-1] @ gpt2.wte.weight.T
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        plain()
    counted = timing.count_flops(lambda: model.language_loss(tokens).backward(), gpt2.wte.weight, 3 * 15)
    assert counted == counter.get_total_flops()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, lm_folder):
    """LAMO_KILLS=100 python -m pytest -q -k killed: SIGKILL and SIGTERM at random moments, then --resume."""
    often = "import lamo; lamo.SAVE_EVERY, lamo.LOG_EVERY = 0.02, 3; lamo.run_command(lamo.main)"
    options = f"{SHORT} --steps 30 --eval-every 10 --lm {lm_folder} --out run".split()

    def start(folder, *arguments):
        folder.mkdir(exist_ok=True)
        python = [sys.executable, "-c", often, *arguments]
        environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            python, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )

    def wait_for_a_checkpoint(process, folder):
        while not (folder / "run" / "checkpoint.pt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    def outcome(folder):
        checkpoint = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
        scores, log = read_scores(folder / "run"), (folder / "run" / "log.jsonl").read_text()
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
        assert process.returncode in (0, -9, -15) or "resume with: python lamo.py --resume run" in message
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


DEMO_DATA = {  # steps, range of the mean return, least best return, least spread
    "hopper": (100_000, 1000, 1800, 3000, 0.2), "halfcheetah": (50_000, 2000, 5000, 4000, 0.2),
    "walker2d": (50_000, 1000, 4000, 2500, 0.2), "reacher2d": (10_000, 20, 60, 70, 0.2),
    "kitchen-complete": (3_000, 3, 4, 3.5, 0.1), "kitchen-partial": (10_000, 2, 4, 3.5, 0.2),
    "kitchen-mixed": (10_000, 1, 3, 2.5, 0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", DEMO_DATA)
def test_demo_datasets_are_whole(name):
    steps, low, high, best, spread = DEMO_DATA[name]
    dataset = minari.MinariDataset(HERE / "demo" / "lamo" / name / "demo-v0" / "data")
    assert dataset.id == f"lamo/{name}/demo-v0" and dataset.observation_space.dtype == np.float32
    returns = np.array([episode.rewards.sum() for episode in dataset])
    assert steps <= dataset.total_steps < steps + 1000
    assert low < returns.mean() < high and returns.max() > best and returns.std() > spread * returns.mean()
    metadata = dataset.storage.metadata
    assert metadata["ref_min_score"] < returns.mean() < metadata["ref_max_score"]
    env, episode = dataset.recover_environment(), dataset[0]
    observation, _ = env.reset(seed=0)  # the first steps, simulated again, are those on file
    for t in range(3):
        seen, scale = evaluation.vector(observation), np.abs(episode.observations).max()
        np.testing.assert_allclose(seen, episode.observations[t], atol=1e-3 * scale)
        observation, reward, *_ = env.step(episode.actions[t])
        assert reward == pytest.approx(episode.rewards[t], abs=1e-3)


@pytest.mark.parametrize("name, steps", [("hopper", 300), ("reacher2d", 300), ("kitchen-mixed", 100)])
def test_demo_data_can_be_made_anew(name, steps, tmp_path):
    if name == "hopper":
        pytest.importorskip("stable_baselines3", reason="pip install -r demo/requirements.txt")
    result = command("demo/make.py", "--only", name, "--steps", steps, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    data = tmp_path / "lamo" / name / "demo-v0"
    lamo.main(f"{SHORT} --ratio 1 --method dt --env {name} --data {data} --out {tmp_path / 'run'}".split())
    assert read_scores(tmp_path / "run")["dataset"] == str(data)


class Hub(http.server.BaseHTTPRequestHandler):
    """Imitates the Hugging Face hub: `files` by path; `fault` is what goes wrong."""

    files, fault = {}, None

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        data = self.files.get(self.path)
        status = self.fault if isinstance(self.fault, int) else 200 if data else 404
        self.send_response(status)
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


def test_everything_comes_from_the_hub_and_stays_in_the_caches(tmp_path, lm_folder):
    names = "train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"
    for name in names:
        table = pyarrow.table({"text": [WORDS] * (400 if "train" in name else 90)})
        parquet.write_table(table, tmp_path / name)
        Hub.files[f"/datasets/Salesforce/wikitext/resolve/main/wikitext-103-raw-v1/{name}.parquet"] = (
            tmp_path / name
        ).read_bytes()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        Hub.files[f"/gpt2/resolve/main/{name}"] = (lm_folder / name).read_bytes()
    for name in ("main_data.hdf5", "metadata.json"):
        path = f"/datasets/farama-minari/mujoco/resolve/main/hopper/medium-v0/data/{name}"
        Hub.files[path] = (HOPPER / name).read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_CACHE": str(tmp_path / "hub")}
    options = "--device cpu --steps 1 --episodes 1 --ratio 0.05 --text-block 32 --targets 800 --out".split()
    for Hub.fault, words in ((503, "503"), (403, "403"), ("cut", "without sending complete message body"), (None, "")):
        result = command("lamo.py", *options, tmp_path / "run", **hub)
        assert words in result.stderr and (result.returncode == 2) == bool(words), result.stderr
        assert result.stderr.count("Traceback") == 0
    server.shutdown()
    assert read_scores(tmp_path / "run")["dataset"] == "mujoco/hopper/medium-v0"
    result = command("lamo.py", *options, tmp_path / "again", **hub)
    assert result.returncode == 0 and "Retrying" not in result.stderr, result.stderr
    assert read_scores(tmp_path / "again") == read_scores(tmp_path / "run")


@pytest.fixture(scope="session")
def bad(tmp_path_factory, lm_folder, trained):
    """A folder of files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in {
        "short.txt": b"too short", "empty.txt": b"", "binary.txt": bytes(range(256)) * 40, "folder/x": b"",
        "no-json/config.json": b"{", "no-tokenizer/config.json": (lm_folder / "config.json").read_bytes(),
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    settings = {
        "bert": {"model_type": "bert"}, "relu": {"activation_function": "relu"}, "wide": {"n_embd": 64},
        "unscaled": {"scale_attn_weights": False}, "by-layer": {"scale_attn_by_inverse_layer_idx": True},
        "untied": {"tie_word_embeddings": False}, "few-words": {"vocab_size": 100},
    }  # fmt: skip
    for name in (*settings, "cut-weights", "lacking-weights", "pickled-weights"):
        shutil.copytree(lm_folder, folder / name)
        config = json.loads((lm_folder / "config.json").read_text()) | settings.get(name, {})
        (folder / name / "config.json").write_text(json.dumps(config))
    weights = folder / "cut-weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    tensors = load_file(folder / "lacking-weights" / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "lacking-weights" / "model.safetensors")
    words = load_file(folder / "few-words" / "model.safetensors")
    words["transformer.wte.weight"] = words["transformer.wte.weight"][:100]
    save_file(words, folder / "few-words" / "model.safetensors")
    (folder / "pickled-weights" / "model.safetensors").rename(folder / "pickled-weights" / "pytorch_model.bin")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        rng = np.random.default_rng(0)
        episodes = [(rng.normal(size=(6, 11)), rng.uniform(-1, 1, (5, 3)), np.ones(5)) for _ in range(3)]
        space = gym.spaces.Box(-np.inf, np.inf, (11,))
        good = save_dataset("test/good-v0", "Hopper-v5", episodes, observation_space=space)
        cartpole = [(rng.normal(size=(6, 4)), rng.integers(2, size=5), np.ones(5)) for _ in range(3)]
        save_dataset("test/discrete-v0", "CartPole-v1", cartpole)
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
            (data.parent / "metadata.json").write_text(json.dumps(metadata | {"total_episodes": 0, "total_steps": 0}))
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
            checkpoint["header"]["lm_sha256"] = "0" * 64 if name == "other-lm" else None
            torch.save(checkpoint, path)
    return folder


BAD_INPUT = {
    "lamo": """
        --ratio 0|--ratio 1.5|--ratio nan|--ratio -0.1|--ratio ten|--steps 0|--steps ten|--steps 1.5|--seed -1|--seed 1000001
        --grad-clip 0|--nonsense|--method bc|--embed conv|--lr-schedule linear|--dropout 2|--lora-dropout -1|--targets
        --targets x|--targets nan|--episodes 0|--lora-rank -1|--lr -1|--lr nan|--batch 0|--context -1|--text-block 1
        --eval-every 0|--warmup -1|--lang-coef -1|--weight-decay -1|--layers 0|--width 0|--heads 0|--env|extra
        --env humanoid: choose from|--ratio 0.0001: is none|--device cuda:99: --device cuda:99|--device tpu: --device
        --lm none: add --lang-coef 0|--lora-rank 0: add --lang-coef 0|--train-trunk: add --lora-rank 0|--text-block 512: 256 positions|--lm none --lang-coef 0 --heads 3: 128 is not a multiple of 3 heads
        --data {bad}/nowhere: nowhere|--data {bad}/folder: folder|--data {bad}/cut-data: cut-data|--data {bad}/nan: NaN
        --data {bad}/empty-data: empty-data|--data {bad}/no-episodes: is none|--data {bad}/metadata-alone: metadata-alone
        --data {bad}/no-rewards: no-rewards|--data {bad}/nan-reward: NaN|--data {bad}/words: words
        --data {bad}/narrow: narrow|--data {bad}/test/discrete-v0: vectors of real numbers|--data no-such-name: no-such-name
        --lm {bad}/folder: config.json|--lm {bad}/no-json: --lm|--lm {bad}/no-tokenizer: tokenizer.json|--lm {bad}/bert: model_type
        --lm {bad}/relu: activation_function|--lm {bad}/unscaled: scale_attn_weights|--lm {bad}/by-layer: inverse_layer_idx
        --lm {bad}/wide: model.safetensors|--lm {bad}/cut-weights: delete it and fetch it again|--lm {bad}/lacking-weights: h.1.mlp.c_fc.weight
        --lm {bad}/pickled-weights: model.safetensors|--lm {bad}/untied: tie_word_embeddings
        --lm {bad}/few-words: 100 tokens|--data=: cannot use the dataset
        --text {bad}/short.txt: --text-block|--text {bad}/empty.txt: 0 tokens|--text {bad}/binary.txt: UTF-8
        --text {bad}/missing.txt: missing.txt|--text {bad}/folder: folder|--out {bad}: --out|--out {bad}/short.txt/run: --out
    """,
    "resume": """
        --resume {bad}: checkpoint.pt|--resume {bad}/nowhere: checkpoint.pt|--resume {bad}/cut: cut|--steps 1 --resume {bad}: no other option
        --resume {bad}/altered: checkpoint.pt|--resume {bad}/old: version 1|--resume {bad}/other-lm: is not the one
    """,
    "eval": """
        |{bad}: checkpoint.pt|{bad}/cut: cut|{bad}/altered: checkpoint.pt|{bad}/other-lm: is not the one|{run} --seed -1|{run} --episodes 0
        {run} --video out.avi: neither .gif nor .mp4|{run} --targets x|{run} --device tpu: tpu|{run} {run}: add --plot
        {run} --plot out.xyz: out.png|{bad} --plot out.png: log.jsonl|{run} --plot nowhere/out.png: nowhere/out.png
    """,
}  # fmt: skip


CASES = [
    (kind, case.strip()) for kind, text in BAD_INPUT.items() for case in text.strip().replace("\n", "|").split("|")
]


@pytest.mark.parametrize("kind, case", CASES)
def test_bad_input_ends_in_one_line_and_leaves_nothing(kind, case, bad, trained, tmp_path, monkeypatch, capsys):
    options, _, words = case.format(bad=bad, run=trained[0]).partition(": ")
    short = "--demo --steps 1 --text-block 32" + f" --out {tmp_path / 'run'}" * ("--out" not in options)
    arguments = f"{short} {options}" if kind == "lamo" else options
    module = evaluation if kind == "eval" else lamo
    before = sorted(bad.rglob("*"))
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        lamo.run_command(module.main)
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and error.startswith(f"{module.__name__}.py: error: ") and words in error
    assert sorted(bad.rglob("*")) == before and not (tmp_path / "run").exists()


WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([f"--{field.name.replace('_', '-')}" for field in fields(Config)]) | WORD, max_size=4))
def test_any_command_line_is_refused_in_words_or_understood(arguments):
    parser_errors = (InputError, SystemExit)
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(*parser_errors),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(lamo, "run", lambda *_: None)
        patch.setattr(Path, "mkdir", lambda *_, **__: None)
        with contextlib.redirect_stdout(io.StringIO()):
            lamo.main(["--demo", *arguments])


def test_reacher2d_moves_as_the_authors_arm():
    env = gym.make("demo.reacher2d:lamo/Reacher2d-v0").unwrapped
    env.reset(seed=0)
    env.set_state(np.array([0.5, -1.2]), np.zeros(2))
    # angles, velocities and fingertip after that many steps, recorded from the authors' model of the arm
    expected = {
        1: ([0.499169, -1.164526], [-0.011509, 0.432706], [0.523645, 0.297719]),
        10: ([0.602152, -0.476248], [0.30049, -0.099221], [0.556007, 0.646418]),
        25: ([1.828588, -1.778218], [0.451975, -0.116215], [-0.068859, 0.324943]),
        40: ([1.604499, -0.373948], [-0.395511, 0.336601], [-0.287983, 0.834104]),
    }
    goal = env.model.body("goal").pos[:2]
    for t in range(1, 41):
        observation, *_ = env.step(np.array([np.sin((t - 1) / 7), np.cos((t - 1) / 5)]))
        if t in expected:
            angles, velocities, tip = map(np.array, expected[t])
            parts = np.sin(angles), np.cos(angles), 0.15 * velocities, tip, goal, tip - goal
            np.testing.assert_allclose(observation, np.concatenate(parts), atol=2e-6)


def test_reacher2d_starts_pays_and_ends_as_the_authors():
    env = gym.make("demo.reacher2d:lamo/Reacher2d-v0")
    starts = []
    for seed in range(300):
        observation, _ = env.reset(seed=seed)
        arm = env.unwrapped
        starts.append([*arm.data.qpos, *observation[8:10]])
        assert not arm.data.qvel.any()
        np.testing.assert_array_equal(observation[:2], np.sin(arm.data.qpos))
    angles, goals = np.array(starts)[:, :2], np.array(starts)[:, 2:]
    assert -2 < angles.min() < -1.9 and 1.9 < angles.max() < 2
    assert 0.5 <= np.linalg.norm(goals, axis=1).min() < 0.52 and 0.98 < np.linalg.norm(goals, axis=1).max() <= 1
    for dx, dy, pays in ((0.09, 0.0, 1), (0.04, -0.05, 1), (0.06, 0.05, 0), (-0.05, -0.06, 0), (0.11, 0.0, 0)):
        tip = arm.data.site("fingertip").xpos
        arm.model.body("goal").pos[:2] = tip[:2] + [dx, dy]
        arm.set_state(arm.data.qpos, np.zeros(2))
        observation, reward, *_ = env.step(np.zeros(2, np.float32))
        np.testing.assert_allclose(observation[10:], [-dx, -dy], atol=1e-9)
        assert reward == pays
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]
    assert env.action_space == gym.spaces.Box(-1, 1, (2,), np.float32)


def test_demo_model_equals_transformers_and_knows_english():
    folder = HERE / "demo" / "gpt2-tiny"
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    ours = GPT2.from_pretrained("demo/gpt2-tiny").eval()
    sentence = "Return True if the object is a subclass of the given class, and False otherwise."
    tokens = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(sentence).ids])
    with torch.no_grad():
        hidden = theirs.transformer(tokens).last_hidden_state
        torch.testing.assert_close(ours.hidden(tokens), hidden, atol=1e-4, rtol=0)
        assert theirs(tokens, labels=tokens).loss < math.log(4096) - 3  # trained: far below a uniform guess


def test_eval_command_and_video(trained, tmp_path):
    folder, _ = trained
    result = command("eval.py", folder, "--targets", 1500, "--video", tmp_path / "out.gif")
    if "cannot render" in result.stderr:
        pytest.skip("this machine has no OpenGL")
    assert result.returncode == 0, result.stderr
    row = read_scores(folder)["targets"]["1500"]
    assert f"{row['return_mean']:.1f}" in result.stdout
    with Image.open(tmp_path / "out.gif") as image:
        assert image.info["duration"] == 40 and image.n_frames == math.ceil(row["length_mean"] / 5)  # Hopper: 125 Hz
        first = np.asarray(image.convert("RGB")).astype(int)
        image.seek(image.n_frames - 1)
        assert np.abs(first - np.asarray(image.convert("RGB"))).max() > 30  # it moves


def test_tables_and_figures_are_those_of_the_runs():
    rows = [row for row in csv.DictReader((HERE / "results" / "runs.csv").open()) if row["seed"] != "100"]
    tables = (HERE / "results" / "table.md").read_text()
    answers = " ".join((HERE / "README.md").read_text().split("## Does it work?")[1].split("\n## ")[0].split())
    figures = re.findall(r"[-+]?\d+\.\d \(-?\d+\.\d to -?\d+\.\d\)|[\d.]+ ± [\d.]+\d", answers)
    assert len(figures) > 4 and all(figure in tables for figure in figures)
    for table in tables.strip().split("\n\n"):
        assert f"\n\n{table}\n" in (HERE / "results" / "README.md").read_text()
        header, _, *lines, _, differences = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")
        )
        methods, scores = [name.lower() for name in header[1:]], {}
        for task, *cells in lines:
            for method, cell in zip(methods, cells, strict=True):
                chosen = [row for row in rows if (row["task"], row["method"].lower()) == (task, method)]
                assert sorted(row["seed"] for row in chosen) == list("01234")
                assert len({row["options"] for row in chosen}) == 1
                returns = [float(row["best_return"]) for row in chosen]
                printed = cell.split(" (")[0].split(" ± ")
                digits = len(printed[0].partition(".")[2])
                expected = statistics.mean(returns), statistics.stdev(returns)
                assert [float(part) for part in printed] == pytest.approx(expected, rel=0, abs=0.51 * 10**-digits)
                scores |= {(task, method, row["seed"]): float(row["best_score"]) for row in chosen}
        for method, cell in zip(methods[1:], differences[2:], strict=True):
            pairs = [
                score - scores[task, methods[0], seed]
                for (task, other, seed), score in scores.items()
                if other == method
            ]
            assert float(cell.split()[0]) == pytest.approx(statistics.mean(pairs), abs=0.051)


def test_the_camera_follows_the_robot(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    env = evaluation.Environments(gym.spec("Hopper-v5"), 1, "rgb_array").envs[0]
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


def test_intervals_are_those_of_a_plain_loop():
    tasks = [np.array([10.0, 50, 20, 40, 90]), np.array([0.0, 5, 100])]
    rng, means = random.Random(0), []
    for _ in range(10_000):
        drawn = sorted(rng.choice(scores) for scores in tasks for _ in scores)
        means.append(sum(drawn[2:6]) / 4)  # of eight, without the two lowest and the two highest
    middle, low, high = plot.interval(tasks)
    assert middle == (10 + 20 + 40 + 50) / 4
    assert [low, high] == pytest.approx([sorted(means)[250], sorted(means)[9750]], abs=3)


def test_plot_draws_runs_by_task_and_method(trained, tmp_path, monkeypatch, capsys):
    header, *lines = read_log(trained[0])
    last = {"step": 4, "evaluation": lines[-1]["evaluation"]}
    runs = [("lamo", 16, 10), ("lamo", 16, 20), ("lamo", 16, 60), ("lamo", 16, 30), ("lamo", 64, 5), ("dt", 0, 7)]
    for number, (method, rank, score) in enumerate(runs):
        config = header["config"] | {
            "steps": 4,
            "method": method,
            "lora_rank": rank,
            "seed": number,
            "out": str(number),
        }
        first, best = ({"800": last["evaluation"]["800"] | {"score": value}} for value in (1, score))
        log = [header | {"config": config}, {"step": 2, "evaluation": first}, last | {"evaluation": best}]
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    monkeypatch.chdir(tmp_path)
    evaluation.main([*map(str, range(len(runs))), "--plot", "out.png"])
    assert (
        capsys.readouterr().out.splitlines()
        == [
            "lamo, lora_rank 16: 25.0 (10.0 to 60.0), 4 runs on hopper 10% (demo)",  # three of four draws alike: 5 % at each end
            "lamo, lora_rank 64: 5.0 (5.0 to 5.0), 1 runs on hopper 10% (demo)",
            "dt: 7.0 (7.0 to 7.0), 1 runs on hopper 10% (demo)",
        ]
    )
    with Image.open("out.png") as image:
        assert len(image.convert("RGB").getcolors(10**6)) > 100


def test_plot_tells_datasets_apart_but_not_seeds():
    base = asdict(Config())
    changes = {"data": "medium"}, {"data": "expert"}, {"data": "demo/medium", "demo": "demo"}
    labels = plot.label_runs([base | change for change in changes])
    assert labels == [("medium 100%", "lamo"), ("expert 100%", "lamo"), ("hopper 100% (demo)", "lamo")]
    seeds = [base | {"env": None, "data": "ant", "seed": seed, "targets": [10 * seed, 5 * seed]} for seed in (1, 2)]
    assert plot.label_runs(seeds) == [("ant 100%", "lamo")] * 2


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
    with pytest.raises(InputError, match="no config.json of no/such"):
        lamo.main(f"--demo --lm no/such --out {tmp_path}".split())
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_resumed_run_that_fails_keeps_its_folder(trained, tmp_path, monkeypatch):
    out = shutil.copytree(trained[0], tmp_path / "run")

    def fail(*_):
        (out / "checkpoint.pt").unlink()
        raise InputError("the checkpoint is gone")

    monkeypatch.setattr(lamo, "run", fail)
    with pytest.raises(InputError, match="the checkpoint is gone"):
        lamo.main(["--resume", str(out)])
    assert (out / "log.jsonl").exists()


def test_a_run_whose_data_or_text_has_changed_is_not_resumed(tmp_path, lm_folder):
    data, text, out = shutil.copytree(HOPPER.parent, tmp_path / "data"), tmp_path / "text.txt", tmp_path / "run"
    text.write_text(20 * WORDS)
    lamo.main(f"{SHORT} --data {data} --text {text} --lm {lm_folder} --out {out}".split())
    lamo.main(["--resume", str(out)])
    before = (out / "checkpoint.pt").read_bytes()
    text.write_text(20 * WORDS + "the end")
    lamo.load_text.cache_clear()
    with pytest.raises(InputError, match="text.txt has changed"):
        lamo.main(["--resume", str(out)])
    text.write_text(20 * WORDS)
    lamo.load_text.cache_clear()
    with h5py.File(data / "data" / "main_data.hdf5", "a") as file:
        for episode in file.values():
            episode["actions"][0] = 0
    with pytest.raises(InputError, match="--data .* has changed"):
        lamo.main(["--resume", str(out)])
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    model, *_, header, out = run = hopper_run(tmp_path / "run")
    lamo.train(*run)
    before = (out / "checkpoint.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="free some space, then start again, or --resume .*No space left on device"):
        lamo.save(out / "checkpoint.pt", model, header, {})
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("*.partial"))


RANGES = {"Pusher-v5": 2.0, "InvertedPendulum-v5": 3.0, "demo.reacher2d:lamo/Reacher2d-v0": 1.0}


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
    returns = Trajectories.from_minari(minari.MinariDataset(folder / "data"), 0.5, 0).returns
    best, largest = returns.max(), max(*abs(returns), 1e-3)
    half = best / 2 if best > 0 else 2 * best  # of a negative return, half is more
    assert config.targets == pytest.approx((best, half) if best else (0,)) and config.context == 20
    scale = header["arguments"]["return_scale"]
    assert 0.3 < largest / scale < 3.2 and math.log10(scale) == round(math.log10(scale))
    row = read_scores(out)["best"]
    assert header["reference"] == (0, 100) and row["score"] == pytest.approx(row["return_mean"])


def test_a_dataset_whose_environment_cannot_be_made_takes_that_of_env(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [(rng.normal(size=(6, 11)), rng.uniform(-1, 1, (5, 3)), np.ones(5)) for _ in range(3)]
    spaces = {"observation_space": gym.spaces.Box(-9, 9, (11,)), "action_space": gym.spaces.Box(-1, 1, (3,))}
    folder = save_dataset("test/lost-v0", None, episodes, **spaces)
    lamo.main(f"{SHORT} --ratio 1 --env hopper --data {folder} --method dt --out {tmp_path / 'run'}".split())
    assert "Hopper-v5" in read_log(tmp_path / "run")[0]["env_spec"]


@pytest.mark.parametrize(
    "named, words",
    [
        ("--lm gpt2", "of gpt2 here, nor from the Hugging Face hub"),
        ("--data mujoco/hopper/medium-v0 --method dt", "of farama-minari/mujoco here, nor from"),
        ("--text wikitext --lm {lm} --text-block 32 --demo --steps 1", "of Salesforce/wikitext here, nor from"),
        ("--device cpu", "of gpt2 here, nor from"),
    ],
)
def test_what_was_named_is_never_replaced(tmp_path, lm_folder, named, words):
    with pytest.raises(InputError, match=words):
        lamo.main([*named.format(lm=lm_folder).split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    config = lamo.configure({"method": "dt", "data": str(HOPPER.parent)})
    assert config.demo is None and config.steps == 100_000 and config.env is None


def test_errors_are_one_line_in_a_process_of_its_own(tmp_path):
    for script, *arguments in (
        ("lamo.py", "--env", "humanoid"),
        ("eval.py", tmp_path),
        ("eval.py", tmp_path, "--seed=-1"),
    ):
        result = command(script, *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith(f"{script}: error: ")


def test_runs_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lamo.main(f"{SHORT} --method dt".split())
    before = (tmp_path / "runs" / "hopper-dt-0.1-0-demo" / "log.jsonl").read_text()
    with pytest.raises(InputError, match="delete it, or --resume runs/hopper-dt-0.1-0-demo"):
        lamo.main(f"{SHORT} --method dt".split())
    assert (tmp_path / "runs" / "hopper-dt-0.1-0-demo" / "log.jsonl").read_text() == before


def test_import_has_no_side_effects(tmp_path):
    code = "from lamo import GPT2, LoRALinear, LaMo, Trajectories, Text; import sys; assert 'transformers' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_tasks_are_the_papers():
    kitchen = (5, 4, 3, 2, 1), 1, 20, 280
    assert {name: (*task[2:5], gym.make(task.env_id).spec.max_episode_steps) for name, task in lamo.TASKS.items()} == {
        "hopper": ((3600, 2600, 2200, 1800), 1000, 20, 1000), "halfcheetah": ((12000, 8000, 6000, 4500), 1000, 20, 1000),
        "walker2d": ((5000, 4000, 3000, 2500), 1000, 20, 1000), "kitchen-complete": kitchen, "kitchen-partial": kitchen,
        "kitchen-mixed": kitchen, "reacher2d": ((76, 40), 10, 5, 100),
    }  # fmt: skip


def test_without_the_hub_the_demo_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for options in ({}, {"method": "dt"}, {"env": "reacher2d"}):
        config = lamo.configure(options)
        assert "Hugging Face hub" in config.demo and config.steps == 1000
    config = lamo.configure({"env": "reacher2d", "method": "dt"})
    assert config.demo is None and config.steps == 100_000 and config.data == lamo.TASKS["reacher2d"].data
    monkeypatch.setattr(lamo, "rank_and_world", lambda: (1, 2))
    assert lamo.configure({}).demo is None  # torchrun's processes could disagree


def test_where_a_cached_dataset_is_damaged_the_demo_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = tmp_path / "minari" / lamo.TASKS["hopper"].data / "data"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    (folder / "main_data.hdf5").write_text("not HDF5")
    assert "files of the authors' run cannot be used" in lamo.configure({}).demo


def test_weights_of_a_model_with_other_names_are_refused():
    config = lamo.configure({"demo": "the demo", "device": "cpu"})
    stats, bounds = [[0.0] * 3, [1.0] * 3], [[-1.0] * 2, [1.0] * 2]
    arguments = {"max_timesteps": 9, "return_scale": 1.0, "state_stats": stats, "action_bounds": bounds}
    model = lamo.build_model(config, arguments)
    weights = {name.replace("embed_state", "state_embedder"): weight for name, weight in model.state_dict().items()}
    checkpoint = {"header": {"lm_sha256": model.gpt2.sha256}, "weights": weights}
    with pytest.raises(InputError, match="cannot build the model .*state_embedder"):
        lamo.build_model(config, arguments, checkpoint)


def test_what_a_saved_tokenizer_adds_and_cuts_is_turned_off(tmp_path):
    tokenizer = Tokenizer.from_file(str(HERE / "demo" / "gpt2-tiny" / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(8)
    tokenizer.add_special_tokens(["<|start|>"])
    start = "<|start|>", tokenizer.token_to_id("<|start|>")
    tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[start])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text, plain = (lamo.load_text(str(lm), "demo/text.txt", 256) for lm in (tmp_path, "demo/gpt2-tiny"))
    assert np.array_equal(text.tokens, plain.tokens)
