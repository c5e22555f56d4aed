"""Times the library's convolutions over contiguous images against channels_last, rearranging included.

    python benchmarks/formats.py [--threads 1 2] [--quick] [--out PATH]

What the rule in csrc/products.cpp rests on: a forward and a backward, given contiguous tensors and giving
contiguous ones, by the library as it is, and with copies into and out of channels_last.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import torch
from harness import (
    add_common_arguments,
    clock,
    interleaved_for,
    out_path,
    provenance,
    ratio,
    summary,
    threads,
    with_suffix,
    write_json,
)
from torch import Tensor


class Shape(NamedTuple):
    inputs: int
    outputs: int
    kernel: int
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.inputs}-{self.outputs} k{self.kernel}, {self.size}^2, batch {self.batch}"


CHANNELS = ((16, 16), (16, 64), (32, 32), (64, 64), (64, 192), (128, 128), (256, 256))
# Kernel, height and width, batch.
IMAGES = ((1, 14, 64), (3, 4, 128), (3, 8, 64), (3, 16, 32), (3, 32, 16), (5, 7, 64), (5, 15, 32))
SHAPES = tuple(Shape(*channels, *image) for channels in CHANNELS for image in IMAGES)


def forward_and_backward(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, last: bool) -> None:
    geometry: tuple[Any, ...] = ([1, 1], [weight.shape[-1] // 2] * 2, [1, 1], False, [0, 0], 1)

    def arranged(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if last else t

    torch.ops.aten.convolution(arranged(x), weight, bias, *geometry).contiguous()
    gradients = torch.ops.aten.convolution_backward(
        arranged(grad), arranged(x), weight, [len(bias)], *geometry, [True] * 3
    )
    for g in gradients:
        g.contiguous()


def run_shape(shape: Shape, seconds: float) -> dict[str, Any]:
    x = torch.randn(shape.batch, shape.inputs, shape.size, shape.size)
    weight = torch.randn(shape.outputs, shape.inputs, shape.kernel, shape.kernel) * 0.05
    bias = torch.zeros(shape.outputs)
    grad = torch.randn(shape.batch, shape.outputs, shape.size, shape.size)
    runs = {
        name: lambda last=last: clock(lambda: forward_and_backward(x, weight, bias, grad, last))
        for name, last in (("contiguous", False), ("channels_last", True))
    }
    for run in runs.values():
        run()
    times, _ = interleaved_for(runs, seconds, rounds=100)
    return {
        "shape": shape._asdict(),
        **{name: summary(values) for name, values in times.items()},
        "channels_last_over_contiguous": ratio(times["channels_last"], times["contiguous"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, "formats")
    args = parser.parse_args()
    result: dict[str, Any] = {"provenance": provenance(), "quick": args.quick, "runs": []}
    for count in args.threads:
        with threads(count):
            tables = []
            for shape in SHAPES[:2] if args.quick else SHAPES:
                tables.append(run_shape(shape, 0.1 if args.quick else 0.6))
                over = tables[-1]["channels_last_over_contiguous"]
                print(
                    f"{shape!s:34}{tables[-1]['contiguous']['median_us'] / 1e3:9.2f} ms  channels_last "
                    f"{over['ratio']:5.2f} ({over['low']:.2f}-{over['high']:.2f})",
                    flush=True,
                )
        result["runs"].append({"threads": count, "shapes": tables})
    out = with_suffix(out_path(args.out, "formats", args.quick), ".json")
    write_json(out, result)
    print(f"\nwrote {out}")
    return 0


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
