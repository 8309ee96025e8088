"""
What is measured in texts: counts that need no judge, an n-gram as the judge without a download, a
causal LM as the paper's. Nothing of ELF in it. ids: the tokens of a text, a list; text: a str.
"""
import math
import sys
from collections import Counter
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import UserError, from_hub

# --------------------------------------------------------------------------------------------------
# no judge

def mean(numbers):
    """Average a list of numbers; nan if it is empty."""
    return sum(numbers) / len(numbers) if numbers else math.nan


def ngrams(sequence, n):
    """All runs of n items of a tuple, or of n characters of a text, in order."""
    return (sequence[i:i + n] for i in range(len(sequence) - n + 1))


def entropy(ids):
    """
    Unigram entropy of one list of ids, nats: log of the number of equally likely tokens it amounts
    to. 0.0 when empty.
    """
    shares = [n / len(ids) for n in Counter(ids).values()]
    return -sum(p * math.log(p) for p in shares) + 0.0


def repetition(ids_list):
    """
    Share of tokens that lie in a 5-gram that its own text holds three times or more; all texts as
    one pool.
    """
    inside = 0
    for ids in ids_list:
        grams = list(ngrams(tuple(ids), 5))
        counts, repeated = Counter(grams), set()
        for i, gram in enumerate(grams):
            if counts[gram] >= 3:
                repeated.update(range(i, i + 5))
        inside += len(repeated)
    return inside / max(1, sum(map(len, ids_list)))


def duplicates(texts):
    """Share of texts that equal an earlier one."""
    return 1 - len(set(texts)) / len(texts) if texts else 0.0


def distinct(ids_list, n=4, limit=sys.maxsize):
    """
    Share of different ones among all n-grams of a set of texts, none across two texts. The share
    falls as a set grows: compare sets of as many tokens, the first `limit` of each.
    """
    grams = []
    for ids in ids_list:
        ids = tuple(ids[:limit])
        limit -= len(ids)
        grams.extend(ngrams(ids, n))
    return len(set(grams)) / max(1, len(grams))


def words(texts, vocabulary):
    """
    Share of the inner words of texts that are in vocabulary, a set, and the same share of those
    longer than three letters. Inner: neither a text's first nor its last, which may be cut. nan
    where there are none.
    """
    inner = [word for text in texts for word in text.split()[1:-1]]
    known = [word in vocabulary for word in inner]
    return mean(known), mean([hit for word, hit in zip(inner, known) if len(word) > 3])


@lru_cache(maxsize=1)
def pieces(text, k):
    return set(ngrams(text, k))


def copied(texts, training_text, k=12):
    """
    The longest run of characters that each text shares with training_text -> list of lengths, 0 for
    less than k. White space of any kind and length counts as one space.
    """
    training_text = ' '.join(training_text.split())
    known, lengths = pieces(training_text, k), []
    for text in texts:
        text, longest, at = ' '.join(text.split()), k - 1, -1
        # does a longer run end here? by one character: two more, and its start was one before
        for end in range(k, len(text) + 1):
            run = text[end - longest - 1:end]
            # a look at its pieces spares nearly all searches, which are slow; where the run only
            # grew at its end, it is nowhere before the shorter one's place
            seen = known.issuperset(ngrams(run, k))
            at = training_text.find(run, max(at, 0)) if seen else -1
            longest += at >= 0
        lengths.append(longest if longest >= k else 0)
    return lengths


def bleu(hyps, refs, cased=False):
    """
    Corpus BLEU, 0 to 100: the official code's (lower case, effective order), or sacreBLEU's
    standard cased one.
    """
    import sacrebleu
    assert len(hyps) == len(refs), f"{len(hyps)} texts, {len(refs)} references"
    official = {} if cased else dict(lowercase=True, use_effective_order=True)
    return sacrebleu.corpus_bleu(hyps, [refs], **official).score


def rouge(hyps, refs):
    """ROUGE-1, -2 and -L, stemmed: F-measure * 100 of each pair, then the plain mean."""
    from rouge_score import rouge_scorer
    kinds = ('rouge1', 'rouge2', 'rougeL')
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(ref, hyp) for hyp, ref in zip(hyps, refs, strict=True)]
    return {kind: mean([score[kind].fmeasure * 100 for score in scores]) for kind in kinds}

# --------------------------------------------------------------------------------------------------
# the judge without a download: interpolated n-grams, Witten-Bell smoothed, of 5 characters and of 3
# tokens: where tokens are words, five characters see hardly more than one of them

def train_ngram(texts, n=5):
    """
    Count within each text -> n; all 1- to n-grams; per context the characters that followed it, and
    how many different ones.
    """
    grams, followers, kinds = Counter(), Counter(), Counter()
    for text in texts:
        for k in range(1, n + 1):
            grams.update(ngrams(text, k))
    for gram, count in grams.items():
        followers[gram[:-1]] += count
        kinds[gram[:-1]] += 1
    return n, grams, followers, kinds


