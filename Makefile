# make demo        set up .venv, build, train a Bayesian LeNet and show what it knows and does not know
# make test        set up .venv, build, run the tests            (PYTEST_ARGS=... to choose)
# make test-slow   the tests marked slow too
# make fuzz        random calls, the kernels against the reference, and malformed ones; a quarter of an hour or
#                  so (FUZZ_ARGS="--case 0:1234" runs one again, as a failure prints it)
# make sanitize    the tests of ops and layers under AddressSanitizer and UndefinedBehaviorSanitizer, threads
#                  under ThreadSanitizer; Linux with g++, half an hour or so (SANITIZE_ARGS="--only threads" chooses)
# make test-cpp    the C++ tests, through CMake and ctest
# make test-blocks the tests of the ops, on the CUDA kernels run block by block on the CPU
# make portability each instruction set, an emulated CPU without AVX, compilers for other CPUs; x86-64 Linux,
#                  takes emulators and compilers from Debian's packages (PORTABILITY_ARGS="--only avx2" chooses)
# make cuda-check  without a GPU: build for sm_80 and sm_90 against PyPI's CUDA torch, list registers, fail on
#                  spills, run the CPU tests through that build; sets up build/cuda-check (5 GB a release)
# make wheels      wheels with the CPU's kernels, into dist, for each supported release of torch (TORCH=2.13.0: for
#                  one) and the Python that PYTHON= names; sets up build/wheels (up to 5 GB a release)
# make gpu-report  on a machine with a GPU, torch and nvcc: build, GPU tests, sanitizers, benchmarks
# make lint        ruff, clang-format and mypy, checking only;  make format  changes the files
# make docs        build the documentation's site into build/site; executes the tutorials that have changed
# make stubs       write bbb_fast/functional.pyi and reference.pyi anew, after a change of a function's arguments
# make bench       the benchmark of the layers, against torch.nn, torch.compile and other libraries, which it
#                  installs; ten minutes or so (BENCH_ARGS=--quick: that it runs; --compare OLD.json)
# make clean       remove what was built
#
# torch comes from the active interpreter if it has one, else torch==2.13.0 is installed. Everything else
# is installed into .venv. BBB_FAST_NO_EXT=1 installs and tests the reference path alone.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PYTEST_ARGS ?=
# No step of the installation is silent for long; all of its output is shown if it fails.
STEP := $(PYTHON) .ci/progress.py
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# One stamp for each way of installing; taking one way removes the other's stamp, so that the two never mix.
NO_EXT := $(filter-out 0 false no off,$(shell echo "$(BBB_FAST_NO_EXT)" | tr A-Z a-z))
INSTALLED := $(VENV)/.$(if $(NO_EXT),reference,native)
OTHER := $(VENV)/.$(if $(NO_EXT),native,reference)
NATIVE_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.h)
OP_TESTS := $(addprefix python_tests/test_,noise.py dropout.py sample_weights.py kl_divergence.py bbb.py lrt.py flipout.py \
  conv_transpose.py multi_sample.py priors.py layer_table.py layers.py memory.py losses.py errors.py inference.py models.py compile.py kernels_on_cpu.py)

.PHONY: demo test test-slow fuzz test-cpp test-blocks portability sanitize cuda-check wheels gpu-report lint format docs stubs bench setup clean

demo: setup
	$(PY) benchmarks/demo.py

test: setup
	$(PY) -m pytest $(PYTEST_ARGS)

test-slow: setup
	$(PY) -m pytest --run-slow $(PYTEST_ARGS)

FUZZ_ARGS ?= --calls 20000 --malformed 5000

fuzz: setup
	PYTHONPATH=python_tests OMP_NUM_THREADS=1 $(PY) -W ignore -m fuzz $(FUZZ_ARGS)

CMAKE := $(VENV)/bin/cmake

# -O1: the compiler takes most of the time of these tests, and they ask for no speed. (g++ 12 fails at -O0.)
build/cmake/build.ninja: CMakeLists.txt | setup
	@$(STEP) "installing CMake" $(PY) -m pip install "cmake>=3.18,<4"
	$(CMAKE) -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	  -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" \
	  -DCMAKE_PREFIX_PATH="$$($(PY) -c 'import torch; print(torch.utils.cmake_prefix_path)')"

