# The two commands: make demo (numbers become words, on a CPU, in minutes) and make test.
# What they run stands in README.md, too.
PYTHON ?= python3
DEMO ?=
ASKED ?= 1000

.PHONY: demo prose test lint stress

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch .venv/ready

# run again it goes on where it was, or only asks
demo: .venv/ready
	@echo "ELF learns to read numbers aloud: two to five minutes on two CPU cores, nothing is"
	@echo "downloaded; the end of each loss line tells how much time is left"
	.venv/bin/python prepare.py --dataset=numbers
	.venv/bin/python train.py config/numbers.py --init_from=auto $(DEMO)
	.venv/bin/python eval.py --out_dir=out/numbers --dataset=numbers --num_samples=$(ASKED) \
		--batch_size=100 --eval_iters=5
	.venv/bin/python sample.py --out_dir=out/numbers --input_file=data/numbers/val.jsonl \
		--num_samples=8 --html=out/numbers/page.html
	@echo
	@echo "look:    out/numbers/page.html in a browser: the answers come out of the noise"
	@echo "ask:     .venv/bin/python sample.py --out_dir=out/numbers --input=4071 --trace=8"
	@echo "next:    make prose, the same on the documentation inside every Python"

prose: .venv/ready
	.venv/bin/python tests/pydocs.py pydocs.txt
	.venv/bin/python prepare.py --dataset=pydocs.txt
	.venv/bin/python train.py config/pydocs.py --init_from=auto
	.venv/bin/python eval.py --out_dir=out/pydocs --dataset=pydocs --judge=ngram \
		--num_samples=200 --batch_size=50
	.venv/bin/python sample.py --out_dir=out/pydocs --trace=8 --html=out/pydocs/page.html

test: lint
	.venv/bin/python -m pytest -q tests

# only checks: long lines, names that are not there or not used; nothing is reformatted
lint: .venv/ready
	.venv/bin/ruff check -q --line-length=100 --select=E501,F --ignore=F811 .

# half an hour: 100 kills, 20 dead ranks, 1,000 command lines, ten minutes of memory
stress: .venv/ready
	.venv/bin/python -m pytest -q -s --slow -m slow tests
