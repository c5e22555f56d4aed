"""Checks that results do not depend on the CPU; what ``make portability`` runs, on x86-64 Linux.

  binary    instructions past plain x86-64 are only where the dispatch leads on a CPU that has them
  avx2      the tests of the layers pass with BBB_FAST_ISA=avx2 (those of the ops take each in turn)
  base      and with BBB_FAST_ISA=base
  no-avx    PyTorch, the extension and some tests of the ops run on an emulated CPU without AVX, which dies
            of any AVX instruction; the kernels' mathematics also on the first x86-64 CPUs
  aarch64   every source compiles for 64-bit ARM without a warning; the mathematics gives the promised noise
  s390x     the mathematics on a big-endian CPU

All of them run, unless ``--only`` names some. Needs a built package, binutils and g++. Emulators and cross
compilers are taken from PATH, else from Debian's packages, which are unpacked into build/portability:
that needs apt-get, dpkg and the network, not root.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checks import ROOT, CheckError, run, run_checks

WORK = ROOT / "build" / "portability"
DEBIAN = WORK / "debian"
# Programs by any of their names, and the package that has them.
PROGRAMS = {
    "qemu-x86_64": (("qemu-x86_64-static", "qemu-x86_64"), "qemu-user-static"),
    "qemu-aarch64": (("qemu-aarch64-static", "qemu-aarch64"), "qemu-user-static"),
    "qemu-s390x": (("qemu-s390x-static", "qemu-s390x"), "qemu-user-static"),
    "aarch64": (("aarch64-linux-gnu-g++",), "g++-aarch64-linux-gnu"),
    "s390x": (("s390x-linux-gnu-g++",), "g++-s390x-linux-gnu"),
}
# Intel's last generation without AVX, the least that PyTorch's own libraries run on; and plain x86-64.
WITHOUT_AVX, PLAIN = "Nehalem", "qemu64"
# One instruction of each extension that the kernels of avx2 and avx512 are compiled for.
PAST_BASE = (
    "vzeroupper",
    "vpaddd %ymm0, %ymm0, %ymm0",
    "vfmadd231ps %xmm0, %xmm0, %xmm0",
    "vcvtph2ps %xmm0, %xmm0",
    "shlx %rax, %rax, %rax",
    "vpaddd %zmm0, %zmm0, %zmm0",
)
FLAGS = (
    "-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Werror", "-Wno-psabi",
    "-Wno-maybe-uninitialized",
)  # fmt: skip


def find(name: str) -> str | None:
    unpacked = os.pathsep.join((os.environ.get("PATH", ""), str(DEBIAN / "usr" / "bin")))
    return next(filter(None, (shutil.which(n, path=unpacked) for n in PROGRAMS[name][0])), None)


def program(name: str) -> str:
    path = find(name)
    if path is None:
        raise CheckError(f"{PROGRAMS[name][0][0]} was not found, on PATH or in {DEBIAN}")
    return path


def unpack_missing(names: list[str]) -> None:
    """Downloads the packages of the programs that are missing, with all they need, and unpacks them.

    apt-get keeps lists and downloads in a folder of ours, so that it changes nothing on the machine.
    """
    packages = sorted({PROGRAMS[name][1] for name in names if find(name) is None})
    if not packages:
        return
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise CheckError(
                f"{tool} was not found: install {', '.join(packages)}, or what holds the same programs"
            )
    state = WORK / "apt"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State": state / "state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": state / "cache",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in options.items())]
    print(f"unpacking {', '.join(packages)} into {DEBIAN.relative_to(ROOT)}", flush=True)
    run(*apt, "update")
    run(*apt, "install", "--yes", "--download-only", *packages)
    for archive in sorted((state / "cache" / "archives").glob("*.deb")):
        run("dpkg", "-x", archive, DEBIAN)
        archive.unlink()


def binary() -> str:
    """Disassembles the extension: what uses which registers and encodings."""
    built = sorted(ROOT.glob("bbb_fast/_C.*.so"))
    if len(built) != 1:
        raise CheckError(f"expected one extension built in place, bbb_fast/_C.*.so; found {built}")
    # VEX and EVEX instructions begin with a v (but for verr and verw); the others are BMI's.
    past_base = re.compile(r"\t(v(?!err|erw)\w+|andn|bzhi|mulx|pdep|pext|rorx|s[ah][lr]x)\b")
    past_avx2 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])")
    counts = {"base": 0, "avx2": 0, "avx512": 0}
    wrong: set[str] = set()
    function = owner = ""
    for line in run("objdump", "-d", "--no-show-raw-insn", *built).splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
            owner = next(
                (isa for isa in ("avx512", "avx2") if f"8bbb_fast{len(isa)}{isa}" in function), "base"
            )
        elif "\t" in line:
            counts[owner] += 1
            if owner != "avx512" and past_avx2.search(line):
                wrong.add(f"{function}: {line.strip()}")
            if owner == "base" and past_base.search(line):
                wrong.add(f"{function}: {line.strip()}")
    if wrong:
        raise CheckError(
            "instructions that not every CPU has, outside the dispatch:\n" + "\n".join(sorted(wrong)[:20])
        )
    if not all(counts.values()):
        raise CheckError(f"the extension has no code for some instruction set: {counts}")
    return f"{counts} instructions"


def tests(*names: str, isa: str, before: tuple[str, ...] = ()) -> str:
    """Runs test files where the instruction set in use is ``isa``, asked for or found."""
    files = [f"python_tests/test_{name}.py" for name in names]
    start = (
        "import sys, bbb_fast, pytest\n"
        "used = bbb_fast.build_info()['extension']['instruction_set']\n"
        "sys.exit(pytest.main(sys.argv[2:]) if used == sys.argv[1] else f'in use is {used}')"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("BBB_FAST_ISA", None)
    if before:
        # NumPy's OpenBLAS takes the emulated CPU for the newest of its maker's, whatever it can do.
        env["OPENBLAS_CORETYPE"] = WITHOUT_AVX
    else:
        env["BBB_FAST_ISA"] = isa
    # opcheck is about the registration of ops, the same everywhere, and slow.
    options = ["-p", "no:cacheprovider", "--tb=short", "-o", "addopts=", "-k", "not opcheck"]
    if not before:
        options += ["-n", "2"]
    text = run(*before, sys.executable, "-c", start, isa, *options, *files, env=env)
    return text.strip().splitlines()[-1].strip("= ")


def avx2() -> str:
    return tests("layers", isa="avx2")


def base() -> str:
    return tests("layers", isa="base")


def cross(compiler: str) -> tuple[list[str], dict[str, str]]:
    """A cross compiler's command and environment; an unpacked one needs its libraries named."""
    libraries = DEBIAN / "usr" / "lib" / "x86_64-linux-gnu"
    path = os.pathsep.join(filter(None, (str(libraries), os.environ.get("LD_LIBRARY_PATH"))))
    return [program(compiler), *FLAGS], {**os.environ, "LD_LIBRARY_PATH": path}


