"""Other runtimes behind one interface, for the benchmark: prompt ids, a number of tokens -> new ids, step by step.

Greedy; each reads one model, with as many threads as it is told; end-of-text tokens do not end a text.
"""

from __future__ import annotations

import importlib
import json
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemix.bundle import graph_io
from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Run = Callable[[list[int], int], Iterable[list[int]]]


def bare_loop(graph: Path, vocabulary: int, threads: int) -> Run:
    """A member's graph in the shortest loop around ONNX Runtime: past and present bound to one buffer, logits copied
    out, nothing else. What it reaches is what a runtime around the same graph can reach.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    pasts = {each.name: each.shape for each in session.get_inputs() if each.name.startswith(graph_io.PAST_PREFIX)}
    positions = any(each.name == graph_io.POSITION_IDS for each in session.get_inputs())

    def run(ids: list[int], count: int) -> Iterable[list[int]]:
        cache = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, len(ids) + count, size), np.float32))
            for name, (_, heads, _, size) in pasts.items()
        }
        new, total = np.array([ids], np.int64), len(ids)
        for _ in range(count):
            binding = session.io_binding()
            binding.bind_output(graph_io.LOGITS)
            binding.bind_cpu_input(graph_io.INPUT_IDS, new)
            binding.bind_cpu_input(graph_io.ATTENTION_MASK, np.ones((1, total), np.int64))
            if positions:
                binding.bind_cpu_input(graph_io.POSITION_IDS, np.arange(total - new.shape[1], total)[None])
            for name, value in cache.items():
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(graph_io.present_of(name), value)
            session.run_with_iobinding(binding)
            token = int(binding.get_outputs()[0].numpy()[0, -1, :vocabulary].argmax())
            yield [token]
            new, total = np.array([[token]], np.int64), total + 1

    return run


def _transformers(where: str, threads: int) -> Run:
    import torch

    from edgemix.export.models.loading import MemberLoader
    from edgemix.recipe.schema import MemberRecipe

    torch.set_num_threads(threads)
    model = MemberLoader(Path()).load(MemberRecipe("peer", where)).model.eval()

    def run(ids: list[int], count: int) -> Iterable[list[int]]:
        with torch.no_grad():
            made = model(input_ids=torch.tensor([ids]), use_cache=True)
            for _ in range(count):
                token = int(made.logits[0, -1].argmax())
                yield [token]
                made = model(input_ids=torch.tensor([[token]]), past_key_values=made.past_key_values, use_cache=True)

    return run


def _llama_cpp(where: str, threads: int) -> Run:
    llama_cpp = _imported("llama_cpp", "llama-cpp-python")
    model = llama_cpp.Llama(
        where, n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False, logits_all=False
    )

    def run(ids: list[int], count: int) -> Iterable[list[int]]:
        model.reset()
        model.eval(ids)
        for _ in range(count):
            token = int(model.sample(temp=0.0))
            yield [token]
            model.eval([token])

    return run


def _genai(where: str, threads: int) -> Run:
    genai: Any = _imported("onnxruntime_genai", "onnxruntime-genai")
    del threads  # as the folder's genai_config.json says
    model = genai.Model(where)

    def run(ids: list[int], count: int) -> Iterable[list[int]]:
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(ids) + count + 1, do_sample=False)
        generator = genai.Generator(model, options)
        generator.append_tokens(np.array([ids], np.int32))
        for _ in range(count):
            generator.generate_next_token()
            yield [int(generator.get_next_tokens()[0])]

    return run


def _ctranslate2(where: str, threads: int) -> Run:
    ctranslate2: Any = _imported("ctranslate2", "ctranslate2")
    model = ctranslate2.Generator(where, device="cpu", inter_threads=1, intra_threads=threads)
    names = json.loads((Path(where) / "vocabulary.json").read_text(encoding="utf-8"))  # it takes tokens by name

    def run(ids: list[int], count: int) -> Iterable[list[int]]:
        prompt = [names[token] for token in ids]
        for step in model.generate_tokens(prompt, max_length=count, min_length=count, sampling_topk=1):
            yield [step.token_id]

    return run


def _openvino(where: str, threads: int) -> Run:
    genai: Any = _imported("openvino_genai", "openvino-genai")
    openvino: Any = _imported("openvino", "openvino")
    scheduling = genai.SchedulerConfig()
    scheduling.enable_prefix_caching = False  # it is on by default, and a prompt would be read in the first round only
    scheduling.max_num_batched_tokens = 1 << 30  # the pipeline's own default, which a configuration replaces
    pipeline = genai.LLMPipeline(where, "CPU", scheduler_config=scheduling, INFERENCE_NUM_THREADS=threads)

    def run(ids: list[int], count: int) -> Iterable[list[int]]:
        options = genai.GenerationConfig(max_new_tokens=count, do_sample=False, ignore_eos=True)
        array = np.array([ids], np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(array), openvino.Tensor(np.ones_like(array)))
        produced: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        class Streamer(genai.StreamerBase):  # type: ignore[misc]
            def write(self, tokens: Any) -> Any:
                for token in tokens if isinstance(tokens, list) else [tokens]:
                    produced.put(int(token))
                return genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        def generate() -> Any:
            try:
                return pipeline.generate(inputs, options, Streamer())
            finally:
                produced.put(None)

        with ThreadPoolExecutor(1) as pool:
            generated = pool.submit(generate)
            while (token := produced.get()) is not None:
                yield [token]
            generated.result()

    return run


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{package} is not installed", f"pip install {package}") from None


PEERS: dict[str, Callable[[str, int], Run]] = {
    "transformers": _transformers,
    "llama-cpp": _llama_cpp,
    "onnxruntime-genai": _genai,
    "openvino-genai": _openvino,
    "ctranslate2": _ctranslate2,
}
