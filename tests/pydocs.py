"""
The prose that every Python carries, of its language reference (pydoc_data.topics) and of its
library's docstrings, so that there is a text without a download.

    python tests/pydocs.py pydocs.txt       # 1.3 MB: a paragraph, a blank line, a paragraph, ...
    python prepare.py --dataset=pydocs.txt
    python train.py config/pydocs.py
"""
import ast
import os
import re
import sys
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics


def docstrings():
    """Every docstring of Python's standard library but its tests; read, never imported."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    # a distribution may leave some out, or put its own packages beside
    skipped = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'lib2to3'}
    library = Path(os.__file__).parent
    for file in sorted(library.rglob('*.py'), key=lambda file: (file.parent.parts, file.name)):
        if skipped.isdisjoint(file.relative_to(library).parts):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, documented):
                    yield ast.get_docstring(node) or ''


def paragraphs():
    """The paragraphs that are prose, each once, in a line of its own."""
    found = {}                  # a dict, as some stand in two places
    for text in chain((topics[topic] for topic in sorted(topics)), docstrings()):
        for paragraph in text.split('\n\n'):
            flat = re.sub(r'[*"`]+', '', ' '.join(paragraph.split()))
            letters = sum(ch.isalpha() or ch in ' ,.' for ch in flat)
            # no code, table or heading, nor grammar
            prose = len(flat) > 60 and flat[-1] in '.:;' and '::=' not in flat
            if prose and letters > 0.92 * len(flat):
                found[flat] = True
    return found


def main(file='pydocs.txt'):
    with open(file, 'w', encoding='utf-8', newline='\n') as f:
        f.write('\n\n'.join(paragraphs()) + '\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