def signs(ids):
    """Ids as a text with one sign for each, so that an n-gram of tokens is one of these."""
    return ''.join(map(chr, ids))


def ngram_p(char, context, ngram):
    """
    P(char | context): a context h seen N times with K different followers gives (count(h char) +
    K * P(char | h without its first character)) / (N + K). Below the empty context: uniform over
    the alphabet and one sign for all others.
    """
    _, grams, followers, kinds = ngram
    p = 1 / (kinds[''] + 1)
    for start in range(len(context), -1, -1):
        h = context[start:]
        if h not in followers:
            break               # longer ones were not seen either
        p = (grams.get(h + char, 0) + kinds[h] * p) / (followers[h] + kinds[h])
    return p


def ngram_nats(texts, ngram):
    """
    Mean -log P of all characters of texts, nats; each text starts without context. nan if there are
    none.
    """
    reach = ngram[0] - 1
    return mean([-math.log(ngram_p(char, text[max(0, i - reach):i], ngram))
                 for text in texts for i, char in enumerate(text)])

# --------------------------------------------------------------------------------------------------
# the judge of the paper: a causal LM

@lru_cache(maxsize=1)
def load_judge(name, device):
    """A causal LM from a folder or hub id, float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    with from_hub("no judge, a causal LM (--judge=ngram needs no download)", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().to(device)
    if len(tokenizer) > model.config.vocab_size or tokenizer.eos_token_id is None:
        raise UserError(f"judge {name!r}: its tokenizer has no EOS, or more ids than the model")
    return model, tokenizer


def judge_ids(texts, tokenizer, max_length=1024):
    """The texts that are not blank as ids, cut to max_length -> list of lists."""
    return [tokenizer(text, add_special_tokens=False, truncation=True,
                      max_length=max_length)['input_ids'] for text in texts if text.strip()]


@torch.no_grad()
def gen_ppl(texts, judge, batch_size=16, device='cpu', max_length=1024):
    """
    Generative perplexity, the official JAX protocol [utils/metrics_utils.py], and the port's beside
    it -> dict. Blank texts are left out, counted in 'empty'. The judge's (GPT-2's) ids, cut to
    max_length, filled with EOS to the longest of the set. Scored: every token but a row's first
    that is no EOS or the first EOS, so the first fill token too. gen_ppl = exp(sum nll / sum
    tokens) over all texts. The port adds its two masks as numbers (JAX: or), so gen_ppl_port counts
    tokens between the first and the second EOS twice. entropy: nats over the ids without fill, mean
    over texts.
    """
    model, tokenizer = load_judge(judge, str(device))
    torch.set_float32_matmul_precision('highest')   # of a GPU: pick_device may have allowed TF32
    eos = tokenizer.eos_token_id
    limit = getattr(model.config, 'max_position_embeddings', max_length)
    rows = judge_ids(texts, tokenizer, min(max_length, limit))
    width = max(map(len, rows), default=0)
    nlls, tokens = torch.zeros(2, 2, dtype=torch.float64)           # of the two protocols
    for first in tqdm(range(0, len(rows), batch_size), desc='judge', disable=None, leave=False):
        part = rows[first:first + batch_size]
        ids = torch.tensor([row + [eos] * (width - len(row)) for row in part], device=device)
        # what is scored never looks at the fill; row by row, as float32 logits take gigabytes
        for row, logits in zip(ids, model(ids).logits):                         # (T,), (T, V)
            nll = F.cross_entropy(logits[:-1], row[1:], reduction='none').double().cpu()
            token = (row != eos).double().cpu()
            first_eos = (1 - token).cumsum(0) == 1      # from the first EOS to before the second
            port = (token + first_eos)[1:]
            weights = torch.stack((port.clamp(max=1), port))                    # (2, T-1)
            nlls += weights @ nll
            tokens += weights.sum(1)
    jax, port = (nlls / tokens).exp().tolist()      # nan where there are no tokens
    return dict(gen_ppl=jax, gen_ppl_port=port, entropy=mean([*map(entropy, rows)]),
                tokens=int(tokens[0]), empty=len(texts) - len(rows))

# --------------------------------------------------------------------------------------------------
# all of it, and the table; rows: dicts with 'generated', 'ids' and perhaps 'target'

def find_targets(rows):
    """The 'target' (or 'output') of all rows -> list of texts; [] if there is one without."""
    targets = [row.get('target', row.get('output')) for row in rows]
    return targets if all(isinstance(target, str) for target in targets) else []


def count_tokens(rows):
    return sum(len(row['ids']) for row in rows)


def measure(rows, limit, train_texts, ngram, judge, batch_size, device):
    """
    All metrics of one line of the table -> dict. entropy_own is over the ids given, mean over the
    texts that are not blank; limit: tokens that distinct-4 looks at. judge: ngram, a pair
    (of characters, of tokens), if there is one, else a causal LM or 'none'. Words and copies are
    looked up in train_texts, if there are any, joined by spaces: rows are packed in order, so a run
    may cross from one to the next; a word that was cut between two is then its two parts.
    """
    texts, ids = [row['generated'] for row in rows], [row['ids'] for row in rows]
    entropies = [entropy(row['ids']) for row in rows if row['generated'].strip()]
    out = dict(texts=len(rows), empty=len(rows) - len(entropies), entropy_own=mean(entropies),
               distinct_4=distinct(ids, 4, limit), repetition=repetition(ids),
               duplicates=duplicates(texts))
    if train_texts:
        training_text = ' '.join(train_texts)
        lengths = copied(texts, training_text)
        out['words'], out['long_words'] = words(texts, set(training_text.split()))
        out['copied_median'], out['copied_max'] = float(np.median(lengths)), max(lengths)
    if ngram:
        of_chars, of_tokens = ngram
        out['nats_per_char'] = ngram_nats(texts, of_chars)
        out['nats_per_token'] = ngram_nats(list(map(signs, ids)), of_tokens)
    elif judge != 'none':
        out |= gen_ppl(texts, judge, batch_size, device)
    if targets := find_targets(rows):
        out['bleu'], out['bleu_cased'] = bleu(texts, targets), bleu(texts, targets, cased=True)
        out |= rouge(texts, targets)
    return out


COLUMNS = [                             # key, title, digits
    ('nats_per_char', 'nats/char', 3),
    ('nats_per_token', 'token', 2),
    ('gen_ppl', 'ppl', 2),
    ('gen_ppl_port', 'port', 2),
    ('entropy', 'entropy', 3),
    ('entropy_own', 'own ent', 3),
    ('distinct_4', 'dist-4', 3),
    ('repetition', 'repeat', 3),
    ('duplicates', 'dupl', 3),
    ('words', 'words', 3),
    ('long_words', 'long', 3),
    ('copied_median', 'copied', 0),
    ('copied_max', 'max', 0),
    ('bleu', 'BLEU', 2),
    ('bleu_cased', 'cased', 2),
    ('rouge1', 'R-1', 2),
    ('rouge2', 'R-2', 2),
    ('rougeL', 'R-L', 2),
    ('empty', 'empty', 0),
    ('nfe', 'NFE', 0),
    ('seconds', 'seconds', 1),
]


def print_table(results, unit, left_out=()):
    """
    {name: metrics} -> a line for each, without the columns that none has or that are left out.
    unit: what the ids are.
    """
    names, keys = list(results), {key for row in results.values() for key in row}
    columns = [['', *names]]
    for key, title, digits in COLUMNS:
        if key in keys and key not in left_out:
            numbers = [results[name].get(key) for name in names]
            columns.append([title, *('' if x is None else f'{x:.{digits}f}' for x in numbers)])
    widths = [max(map(len, column)) for column in columns]
    print()
    for name, *numbers in zip(*columns):
        print(name.ljust(widths[0]), *(x.rjust(width) for x, width in zip(numbers, widths[1:])))
    print(f"own ent, dist-4, repeat: over {unit}; entropies in nats")
    if 'nats_per_token' in keys:
        print("nats/char, token: nats of each by a 5-gram of characters, a 3-gram of tokens")
    if 'copied_max' in keys - set(left_out):
        print("words, long: share that the training text has too; long ones have over 3 letters")
        print("copied, max: characters in a row as in the training text, median and most of a text")


def over_runs(results):
    """Metrics of each run -> their means, and with several runs the standard errors of these."""
    if len(results) == 1:
        return results[0]
    means, errors = {}, {}
    for key in results[0]:
        numbers = [row[key] for row in results]
        means[key] = mean(numbers)
        errors[key] = float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers))
    return means | dict(stderr=errors)


def print_gap(results, own):
    """
    How near texts come to real ones under the n-gram judges -> {'gap_closed', 'gap_closed_tokens'},
    the share of the way from unigram, by characters and by tokens.
    """
    gaps = {}
    for gap, key in (('gap_closed', 'nats_per_char'), ('gap_closed_tokens', 'nats_per_token')):
        worst, best = results['unigram'][key], results['real'][key]
        gaps[gap] = (worst - own[key]) / (worst - best) if worst != best else math.nan
    share = own['distinct_4'] / max(1e-9, results['real']['distinct_4'])
    print(f"gap closed: {gaps['gap_closed']:.3f} of the way from unigram to real text by "
          f"characters, {gaps['gap_closed_tokens']:.3f} by tokens; "
          f"distinct-4 {share:.2f} of real text's")
    return gaps