def mathematics(name: str, command: list[str], env: dict[str, str], *emulator: str) -> None:
    """Builds csrc/test/test_base.cpp and runs it with the golden values of the noise."""
    sys.path[:0] = [str(ROOT), str(ROOT / "python_tests")]
    from test_noise import GOLDEN

    target = WORK / f"test_base-{name}"
    run(*command, "-static", "csrc/test/test_base.cpp", "csrc/cpu/isa.cpp", "-o", target, env=env)
    for numbers, values in GOLDEN.items():
        run(*emulator, target, *numbers, *values)


def no_avx() -> str:
    emulator = program("qemu-x86_64")
    for number, instruction in enumerate(PAST_BASE):
        # The emulated CPU does refuse what it lacks; else all that follows would prove nothing.
        source, target = WORK / f"control-{number}.cpp", WORK / f"control-{number}"
        source.write_text(f'int main() {{ asm volatile("{instruction}"); }}\n')
        run("g++", "-static", source, "-o", target)
        for cpu in (WITHOUT_AVX, PLAIN):
            done = subprocess.run([emulator, "-cpu", cpu, target], capture_output=True, check=False)
            if done.returncode != -signal.SIGILL:
                raise CheckError(f"the emulated {cpu} runs {instruction!r}: exit status {done.returncode}")
    mathematics("x86_64", ["g++", *FLAGS], dict(os.environ), emulator, "-cpu", PLAIN)
    # A part, as the emulator is slow: `base` runs the same kernels, and `binary` has seen every instruction.
    return tests("isa", isa="base", before=(emulator, "-cpu", WITHOUT_AVX))


def aarch64() -> str:
    import pybind11
    from torch.utils.cpp_extension import include_paths

    command, env = cross("aarch64")
    mathematics("aarch64", command, env, program("qemu-aarch64"))
    # Python's headers are this machine's: both have 64-bit pointers and longs. Debian has a part of them in a
    # folder of the architecture's name.
    python = Path(sysconfig.get_path("include"))
    here = Path("/usr/include", str(sysconfig.get_config_var("MULTIARCH")), python.name)
    there = WORK / "aarch64" / "aarch64-linux-gnu" / python.name
    there.parent.mkdir(parents=True, exist_ok=True)
    there.unlink(missing_ok=True)
    there.symlink_to(here)
    headers = [*include_paths(), pybind11.get_include(), str(python), str(WORK / "aarch64")]
    command += ["-fopenmp", "-fPIC", "-fvisibility=hidden", *(f"-isystem{folder}" for folder in headers)]
    # torch's headers, which take most of the time, are read once.
    prefix = WORK / "aarch64" / "prefix.h"
    prefix.write_text("#include <torch/library.h>\n#include <torch/csrc/autograd/custom_function.h>\n")
    run(*command, "-x", "c++-header", prefix, "-o", f"{prefix}.gch", env=env)
    sources = sorted((*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")))
    command += ["-include", str(prefix), "-Winvalid-pch", "-fsyntax-only"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: run(*command, source, env=env), sources))
    return f"{len(sources)} sources compiled"


def s390x() -> str:
    mathematics("s390x", *cross("s390x"), program("qemu-s390x"))
    return "big-endian noise is the promised one"


CHECKS: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "no-avx": (no_avx, ("qemu-x86_64",)),
    "aarch64": (aarch64, ("aarch64", "qemu-aarch64")),
    "avx2": (avx2, ()),
    "base": (base, ()),
    "s390x": (s390x, ("s390x", "qemu-s390x")),
    "binary": (binary, ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="checks at a time (default: CPUs)")
    chosen = parser.parse_args()
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise SystemExit(f"portability: needs x86-64 Linux, this is {platform.machine()} {platform.system()}")
    WORK.mkdir(parents=True, exist_ok=True)
    try:
        unpack_missing([tool for name in chosen.only for tool in CHECKS[name][1]])
    except CheckError as error:
        raise SystemExit(f"portability: emulators and cross compilers: {error}") from error
    checks = {name: check for name, (check, _) in CHECKS.items()}
    run_checks("portability", checks, chosen.only, chosen.jobs)


if __name__ == "__main__":
    main()
