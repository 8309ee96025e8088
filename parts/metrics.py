"""
What is measured in texts: counts that need no judge, an n-gram as the judge without a download, a
causal LM as the paper's. Nothing of ELF in it. ids: the tokens of a text, a list; text: a str.
"""
import math
import os
import sys
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np
import regex
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
    """Unigram entropy of a list of ids, nats: the log of so many equally likely tokens."""
    shares = [n / len(ids) for n in Counter(ids).values()]
    return -sum(p * math.log(p) for p in shares) + 0.0


def repetition(ids_list):
    """Share of the tokens of all texts in a 5-gram that its own text holds three times or more."""
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
def kgrams(text, k):
    return set(ngrams(text, k))


def copied(texts, training_text, k=12):
    """
    The longest run of characters that each text shares with training_text -> list of lengths, 0 for
    less than k. White space of any kind and length counts as one space.
    """
    training_text = ' '.join(training_text.split())
    grams, lengths = kgrams(training_text, k), []
    for text in texts:
        text, longest = ' '.join(text.split()), k - 1
        for start in range(len(text)):
            place = 0       # is a run of one character more copied? a longer one: nowhere before
            while place >= 0 and start + longest < len(text):
                run = text[start:start + longest + 1]
                # a look at its k-grams spares nearly all searches, which are slow
                seen = grams.issuperset(ngrams(run, k))
                place = training_text.find(run, place) if seen else -1
                longest += place >= 0
        lengths.append(longest if longest >= k else 0)
    return lengths

# --------------------------------------------------------------------------------------------------
# against the texts that were wanted, the targets

UNSPACED = r'[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]'
TOKENS = regex.compile(rf'(?V1){UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--{UNSPACED}]+')


def script_of(texts):
    """
    How BLEU and ROUGE cut texts: 'a-z', as the official code does, if most of their letters are
    these; else 'words', if there are spaces between them, 'zh' for Chinese, 'char' for others.
    """
    counts = Counter(''.join(texts).lower())

    def count(kind):
        return sum(n for char, n in counts.items() if regex.match(kind, char))

    letters, unspaced = count(r'\p{L}'), count(UNSPACED)
    if 2 * count('[a-z]') >= letters:
        return 'a-z'
    if 2 * unspaced < letters:
        return 'words'
    return 'zh' if count(r'\p{Han}') > 0.9 * unspaced else 'char'


def bleu(hyps, refs, cased=False):
    """
    Corpus BLEU, 0 to 100: the official code's (lower case, effective order), or sacreBLEU's
    standard cased one. Targets without spaces: sacreBLEU's tokens 'zh' for Chinese, else 'char'.
    """
    import sacrebleu
    assert len(hyps) == len(refs), f"{len(hyps)} texts, {len(refs)} references"
    settings = {} if cased else dict(lowercase=True, use_effective_order=True)
    if (script := script_of(refs)) in ('zh', 'char'):
        settings['tokenize'] = script
    return sacrebleu.corpus_bleu(hyps, [refs], **settings).score


def rouge(hyps, refs):
    """
    ROUGE-1, -2 and -L, stemmed: F-measure * 100 of each pair, then the plain mean. rouge-score sees
    a to z and 0 to 9 alone; for targets in other letters its tokens are words of any script, not
    stemmed, and single characters where there are no spaces. A pair of one-word texts has no pairs
    of words: its ROUGE-2 is 0 even where they are equal.
    """
    from rouge_score import rouge_scorer
    kinds, tokenizer = ('rouge1', 'rouge2', 'rougeL'), None
    if script_of(refs) != 'a-z':
        tokenizer = SimpleNamespace(tokenize=lambda text: TOKENS.findall(text.lower()))
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True, tokenizer=tokenizer)
    scores = [scorer.score(ref, hyp) for hyp, ref in zip(hyps, refs, strict=True)]
    return {kind: mean([score[kind].fmeasure * 100 for score in scores]) for kind in kinds}


def exact_match(hyps, refs):
    """Share of texts that equal their target, white space at the ends aside."""
    return mean([hyp.strip() == ref.strip() for hyp, ref in zip(hyps, refs, strict=True)])


def describe_errors(hyps, refs, encode):
    """
    exact_match and its binomial standard error; of the other texts the shares of those with too few
    and too many tokens, and the place of the first wrong token, from 1, the median -> dict.
    """
    exact = exact_match(hyps, refs)
    pairs = [(encode(hyp.strip()), encode(ref.strip())) for hyp, ref in zip(hyps, refs)
             if hyp.strip() != ref.strip()]
    places = [len(os.path.commonprefix(pair)) + 1 for pair in pairs]
    return dict(exact=exact, exact_stderr=math.sqrt(exact * (1 - exact) / len(refs)),
                too_short=mean([len(hyp) < len(ref) for hyp, ref in pairs]),
                too_long=mean([len(hyp) > len(ref) for hyp, ref in pairs]),
                first_wrong=float(np.median(places)) if places else math.nan)

