"""Builds bbb_fast: the Python package and, where a compiler is at hand, its native extension.

CUDA kernels are built when torch is a CUDA build and a CUDA toolkit of its major version is found: in
CUDA_HOME or CUDA_PATH, by the nvcc on PATH, in /usr/local/cuda, or in PyPI's nvidia-cuda-nvcc. No GPU is
needed to build.

Environment:
  BBB_FAST_NO_EXT=1      leave the extension out
  BBB_FAST_NO_CUDA=1     leave the CUDA kernels out
  FORCE_CUDA=1           stop with an error where they cannot be built
  TORCH_CUDA_ARCH_LIST   architectures, as torch reads it (default: those of the GPUs at hand, or else
                         WITHOUT_A_GPU below, and PTX for later ones)
  BBB_FAST_WHEEL         a tag that the version gets, as pt214cpu, where a wheel is made to be given away
  MAX_JOBS               files compiled at a time (default: as many as there are cores)
  CXX, CFLAGS            as usual

pip shows what is printed here with `pip install -v`, or when the build fails. `python -m bbb_fast info`
shows the record of it later.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent
# Code for 8.0 runs on every 8.x, PTX of 9.0 on whatever comes after it.
WITHOUT_A_GPU = ("8.0", "9.0")
# Of one core, for a C++ file, for a CUDA file, and for each architecture of that: to say how long to wait.
CXX_SECONDS, CUDA_SECONDS, ARCHITECTURE_SECONDS = 8, 20, 10
# The kernels never read errno or floating point exceptions; without these two, selects and roots would
# not vectorise. Nothing here changes a result the way -ffast-math would.
COMPILE_ARGS = [
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]
OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []
# A compiler made to link its C++ library statically would leave a second copy of it beside torch's: a number
# in an error message is then written by one copy in the other's locale, which crashes. Named first, the
# shared library serves.
LINK_ARGS = [*OPENMP, "-lstdc++"] if platform.system() == "Linux" else OPENMP


def files(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def switched_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def wheel_tag() -> str:
    """What a wheel that is given away is for: a release of torch, and devices."""
    tag = os.environ.get("BBB_FAST_WHEEL", "").strip()
    if tag and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", tag):
        raise SystemExit(f"bbb_fast: BBB_FAST_WHEEL={tag!r}: small letters, digits and dots, as in pt214cpu")
    return tag


def why_no_extension() -> str | None:
    """The reason to install the reference path alone, or None."""
    if switched_on("BBB_FAST_NO_EXT"):
        return "it was installed with BBB_FAST_NO_EXT=1"
    compilers = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if any(shutil.which(name) for name in compilers):
        return None
    reason = f"no C++ compiler was found at installation (looked for {', '.join(compilers)})"
    if switched_on("FORCE_CUDA") and not switched_on("BBB_FAST_NO_CUDA"):
        raise SystemExit(f"bbb_fast: FORCE_CUDA=1, but {reason}")
    return reason


def output_of(*command: str) -> str:
    """What a command prints, or nothing if it cannot be run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return run.stdout + run.stderr


def find_toolkit() -> Path | None:
    """The folder of a CUDA toolkit with a compiler and headers."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        # nvcc on PATH may be a script or a link outside the toolkit; it says itself where that is.
        top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.M)
        candidates.append(os.path.realpath(top.group(1)) if top else None)
    candidates.append("/usr/local/cuda")
    try:
        import nvidia

        candidates += [str(p) for root in nvidia.__path__ for p in sorted(Path(root).glob("cu[0-9]*"))]
    except ImportError:
        pass
    for path in map(Path, filter(None, candidates)):
        if (path / "bin" / "nvcc").exists() and (path / "include" / "cuda_runtime.h").exists():
            return path
    return None


def toolkit_version(toolkit: Path) -> str:
    found = re.search(r"release (\d+\.\d+)", output_of(str(toolkit / "bin" / "nvcc"), "--version"))
    return found.group(1) if found else "unknown"


def why_no_cuda() -> str | None:
    """The reason to build no CUDA kernels, or None; FORCE_CUDA=1 turns all but an explicit no into errors."""
    if switched_on("BBB_FAST_NO_CUDA"):
        return "it was built with BBB_FAST_NO_CUDA=1"
    import torch

    toolkit = find_toolkit()
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is not a CUDA build"
    elif toolkit is None:
        reason = "no CUDA toolkit was found (CUDA_HOME, nvcc on PATH, /usr/local/cuda, nvidia-cuda-nvcc)"
    elif toolkit_version(toolkit).split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = (
            f"the CUDA toolkit is {toolkit_version(toolkit)} and torch {torch.__version__} was built with "
            f"{torch.version.cuda}"
        )
    else:
        return None
    if switched_on("FORCE_CUDA"):
        raise SystemExit(f"bbb_fast: FORCE_CUDA=1, but {reason}")
    return reason


def visible_gpus() -> list[str]:
    """The compute capabilities of the GPUs that torch sees, the oldest first."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def architectures(toolkit: Path) -> str:
    """TORCH_CUDA_ARCH_LIST; or what is at hand, as far as the compiler knows it, and PTX of the last."""
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return ";".join(asked.replace(";", " ").split())
    known = output_of(str(toolkit / "bin" / "nvcc"), "--list-gpu-arch").split()
    for wanted in (visible_gpus(), list(WITHOUT_A_GPU)):
        if fitting := [a for a in wanted if f"compute_{a.replace('.', '')}" in known]:
            return ";".join(fitting) + "+PTX"
    return ";".join(WITHOUT_A_GPU) + "+PTX"


