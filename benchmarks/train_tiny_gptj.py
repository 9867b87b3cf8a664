"""Train the demo model of the tiny-gptj benchmark and write fleet/harness/benchmarks/tiny_gptj.

From a checkout with the `dev` and `harness` extras:

    python benchmarks/train_tiny_gptj.py

The shipped weights came from these defaults in 617 s, plus 12 s to measure, on one core of a Xeon.

events.json is the only file there that is written by hand; tokenizer.json, config.json, model.safetensors and
card.json are made here. Data, initial weights and batch order follow from the seed, but float sums differ between
machines, so another machine's weights differ in their last bits and its ROUGE by a few tenths. Weights below 85
ROUGE-L on the validation set are not written.
"""

import hashlib
import json
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import GPTJConfig, GPTJForCausalLM

from fleet.harness.benchmarks import tiny_gptj
from fleet.harness.benchmarks.summaries import Summaries, plain_sentences
from fleet.harness.interfaces import Features

FLOOR = 85.0
"""Percent ROUGE-L under which weights are not worth shipping."""
CHUNK = 12_800
"""Training samples made at once."""
END = tiny_gptj.GENERATION.eos_token_ids[0]
VOCABULARY = 704
PROMPT_LOSS = 0.2
"""Weight of the loss over the prompt's tokens: guessing a name that comes again teaches the model to copy."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised training sample: prompt, summary and end."""

    input_ids: npt.NDArray[np.int64]
    prompt: int
    """How many of the tokens are the prompt."""


def make_tokenizer() -> Tokenizer:
    """Byte-level pairs as GPT-J's, learned from training texts; any text can be encoded."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    samples = tiny_gptj.generate(1, 20_000, training=True)
    tokenizer.train_from_iterator((f"{sample.prompt} {sample.summary}" for sample in samples), trainer)
    return tokenizer


def examples(tokenizer: Tokenizer, seed: int) -> list[Example]:
    """Training examples of one seed."""
    samples = list(tiny_gptj.generate(seed, CHUNK, training=True))
    prompts = tiny_gptj.tokenise(samples, tokenizer)
    answers = tokenizer.encode_batch([f" {sample.summary}" for sample in samples])
    return [
        Example(np.array([*prompt, *answer.ids, END], dtype=np.int64), len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def batches(tokenizer: Tokenizer, seed: int, size: int) -> Iterator[list[Example]]:
    """Endless fresh batches; those of one batch are of similar length, which saves half the padding."""
    shuffle = random.Random(seed).shuffle
    chunk = 1000 * seed
    while True:
        chunk += 1
        pool = examples(tokenizer, chunk)
        made = []
        for begin in range(0, len(pool), 8 * size):
            block = sorted(pool[begin : begin + 8 * size], key=lambda example: len(example.input_ids))
            made += [block[at : at + size] for at in range(0, len(block), size)]
        shuffle(made)
        yield from made


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train; card.json keeps it."""

    seed: int
    steps: int
    batch: int
    rate: float
    layers: int
    device: str


def matching(model: GPTJForCausalLM) -> None:
    """Begin with embeddings and attention large enough that a token finds its like at once: copying begins with it."""
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.3)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.transformer.wte.weight / 3)
        for layer in model.transformer.h:
            torch.nn.init.normal_(layer.attn.q_proj.weight, std=0.09)
            layer.attn.k_proj.weight.copy_(layer.attn.q_proj.weight)


