# The two commands: make demo (text out of noise, on a CPU, in minutes) and make test. What they run
# stands in README.md, too.
PYTHON ?= python3
DEMO ?=
DEMO_SAMPLES ?= 200

.PHONY: demo test lint stress

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch .venv/ready

demo: .venv/ready
	@echo "ELF learns to write about Python, from Python's own documentation: three to six minutes on"
	@echo "two CPU cores, nothing is downloaded; its loss line tells how much time is left"
	.venv/bin/python prepare.py
	.venv/bin/python train.py config/demo.py $(DEMO)
	.venv/bin/python sample.py --out_dir=out/demo --num_samples=8 --trace=8 \
		--html=out/demo/page.html
	.venv/bin/python eval.py --out_dir=out/demo --dataset=pydocs --judge=ngram \
		--num_samples=$(DEMO_SAMPLES) --batch_size=50 --eval_iters=5
	@echo
	@echo "look:      out/demo/page.html in a browser: the texts come out of the noise; loss.png"
	@echo "try next:  .venv/bin/python sample.py --out_dir=out/demo --seed=7 --trace=32"
	@echo "           .venv/bin/python sample.py --out_dir=out/demo --prompt=' the'"
	@echo "           .venv/bin/python prepare.py --dataset=my.txt"
	@echo "           .venv/bin/python train.py config/demo.py --dataset=my --out_dir=out/my"

test: lint
	.venv/bin/python -m pytest -q tests

# only checks: long lines, names that are not there or not used; nothing is reformatted
lint: .venv/ready
	.venv/bin/ruff check -q --line-length=100 --select=E501,F --ignore=F811 .

# half an hour: 100 kills, 20 dead ranks, 1,000 command lines, ten minutes of memory
stress: .venv/ready
	.venv/bin/python -m pytest -q -s --slow -m slow tests