def runtime_library(toolkit: Path) -> list[str]:
    """A folder where the linker finds libcudart.so, for toolkits from PyPI, which number theirs."""
    numbered = sorted((toolkit / "lib").glob("libcudart.so.*"))
    if not numbered or any((toolkit / d / "libcudart.so").exists() for d in ("lib", "lib64")):
        return []
    folder = ROOT / "build" / "cuda-lib"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(numbered[-1])
    return [str(folder)]


def build_record() -> dict[str, object]:
    """What was built, for ``python -m bbb_fast info`` and the loader."""
    reason = why_no_extension()
    record: dict[str, object] = {"native": reason is None, "reason": reason, "devices": "cpu"}
    if switched_on("BBB_FAST_NO_EXT"):
        record["reference_asked_for"] = True
    if wheel_tag():
        record["wheel"] = wheel_tag()
    try:
        import torch

        record["torch"] = torch.__version__
    except ImportError:
        record["torch"] = None
    if reason is None:
        record["no_cuda_because"] = why_no_cuda()
        if record["no_cuda_because"] is None:
            toolkit = find_toolkit()
            assert toolkit is not None  # why_no_cuda would have said so
            record["devices"] = "cpu,cuda"
            record["cuda_toolkit"] = toolkit_version(toolkit)
            record["cuda_architectures"] = architectures(toolkit).replace(";", " ")
    return record


def write_record(folder: Path, record: dict[str, object]) -> None:
    target = folder / "bbb_fast" / "_build_info.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n")


def show_ninja() -> None:
    """Adds the folder of PyPI's ninja to PATH, where alone torch looks; without it files compile in turn."""
    folders = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    try:
        import ninja

        folders.append(ninja.BIN_DIR)
    except (ImportError, AttributeError):
        pass
    os.environ["PATH"] = os.pathsep.join(filter(None, folders))


def jobs() -> int:
    if not shutil.which("ninja"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("MAX_JOBS", "")
    return min(cores, max(int(asked), 1)) if asked.isdigit() else cores


def announcement(record: dict[str, object]) -> str:
    """What is going to be compiled, and for how long."""
    count = len(files("csrc/*.cpp", "csrc/cpu/*.cpp"))
    text, seconds = f"bbb_fast: compiling {count} C++ files", count * CXX_SECONDS
    if "cuda_architectures" in record:
        kernels, targets = len(files("csrc/cuda/*.cu")), str(record["cuda_architectures"])
        text += f" and {kernels} CUDA files for {targets}"
        seconds += kernels * (CUDA_SECONDS + len(targets.split()) * ARCHITECTURE_SECONDS)
    why = "MAX_JOBS" if shutil.which("ninja") else "ninja is not installed"
    return f"{text}, {jobs()} at a time ({why}): about {max(round(seconds / jobs() / 60), 1)} minute(s)"


class BuildPy(build_py):
    """Also writes the record down."""

    def run(self) -> None:
        super().run()
        write_record(ROOT if self.editable_mode else Path(self.build_lib), build_record())


class EggInfo(egg_info):
    """Also gives a wheel its local version, after a plus: this release of ours, built for one of torch."""

    def finalize_options(self) -> None:
        if wheel_tag():
            self.tag_build = f"+{wheel_tag()}"
        super().finalize_options()


def extension() -> object:
    """The extension bbb_fast._C, with CUDA kernels or without."""
    sources = files("csrc/*.cpp", "csrc/cpu/*.cpp")
    compile_args = {"cxx": COMPILE_ARGS + OPENMP}
    options = {"depends": files("csrc/**/*.h"), "extra_link_args": LINK_ARGS}
    if why_no_cuda() is not None:
        from torch.utils.cpp_extension import CppExtension

        return CppExtension("bbb_fast._C", sources, extra_compile_args=compile_args, **options)

    toolkit = find_toolkit()
    assert toolkit is not None  # why_no_cuda would have said so
    os.environ["CUDA_HOME"] = str(toolkit)  # read by torch when the next line is imported
    from torch.utils.cpp_extension import CUDAExtension

    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(toolkit)
    # Neither a space nor a comma nor a semicolon gets through every command line on the way.
    define = "-DBBB_FAST_CUDA_ARCHS=" + architectures(toolkit).replace(";", ":")
    sources.remove(os.path.join("csrc", "without_cuda.cpp"))
    compile_args["cxx"] = [*compile_args["cxx"], define]
    compile_args["nvcc"] = ["-O3", "-Xcompiler", "-fvisibility=hidden", define]
    return CUDAExtension(
        "bbb_fast._C",
        sources + files("csrc/cuda/*.cu"),
        extra_compile_args=compile_args,
        library_dirs=runtime_library(toolkit),
        **options,
    )


commands: dict[str, type] = {"build_py": BuildPy, "egg_info": EggInfo}
extensions = []
if why_no_extension() is None:
    show_ninja()
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"bbb_fast: building needs torch ({error}): install it first and give pip --no-build-isolation, "
            "or set BBB_FAST_NO_EXT=1"
        ) from None
    extensions.append(extension())
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """Also says what it does, and adds to the record how long that took."""

        def run(self) -> None:
            record = build_record()
            print(announcement(record), flush=True)
            start = time.perf_counter()
            super().run()
            took = {"build_seconds": round(time.perf_counter() - start), "build_jobs": jobs()}
            write_record(ROOT if self.inplace else Path(self.build_lib), {**record, **took})

    commands["build_ext"] = BuildExt
else:
    print(f"bbb_fast: installing the reference path only: {why_no_extension()}")

setup(ext_modules=extensions, cmdclass=commands)