def collate(chosen: Sequence[Example], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [batch, length] padded on the right, and two masks: where the next token is the summary's, the prompt's.

    No attention mask: what comes later is not seen, and what comes later than a sample's end has no loss.
    """
    ids = np.full((len(chosen), max(len(each.input_ids) for each in chosen)), END, dtype=np.int64)
    answer, prompt = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
    for row, each in enumerate(chosen):
        ids[row, : len(each.input_ids)] = each.input_ids
        prompt[row, : each.prompt - 1] = True
        answer[row, each.prompt - 1 : len(each.input_ids) - 1] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(answer).to(device), torch.from_numpy(prompt).to(device)


def train(model: GPTJForCausalLM, tokenizer: Tokenizer, plan: Plan) -> None:
    """AdamW with warm-up and a cosine down to nothing, on texts that never repeat."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    began, total = time.monotonic(), 0.0
    for step, chosen in zip(range(1, plan.steps + 1), batches(tokenizer, plan.seed, plan.batch), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, step / 100) * (0.51 + 0.49 * math.cos(math.pi * step / plan.steps))
        ids, answer, prompt = collate(chosen, plan.device)
        logits = model(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        wanted = losses[answer[:, :-1]].mean()
        optimizer.zero_grad()
        (wanted + PROMPT_LOSS * losses[prompt[:, :-1]].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += float(wanted.detach())
        if step % 100 == 0:
            print(f"step {step} loss {total / 100:.4f} after {time.monotonic() - began:.0f} s", flush=True)
            total = 0.0


def answers(model: GPTJForCausalLM, features: Sequence[Features], beams: int) -> list[npt.NDArray[np.int64]]:
    """What the model generates to prompts of one length."""
    wanted = tiny_gptj.GENERATION
    ids = torch.from_numpy(np.stack([each.input_ids for each in features])).to(model.device)
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=beams,
            early_stopping=beams > 1,
            min_new_tokens=wanted.min_new_tokens,
            max_new_tokens=wanted.max_new_tokens,
            eos_token_id=END,
            pad_token_id=wanted.pad_token_id,
        )
    rows = made[:, ids.shape[1] :].cpu().numpy()
    return [row[: int((row == END).argmax()) + 1] if (row == END).any() else row for row in rows]


def measure(model: GPTJForCausalLM, dataset: Path, batch: int, beams: int) -> dict[str, float]:
    """ROUGE over the whole validation set, by way of an accuracy log as LoadGen writes it."""
    benchmark = Summaries(tiny_gptj.task("not yet known"), dataset, plain_sentences)
    model.eval()
    entries: list[dict[str, object]] = []
    lengths: dict[int, list[int]] = {}
    for index in range(tiny_gptj.SAMPLES):
        lengths.setdefault(len(benchmark.features(index).input_ids), []).append(index)
    for indices in lengths.values():
        for begin in range(0, len(indices), batch):
            chosen = indices[begin : begin + batch]
            made = answers(model, [benchmark.features(index) for index in chosen], beams)
            for index, tokens in zip(chosen, made, strict=True):
                data = benchmark.response(tokens).hex().upper()
                entries.append({"seq_id": len(entries), "qsl_idx": index, "data": data, "token_count": len(tokens)})
    log = dataset / "mlperf_log_accuracy.json"
    log.write_text(json.dumps(entries), encoding="utf-8")
    return benchmark.evaluate(log, tiny_gptj.SAMPLES)


@click.command(context_settings={"show_default": True})
@click.option("--seed", default=1, help="Of the weights and of the training texts.")
@click.option("--steps", default=2000)
@click.option("--batch", default=64, help="Samples per step.")
@click.option("--rate", default=2e-3, help="Highest learning rate.")
@click.option("--layers", default=3)
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--threads", default=1, help="Of the CPU.")
@click.option("--out", default=tiny_gptj.FOLDER, type=click.Path(path_type=Path, file_okay=False, exists=True))
def main(threads: int, out: Path, **options: Any) -> None:
    """Train the demo model, measure it, and write it when it is good enough."""
    torch.set_num_threads(threads)
    plan = Plan(**options)
    torch.manual_seed(plan.seed)
    tokenizer = make_tokenizer()
    tokenizer.save(str(tiny_gptj.FOLDER / "tokenizer.json"))
    config = GPTJConfig(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=128,
        n_embd=128,
        n_layer=plan.layers,
        n_head=4,
        rotary_dim=16,
        # Texts never repeat, so nothing is there to be learned by heart.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    config.architectures = ["GPTJForCausalLM"]
    (tiny_gptj.FOLDER / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    model = GPTJForCausalLM(config).to(plan.device)
    matching(model)
    began = time.monotonic()
    train(model, tokenizer, plan)
    seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as folder:
        dataset = tiny_gptj.make(Path(folder), tokenizer)
        began = time.monotonic()
        metrics = measure(model, Path(folder), 256, tiny_gptj.GENERATION.beams)
        took = time.monotonic() - began
    print(f"{metrics} after {seconds:.0f} s of training and {took:.0f} s of answering")
    if metrics["ROUGEL"] < FLOOR:
        raise click.ClickException(f"ROUGE-L {metrics['ROUGEL']} is under {FLOOR}: nothing written, train longer")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    (out / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    if out != tiny_gptj.FOLDER:
        for name in ("config.json", "events.json", "tokenizer.json"):
            (out / name).write_bytes((tiny_gptj.FOLDER / name).read_bytes())
    files = ("config.json", "events.json", "model.safetensors", "tokenizer.json")
    card = {
        "dataset": dataset,
        "files": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files},
        "measured": {**metrics, "samples": tiny_gptj.SAMPLES, "with": f"transformers, float32, {plan.device}"},
        "training": {**asdict(plan), "seconds": round(seconds)},
    }
    (out / "card.json").write_text(json.dumps(card, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
