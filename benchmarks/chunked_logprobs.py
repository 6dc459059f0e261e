"""Memory and time of chunked log-probs against plain ones, forward and backward pass.

Plain: ``log_softmax(hidden @ weight.T)`` and a gather. Both are measured alone and with the entropy of each distribution, which
training always computes. Each side is measured in a process of its own, because a process never gives its peak back; the sides
alternate.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from benchmarks._record import ratios, record
from reasoner_ray.learner.logprobs import chunked_logprobs

WITH_ENTROPY = "_with_entropy"
SIDES = ("plain", "chunked", f"plain{WITH_ENTROPY}", f"chunked{WITH_ENTROPY}")


def step(side: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> tuple[float, float]:
    """One forward and backward pass; wall-clock seconds and this process's CPU seconds."""
    hidden.grad = weight.grad = None
    start, cpu = time.perf_counter(), time.process_time()
    entropy = side.endswith(WITH_ENTROPY)
    if side.startswith("plain"):
        distribution = torch.log_softmax(hidden @ weight.T, dim=-1)
        logprobs = distribution.gather(1, targets[:, None]).squeeze(1)
        entropies = -(distribution.exp() * distribution).sum(-1) if entropy else torch.zeros_like(logprobs)
        del distribution  # what the backward pass needs of it is kept there
    else:
        predictors = torch.arange(len(hidden), device=hidden.device)
        logprobs, entropies = chunked_logprobs(hidden, weight, predictors, targets, chunk=chunk, with_entropy=entropy)
    (logprobs + 0.01 * entropies if entropy else logprobs).mean().backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu


def measure(side: str, tokens: int, vocabulary: int, width: int, chunk: int, steps: int) -> dict[str, float]:
    """Seconds (wall-clock and CPU) of the fastest of ``steps`` steps, and the peak memory above inputs and gradients, bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device, generator=generator) * 0.05).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device, generator=generator)
    step(side, hidden[:8].detach().requires_grad_(), weight, targets[:8], chunk)  # libraries and gradients are in memory now
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds, cpu = min(step(side, hidden, weight, targets, chunk) for _ in range(steps))
    after = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "cpu_seconds": cpu, "bytes": after - before}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--entropy-tokens", type=int, default=4096, help="with the entropy; plainly it takes three times the memory")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896, help="hidden size; 896: Qwen2.5-0.5B")
    parser.add_argument("--chunk", type=int, default=1024, help="positions' worth of logits kept; 1024: learner.logprob_chunk")
    parser.add_argument("--steps", type=int, default=1, help="steps a process, of which the fastest counts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="measure this side alone and print it as JSON")
    args = parser.parse_args()
    shape = {"tokens": args.tokens, "vocabulary": args.vocabulary, "width": args.width, "chunk": args.chunk, "steps": args.steps}
    if args.side:
        print(json.dumps(measure(args.side, **shape)))
        return
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for i in range(args.repeats):
        for side in reversed(SIDES) if i % 2 else SIDES:
            tokens = args.entropy_tokens if side.endswith(WITH_ENTROPY) else args.tokens
            options = [f"--{key}={value}" for key, value in (shape | {"tokens": tokens}).items()]
            command = [sys.executable, "-m", "benchmarks.chunked_logprobs", f"--side={side}", *options]
            results[side].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    seconds = {side: [r["seconds"] for r in rows] for side, rows in results.items()}
    cpu = {side: [r["cpu_seconds"] for r in rows] for side, rows in results.items()}
    memory = {side: [r["bytes"] / 2**30 for r in rows] for side, rows in results.items()}
    record(
        "chunked_logprobs",
        settings={
            **shape,
            "tokens_with_entropy": args.entropy_tokens,
            "repeats": args.repeats,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
        },
        figures={
            **{f"seconds_{side}": values for side, values in seconds.items()},
            **{f"cpu_seconds_{side}": values for side, values in cpu.items()},
            **{f"peak_gib_{side}": values for side, values in memory.items()},
            **compare("", seconds, cpu, memory),
            **compare(WITH_ENTROPY, seconds, cpu, memory),
        },
    )


def compare(
    kind: str, seconds: dict[str, list[float]], cpu: dict[str, list[float]], memory: dict[str, list[float]]
) -> dict[str, list[float]]:
    """Chunked against plain, both of one ``kind`` (with the entropy or without)."""
    plain, chunked = f"plain{kind}", f"chunked{kind}"
    return {
        f"time_chunked_over_plain{kind}": ratios(seconds[chunked], seconds[plain]),
        f"cpu_time_chunked_over_plain{kind}": ratios(cpu[chunked], cpu[plain]),  # steadier where others use the machine too
        f"memory_plain_over_chunked{kind}": ratios(memory[plain], memory[chunked]),
    }


if __name__ == "__main__":
    main()
