"""Runs the tests on an extension built with sanitizers; what ``make sanitize`` does, on Linux with g++.

  address   AddressSanitizer and UndefinedBehaviorSanitizer: the tests of ops and layers
  isas      the tests of the kernels again, with BBB_FAST_ISA=avx2 and base
  fuzz      random and malformed calls, on the same build
  threads   ThreadSanitizer: python_tests/test_races.py
  controls  faults that are there on purpose (csrc/test/faults.cpp) are reported, in the same processes

All of them run, unless ``--only`` names some. A report is a failure, also of a process that a test starts.

The extension alone is built so, a copy of it in build/sanitize. Memory of tensors comes from malloc, so that
AddressSanitizer knows the ends of every tensor, whoever made it. PyTorch and libgomp are not built so: what
they do wrong, or what another thread does in them, is not seen. Of CPython, leaks are not looked for, as it
frees little at its end; python_tests/test_soak.py watches the memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from checks import ROOT, CheckError, long_run, run, run_checks

WORK = ROOT / "build" / "sanitize"
SUPPRESSIONS = WORK / "thread" / "suppressions"
FLAGS = {
    "address": (
        "-fsanitize=address,undefined,float-cast-overflow",
        # AddressSanitizer finds what comes of most of these, and they would double the time of compiling;
        # vptr wants the type information of torch's classes.
        "-fno-sanitize=vptr,null,alignment,object-size,pointer-overflow",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        # Checks as calls, which compile faster than checks in line.
        *("--param", "asan-instrumentation-with-call-threshold=0"),
    ),
    "thread": ("-fsanitize=thread", "-fno-omit-frame-pointer"),
}
# libstdc++ too: AddressSanitizer looks for its functions before Python loads it.
PRELOADED = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    "address": {
        # A size that no machine has is an error of the call, not of the process.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    # Of other libraries, mutexes and threads are seen and accesses are not: without this, some would be.
    "thread": {
        "TSAN_OPTIONS": f"ignore_noninstrumented_modules=1:history_size=4:suppressions={SUPPRESSIONS}"
    },
}
# In torch's header: threads that use one parameter write the same true to its node.
SUPPRESSED = "race_top:torch::autograd::Node::topological_nr\n"
KERNEL_TESTS = ("noise", "dropout", "sample_weights", "kl_divergence", "special_values")
OP_TESTS = (
    *("isa", *KERNEL_TESTS, "bbb", "lrt", "flipout", "conv_transpose", "bilinear", "embedding"),
    *("multi_sample", "priors", "kl_node", "second_derivatives", "transforms", "routes", "layers", "memory"),
    *("errors", "inference", "properties"),
)


def compiler(kind: str) -> Path:
    """A script that compiles as it is told, but for the optimization, which takes most of the time."""
    script = WORK / kind / "c++"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text('#!/bin/sh\nexec c++ "$@" -O1 -g1\n')
    script.chmod(0o755)
    return script


@cache
def built(kind: str) -> Path:
    """A folder with the package: its extension built with the sanitizer, and links to everything else."""
    folder, cxx, flags = WORK / kind, compiler(kind), FLAGS[kind]
    link = [flags[0]]
    if kind == "thread":
        SUPPRESSIONS.write_text(SUPPRESSED)
        wrapper = folder / "tsan_openmp.o"
        run(cxx, *flags, "-fPIC", "-c", "csrc/test/tsan_openmp.cpp", "-o", wrapper)
        link += [str(wrapper), "-Wl,--wrap=GOMP_parallel"]
    env = {**os.environ, "CXX": str(cxx), "CFLAGS": " ".join(flags), "LDFLAGS": " ".join(link)}
    places = ("--build-lib", folder, "--build-temp", folder / "objects")
    build = (sys.executable, "setup.py", "build_ext", *places)
    long_run(f"building with {flags[0]}", *build, env={**env, "BBB_FAST_NO_CUDA": "1"})
    package = folder / "bbb_fast"
    for old in filter(Path.is_symlink, package.iterdir()):
        old.unlink()
    for path in (ROOT / "bbb_fast").iterdir():
        if path.suffix != ".so" and path.name not in ("_build_info.json", "__pycache__"):
            (package / path.name).symlink_to(path)
    options = ("-shared", "-fPIC", "-fopenmp", *link)
    run(cxx, *flags, *options, "csrc/test/faults.cpp", "-o", folder / "faults.so")
    return folder


def sanitized(kind: str, *command: object, **variables: str) -> str:
    """Runs Python, which finds the package that was built; raises CheckError with what was reported."""
    folder = built(kind)
    libraries = [run("c++", f"-print-file-name={name}").strip() for name in PRELOADED[kind]]
    for old in folder.glob("report.*"):
        old.unlink()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": " ".join(libraries), **variables}
    env["PYTHONPATH"] = os.pathsep.join((str(folder), str(ROOT / "python_tests")))
    for name, value in OPTIONS[kind].items():
        env[name] = f"{value}:log_path={folder / 'report'}"
    try:
        # Not where the package is that was built in place: Python looks there first.
        said, failed = run(sys.executable, "-W", "ignore", *command, env=env, cwd=folder), False
    except CheckError as error:
        said, failed = str(error), True
    reports = [report.read_text() for report in sorted(folder.glob("report.*"))]
    if failed or reports:
        raise CheckError("\n".join((said, *reports)))
    return said


def tests(kind: str, *names: str, **variables: str) -> str:
    """Runs test files on the extension that was built; returns the last line."""
    start = (
        "import sys, pytest, bbb_fast\n"
        "here = bbb_fast.__file__.startswith(sys.argv[1]) and bbb_fast.backend() == 'native'\n"
        "sys.exit(pytest.main(sys.argv[2:]) if here else f'{bbb_fast.__file__}: {bbb_fast.build_info()}')"
    )
    files = [str(ROOT / "python_tests" / f"test_{name}.py") for name in names]
    # opcheck is about the registration of ops; what is compiled runs other code, and compilers under a
    # sanitizer take their time.
    options = ("-x", "-s", "-p", "no:cacheprovider", "--tb=short", "-k", "not opcheck and not compile")
    said = sanitized(kind, "-c", start, f"{built(kind)}{os.sep}", *options, *files, **variables)
    return said.strip().splitlines()[-1].strip("= ")


def address() -> str:
    return tests("address", *OP_TESTS)


def isas() -> str:
    return ", ".join(
        f"{isa}: {tests('address', *KERNEL_TESTS, BBB_FAST_ISA=isa)}" for isa in ("avx2", "base")
    )


def fuzz() -> str:
    return sanitized("address", "-m", "fuzz", "--calls", "300", "--malformed", "300").strip().splitlines()[-1]


def threads() -> str:
    # Threads of OpenMP that sleep while there is nothing to do: there are more than cores.
    return tests("thread", "races", OMP_WAIT_POLICY="passive")


# Calls of csrc/test/faults.cpp: one in which nothing is wrong, and what is reported of the others.
BEFORE = """
import ctypes, torch
from threading import Thread
faults = ctypes.CDLL("./faults.so")
values = torch.zeros(1000)
"""
WELL = {
    "address": "faults.read_past(ctypes.c_void_p(values.data_ptr()), 999)",
    "thread": "faults.add_apart()",
}
FAULTS = {
    "address": {
        "heap-buffer-overflow": "faults.read_past(ctypes.c_void_p(values.data_ptr()), 1000)",
        "signed integer overflow": "faults.add_one(2**31 - 1)",
        "outside the range of representable values": "faults.to_integer(ctypes.c_float(3e9))",
    },
    "thread": {
        "data race": "[Thread(target=faults.count_a_call).start() for _ in range(2)]",
        "add_together": "faults.add_together()",
    },
}


def controls() -> str:
    for kind, faults in FAULTS.items():
        sanitized(kind, "-c", BEFORE + WELL[kind])
        for report, call in faults.items():
            try:
                sanitized(kind, "-c", BEFORE + call)
            except CheckError as error:
                if report not in str(error):
                    raise
            else:
                raise CheckError(f"not reported: {call}")
    return f"{sum(map(len, FAULTS.values()))} faults are reported"


CHECKS: dict[str, Callable[[], str]] = {
    "controls": controls,
    "address": address,
    "isas": isas,
    "fuzz": fuzz,
    "threads": threads,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK")
    chosen = parser.parse_args()
    if platform.system() != "Linux":
        raise SystemExit(f"sanitize: needs Linux, this is {platform.system()}")
    # One after the other: they share the folders of reports.
    run_checks("sanitize", CHECKS, chosen.only, jobs=1)


if __name__ == "__main__":
    main()
