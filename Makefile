# make test        install what is missing, then lint, type-check and test
# make test-oldest tests what is compiled under the oldest torch that is supported
# make quickstart  the whole job on handwritten digits, on a CPU, in minutes
# make imagenette  download ten classes of ImageNet, for exp/imagenette/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MAIN := $(BIN)/python ./calibquant/solver/main_imagenet.py
TEST := $(BIN)/python ./calibquant/solver/test_imagenet.py
QUICK := $(BIN)/python ./calibquant/solver/quickstart.py

OLDEST := $(VENV)-oldest

.PHONY: test test-oldest lint quickstart imagenette clean

test: lint
	$(BIN)/python -m pytest -q --numprocesses auto --dist loadfile

# of compiled code, what an older release does with a gradient is not what the newest one does
test-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest -q --numprocesses auto tests/test_affine.py tests/test_columns.py tests/test_drop.py \
		tests/test_distil.py tests/test_fake_quant.py tests/test_fast.py tests/test_recon.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# threads gain nothing on images so small, and lose a lot on a busy machine
quickstart: export OMP_NUM_THREADS = 1
quickstart: $(VENV)/.dev
	$(QUICK) prepare
	$(MAIN) --config ./exp/quickstart/w4a4.yaml
	$(TEST) --config ./exp/quickstart/w4a4.yaml \
		--quantized_model_path "$$($(QUICK) newest ./exp/quickstart/w4a4.yaml)"
	$(MAIN) --config ./exp/quickstart/w2a4.yaml
	$(TEST) --config ./exp/quickstart/w2a4.yaml \
		--quantized_model_path "$$($(QUICK) newest ./exp/quickstart/w2a4.yaml)"
	$(QUICK) table

imagenette: $(VENV)/.run
	$(BIN)/python ./calibquant/solver/imagenette.py

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(OLDEST)/.dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt \
		torch==2.11.0 torchvision==0.26.0
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) quickstart .mypy_cache .ruff_cache .pytest_cache .hypothesis
