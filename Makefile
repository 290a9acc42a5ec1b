# `make curate` does the main job, `make test` passes the tests. Nothing but Rust is needed for either.

CARGO ?= cargo
# One optimised profile for everything, so that dependencies are built once.
PROXYSET = $(CARGO) run --release --quiet --
INTEROP = target/interop
PEERS = target/peers

.PHONY: build curate experiment test test-extractors commands ci format lint docs smoke bench bench-peers bench-cuda bench-curate test-interop test-robustbench test-autoattack cuda check-cuda \
	test-cuda test-cuda-emulated clean

build:
	$(CARGO) build --release

# From real digits to a checked, curated data set, with report and contact sheet in runs/digits.
curate: build
	$(PROXYSET) run pipelines/digits.toml --until materialize
	$(PROXYSET) check runs/digits

# The same, then every arm trained with every seed, evaluated and compared.
experiment: build
	$(PROXYSET) run pipelines/digits.toml

test:
	$(CARGO) test --release

# Networks of the Hub as extractors of features, against their Python originals.
test-extractors:
	$(CARGO) test --release --features extractors -- pretrained extractors

# docs/commands.md, which a test holds against the command line.
commands:
	PROXYSET_WRITE_DOCUMENTS=1 $(CARGO) test --release --test integration -- the_command_reference

ci: format lint docs test test-extractors check-cuda smoke

format:
	$(CARGO) fmt --check

lint:
	$(CARGO) clippy --release --all-targets -- -D warnings
	$(CARGO) clippy --release --all-targets --features extractors -- -D warnings

docs:
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --no-deps --document-private-items

# The digits pipeline, whole but small: minutes become seconds.
smoke: build
	rm -rf target/smoke
	$(PROXYSET) run pipelines/digits.toml --out target/smoke \
	  --set fit-generator.steps=150 --set generate.count=1024 --set generate.sampler.steps=10 --set generate.shard_rows=256 \
	  --set labeller.steps=300 --set fit-discriminator.steps=40 --set curate.keep_per_class=10 \
	  --set curate.allow_short=true --set curate.require_agreement=false \
	  --set train.steps=60 --set experiment.seeds=[0,1]
	$(PROXYSET) check target/smoke

# The kernels one by one, with criterion. A part of them: `make bench ONLY=conv2d`.
bench:
	$(CARGO) bench --bench ops -- $(ONLY)

# proxyset, PyTorch and stock candle on the same work in one run; makes its own environment, and takes a while.
# A part of it: `make bench-peers ARGS="--only 'conv*'"`. See tests/bench/README.md.
bench-peers:
	test -d $(PEERS) || python3 -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r tests/bench/requirements.txt
	$(CARGO) bench --bench peers --no-run
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(PEERS)/inductor $(PEERS)/bin/python tests/bench/peers.py \
	  --runner "$(CARGO) bench --quiet --bench peers --" $(ARGS)

# proxyset and PyTorch on the same GPU in one run; needs one. A part, in another precision: `make bench-cuda PRECISION=tf32
# ARGS="--only 'unet*'"`.
PRECISION = bf16
bench-cuda:
	test -d $(PEERS) || python3 -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r tests/bench/requirements.txt
	environment=$$(tests/cuda/toolkit.sh $(CUDA_TOOLKIT)) && eval "$$environment" && \
	  $(CARGO) bench --features cuda --bench peers --no-run && \
	  TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(PEERS)/inductor $(PEERS)/bin/python tests/bench/peers.py --device cuda:0 \
	  --precision $(PRECISION) --out target/bench-cuda-$(PRECISION).json \
	  --runner "$(CARGO) bench --quiet --features cuda --bench peers --" $(ARGS)

# Curation of ten million rows beside DuckDB and polars.
bench-curate: build
	test -d $(PEERS) || python3 -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r tests/bench/requirements-curate.txt
	$(PEERS)/bin/python tests/bench/curate.py $(or $(CARGO_TARGET_DIR),target)/release/proxyset target/bench-curate

