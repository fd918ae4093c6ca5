"""A decode step through a layer of DeepSeek-V2-Lite on an emulated NPU: what the NPU emulator makes of it.

``python -m bench.emulated_layer [--dtype fp32] [--context 4096] [--rounds 30]`` builds transformers' model with one
decoder layer at full width (latent attention, 64 experts of which 6 are taken, 2 shared ones), moves it to the device
and decodes one token after the context. It holds the result against the CPU code first, and times nothing that is
wrong. Printed are the wall time of a step, its processor time over all threads, and what each kernel took. torch's own
operators run on one thread: those of a thread pool that wait for work would take turns with the emulator's two.
"""

import argparse
import contextlib
import inspect
import statistics
import sys
import time
from collections import defaultdict

import torch
import transformers

from bench.compare import machine
from mla_kernels import demo, tiles
from mla_kernels.compat.transformers import LatentLayer, enable
from mla_kernels.targets import emulated_npu, emulator

ERROR_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # as bench/conftest.py
ONE_LAYER = dict(num_hidden_layers=1, first_k_dense_replace=0)
CACHE = "cache" if "cache" in inspect.signature(transformers.DeepseekV3Model.forward).parameters else "past_key_values"


def step(model, latents, device):
    """``step()``: the hidden state of one token after these latents, which stay the cache's only ones."""
    layer = LatentLayer()
    cache = transformers.Cache(layers=[layer])
    layer.expect(None)
    layer.update(*(part.to(device) for part in latents))
    token = torch.tensor([[5]], device=device)

    def run() -> torch.Tensor:
        out = model(token, **{CACHE: cache}).last_hidden_state
        layer.crop(-1)
        return out

    return run


@contextlib.contextmanager
def kernel_times():
    """Seconds that the emulator's programs run within the block, by kernel."""
    spent: defaultdict = defaultdict(list)
    run = emulator.Program.__call__

    def timed(program, *arguments):
        start = time.perf_counter()
        peak = run(program, *arguments)
        spent[program.function].append(time.perf_counter() - start)
        return peak

    emulator.Program.__call__ = timed
    try:
        yield spent
    finally:
        emulator.Program.__call__ = run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.emulated_layer", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", choices=list(demo.DTYPES), default="fp32")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="tokens attended to (default 4096)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="timed steps (default 30)")
    options = parser.parse_args()
    if options.context < 2 or options.rounds < 2:
        parser.error("--context and --rounds: at least 2 is accepted")
    emulated_npu.install()
    torch.set_num_threads(1)
    dtype = demo.DTYPES[options.dtype]
    with torch.no_grad(), tiles.silent():
        model = enable(demo.build_model(demo.V2_LITE | ONE_LAYER, dtype, seed=0).model)
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, 1, options.context - 1, width) for width in (model.config.kv_lora_rank, 64)]
        latents = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        expected = step(model, latents, "cpu")().double()
        run = step(model.to("npu"), latents, "npu")
        error = (run().cpu().double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        if not error <= ERROR_LIMIT[dtype]:
            print(f"wrong, not timed: RMS error {error:.3g} of the CPU's result, accepted {ERROR_LIMIT[dtype]}")
            return 1
        wall, processor = [], []
        with kernel_times() as spent:
            for _ in range(options.rounds):
                start, used = time.perf_counter(), time.process_time()
                run()
                wall.append(time.perf_counter() - start)
                processor.append(time.process_time() - used)
    print(machine())
    print(f"RMS error {error:.2g} of the CPU's result; milliseconds of {options.rounds} steps, {options.dtype}:")
    for name, times in {"a step": wall, "its processor time": processor, **spent}.items():
        first, middle, third = (1e3 * quartile for quartile in statistics.quantiles(times, n=4))
        print(f"  {name:<24} {middle:7.1f} ({first:.1f} to {third:.1f}), least {1e3 * min(times):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