# --------------------------------------------------------------------------------------------------
# the judge without a download: interpolated n-grams, Witten-Bell smoothed, of 5 characters and of 3
# tokens: where tokens are words, five characters see hardly more than one of them

def train_ngram(sequences, n=5):
    """
    Count within each text or tuple of ids -> n; all 1- to n-grams; per context the items that
    followed it, and how many different ones.
    """
    grams, followers, kinds = Counter(), Counter(), Counter()
    for sequence in sequences:
        for k in range(1, n + 1):
            grams.update(ngrams(sequence, k))
    for gram, count in grams.items():
        followers[gram[:-1]] += count
        kinds[gram[:-1]] += 1
    return n, grams, followers, kinds


def ngram_p(item, context, ngram):
    """
    P(item | context), both texts or tuples: a context h seen N times with K different followers
    gives (count(h item) + K * P(item | h without its first)) / (N + K). Below the empty context:
    uniform over the alphabet and one item for all others.
    """
    _, grams, followers, kinds = ngram
    p = 1 / (kinds[item[:0]] + 1)
    for start in range(len(context), -1, -1):
        h = context[start:]
        if h not in followers:
            break               # longer ones were not seen either
        p = (grams.get(h + item, 0) + kinds[h] * p) / (followers[h] + kinds[h])
    return p


def ngram_nats(sequences, ngram):
    """Mean -log P of all items, nats; each text starts without context. nan if there are none."""
    reach = ngram[0] - 1
    return mean([-math.log(ngram_p(sequence[i:i + 1], sequence[max(0, i - reach):i], ngram))
                 for sequence in sequences for i in range(len(sequence))])

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


def load_gpt2(source):
    """
    GPT-2's tokenizer without GPT-2, from the encoder files in a folder (OpenAI's names or the
    hub's) or of a hub id -> encode(text) -> ids. UserError if they are not there.
    """
    from huggingface_hub import snapshot_download
    from tiktoken import Encoding
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    os.environ['TIKTOKEN_CACHE_DIR'] = ''       # its copies go by the path, whatever is there now
    published, hub = ('vocab.bpe', 'encoder.json'), ('merges.txt', 'vocab.json')
    with from_hub(f"no encoder files of GPT-2, {' and '.join(hub)}", source):
        folder = source
        if not os.path.isdir(source):
            folder = snapshot_download(source, allow_patterns=hub)
        names = published if os.path.isfile(os.path.join(folder, published[0])) else hub
        ranks = data_gym_to_mergeable_bpe_ranks(*(os.path.join(folder, name) for name in names))
    encoding = Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                        special_tokens={'<|endoftext|>': len(ranks)})
    return partial(encoding.encode, allowed_special='all')


def judge_ids(texts, encode, max_length=1024):
    """The texts that are not blank as the judge's ids, cut to max_length -> list of lists."""
    return [encode(text)[:max_length] for text in texts if text.strip()]


def count_ids(rows):
    """Of texts as the judge's ids: entropy, nats, mean over the texts; distinct-4 -> dict."""
    return dict(entropy=mean([*map(entropy, rows)]), distinct_4_judge=distinct(rows))