# The logits of RobustBench's and torchvision's networks, with random weights, and of ours.
test-robustbench: build
	test -d $(PEERS) || python3 -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r tests/interop/requirements-autoattack.txt
	$(PEERS)/bin/pip install -q --no-deps robustbench==1.1.1 torchvision==0.26.0
	$(PEERS)/bin/python tests/interop/check_robustbench.py $(or $(CARGO_TARGET_DIR),target)/release/proxyset target/robustbench

# Every attack of our AutoAttack beside the reference, on 500 digits, a robust network and an undefended one, which are
# trained first. Makes its own environment, and takes half an hour.
AUTOATTACK = target/autoattack
test-autoattack: build
	test -d $(PEERS) || python3 -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r tests/interop/requirements-autoattack.txt
	$(PEERS)/bin/python tests/interop/split_digits.py $(AUTOATTACK)/digits
	$(PROXYSET) split --source $(AUTOATTACK)/digits --out $(AUTOATTACK)/split
	$(PROXYSET) train --split $(AUTOATTACK)/split --epsilon 0.15 --attack-steps 10 --channels 16,32,32 --steps 1500 \
	  --learning-rate 0.05 --epsilon-warmup-steps 500 --held-out 0.1 --eval-every 250 --out $(AUTOATTACK)/robust
	$(PROXYSET) train --split $(AUTOATTACK)/split --objective plain --channels 16,32,32 --steps 500 \
	  --learning-rate 0.05 --held-out 0.1 --eval-every 250 --out $(AUTOATTACK)/plain
	for ball in "linf 0.15" "l2 0.6"; do \
	  $(PEERS)/bin/python tests/interop/check_autoattack.py $(or $(CARGO_TARGET_DIR),target)/release/proxyset $(AUTOATTACK)/digits \
	    $(AUTOATTACK)/runs 500 $$ball $(AUTOATTACK)/robust $(AUTOATTACK)/plain || exit 1; done

# The data set of `make curate` in Python's datasets, duckdb and polars, and the same noise here and in diffusers; makes
# its own environment.
test-interop:
	test -d $(INTEROP) || python3 -m venv $(INTEROP)
	$(INTEROP)/bin/pip install -q -r tests/interop/requirements.txt
	for dataset in runs/digits/materialize-*/dataset; do $(INTEROP)/bin/python tests/interop/check_hub.py $$dataset || exit 1; done
	$(CARGO) build --release
	$(INTEROP)/bin/python tests/interop/check_samples.py $(or $(CARGO_TARGET_DIR),target)/release/proxyset models/digits-ddpm

# With the CUDA toolkit that is installed (nvcc on the PATH or in CUDA_HOME, cuDNN), else with one made of Python wheels.
CUDA_TOOLKIT = target/cuda-toolkit
cuda:
	environment=$$(tests/cuda/toolkit.sh $(CUDA_TOOLKIT)) && eval "$$environment" && \
	  $(CARGO) build --release --features cuda

# Whether the CUDA program compiles, where a toolkit is installed.
check-cuda:
	@if environment=$$(tests/cuda/toolkit.sh --installed 2>/dev/null); then \
	  eval "$$environment" && $(CARGO) clippy --release --features cuda --all-targets -- -D warnings; \
	else echo "check-cuda: skipped, no CUDA toolkit is installed (\`make cuda\` makes one)"; fi

# Needs a GPU: the tests that are ignored elsewhere, and nothing else.
test-cuda:
	environment=$$(tests/cuda/toolkit.sh $(CUDA_TOOLKIT)) && eval "$$environment" && \
	  $(CARGO) test --release --features cuda -- --ignored --nocapture cuda && \
	  PROXYSET_TEST_PRECISION=tf32 $(CARGO) test --release --features cuda -- --ignored --nocapture agree && \
	  PROXYSET_TEST_PRECISION=bf16 $(CARGO) test --release --features cuda -- --ignored --nocapture cuda_networks

# The CUDA kernels without a GPU: compiled for the CPU and held against PyTorch. Needs a C++ compiler; makes its own environment.
test-cuda-emulated:
	test -d $(PEERS) || python3 -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r tests/bench/requirements.txt
	$(PEERS)/bin/python tests/cuda/check_kernels.py

clean:
	$(CARGO) clean
	rm -rf runs
