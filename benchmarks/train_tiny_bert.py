"""Train the demo model of the tiny-bert benchmark and write fleet/harness/benchmarks/tiny_bert.

From a checkout with the `dev` and `harness` extras:

    python benchmarks/train_tiny_bert.py

The shipped weights came from these defaults in 562 s, plus half a minute to measure, on two cores of a Xeon that other
work shared.

frames.json is the only file there that is written by hand; tokenizer.json, config.json, model.safetensors and
card.json are made here. Data, initial weights and batch order follow from the seed, but float sums differ between
machines, so another machine's weights differ in their last bits and its F1 by a few tenths. Weights below 85 F1 on
the validation set are not written.
"""

import hashlib
import json
import math
import multiprocessing
import random
import re
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import BertConfig, BertForQuestionAnswering

from fleet.harness.benchmarks import tiny

FLOOR = 85.0
"""Percent F1 under which weights are not worth shipping."""
CHUNK = 12_800
"""Training samples made at once."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised training sample."""

    input_ids: npt.NDArray[np.int64]
    context_start: int
    first: int
    last: int
    evidence: npt.NDArray[np.float32]
    """[length], 1 on the sentence that holds the answer."""


def vocabulary() -> list[str]:
    """Word pieces in a fixed order: what the generator can write, plus single characters for everything else."""
    data = tiny.patterns()
    names = data["names"]
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    texts = [text for values in data["lists"].values() for text in values]
    texts += [number["text"] for number in data["numbers"].values()]
    for frame in data["frames"]:
        texts += frame["sentences"] + [question["ask"] for question in frame["questions"]]
    words = re.findall(r"[a-z]+", re.sub(r"\{\w*\}", " ", " ".join([*texts, "he she"]).lower()))
    heads = [o + v + c for o in names["onsets"] for v in names["vowels"] for c in names["codas"]]
    tails = names["middles"] + [ending for endings in names["endings"].values() for ending in endings]
    pairs = [f"{number:02d}" for number in range(100)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?!'", *characters, *(f"##{c}" for c in characters)]
    pieces += [*sorted(set(words)), *heads, *(f"##{tail}" for tail in tails), *pairs, *(f"##{pair}" for pair in pairs)]
    return list(dict.fromkeys(pieces))


def make_tokenizer() -> Tokenizer:
    """Lower-casing word pieces with BERT's pair layout."""
    vocab = {piece: number for number, piece in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return tokenizer


def examples(seed: int, count: int) -> list[Example]:
    """Training examples of one seed."""
    samples = list(tiny.generate(seed, count, training=True))
    arrays = tiny.tokenise(samples)
    made = []
    for number, sample in enumerate(samples):
        begin, end = arrays["rows.npy"][number : number + 2]
        start = int(arrays["context_starts.npy"][number])
        inside = arrays["offsets.npy"][begin + start : end - 1]
        first = start + int(np.flatnonzero(inside[:, 0] == sample.start)[0])
        last = start + int(np.flatnonzero(inside[:, 1] == sample.start + len(sample.answer))[0])
        sentence = sample.context.rfind(". ", 0, sample.start) + 1, sample.context.index(".", sample.start)
        evidence = np.zeros(end - begin, np.float32)
        evidence[start:-1] = (inside[:, 0] >= sentence[0]) & (inside[:, 1] <= sentence[1])
        made.append(Example(arrays["input_ids.npy"][begin:end].astype(np.int64), start, first, last, evidence))
    return made


def pools(seed: int, workers: int) -> Iterator[list[Example]]:
    """Endless fresh chunks in the order of their seeds, made ahead by `workers` processes."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        ahead: deque[Future[list[Example]]] = deque()
        try:
            while True:
                while len(ahead) <= workers:
                    seed += 1
                    ahead.append(executor.submit(examples, seed, CHUNK))
                yield ahead.popleft().result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def batches(seed: int, size: int, workers: int) -> Iterator[list[Example]]:
    """Endless fresh batches; those of one batch are of similar length, which saves half the padding."""
    shuffle = random.Random(seed).shuffle
    for pool in pools(1000 * seed, workers):
        made = []
        for begin in range(0, len(pool), 8 * size):
            block = sorted(pool[begin : begin + 8 * size], key=lambda example: len(example.input_ids))
            made += [block[at : at + size] for at in range(0, len(block), size)]
        shuffle(made)
        yield from made


def collate(ids: list[npt.NDArray[np.int64]], starts: list[int], device: str) -> dict[str, torch.Tensor]:
    """The three inputs of BERT, padded to the longest."""
    shape = (len(ids), max(len(row) for row in ids))
    arrays = {name: np.zeros(shape, np.int64) for name in ("input_ids", "token_type_ids", "attention_mask")}
    for number, row in enumerate(ids):
        arrays["input_ids"][number, : len(row)] = row
        arrays["token_type_ids"][number, starts[number] : len(row)] = 1
        arrays["attention_mask"][number, : len(row)] = 1
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train; card.json keeps it."""

    seed: int
    steps: int
    batch: int
    rate: float
    layers: int
    device: str


def matching(model: BertForQuestionAnswering) -> None:
    """Begin with attention that looks for the same word and for neighbours: what reading an answer begins with.

    From BERT's own starting weights that takes some ten thousand steps to appear.
    """
    bert = model.bert
    torch.nn.init.normal_(bert.embeddings.word_embeddings.weight, std=0.06)
    width = model.config.hidden_size
    angles = torch.arange(tiny.MAX_LENGTH)[:, None] / 300 ** (torch.arange(0, width, 2) / width)
    with torch.no_grad():
        bert.embeddings.position_embeddings.weight.copy_(0.06 * torch.cat([angles.sin(), angles.cos()], dim=1))
        for layer in bert.encoder.layer:
            attention = layer.attention.self
            torch.nn.init.normal_(attention.query.weight, std=0.09)
            attention.key.weight.copy_(attention.query.weight)


def train(model: BertForQuestionAnswering, plan: Plan, workers: int) -> None:
    """AdamW with warm-up and a cosine down to nothing, on texts that never repeat.

    Two more heads, thrown away afterwards, give every token something to learn from: after the first layer whether
    the question has the same word, after the last but one whether the token's sentence holds the answer.
    """
    heads = torch.nn.Linear(model.config.hidden_size, 2).to(plan.device)
    weights = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    model.train()
    began, total = time.monotonic(), 0.0
    for step, chosen in zip(range(1, plan.steps + 1), batches(plan.seed, plan.batch, workers), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, step / 200) * (0.51 + 0.49 * math.cos(math.pi * step / plan.steps))
        inputs = collate([each.input_ids for each in chosen], [each.context_start for each in chosen], plan.device)
        firsts = torch.tensor([each.first for each in chosen], device=plan.device)
        lasts = torch.tensor([each.last for each in chosen], device=plan.device)
        output = model(**inputs, start_positions=firsts, end_positions=lasts, output_hidden_states=True)
        ids, context = inputs["input_ids"], inputs["token_type_ids"].bool()
        asked = ids.masked_fill(context | (ids == 0), -1)
        same = (ids[:, :, None] == asked[:, None, :]).any(dim=2).float()
        evidence = torch.zeros(ids.shape, device=plan.device)
        for row, each in enumerate(chosen):
            evidence[row, : len(each.evidence)] = torch.from_numpy(each.evidence)
        hidden = output.hidden_states
        loss = output.loss + loss_of(heads(hidden[1])[..., 0][context], same[context])
        loss += loss_of(heads(hidden[-2])[..., 1][context], evidence[context])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        total += output.loss.detach()
        if step % 200 == 0:
            print(f"step {step} loss {float(total) / 200:.4f} after {time.monotonic() - began:.0f} s", flush=True)
            total = 0.0


def measure(model: BertForQuestionAnswering, dataset: Path, batch: int, device: str) -> dict[str, float]:
    """F1 and exact match over the whole validation set, by way of an accuracy log as LoadGen writes it."""
    benchmark = tiny.TinyBert(dataset)
    model.eval()
    entries: list[dict[str, object]] = []
    order = sorted(range(tiny.SAMPLES), key=lambda index: len(benchmark.features(index).input_ids))
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        features = [benchmark.features(index) for index in chosen]
        starts = [int(each.token_type_ids.argmax()) for each in features]
        with torch.inference_mode():
            output = model(**collate([each.input_ids for each in features], starts, device))
        logits = torch.stack([output.start_logits, output.end_logits], dim=2).float().cpu().numpy()
        for index, each, row in zip(chosen, features, logits, strict=True):
            data = benchmark.response(row[: len(each.input_ids)]).hex().upper()
            entries.append({"seq_id": len(entries), "qsl_idx": index, "data": data})
    log = dataset / "mlperf_log_accuracy.json"
    log.write_text(json.dumps(entries), encoding="utf-8")
    return benchmark.evaluate(log, tiny.SAMPLES)


@click.command(context_settings={"show_default": True})
@click.option("--seed", default=1, help="Of the weights and of the training texts.")
@click.option("--steps", default=4500)
@click.option("--batch", default=32, help="Samples per step.")
@click.option("--rate", default=1e-3, help="Highest learning rate.")
@click.option("--layers", default=3)
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--threads", default=2, help="Of the CPU.")
@click.option("--workers", default=1, help="Processes that write texts.")
@click.option("--out", default=tiny.FOLDER, type=click.Path(path_type=Path, file_okay=False, exists=True))
def main(threads: int, workers: int, out: Path, **options: Any) -> None:
    """Train the demo model, measure it, and write it when it is good enough."""
    torch.set_num_threads(threads)
    plan = Plan(**options)
    torch.manual_seed(plan.seed)
    tokenizer = make_tokenizer()
    tokenizer.save(str(tiny.FOLDER / "tokenizer.json"))
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=plan.layers,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=tiny.MAX_LENGTH,
        # Texts never repeat, so nothing is there to be learned by heart.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForQuestionAnswering(config).to(plan.device)
    matching(model)
    began = time.monotonic()
    train(model, plan, workers)
    seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as folder:
        dataset = tiny.write_dataset(Path(folder), list(tiny.generate(tiny.SEED, tiny.SAMPLES)))
        metrics = measure(model, Path(folder), 256, plan.device)
    print(f"F1 {metrics['F1']:.3f} exact match {metrics['exact_match']:.3f} after {seconds:.0f} s of training")
    if metrics["F1"] < FLOOR:
        raise click.ClickException(f"F1 {metrics['F1']:.2f} is under {FLOOR}: nothing written, train with more steps")
    config.architectures = ["BertForQuestionAnswering"]
    (out / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    (out / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    if out != tiny.FOLDER:
        for name in ("frames.json", "tokenizer.json"):
            (out / name).write_bytes((tiny.FOLDER / name).read_bytes())
    files = ("config.json", "frames.json", "model.safetensors", "tokenizer.json")
    card = {
        "dataset": dataset,
        "files": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files},
        "measured": {**metrics, "samples": tiny.SAMPLES, "with": f"transformers, float32, {plan.device}"},
        "training": {**asdict(plan), "seconds": round(seconds)},
    }
    (out / "card.json").write_text(json.dumps(card, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
