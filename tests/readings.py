"""
A task with two right answers: each number is read as a number or digit by digit, by chance, so that
words that are chosen at the same time must agree.

    python tests/readings.py                                    # readings/train.jsonl, val.jsonl
    python prepare.py --dataset=readings --token_level=words
    python train.py config/numbers.py --dataset=readings --out_dir=out/readings
    python eval.py --out_dir=out/readings --dataset=readings --batch_size=100 --steps=1
    python tests/readings.py out/readings/samples_eval.jsonl    # how many are right, either way

eval.py knows one target, so what it calls exact is about half of that.
"""
import json
import math
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from parts.toy import BELOW_20, in_words, numbers  # noqa: E402, found by the path above


def spelled(digits):
    """'4071' -> 'four zero seven one'."""
    return ' '.join(BELOW_20[int(digit)] for digit in digits)


def write(folder):
    """The pairs of the set numbers, each with one of its two readings; those held out are val."""
    os.makedirs(folder, exist_ok=True)
    rng = random.Random(0)
    train = open(os.path.join(folder, 'train.jsonl'), 'w')
    val = open(os.path.join(folder, 'val.jsonl'), 'w')
    with train, val:
        for i, row in enumerate(numbers()):
            row['target'] = rng.choice((row['target'], spelled(row['input'])))
            file = val if i % 101 == 100 else train
            file.write(json.dumps(row) + '\n')


def score(file):
    """Print the shares of texts that are one of the readings, and that are the first of them."""
    with open(file) as f:
        rows = [json.loads(line) for line in f]
    as_number = [row['generated'] == in_words(int(row['input'])) for row in rows]
    by_digit = [row['generated'] == spelled(row['input']) for row in rows]
    right = sum(map(max, as_number, by_digit)) / len(rows)
    error = math.sqrt(right * (1 - right) / len(rows))
    print(f"right {right:.3f} +- {error:.3f}, as a number {sum(as_number) / len(rows):.3f}")


if __name__ == '__main__':
    if len(sys.argv) > 1:
        score(sys.argv[1])
    else:
        write('readings')
