"""Put a trained base and its adapter where the package ships them.

python -m benchmarks.demo_model.publish --base runs/base/model --adapter runs/adapter/adapter
"""

import argparse
import json
import shutil
from pathlib import Path

from vllm_mtp import demo
from vllm_mtp.adapter import validate_folder

BASE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "figures.json",
)
MAX_MEGABYTES = 30


def publish(base: Path, adapter: Path) -> None:
    """Copy both folders after checking that they belong together and are small enough to ship."""
    validate_folder(adapter, base)
    size = sum((base / name).stat().st_size for name in BASE_FILES if (base / name).exists())
    size += sum(file.stat().st_size for file in adapter.iterdir())
    if size > MAX_MEGABYTES * 1_000_000:
        raise ValueError(f"base and adapter are {size / 1e6:.1f} MB together, more than {MAX_MEGABYTES}: train a smaller rank.")
    for folder in (demo.BASE, demo.ADAPTER):
        shutil.rmtree(folder, ignore_errors=True)
    demo.BASE.mkdir()
    for name in BASE_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, demo.BASE / name)
    config = json.loads((base / "config.json").read_text())
    config["use_cache"] = True  # training switched it off
    (demo.BASE / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copytree(adapter, demo.ADAPTER, copy_function=shutil.copyfile)
    validate_folder(demo.ADAPTER, demo.BASE)
    print(f"{size / 1e6:.1f} MB in {demo.FOLDER}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    arguments = parser.parse_args()
    publish(arguments.base, arguments.adapter)


if __name__ == "__main__":
    main()
