"""Check what `make wheel` built: `python .ci/check_wheel.py dist`.

The sources hold what the build needs, the wheel fits every Python, and its library loads under the
oldest and the newest one found here.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SUPPORTED = [f"3.{minor}" for minor in range(10, 16)]
LOAD = """
import ctypes, pathlib, sys, zeropoint
library = pathlib.Path(zeropoint.__file__).parent / "lib" / "libzeropoint.so"
version = ctypes.CDLL(str(library)).zp_version()
print(f"Python {sys.version.split()[0]}: {library.name} loaded, zp_version() = {version}")
"""


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} must hold one {pattern}, found {[path.name for path in found]}")
    return found[0]


def check_sources(path: Path) -> None:
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"CMakeLists.txt", *map(str, Path("csrc").glob("*"))}
    if not wanted <= inside:
        sys.exit(f"{path.name} lacks {sorted(wanted - inside)}")
    built = [name for name in inside if name.endswith((".so", ".o"))]
    if built:
        sys.exit(f"{path.name} holds what was built here: {built}")
    print(f"{path.name}: {len(inside)} files, csrc and CMakeLists.txt among them")


def check_tag(wheel: Path) -> None:
    if not re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name):
        sys.exit(f"{wheel.name} should be tagged py3-none-PLATFORM")
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes")


def interpreters() -> dict[str, str]:
    """Version -> program, of the supported Pythons that start here."""
    if shutil.which("pyenv"):  # whose programs refuse to start until their version is selected
        shown = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)
        os.environ["PYENV_VERSION"] = ":".join(shown.stdout.split())
    found = {}
    for version in SUPPORTED:
        program = shutil.which(f"python{version}")
        if program and not subprocess.run([program, "-c", "import venv, ensurepip"]).returncode:
            found[version] = program
    return found


def load(program: str, wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([program, "-m", "venv", folder], check=True)
        python = str(Path(folder) / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*install, str(wheel.resolve())], check=True)
        subprocess.run([python, "-c", LOAD], cwd=folder, check=True)


def main(folder: Path) -> None:
    check_sources(only(folder, "*.tar.gz"))
    wheel = only(folder, "*.whl")
    check_tag(wheel)
    found = interpreters() or {"this": sys.executable}
    for version in sorted({list(found)[0], list(found)[-1]}):
        load(found[version], wheel)
    if len(found) == 1:
        print("Only one Python is here: the wheel was NOT tried under a second version.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
