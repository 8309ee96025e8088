# The two commands: make demo (text out of noise, on a CPU, in minutes) and make test. The plain lines behind both are in README.md.
PYTHON ?= python3
DEMO ?=
DEMO_SAMPLES ?= 200

.PHONY: demo test stress

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch .venv/ready

demo: .venv/ready
	.venv/bin/python prepare.py
	.venv/bin/python train.py config/demo.py $(DEMO)
	.venv/bin/python sample.py --out_dir=out/demo --num_samples=8 --trace=8 --dtype=float32
	.venv/bin/python eval.py --out_dir=out/demo --dataset=pydocs --judge=ngram --num_samples=$(DEMO_SAMPLES) --batch_size=50 --eval_iters=5 --dtype=float32
	@echo
	@echo "the model is in out/demo/ckpt.pt, its losses in out/demo/loss.png and metrics.jsonl, texts in out/demo/samples.jsonl"
	@echo "try next:  .venv/bin/python sample.py --out_dir=out/demo --seed=7 --steps=64 --trace=12"
	@echo "           .venv/bin/python prepare.py --dataset=my.txt && .venv/bin/python train.py config/demo.py --dataset=my --out_dir=out/my"

test: .venv/ready
	.venv/bin/python -m pytest -q tests

# half an hour: 100 kills, 20 dead ranks, 1,000 command lines, ten minutes of memory, a task learned by heart
stress: .venv/ready
	.venv/bin/python -m pytest -q -s --slow -m slow tests
