"""Images per second of one training step, by precision and memory format: `python -m tests.benchmarks.training_step`.

One process, the four kinds in turn, medians; run it on a machine that does nothing else.
"""

import argparse
import statistics
import time

import torch

from resode.networks import build


def seconds_a_step(model: str, bf16: bool, channels_last: bool, batch: int, steps: int) -> list[float]:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = build(model).to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=layout)
    labels = torch.randint(10, (batch,))
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    print(
        f"{options.model}, batch {options.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for bf16 in (False, True):
        for channels_last in (False, True):
            times = seconds_a_step(options.model, bf16, channels_last, options.batch, options.steps)
            rates = sorted(options.batch / s for s in times)
            name = f"{'bf16' if bf16 else 'float32'}, {'channels-last' if channels_last else 'NCHW'}"
            print(f"{name:<24}{statistics.median(rates):6.0f} images/s  ({rates[0]:.0f} to {rates[-1]:.0f})")


if __name__ == "__main__":
    main()
