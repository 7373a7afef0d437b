"""How the package is built: one library, opened by its path, in one wheel for every Python."""

import ctypes
import json
import os
import re
import shutil
import subprocess
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

import zeropoint

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
LIBRARY = ROOT / "zeropoint" / "lib" / "libzeropoint.so"
HEADER = (CSRC / "zeropoint.h").read_text()
CMAKE = (ROOT / "CMakeLists.txt").read_text()

INSTRUCTION_SETS = re.findall(r"^ *add_instruction_set\((\w+) ", CMAKE, re.MULTILINE)
"""Names of the files compiled with flags that not every CPU can run."""

NEEDED = r"lib(c|m|pthread|dl|stdc\+\+|gcc_s)\.so(\.\d+)*|ld-linux.*|ld64.*"
"""What the library may ask the loader for."""


def settings():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def override(condition):
    overrides = settings()["tool"]["scikit-build"]["overrides"]
    (found,) = [entry for entry in overrides if condition in entry["if"]]
    return found


def installed() -> Distribution:
    try:
        return distribution("zeropoint")
    except PackageNotFoundError:
        pytest.skip("zeropoint is not installed, only on the path")


@pytest.fixture
def library() -> Path:
    """The library of an editable install, which must be there where there is a compiler."""
    if not LIBRARY.exists():
        where = json.loads(installed().read_text("direct_url.json") or "{}")
        if not where.get("dir_info", {}).get("editable"):
            pytest.skip("not an editable install: the library is not in this folder")
        compiler = shutil.which(os.environ.get("CXX") or "c++")
        assert compiler is None, f"{compiler} is here, {LIBRARY} is not: pip install -v -e ."
        pytest.skip("no C++ compiler here, so no library")
    return LIBRARY


def system_headers(file):
    """What a source includes with <>, itself or through what it includes with quotes."""
    source = (CSRC / file).read_text()
    inner = [system_headers(local) for local in re.findall(r'#include "(.+)"', source)]
    return set(re.findall(r"#include <(.+)>", source)).union(*inner)


def tool(name, *arguments):
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not here")
    run = subprocess.run([name, *arguments], capture_output=True, text=True, check=True)
    return run.stdout


def exported(symbols):
    """Names in what `nm --defined-only` printed, versions cut off."""
    return {line.split()[-1].partition("@")[0] for line in symbols.splitlines() if line.strip()}


def strangers(dynamic):
    """Libraries in what `readelf -d` printed that the native library must not need."""
    libraries = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert libraries, "readelf -d lists no library at all"
    return [name for name in libraries if not re.fullmatch(NEEDED, name)]


# --- what the files say ---


def test_the_wheel_fits_every_python():
    assert settings()["build-system"]["build-backend"] == "scikit_build_core.build"
    assert settings()["tool"]["scikit-build"]["wheel"]["py-api"] == "py3"


def test_the_version_has_one_place():
    assert settings()["project"]["dynamic"] == ["version"]
    assert installed().version == zeropoint.__version__


def test_a_failed_build_is_a_package_without_library_and_says_so():
    failed = override("failed")
    assert failed["wheel"] == {"cmake": False}
    assert "NOT built" in failed["messages"]["after-success"]
    assert failed["if"]["env"] == {"ZEROPOINT_REQUIRE_NATIVE": False}


def test_the_oldest_cmake_is_the_same_in_both_files():
    oldest = re.search(r"cmake_minimum_required\(VERSION (\d+\.\d+)", CMAKE)[1]
    assert override("not")["if"]["not"]["system-cmake"] == f">={oldest}"


def test_cmake_lists_every_source():
    always = re.findall(r"csrc/(\w+)\.cpp", CMAKE)
    assert sorted(always + INSTRUCTION_SETS) == sorted(path.stem for path in CSRC.glob("*.cpp"))


def test_no_flag_makes_code_for_this_machine_only_or_changes_rounding():
    assert "-ffp-contract=off" in CMAKE
    assert not re.findall(r"-march=|-mtune=|-flto|-ffast-math|-Ofast", CMAKE)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_an_instruction_set_shares_no_inline_function_with_the_others(name):
    """The linker keeps one copy of an inline function: perhaps one that this CPU cannot run."""
    assert system_headers(f"{name}.cpp") <= {"immintrin.h", "stdint.h", "stddef.h", "string.h"}


# --- what was built ---


def test_the_installed_wheel_is_tagged_for_every_python():
    tags = re.findall(r"^Tag: (.+)$", installed().read_text("WHEEL"), re.MULTILINE)
    assert tags
    assert all(tag.startswith("py3-none-") for tag in tags), tags


def test_the_library_exports_what_the_header_declares(library):
    symbols = tool("nm", "--dynamic", "--defined-only", str(library))
    assert exported(symbols) == set(re.findall(r"^ZP_API [\w *]*?(zp_\w+)\(", HEADER, re.MULTILINE))


def test_the_library_needs_neither_torch_nor_openmp_nor_python(library):
    assert strangers(tool("readelf", "--dynamic", "--wide", str(library))) == []


def test_the_library_is_of_the_version_of_the_header(library):
    version = int(re.search(r"#define ZP_VERSION (\d+)", HEADER)[1])
    assert ctypes.CDLL(str(library)).zp_version() == version


@pytest.mark.parametrize("name", ["libgomp.so.1", "libtorch_cpu.so", "libpython3.11.so.1.0"])
def test_a_library_that_must_not_be_needed_is_found(name):
    dynamic = " 0x1 (NEEDED)  Shared library: [libc.so.6]\n 0x1 (NEEDED)  Shared library: [{}]\n"
    assert strangers(dynamic.format(name)) == [name]


def test_a_symbol_of_the_runtime_is_found():
    symbols = "0000 T zp_version\n0000 u _ZNSt6locale2id@@GLIBCXX_3.4\n"
    assert exported(symbols) == {"zp_version", "_ZNSt6locale2id"}
