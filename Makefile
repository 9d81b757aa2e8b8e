# make demo | test | test-oldest-triton | lint | bench: each sets up .venv first if it is missing or pyproject.toml or constraints.txt changed. PYTHON=python3.12 picks
# the interpreter, TORCH=torch==2.11.0 another torch.
PYTHON ?= python3
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)
# One thread for each test process: two processes on two cores are faster than two processes with two threads each.
TEST_THREADS ?= 1
TEST_WORKERS ?= 2
# Each process begins with a half of its own, so that what tests of one file share is made once, and takes from the other's end.
TEST_EACH := -n $(TEST_WORKERS) --dist worksteal
# Nothing of Triton's runs in these: they are the same with its interpreter and without.
UNINTERPRETED := config.py derivations.py each.py hopper.py products.py
BIN := .venv/bin
READY := .venv/.ready

# What torch 2.11 brings, the oldest torch that is supported.
OLDEST_TRITON := triton==3.6.0

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# What one process has compiled the next one finds: a mutant's takes half of its time otherwise.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-oldest-triton lint bench clean

# torch goes first and alone: with it in place nothing that follows pulls another build of it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -q $(if $(filter command line environment,$(origin TORCH)),,-c constraints.txt) \
	  -e '.[train,bench,dev]'
	touch $@

demo: $(READY)
	$(BIN)/fastft demo $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	@# mypy does not see through an editable install's package map, so it gets the map as links.
	rm -rf build/types && mkdir -p build/types/fastft
	ln -s $(addprefix $(CURDIR)/,$(wildcard backend/*) patterns kernels autotune) build/types/fastft/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p fastft

test: lint
	OMP_NUM_THREADS=$(TEST_THREADS) TRITON_INTERPRET=1 $(BIN)/pytest $(TEST_EACH) $(addprefix --ignore=tests/kernels/test_,$(UNINTERPRETED)) tests/kernels
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/pytest $(TEST_EACH) tests

# What is written in Triton compiles there too: 190 MB to download, once; no GPU needed.
test-oldest-triton: $(READY)
	test -d build/$(OLDEST_TRITON) || $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target build/$(OLDEST_TRITON) $(OLDEST_TRITON)
	PYTHONPATH=build/$(OLDEST_TRITON) $(BIN)/python -c 'import triton; print("triton", triton.__version__)'
	PYTHONPATH=build/$(OLDEST_TRITON) OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/pytest $(TEST_EACH) tests/kernels -k "h100 or hopper"

bench: $(READY)
	$(BIN)/fastft bench kernels $(ARGS)

clean:
	rm -rf .venv build out .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks *.egg-info
