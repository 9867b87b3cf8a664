"""BERT-large and GPT-J-6B on random weights through LoadGen, in performance and accuracy mode, with their peak memory.

    python benchmarks/end_to_end.py                                        on a CPU: GPT-J with 2 of its 28 layers
    python benchmarks/end_to_end.py --device cuda --layers 28 --samples 64   on an NVIDIA GPU

The datasets are generated in the official formats, with the official numbers of words and articles, and prepared by
the same code as the real ones. What comes out says that the whole path works and what memory it takes; scores of
random weights mean nothing, and `fleet submission` refuses such runs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))

from fleet.harness import assets, contract, loadgen  # noqa: E402
from fleet.harness.benchmarks import gptj  # noqa: E402
from fleet.harness.contract import Mode, RunSpec, Scenario  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BERT_WORDS, GPTJ_WORDS, GPTJ_END = 30_522, 50_257, 50_256


def words(chance: random.Random, count: int) -> list[str]:
    """Words of one to six letters."""
    return ["".join(chance.choices(LETTERS, k=chance.randint(1, 6))) for _ in range(count)]


def bert_source(folder: Path, questions: int) -> None:
    """SQuAD's form; a letter is a word piece, so that 45 words make about 178 tokens."""
    folder.mkdir(parents=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "?"]
    pieces += [f"unused{number}" for number in range(BERT_WORDS - len(pieces))]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    chance = random.Random(1)
    paragraphs = []
    for number in range(questions):
        text = words(chance, chance.randint(25, 65))
        answers = [{"text": " ".join(text[3:5]), "answer_start": len(" ".join(text[:3])) + 1}]
        question = {"id": str(number), "question": " ".join(words(chance, 4)) + "?", "answers": answers}
        paragraphs.append({"context": " ".join(text), "qas": [question]})
    data = {"version": "1.1", "data": [{"title": "generated", "paragraphs": paragraphs}]}
    (folder / "dev-v1.1.json").write_text(json.dumps(data), encoding="utf-8")


def gptj_source(folder: Path) -> None:
    """CNN/DailyMail's form as the reference prepares it; a character is a token, about 870 an article."""
    folder.mkdir(parents=True)
    alphabet = sorted(ByteLevel.alphabet())
    names = [*alphabet, *(f"unused{number}" for number in range(len(alphabet), GPTJ_END)), "<|endoftext|>"]
    tokenizer = Tokenizer(BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(names[GPTJ_END], special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    chance = random.Random(2)
    entries = [
        {
            "instruction": "Summarize the following news article:",
            "input": " ".join(words(chance, chance.randint(60, 240))),
            "output": " ".join(words(chance, 12)) + ".",
        }
        for _ in range(gptj.SAMPLES)
    ]
    (folder / "cnn_eval.json").write_text(json.dumps(entries), encoding="utf-8")
    with zipfile.ZipFile(folder / "punkt_tab.zip", "w") as archive:
        for name in ("abbrev_types.txt", "sent_starters.txt", "collocations.tab", "ortho_context.tab"):
            text = {"abbrev_types.txt": "dr", "sent_starters.txt": "so", "collocations.tab": "st\tlouis"}.get(name)
            archive.writestr(f"punkt_tab/english/{name}", text or "so\t46")


def unit(work: Path, name: str, mode: Mode, samples: int, options: dict[str, Any]) -> None:
    """Run one Offline unit as its supervisor would, and say what came of it."""
    module, model = {"bert-99": ("bert", "bert"), "gptj-99": ("gptj", "llama3_1-8b")}[name]
    spec = RunSpec(
        unit="u", session="s", host="h", benchmark=name, module=module, loadgen_model=model,
        scenario=Scenario.OFFLINE, mode=mode, backend="pytorch", backend_options={"weights": "random", **options},
        user_conf="*.Offline.min_duration = 2000\n", sample_count=samples, performance_sample_count=samples,
        deadline_s=3600, expected_s=60, work_dir=str(work), round="v6.1", loadgen_version=loadgen.version(), quick=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        contract.write_json(folder / "run_spec.json", spec)
        paths = [str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        started = time.monotonic()
        for _ in range(2):
            command = [sys.executable, "-m", "fleet.harness", "run", text]
            done = subprocess.run(command, env=environment, cwd=text, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            raise SystemExit(f"{name} {mode}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        summary = (folder / "mlperf_log_summary.txt").read_text(encoding="utf-8")
        told = [
            line.strip() for line in summary.splitlines() if line.startswith(("Samples per", "Tokens per", "Result"))
        ]
        scores = ", ".join(f"{key} {value:.2f}" for key, value in manifest["accuracy"].items())
        gpu = manifest["versions"].get("gpu_peak_memory_gib")
        print(
            f"{name:8} {mode:12} {options} {'; '.join(told) or scores}; peak {manifest['peak_memory_bytes'] / 2**30:.2f} GiB RAM"
            f"{f', {gpu} GiB GPU' if gpu else ''}; {time.monotonic() - started:.0f} s; {', '.join(manifest['labels'])}",
            flush=True,
        )


def main() -> None:
    """Make the datasets, then run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=2, help="of GPT-J's 28")
    parser.add_argument("--samples", type=int, default=16, help="of BERT; GPT-J gets a quarter on a CPU")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        work = Path(text)
        bert_source(work / "assets" / "bert-99" / "source", max(64, given.samples))
        gptj_source(work / "assets" / "gptj-99" / "source")
        for name, module in {"bert-99": "bert", "gptj-99": "gptj"}.items():
            assets.prepare(work, name, module, "benchmark")
        options = {"device": given.device, "dtype": given.dtype}
        for mode in (Mode.ACCURACY, Mode.PERFORMANCE):
            unit(work, "bert-99", mode, given.samples, options)
        more = {"layers": given.layers} if given.layers != 28 else {}
        few = given.samples if given.device.startswith("cuda") else max(2, given.samples // 4)
        for mode in (Mode.ACCURACY, Mode.PERFORMANCE):
            unit(work, "gptj-99", mode, few, {**options, **more, "batch_size": few})


if __name__ == "__main__":
    main()
