"""What is shipped: every module and data file of the package is in the wheel, and the marker of its types."""

import configparser
import subprocess
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.compat import ROOT, build_wheel

FOLDERS = {"vllm_mtp": ROOT / "vllm_mtp", "vllm_mtp/kernels": ROOT / "kernels"}
"""Where setup.cfg takes packages from."""
NOT_SHIPPED = ("vllm_mtp/kernels/README.md",)


def shipped() -> set[str]:
    """Every file of the packages that git knows, under its name in the wheel."""
    found = set()
    for name, folder in FOLDERS.items():
        listed = subprocess.run(["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=True).stdout
        found |= {f"{name}/{path}" for path in listed.splitlines()}
    return found - set(NOT_SHIPPED)


def test_setup_cfg_lists_every_package_and_data_file() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {name.replace(".", "/") for name in setup["options"]["packages"].split()}
    data = {
        f"{package.replace('.', '/')}/{pattern.strip()}"
        for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.split(",")
    }
    files = shipped()
    assert packages == {name.rpartition("/")[0] for name in files if name.endswith(".py")}
    missing = [name for name in files if not name.endswith(".py") and not any(fnmatch(name, pattern) for pattern in data)]
    assert not missing, "name them in setup.cfg"


@pytest.mark.full
def test_the_wheel_holds_what_is_shipped_and_nothing_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(tmp_path)) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert b"[vllm.general_plugins]\nmtp = vllm_mtp.plugin:register" in archive.read(entry_points)
    assert names == shipped()
    assert {"vllm_mtp/py.typed", "vllm_mtp/kernels/cpu/rows.h", "vllm_mtp/demo/base/model.safetensors"} <= names