@contextmanager
def float32_products():
    """Of a GPU, too: for what is sampled device.py may have allowed TF32, which is coarser."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@float32_products()
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
    eos = tokenizer.eos_token_id
    limit = getattr(model.config, 'max_position_embeddings', max_length)
    encode = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    rows = judge_ids(texts, encode, min(max_length, limit))
    width = max(map(len, rows), default=0)
    sums = Counter()
    for first in tqdm(range(0, len(rows), batch_size), desc='judge', disable=None, leave=False):
        part = rows[first:first + batch_size]
        ids = torch.tensor([row + [eos] * (width - len(row)) for row in part], device=device)
        # what is scored never looks at the fill; row by row, as float32 logits take gigabytes
        for row, logits in zip(ids, model(ids).logits):                         # (T,), (T, V)
            nll = F.cross_entropy(logits[:-1], row[1:], reduction='none').cpu().double()
            is_text = (row != eos).cpu()
            before_second = (~is_text).cumsum(0) == 1       # from the first EOS on
            jax = (is_text | before_second)[1:].double()                        # (T-1,)
            port = is_text[1:].double() + before_second[1:].double()
            sums.update(nll=(jax @ nll).item(), tokens=int(jax.sum()),
                        port_nll=(port @ nll).item(), port_tokens=port.sum().item())

    def perplexity(nll, tokens):
        return math.exp(nll / tokens) if tokens else math.nan

    return dict(gen_ppl=perplexity(sums['nll'], sums['tokens']),
                gen_ppl_port=perplexity(sums['port_nll'], sums['port_tokens']),
                tokens=sums['tokens'], empty=len(texts) - len(rows)) | count_ids(rows)

# --------------------------------------------------------------------------------------------------
# all of it, and the table; rows: dicts with 'generated', 'ids' and perhaps 'target'

def find_targets(rows):
    """The 'target' (or 'output') of all rows -> list of texts; [] if there is one without."""
    targets = [row.get('target', row.get('output')) for row in rows]
    return targets if all(isinstance(target, str) for target in targets) else []


def count_tokens(rows):
    return sum(len(row['ids']) for row in rows)


def measure(rows, limit, train, judges, encode=str.split):
    """
    All metrics of one line of the table -> dict. entropy_own is over the ids given, mean over the
    texts that are not blank; limit: tokens that distinct-4 looks at. Words and copies are looked up
    in the rows train, if there are any, joined by spaces: they are packed in order, so a run may
    cross from one to the next; a word that was cut between two is then its two parts. judges:
    functions of texts and their ids that give more metrics; encode: of tokens, to count errors in.
    """
    texts, ids = [row['generated'] for row in rows], [row['ids'] for row in rows]
    entropies = [entropy(row['ids']) for row in rows if row['generated'].strip()]
    out = dict(texts=len(rows), empty=len(rows) - len(entropies), entropy_own=mean(entropies),
               distinct_4=distinct(ids, 4, limit), repetition=repetition(ids),
               duplicates=duplicates(texts))
    if train:
        training_text = ' '.join(row['generated'] for row in train)
        lengths = copied(texts, training_text)
        out['words'], out['long_words'] = words(texts, set(training_text.split()))
        out['copied_median'], out['copied_max'] = float(np.median(lengths)), max(lengths)
    for judge in judges:
        out |= judge(texts, ids)
    if targets := find_targets(rows):
        out['bleu'], out['bleu_cased'] = bleu(texts, targets), bleu(texts, targets, cased=True)
        out |= rouge(texts, targets) | describe_errors(texts, targets, encode)
    return out


COLUMNS = [                             # key, title, digits
    ('nats_per_char', 'nats/char', 3),
    ('nats_per_token', 'token', 2),
    ('gen_ppl', 'ppl', 2),
    ('gen_ppl_port', 'port', 2),
    ('entropy', 'entropy', 3),
    ('distinct_4_judge', 'j dist-4', 3),
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
    ('exact', 'exact', 3),
    ('exact_stderr', '+-', 3),
    ('too_short', 'fewer', 2),
    ('too_long', 'more', 2),
    ('first_wrong', 'at', 1),
    ('empty', 'empty', 0),
    ('nfe', 'NFE', 0),
    ('seconds', 'seconds', 1),
]


LEGEND = dict(
    entropy_own="own ent, dist-4, repeat: over the tokens of the model or the dataset, else words; "
                "nats",
    nats_per_token="nats/char, token: of each by a 5-gram of characters, a 3-gram of tokens",
    entropy="entropy, j dist-4: over the judge's tokens (GPT-2's)",
    long_words="words, long: share that the training text has too; long ones have over 3 letters",
    copied_max="copied, max: characters in a row as in the training text, median and most",
    rougeL="BLEU, R: of the official tokens; where few letters are a to z, of words of any\n"
           "  script, or characters where no spaces are; R-2: of word pairs, 0 for one-word texts",
    exact="exact, +-: share of texts equal to their target, its standard error; of the others",
    first_wrong="  fewer, more: tokens than the target, share; at: first wrong token, median")


def print_table(results, left_out=()):
    """
    {name: metrics} -> a line for each, standard errors below it if there are any, without the
    columns that none has or that are left out.
    """
    lines = {}
    for name, row in results.items():
        lines[name] = row
        if 'stderr' in row:
            lines['+-'.rjust(len(name))] = row['stderr']
    keys = {key for row in lines.values() for key in row} - set(left_out)
    if 'exact' in keys:         # against targets, variety says little, and the line is long
        keys -= {'entropy_own', 'distinct_4', 'bleu_cased'}
    columns = [['', *lines]]
    for key, title, digits in COLUMNS:
        if key in keys:
            numbers = [row.get(key) for row in lines.values()]
            columns.append([title, *('' if x is None else f'{x:.{digits}f}' for x in numbers)])
    widths = [max(map(len, column)) for column in columns]
    print()
    for name, *numbers in zip(*columns):
        print(name.ljust(widths[0]), *(x.rjust(width) for x, width in zip(numbers, widths[1:])))
    for key, text in LEGEND.items():
        if key in keys:
            print(text)


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


def gap_closed(report):
    """
    How near texts come to real ones under the n-gram judges -> {'gap_closed', 'gap_closed_tokens'},
    the share of the way from unigram, by characters and by tokens.
    """
    real, unigram, gaps = report['real'], report['unigram'], {}
    for gap, key in (('gap_closed', 'nats_per_char'), ('gap_closed_tokens', 'nats_per_token')):
        way = unigram[key] - real[key]
        gaps[gap] = (unigram[key] - report[key]) / way if way else math.nan
    return gaps
