"""Times the kernels on a GPU, cell by cell; a run that was cut off continues where it stopped.

    python -m benchmarks.kernels --output kernels.json
    python -m benchmarks.kernels --output /tmp/smoke.json --smoke    # tiny shapes, any machine: does the code run?

Beside each time stand the bytes that must move, the FLOP, and the floor that follows from copy bandwidth and bf16 rate as measured.
"""

import gc

from .command import Command

BASELINES = "forks", "flex", "punica"  # of which a machine may lack one


def main() -> None:
    command = Command.begin(__doc__, "these times mean something on a GPU only")

    import torch

    from . import comb_attention, gated_lora, report, step
    from .timing import measured_rates, time_us

    device, run = command.device, command.run
    run.setdefault("rates", measured_rates(device, command.smoke))
    bandwidth, rate = run["rates"]["copy_bytes_per_s"], run["rates"]["matmul_flop_per_s"]
    cells = [cell for module in (gated_lora, comb_attention, step) for cell in module.cells(device, command.smoke)]
    for cell in cells:
        if "median_us" in run["cells"].get(cell.key, {}) or not command.wants(cell.key):
            continue
        if not command.in_time(cell.key):
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
        command.keep(cell.key, entry)
        calls = []
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for path in report.write_tables(command.output, run):
        print(path)
    ours = [key for key, cell in run["cells"].items() if "error" in cell and cell["variant"] not in BASELINES]
    if ours:
        raise SystemExit(f"{len(ours)} cells failed that run no baseline: {', '.join(ours[:3])}")


if __name__ == "__main__":
    main()
