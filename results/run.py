"""Run lamo.py, and measure more at each evaluation: overfitting, and what is left of the language.

    python -m results.run --env hopper --ratio 0.1      # takes the options of lamo.py

The log gets three more numbers. `train_loss` is the action loss on trajectories that the run trains
on, `held_out_loss` on those that --ratio left out; both are without dropout. `documents_loss` is
the language loss, in nats per token, on docstrings of Python's standard library: text like that of
the pre-training, which the language loss never trains on. The run itself is that of lamo.py. To
resume one that was stopped, call results.run, too: lamo.py does not measure these.
"""

import itertools

import minari
import numpy as np
import torch

import atari
import lamo
from demo.make import documents

DOCUMENTS = 1000  # docstrings
WINDOWS = 128, 8  # windows in a batch, batches


@torch.no_grad()
def action_loss(model, trajectories):
    """Return a LaMo's action loss on windows of Trajectories, always the same ones."""
    size, count = WINDOWS
    torch.manual_seed(0)
    batches = [trajectories.batch(size, model.context) for _ in range(count)]
    return float(np.mean([model.action_loss(batch).item() for batch in batches]))


def read_documents(lm, block, device="cpu"):
    """Return the Text of a thousand docstrings, in the tokens of a language model."""
    tokenizer = lamo.load_tokenizer(lm)
    text = "\n".join(itertools.islice(documents(["stdlib"]), DOCUMENTS))
    tokens = lamo.tokenize(text, tokenizer)
    return lamo.Text(tokens, tokens, block, device, lamo.first_token(tokenizer))


class Recorder(lamo.Recorder):
    """A Recorder that measures the model before each evaluation, and at the start."""

    def __init__(self, out, header, checkpoint=None):
        super().__init__(out, header, checkpoint)
        self.config = lamo.Config(**header["config"])
        dataset = lamo.load_dataset(self.config.data)
        parts = lamo.split_episodes(dataset, self.config.ratio, self.config.seed)
        self.trajectories = {}
        for name, episodes in zip(("train_loss", "held_out_loss"), parts):
            if len(episodes) > 0:
                part = atari.preprocess_data(minari.MinariDataset(dataset.storage, episodes))
                self.trajectories[name] = lamo.read_trajectories(
                    part, 1.0, 0, self.config.delayed, self.config.device
                )
        self.documents = None
        if self.config.lm != "none":
            self.documents = read_documents(
                self.config.lm, self.config.text_block, self.config.device
            )

    def save(self, step, model, optimizer):
        super().save(step, model, optimizer)
        if step != self.config.steps and step % self.config.eval_every > 0:
            return
        model.eval()
        losses = {name: action_loss(model, part) for name, part in self.trajectories.items()}
        if self.documents:
            losses["documents_loss"] = self.documents.held_out_loss(model.trunk)
        model.train()
        self.log({"step": step} | losses)


def main(arguments):
    """Train and evaluate as the command line says, with this Recorder."""
    lamo.Recorder = Recorder
    lamo.main(arguments)


if __name__ == "__main__":
    lamo.run_command(main, "results.run")
