# make demo: numbers in words out of noise, on a CPU, in minutes; make prose: the same with prose;
# make test. What they run stands in README.md, too.
PYTHON ?= python3
DEMO ?=
DEMO_SAMPLES ?= 1000

.PHONY: demo prose test lint stress

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch .venv/ready

demo: .venv/ready
	@echo "ELF learns to write numbers in words: two to three minutes on two CPU cores, nothing is"
	@echo "downloaded; its loss line tells how much time is left"
	.venv/bin/python prepare.py --dataset=numbers
	.venv/bin/python train.py config/numbers.py $(DEMO)
	.venv/bin/python eval.py --out_dir=out/numbers --dataset=numbers --num_samples=$(DEMO_SAMPLES) \
		--batch_size=100 --eval_iters=5
	.venv/bin/python sample.py --out_dir=out/numbers --input_file=data/numbers/val.jsonl \
		--num_samples=8 --trace=8 --html=out/numbers/page.html
	@echo
	@echo "look:      out/numbers/page.html in a browser: words come out of the noise; loss.png"
	@echo "try next:  .venv/bin/python sample.py --out_dir=out/numbers --input=4071 --trace=8"
	@echo "           .venv/bin/python train.py config/numbers.py config/numbers_distill.py"
	@echo "           make prose"

prose: .venv/ready
	@echo "what three minutes of a CPU make of prose: words are right, meaning is not to be expected"
	.venv/bin/python prepare.py
	.venv/bin/python train.py config/pydocs.py
	.venv/bin/python sample.py --out_dir=out/pydocs --num_samples=8 --trace=8 \
		--html=out/pydocs/page.html
	.venv/bin/python eval.py --out_dir=out/pydocs --dataset=pydocs --judge=ngram \
		--num_samples=200 --batch_size=50 --eval_iters=5
	@echo
	@echo "look:      out/pydocs/page.html in a browser; loss.png"
	@echo "try next:  .venv/bin/python sample.py --out_dir=out/pydocs --prompt=' the'"
	@echo "           .venv/bin/python prepare.py --dataset=my.txt"
	@echo "           .venv/bin/python train.py config/pydocs.py --dataset=my --out_dir=out/my"

test: lint
	.venv/bin/python -m pytest -q tests

# only checks: long lines, names that are not there or not used; nothing is reformatted
lint: .venv/ready
	.venv/bin/ruff check -q --line-length=100 --select=E501,F --ignore=F811 .

# half an hour: 100 kills, 20 dead ranks, 1,000 command lines, ten minutes of memory
stress: .venv/ready
	.venv/bin/python -m pytest -q -s --slow -m slow tests
