# The commands of Horace. `make demo` and `make test` each do all of their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= cpu,train,test
WORKERS ?= 2
DEMO := artifacts/demo
DEMO_EPOCHS ?= 2
RESULTS := benchmarks/results
BANK := artifacts/bench/collection
SHIPPED := models/shipped/fashion-mnist
SHIPPED_RUN := artifacts/runs/fashion-mnist
DEBIAN_DATA := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow coverage check format protos shipped bench data promtool clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed data ## Train, export, index, evaluate, serve and search Fashion-MNIST
	@BIN=$(BIN) OUT=$(DEMO) EPOCHS=$(DEMO_EPOCHS) bash examples/demo.sh

test: $(VENV)/.installed promtool ## The whole suite but what is marked slow or gpu, on WORKERS=2 processes
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu"

test-slow: $(VENV)/.installed ## What takes over a minute a test
	$(BIN)/pytest -m "slow and not gpu"

coverage: $(VENV)/.installed ## The suite with branch coverage
	$(BIN)/coverage run -m pytest -m "not slow and not gpu"
	$(BIN)/coverage report

check: $(VENV)/.installed ## Format, lint, types and the walls between packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed ## Mend format and what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/.installed ## Generate the code of protos/horace.proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/horace.proto

shipped: $(VENV)/.installed data ## Make and judge the encoder that ships: over an hour on two cores
	$(BIN)/python -m train.pretrain fashion-mnist --out $(SHIPPED_RUN)
	$(BIN)/python -m train.export $(SHIPPED_RUN) --out $(SHIPPED) --int8 --replace
	$(BIN)/python -m index.build --images fashion-mnist --encoder $(SHIPPED) --out artifacts/fashion-mnist --replace
	$(BIN)/python -m index.evaluate knn --collection artifacts/fashion-mnist --images fashion-mnist:test \
	  --out artifacts/fashion-mnist-knn --record
	$(BIN)/python -m train.probe linear $(SHIPPED) --images fashion-mnist --test fashion-mnist:test --record

