"""Times the kernels on a GPU, cell by cell; a run that was cut off continues where it stopped.

    python -m benchmarks.kernels --output kernels.json
    python -m benchmarks.kernels --output /tmp/smoke.json --smoke    # tiny shapes, any machine: does the code run?

Beside each time stand the bytes that must move, the FLOP, and the floor that follows from copy bandwidth and bf16 rate as measured.
"""

import argparse
import gc
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON; CSV and plots go beside it")
    parser.add_argument("--only", nargs="+", default=[], help="cells whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=60, help="begin no cell after so long")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes; under Triton's interpreter where there is no GPU")
    options = parser.parse_args()
    began = time.monotonic()

    import torch

    if not torch.cuda.is_available():
        if not options.smoke:
            raise SystemExit("No CUDA GPU: these times mean something on a GPU only; --smoke runs tiny shapes without one.")
        os.environ["TRITON_INTERPRET"] = "1"

    from . import comb_attention, gated_lora, report, step
    from .timing import facts, measured_rates, time_us

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = report.load(options.output, {**facts(device), "smoke": options.smoke})
    run.setdefault("rates", measured_rates(device, options.smoke))
    bandwidth, rate = run["rates"]["copy_bytes_per_s"], run["rates"]["matmul_flop_per_s"]
    for module in (gated_lora, comb_attention, step):
        for cell in module.cells(device, options.smoke):
            if "median_us" in run["cells"].get(cell.key, {}) or (
                options.only and not any(part in cell.key for part in options.only)
            ):
                continue
            if time.monotonic() - began > 60 * options.minutes:
                print(f"time is up; the same command goes on with {cell.key}", flush=True)
                break
            floor = 1e6 * max(cell.num_bytes / bandwidth, cell.flops / rate)
            entry = {"operation": cell.operation, "variant": cell.variant, "shape": cell.shape}
            entry |= {"bytes": cell.num_bytes, "flops": cell.flops, "floor_us": floor}
            try:
                calls = cell.make()
                entry |= time_us(calls)
                print(f"{cell.key}: {entry['median_us']:.1f} us, floor {floor:.1f}", flush=True)
            except (RuntimeError, NotImplementedError, ImportError) as error:  # a baseline that this torch lacks, or memory
                if "CUDA error" in str(error):  # nothing runs after it in this process; a new run continues from here
                    raise
                entry["error"] = f"{type(error).__name__}: {error}"[:500]
                print(f"{cell.key}: {entry['error'][:100]}", flush=True)
            run["cells"][cell.key] = entry
            report.save(options.output, run)
            calls = []
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for path in report.write_tables(options.output, run):
        print(path)
    ours = [key for key, cell in run["cells"].items() if "error" in cell and cell["variant"] not in ("forks", "flex", "punica")]
    if ours:
        raise SystemExit(f"{len(ours)} cells failed that run no baseline: {', '.join(ours[:3])}")


if __name__ == "__main__":
    main()
