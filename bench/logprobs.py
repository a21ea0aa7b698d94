"""Time, memory and error of the tiled log-probs against the naive form, interleaved A B A B in one process.

    python -m bench.logprobs [N D V]          # default: 1024 512 32000 on a CPU, 8192 4096 151936 on CUDA

One line per dtype: median seconds of a forward and backward pass and their ratio, and the largest error of a token's
log-prob against float64 on the same inputs. Times on a shared machine are noisy; quote the ratio.
"""

import json
import statistics
import sys
import time

import torch

from rpo.logprobs import token_logps, token_logps_naive

ROUNDS = 5


def inputs(N: int, D: int, V: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=generator).to(device, dtype).requires_grad_()
    head_VD = (torch.randn(V, D, generator=generator) / D**0.5 * 3).to(device, dtype).requires_grad_()
    target_N = torch.randint(V, (N,), generator=generator).to(device)
    upstream_N = torch.randn(N, generator=generator).to(device)
    return hidden_ND, head_VD, target_N, upstream_N


def seconds(function, hidden_ND, head_VD, target_N, upstream_N) -> float:
    hidden_ND.grad = head_VD.grad = None
    if hidden_ND.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(hidden_ND, head_VD, target_N).backward(upstream_N)
    if hidden_ND.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    N, D, V = (
        map(int, sys.argv[1:4])
        if len(sys.argv) > 3
        else ((8192, 4096, 151936) if device.type == "cuda" else (1024, 512, 32000))
    )
    print(
        json.dumps(
            {
                "N": N,
                "D": D,
                "V": V,
                "device": str(device),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )
    )
    for dtype in (torch.float32, torch.bfloat16):
        case = inputs(N, D, V, dtype, device)
        times = {"tiled": [], "naive": []}
        for _ in range(ROUNDS + 1):
            times["tiled"].append(seconds(token_logps, *case))
            times["naive"].append(seconds(token_logps_naive, *case))
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up
        rows = slice(0, 128)  # float64 on all rows would hold 8 N V bytes
        exact_N = token_logps_naive(case[0][rows].double(), case[1].double(), case[2][rows])
        error = (token_logps(case[0], case[1], case[2])[rows] - exact_N).abs().max().item()
        print(
            json.dumps({"dtype": str(dtype), **medians, "ratio": medians["tiled"] / medians["naive"], "error": error})
        )


if __name__ == "__main__":
    main()