test-cpp: build/cmake/build.ninja
	$(CMAKE) --build build/cmake
	$(VENV)/bin/ctest --test-dir build/cmake --output-on-failure

test-blocks: build/cmake/build.ninja
	$(CMAKE) --build build/cmake --target bbb_fast_blocks
	$(PY) -m pytest $(OP_TESTS) --kernels-on-cpu build/cmake/libbbb_fast_blocks.so $(PYTEST_ARGS)

portability: setup
	$(PY) .ci/portability.py $(PORTABILITY_ARGS)

sanitize: setup
	$(PY) .ci/sanitizers.py $(SANITIZE_ARGS)

cuda-check:
	$(PYTHON) .ci/cuda_check.py $(CUDA_CHECK_ARGS)

wheels:
	$(PYTHON) .ci/wheels.py $(if $(TORCH),--torch $(TORCH)) $(WHEELS_ARGS)

gpu-report:
	$(PYTHON) benchmarks/gpu_report.py $(GPU_REPORT_ARGS)

# Without their dependencies, so that nothing replaces torch; the benchmark says which of them are missing.
$(VENV)/.rivals: $(VENV)/.torch benchmarks/rivals.txt
	@$(STEP) "installing the other libraries" $(PY) -m pip install --no-deps -r benchmarks/rivals.txt && touch $@ || \
	  echo "the other libraries could not be installed; their rows will say so"

# torch.profiler, which measures memory, announces every start otherwise.
bench: setup $(VENV)/.rivals
	KINETO_LOG_LEVEL=99 TORCH_CPP_LOG_LEVEL=ERROR $(PY) benchmarks/cpu.py layers $(BENCH_ARGS)

setup: $(INSTALLED)

# torch of the active interpreter is taken through a .pth file, which works where that interpreter is a
# virtual environment itself.
$(VENV)/.torch:
	@$(STEP) "making $(VENV)" $(PYTHON) -m venv $(VENV)
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  $(PYTHON) -c 'import site, sys, torch, os; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
	    > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_the_active_interpreter.pth"; \
	else \
	  $(STEP) "installing torch 2.13.0" $(PY) -m pip install torch==2.13.0; \
	fi
	@$(PY) -W ignore -c 'import torch; print("torch", torch.__version__)'
	@touch $@

$(VENV)/.tools: $(VENV)/.torch pyproject.toml
	@$(STEP) "installing what builds the extension" $(PY) -m pip install "setuptools>=68" wheel ninja pybind11 numpy
	@touch $@

$(INSTALLED): $(VENV)/.tools setup.py $(NATIVE_SOURCES)
	@rm -f $(OTHER)
	@$(STEP) "building and installing bbb_fast" $(PY) -m pip install -v --no-build-isolation -e ".[experiments,test]"
	@touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	@$(STEP) "installing what checks the style" $(PY) -m pip install ruff==0.8.4 clang-format==18.1.8 mypy==2.4.1
	@touch $@

# With ruff, by which signatures are broken into lines.
$(VENV)/.docs: $(VENV)/.lint docs/site/tools.txt
	@$(STEP) "installing what builds the site" $(PY) -m pip install -r docs/site/tools.txt
	@touch $@

PACKAGE_SOURCES := $(shell find bbb_fast -name '*.py')

build/tutorials/%.ipynb: docs/tutorials/%.py docs/site/matplotlibrc $(PACKAGE_SOURCES) $(VENV)/.docs | setup
	mkdir -p $(@D)
	OMP_NUM_THREADS=1 MATPLOTLIBRC=docs/site $(PY) -m jupytext --quiet --to ipynb --set-kernel python3 --execute --output $@ $<

docs: setup $(VENV)/.docs $(patsubst docs/%.py,build/%.ipynb,$(wildcard docs/tutorials/*.py))
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

CXX_FILES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

stubs: setup $(VENV)/.lint
	$(PY) .ci/stubs.py

# mypy reads the packages that are imported, hence setup.
lint: setup $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/mypy

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build *.egg-info bbb_fast/*.so bbb_fast/_build_info.json