# What is committed may have other rounds or options, or come from another machine: a file names its command
# and, where it has times, its hardware; some are older than these fields, and evaluate_recall.json leaves its
# times out. Where several machines were measured, *_avx2 has no AVX-512, *_xeon has it but no AMX,
# *_intel has AMX and *_gpu has a GPU: none is made here.
bench: $(VENV)/.installed data ## Run the benchmarks: hours, on a quiet machine (apt-get install mate-backgrounds wrk nghttp2-client)
	$(BIN)/pip install --quiet -e '.[bench]'
	$(BIN)/python -m benchmarks.decoders --repeats 20 --out $(RESULTS)/decoders.json
	$(BIN)/python -m index.build --images fashion-mnist --encoder $(SHIPPED) --out $(BANK) --replace
	$(BIN)/python -m index.build --images fashion-mnist:test --encoder $(SHIPPED) --out $(BANK)-test --replace
	$(BIN)/python -m index.build --images fashion-mnist:test --encoder $(SHIPPED)/encoder.int8.onnx \
	  --out $(BANK)-int8 --replace
	$(BIN)/python -m index.evaluate retrieval --collection $(BANK) --queries $(BANK)-test --n-queries 0 --json \
	  > $(RESULTS)/evaluate_retrieval.json
	$(BIN)/python -m index.evaluate recall --collection $(BANK) --queries $(BANK)-test --json \
	  > $(RESULTS)/evaluate_recall.json
	$(BIN)/python -m index.evaluate space --collection $(BANK) --json > $(RESULTS)/evaluate_space.json
	$(BIN)/python -m index.evaluate space --collection $(BANK)-test --other $(BANK)-int8 --json \
	  > $(RESULTS)/evaluate_drift.json
	rm -rf $(BANK)-tuned && cp -r $(BANK) $(BANK)-tuned
	$(BIN)/python -m index.tune $(BANK)-tuned --recall 0.99 --index IVF256,PQ256x4fs,RFlat
	$(BIN)/python -m benchmarks.vector_dtypes $(BANK) --out $(RESULTS)/vector_dtypes.json
	$(BIN)/python -m benchmarks.ann --rounds 3 --out $(RESULTS)/ann.json
	$(BIN)/python -m benchmarks.million --memory 1GB --out $(RESULTS)/million.json
	$(BIN)/python -m benchmarks.selection $(BANK) --images 10000 --out $(RESULTS)/selection.json
	$(BIN)/python -m benchmarks.selection $(BANK) --judge validation --judged 4000 --images 10000 \
	  --budgets 10 20 50 100 200 500 --seeds 0 1 2 --out $(RESULTS)/selection_validation.json
	$(BIN)/python -m benchmarks.outliers $(BANK) --images 10000 --seeds 0 --out $(RESULTS)/outliers.json
	$(BIN)/python -m benchmarks.filters $(BANK) --out $(RESULTS)/filters.json
	$(BIN)/python -m benchmarks.filters $(BANK)-tuned --out $(RESULTS)/filters_tuned.json
	$(BIN)/python -m benchmarks.tombstones --out $(RESULTS)/tombstones.json
	$(BIN)/python -m benchmarks.build_throughput --encoders small --rounds 3 --processes 1 \
	  --out $(RESULTS)/build_throughput.json
	$(BIN)/python -m benchmarks.build_throughput --encoders large --rounds 1 --processes 1 \
	  --out $(RESULTS)/build_throughput_large.json
	$(BIN)/python -m benchmarks.index_kills --out $(RESULTS)/index_kills.json
	$(BIN)/python -m benchmarks.index_readers --out $(RESULTS)/index_readers.json
	$(BIN)/python -m benchmarks.index_fuzz --out $(RESULTS)/index_fuzz.json
	$(BIN)/python -m benchmarks.loss --out $(RESULTS)/loss.json
	$(BIN)/python -m benchmarks.views --out $(RESULTS)/views.json
	$(BIN)/python -m benchmarks.train_throughput --seconds 10 --out $(RESULTS)/train_throughput.json
	$(BIN)/python -m benchmarks.ranks --out $(RESULTS)/ranks.json
	$(BIN)/python -m benchmarks.sync --out $(RESULTS)/sync.json
	$(BIN)/python -m benchmarks.restart --out $(RESULTS)/restart.json
	$(BIN)/python -m benchmarks.fashion_mnist --out $(RESULTS)/fashion_mnist.json
	$(BIN)/python -m benchmarks.labels --labels 0.01 --keep artifacts/bench/labels --out $(RESULTS)/labels.json
	$(BIN)/python -m benchmarks.labels --labels 0.1 --keep artifacts/bench/labels --out $(RESULTS)/labels_10.json
	$(BIN)/python -m benchmarks.int8 --rounds 9 --out $(RESULTS)/int8.json
	$(BIN)/python -m benchmarks.observers --out $(RESULTS)/observers.json
	$(BIN)/python -m benchmarks.perf_analyzer --rounds 1 --out $(RESULTS)/perf_analyzer.json
	$(BIN)/python -m benchmarks.serve_peers --fresh --rounds 3 --seconds 2 --cases small-tensor-1 light-tensor-1 \
	  small-jpeg-1 large-tensor-1 int8-tensor-1 --out $(RESULTS)/serve_peers.json
	$(BIN)/python -m benchmarks.serve_overload --cases pinned-small-1 pinned-large-1 shared-small-1 \
	  --out $(RESULTS)/serve_overload.json
	$(BIN)/python -m benchmarks.serve_changes --seconds 12 --out $(RESULTS)/serve_changes.json
	$(BIN)/python -m benchmarks.serve_hostile --frontend native --out $(RESULTS)/serve_hostile_native.json
	$(BIN)/python -m benchmarks.serve_hostile --frontend grpcio --out $(RESULTS)/serve_hostile_grpcio.json
	$(BIN)/python -m benchmarks.serve_soak --frontend native --out $(RESULTS)/serve_soak_native.json
	$(BIN)/python -m benchmarks.serve_soak --frontend grpcio --out $(RESULTS)/serve_soak_grpcio.json
	$(BIN)/python -m benchmarks.ablations --limit-images 25000 --out $(RESULTS)/ablations.json

data: ## Fashion-MNIST from Debian, where that is possible; the commands download it otherwise
	@test -e $(DEBIAN_DATA) || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] \
	  || { apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist >/dev/null; } \
	  || echo "apt-get has no dataset-fashion-mnist here; it will be downloaded"

promtool: # From Debian, where that is possible; without it the tests of the alarms are skipped
	@command -v promtool >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] \
	  || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus >/dev/null; } \
	  || echo "apt-get has no prometheus here; the tests of the alarms are skipped"

clean: ## Remove the environment and every artefact
	rm -rf $(VENV) artifacts .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python: expected 3.11 or newer, found %d.%d; run make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@
