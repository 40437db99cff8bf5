"""What the mixture runtime costs on top of ONNX Runtime: decoding through `Mixture` against the bare loop.

    python tools/decode_overhead.py BUNDLE [--member NAME] [--rounds 9] [--threads 2]

Both sides run the same graph on the same prompt, greedy, batch 1, with the cache bound in place, and take turns in one
process. The bare loop takes an argmax and nothing else; `Mixture` also mixes, keeps log-probabilities and makes text.
Prints one JSON line with medians, in tokens per second, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgemix import graph_io
from edgemix.bundle import read_manifest
from edgemix.runtime import Mixture

CAPACITY, STEPS = 512, 128
PAUSE = 0.2
"""Seconds before a side's turn: the other's threads spin on for a while."""
PROMPT = "The little town by the river had a mill, a church and a school, and every morning " * 8


class BareLoop:
    """Prefill and greedy decoding with nothing but ONNX Runtime."""

    def __init__(self, graph: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.past = [i for i in self.session.get_inputs() if i.name.startswith(graph_io.PAST_PREFIX)]
        self.names = {i.name for i in self.session.get_inputs()}

    def _step(self, cache: dict[str, ort.OrtValue], ids: np.ndarray, total: int) -> np.ndarray:
        binding = self.session.io_binding()
        binding.bind_output(graph_io.LOGITS)
        binding.bind_cpu_input(graph_io.INPUT_IDS, ids)
        binding.bind_cpu_input(graph_io.ATTENTION_MASK, np.ones((1, total), np.int64))
        if graph_io.POSITION_IDS in self.names:
            binding.bind_cpu_input(graph_io.POSITION_IDS, np.arange(total - ids.shape[1], total)[None])
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(graph_io.present_of(name), value)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    def __call__(self, prompt: list[int]) -> tuple[float, float, list[int]]:
        """Tokens per second of prefill and of decoding, and the tokens."""
        cache = {
            i.name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, i.shape[1], CAPACITY, i.shape[3]), np.float32))
            for i in self.past
        }
        total, tokens = len(prompt), []
        start = time.perf_counter()
        logits = self._step(cache, np.array([prompt], np.int64), total)
        prefilled = time.perf_counter()
        for _ in range(STEPS):
            tokens.append(int(logits[0, -1].argmax()))
            total += 1
            logits = self._step(cache, np.array([tokens[-1:]], np.int64), total)
        decoded = time.perf_counter()
        return len(prompt) / (prefilled - start), STEPS / (decoded - prefilled), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--member", help="the bundle's first by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    entries = {entry.name: entry for entry in read_manifest(arguments.bundle).members}
    name = arguments.member or next(iter(entries))
    bare = BareLoop(arguments.bundle / entries[name].graph, arguments.threads)
    rates: dict[str, list[float]] = {"bare": [], "edgemix": [], "bare_prefill": [], "edgemix_prefill": []}
    with Mixture.load(arguments.bundle, provider="cpu", threads=arguments.threads) as mixture:
        prompt = mixture.tokenizer.encode(PROMPT)
        for turn in range(arguments.rounds + 1):
            time.sleep(PAUSE)
            prefill, decode, tokens = bare(prompt)
            time.sleep(PAUSE)
            done = mixture.generate(PROMPT, max_new_tokens=STEPS, weights={name: 1.0})
            if turn == 0:  # warm-up, and both sides must do the same work
                assert list(done.token_ids) == tokens[: len(done.token_ids)], "the two sides disagree"
                assert len(done.token_ids) == STEPS, "the prompt must lead to a long text: choose another member"
                continue
            rates["bare"].append(decode)
            rates["bare_prefill"].append(prefill)
            rates["edgemix"].append(done.timings.decode_rate)
            rates["edgemix_prefill"].append(done.timings.prefill_rate)
    medians = {side: round(statistics.median(values), 2) for side, values in rates.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["edgemix"], rates["bare"], strict=True)]
    print(
        json.dumps(
            {
                "member": name,
                "format": entries[name].format,
                "prompt_tokens": len(prompt),
                "tokens_per_second": medians,
                "decode_ratio": round(statistics.median(ratios), 4),
                "decode_ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
            }
        )
    )


if __name__ == "__main__":
    main()
