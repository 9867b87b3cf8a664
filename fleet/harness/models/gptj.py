"""Generation with PyTorch: GPT-J in our own arithmetic, other decoders through transformers.

GPT-J has its own because transformers' knows neither scaled_dot_product_attention nor static caches, and its
continuous batching answers wrong tokens for this model without saying so (5.23). Beam search copies no cache here: the
beams of a sample share its prompt's keys, keys of generated tokens stay where they were written, and a mask says which
of them a beam descends from. Slots whose sample is answered take the next one at once.
tests/unit/harness/test_gptj_torch.py holds the tokens to transformers' own generate().
"""

import json
import math
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fleet.harness.interfaces import RANDOM_WEIGHTS, Backend, Benchmark, Features, Generation, Options, generation_of
from fleet.harness.models import memory, workers
from fleet.harness.models.beam_search import Batch, Cache
from fleet.harness.models.gptj_layers import DTYPES, SEED, Checkpoint, Drawn, GptJ

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OPTIONS = {"attn_implementation", "batch_size", "beams", "device", "dtype", "layers", "threads", "weights", "workers"}
ATTENTION = ("sdpa", "matmul")
"""On an H200 matmul gave 23.8 samples/s and sdpa 14.7 (GPT-J-6B, beam 4, prompts of 863 tokens): the mask hinders it."""
WORKSPACE_BYTES = 6 * 2**30
"""GPU memory that the cache leaves to prompts, logits and the search."""
CALLS = 16
"""Samples in a call of predict for each slot: the slots run empty only at the end of a call."""

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options that every model here has, checked."""

    device: torch.device
    dtype: str
    batch_size: int
    random: bool
    attention: str
    generation: Generation
    labels: tuple[str, ...]


def settings(benchmark: Benchmark, options: Options) -> Settings:
    """Raises ValueError, naming what there is, for an unknown option or a value out of range."""
    if unknown := set(options) - OPTIONS:
        raise ValueError(f"the pytorch backend has no option {min(unknown)!r}; it has {sorted(OPTIONS)}")
    name = str(options.get("dtype", "float32"))
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: one of {', '.join(DTYPES)}")
    weights = options.get("weights")
    if weights not in {None, "random"}:
        raise ValueError(f"weights {weights!r}: `random`, or leave it out to read the checkpoint")
    if "layers" in options and weights is None:
        raise ValueError("option layers goes with `weights: random` only: a checkpoint has the layers it has")
    generation, labels = generation_of(benchmark, options)
    device = workers.device_of(options)
    batch_size = int(options.get("batch_size", 64 if device.type == "cpu" else 256))
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: a whole number from 1 on")
    if threads := int(options.get("threads", 0)):
        torch.set_num_threads(threads)
    if weights:
        labels = (*labels, RANDOM_WEIGHTS)
    return Settings(
        device=device,
        dtype=name,
        batch_size=batch_size,
        random=bool(weights),
        attention=str(options.get("attn_implementation", "matmul" if device.type == "cuda" else "sdpa")),
        generation=generation,
        labels=labels,
    )


class _Common:
    """What GPT-J and the models of transformers share as backends."""

    by_length = True

    def __init__(self, chosen: Settings) -> None:
        self._chosen = chosen
        self.labels = chosen.labels

    @property
    def model(self) -> dict[str, str]:
        """The precision the weights are run in, and whether there were any."""
        found = {"weight_data_types": SHORT[self._chosen.dtype]}
        if self._chosen.random:
            found |= {"starting_weights_filename": "none", "weight_transformations": "none, the weights are random"}
        return found

    def versions(self) -> dict[str, str]:
        """torch, and CUDA where it is used."""
        device = self._chosen.device
        found = {"torch": torch.__version__, "device": str(device), "machine": platform.machine()}
        if device.type == "cuda":
            found["cuda"] = str(torch.version.cuda)
            found["gpu"] = torch.cuda.get_device_name(device)
            found["gpu_peak_memory_gib"] = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}"
        return found

    def _check(self, prompts: Sequence[Tokens], vocabulary: int, positions: int) -> None:
        """Raises ValueError for what the model has no embedding for; a GPU would only say `device-side assert`."""
        most = positions - self._chosen.generation.max_new_tokens
        for prompt in prompts:
            if not 1 <= len(prompt) <= most:
                raise ValueError(f"a prompt of {len(prompt)} tokens: this model reads 1 to {most} of them")
            if prompt.min() < 0 or prompt.max() >= vocabulary:
                wrong = int(prompt.min() if prompt.min() < 0 else prompt.max())
                raise ValueError(
                    f"token {wrong} is none of the model's {vocabulary}: vocabulary and weights do not match"
                )

    def _halved(self, size: int, longest: int, error: BaseException) -> int:
        """Half as many samples at once. Raises ValueError when there was but one."""
        on_gpu = self._chosen.device.type == "cuda"
        place, larger = ("GPU memory", "a GPU") if on_gpu else ("memory", "a host")
        if size == 1:
            raise ValueError(
                f"out of {place} with one prompt of {longest} tokens and {self._chosen.generation.beams} beams;"
                f" take {larger} with more memory, a smaller dtype or fewer beams"
            ) from error
        sys.stdout.write(f"out of {place} with {size} samples at once: going on with {size // 2}\n")
        return size // 2


class GptJBackend(_Common):
    """GPT-J on CPU or CUDA; for its options see OPTIONS."""

    def __init__(self, benchmark: Benchmark, chosen: Settings, layers: int | None) -> None:
        if chosen.attention not in ATTENTION:
            raise ValueError(f"attn_implementation {chosen.attention!r}: one of {', '.join(ATTENTION)}")
        config, weights = dict(benchmark.config), Drawn(chosen.device) if chosen.random else None
        labels = chosen.labels
        if weights is None:
            config |= json.loads(_readable(benchmark.model_dir / "config.json"))
        elif layers is not None and layers != config["n_layer"]:
            if not 1 <= layers <= config["n_layer"]:
                raise ValueError(f"layers {layers}: the model has 1 to {config['n_layer']}")
            labels = (*labels, f"{layers} of {config['n_layer']} layers")
            config["n_layer"] = layers
        super().__init__(chosen)
        self.labels = labels
        self._gptj = GptJ(
            config, weights or Checkpoint(benchmark.model_dir, chosen.device), chosen.device, chosen.dtype
        )
        self._slots = chosen.batch_size
        self._cache: Cache | None = None
        self._cached_for = 0
        """Slots that were wanted when the cache was made; it may have got fewer."""

    @property
    def batch_size(self) -> int:
        """Many more than are computed at once: an answered sample's slot takes the next one."""
        return CALLS * self._chosen.batch_size

    def predict(self, samples: Sequence[Features]) -> Iterator[Tokens]:
        """New tokens int64 [count] of each sample in order, the end token among them.

        Raises ValueError for a prompt that is empty, too long or of another vocabulary, and when not even one sample
        fits into memory.
        """
        prompts = [np.ascontiguousarray(sample.input_ids, dtype=np.int64) for sample in samples]
        self._check(prompts, self._gptj.vocabulary, self._gptj.positions)
        longest = max(len(prompt) for prompt in prompts)
        waiting = dict(enumerate(prompts))
        answers: dict[int, Tokens] = {}
        given = 0
        while given < len(prompts):
            failed: Exception | None = None
            try:
                for index, tokens in self._generate(waiting):
                    answers[index] = tokens
                    while given in answers:
                        yield answers.pop(given)
                        given += 1
            except (RuntimeError, MemoryError) as error:
                if not memory.is_short(error):
                    raise
                failed = error.with_traceback(None)  # the frames hold the very tensors that filled the memory
            if failed is not None:
                self._cache = None
                self._slots = self._halved(min(self._slots, len(waiting)), longest, failed)
                memory.release(self._chosen.device)

    def _generate(self, waiting: dict[int, Tokens]) -> Iterator[tuple[int, Tokens]]:
        """Index and answer of all that wait, as they come; what is answered waits no longer."""
        with torch.inference_mode():
            batch, slots = self._batch(waiting)
            queue = deque(waiting)
            held: dict[int, int] = {}
        while queue or held:
            with torch.inference_mode():
                free = [slot for slot in range(slots) if slot not in held]
                # A few at a time: a prompt alone costs more than a prompt among others.
                if queue and (not held or len(free) >= max(1, slots // 8)):
                    new = [(slot, queue.popleft()) for slot in free[: len(queue)]]
                    batch.begin([slot for slot, _ in new], [waiting[index] for _, index in new])
                    held.update(new)
                finished = batch.step()
                done = [slot for slot in held if finished[slot]]
                answers = batch.search.answers(done) if done else []
                batch.release(done)
            for slot, tokens in zip(done, answers, strict=True):
                index = held.pop(slot)
                del waiting[index]
                yield index, tokens

    def _batch(self, waiting: dict[int, Tokens]) -> tuple[Batch, int]:
        generation = self._chosen.generation
        start = (generation.beams * generation.max_new_tokens + 7) // 8 * 8
        prompt = (max(len(tokens) for tokens in waiting.values()) + 7) // 8 * 8
        wanted = min(self._slots, len(waiting))
        cache = self._cache
        if cache is None or cache.start != start or cache.prompt < prompt or self._cached_for < wanted:
            self._cache = cache = None  # before the next one is made
            self._cache = cache = Cache(self._gptj, min(wanted, self._fitting(start + prompt)), start, prompt)
            self._cached_for = wanted
        slots = min(cache.slots, wanted)
        # As many rounds, but even ones: a last round of a few samples would take as long as a full one.
        slots = math.ceil(len(waiting) / math.ceil(len(waiting) / slots))
        return Batch(self._gptj, generation, cache, slots, self._chosen.attention), slots

    def _fitting(self, columns: int) -> int:
        """Slots of so many columns that fit into the GPU's free memory; at least one, that it may be tried."""
        if self._chosen.device.type != "cuda":
            return self._slots
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._chosen.device)
        model = self._gptj
        column = 2 * len(model.layers) * model.width * torch.empty((), dtype=model.dtype).element_size()
        return max(1, int((free - WORKSPACE_BYTES) // (columns * column)))

    def close(self) -> None:
        """Let go of the cache."""
        self._cache = None


class TransformersBackend(_Common):
    """Any other decoder, Llama above all, as transformers runs it."""

    def __init__(self, benchmark: Benchmark, chosen: Settings, layers: int | None) -> None:
        super().__init__(chosen)
        import transformers  # seconds: only who needs it pays

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._transformers = transformers
        how = {"dtype": DTYPES[chosen.dtype], "attn_implementation": chosen.attention}
        if chosen.random:
            fields = dict(benchmark.config)
            total = fields.get("num_hidden_layers")
            if layers is not None and layers != total:
                self.labels = (*self.labels, f"{layers} of {total} layers")
                fields["num_hidden_layers"] = layers
            config = transformers.AutoConfig.for_model(**fields)
            torch.manual_seed(SEED)
            with chosen.device:
                self._loaded = transformers.AutoModelForCausalLM.from_config(config, **how)
        else:
            self._loaded = self._read(benchmark.model_dir, how)
        self._loaded = self._loaded.to(chosen.device).eval()
        self.batch_size = chosen.batch_size
        wanted = chosen.generation
        self._wanted = transformers.GenerationConfig(
            num_beams=wanted.beams,
            min_new_tokens=wanted.min_new_tokens,
            max_new_tokens=wanted.max_new_tokens,
            eos_token_id=list(wanted.eos_token_ids),
            pad_token_id=wanted.pad_token_id,
            early_stopping=wanted.early_stopping if wanted.beams > 1 else False,
            do_sample=False,
        )

    def _read(self, folder: Path, how: dict[str, Any]) -> Any:
        """Raises ValueError for weights that are missing, cut off or not all there."""
        Checkpoint(folder, torch.device("cpu"))  # its errors name the file
        loaded, info = self._transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **how
        )
        if missing := info["missing_keys"]:
            raise ValueError(f"{folder}: the weights have no {min(missing)}")
        return loaded

    def versions(self) -> dict[str, str]:
        """torch, transformers, and CUDA where it is used."""
        return super().versions() | {"transformers": self._transformers.__version__}

    def predict(self, samples: Sequence[Features]) -> Sequence[Tokens]:
        """New tokens int64 [count] of each sample in order, the end token among them.

        Raises ValueError for a prompt that is empty, too long or of another vocabulary, and when not even one sample
        fits into memory.
        """
        prompts = [sample.input_ids for sample in samples]
        fields = self._loaded.config
        self._check(prompts, fields.vocab_size, fields.max_position_embeddings)
        if self._chosen.device.type == "cuda" and self._chosen.generation.beams == 1:
            return self._continuously(prompts)
        answers: list[Tokens] = []
        while len(answers) < len(prompts):
            group = prompts[len(answers) : len(answers) + self.batch_size]
            failed: Exception | None = None
            try:
                answers += self._padded(group)
            except (RuntimeError, MemoryError) as error:
                if not memory.is_short(error):
                    raise
                failed = error.with_traceback(None)
            if failed is not None:
                self.batch_size = self._halved(len(group), max(len(prompt) for prompt in group), failed)
                memory.release(self._chosen.device)
        return answers

    def _continuously(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        """Transformers' continuous batching: it fills the GPU's free memory with a cache in pages."""
        found = self._loaded.generate_batch([prompt.tolist() for prompt in prompts], generation_config=self._wanted)
        answers = []
        for number in range(len(prompts)):
            output = found[f"req_{number}"]
            if output.error:
                raise ValueError(f"transformers gave no answer to sample {number}: {output.error}")
            answers.append(np.array(output.generated_tokens, dtype=np.int64))
        return answers

    @torch.inference_mode()
    def _padded(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        wanted, longest = self._chosen.generation, max(len(prompt) for prompt in prompts)
        ids = np.full((len(prompts), longest), wanted.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        made = self._loaded.generate(
            torch.from_numpy(ids).to(self._chosen.device),
            attention_mask=torch.from_numpy(mask).to(self._chosen.device),
            generation_config=self._wanted,
        )
        return [until_end(row, wanted.eos_token_ids) for row in made[:, longest:].cpu().numpy()]

    def close(self) -> None:
        """Nothing to end."""


def until_end(tokens: Tokens, ends: Sequence[int]) -> Tokens:
    """`tokens` without the padding after the first of `ends`."""
    found = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: found[0] + 1].copy() if len(found) else tokens.copy()


def _readable(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file, run `fleet provision`") from error


def open(benchmark: Benchmark, options: Options) -> Backend:  # noqa: A001 - every backend's door has this name
    """The benchmark's model, loaded: GPT-J here, any other decoder by transformers.

    Raises ValueError for unknown options, a benchmark that generates nothing, and weights that are missing, truncated
    or another model's.
    """
    settings(benchmark, options)  # before processes are started
    each = workers.each(options)
    make = partial(_opened, benchmark)
    return workers.Workers(make, each, tokens=None) if len(each) > 1 else make(each[0])


def _opened(benchmark: Benchmark, options: Options) -> Backend:
    """One model on one device."""
    chosen = settings(benchmark, options)
    layers = options.get("layers")
    kind: Callable[[Benchmark, Settings, int | None], Backend]
    kind = GptJBackend if benchmark.config.get("model_type") == "gptj" else TransformersBackend
    return kind(benchmark, chosen, None if layers is None else int(layers))
