"""
What is measured in texts: counts that need no judge, an n-gram as the judge without a download, a
causal LM as the paper's. Nothing of ELF in it. ids: the tokens of a text, a list; text: a str.
"""
import math
import os
from collections import Counter, defaultdict
from functools import lru_cache, partial
from statistics import median
from types import SimpleNamespace

import regex
import torch
import torch.nn.functional as F
from pandas import DataFrame
from tqdm import tqdm

from parts.process import from_hub

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
    """Share of the 5-grams of all texts that their own text holds three times or more."""
    counts = [n for ids in ids_list for n in Counter(ngrams(tuple(ids), 5)).values()]
    return sum(n for n in counts if n >= 3) / max(1, sum(counts))


def distinct(ids_list):
    """
    Share of different ones among all 4-grams of a set of texts, none across two texts. The share
    falls as a set grows: compare sets of one size.
    """
    grams = [gram for ids in ids_list for gram in ngrams(tuple(ids), 4)]
    return len(set(grams)) / max(1, len(grams))


# --------------------------------------------------------------------------------------------------
# against the texts that were wanted, the targets

UNSPACED = r'[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*'


def apart(text):
    """Spaces around each character of a script that has none between words: it counts as one."""
    return regex.sub(UNSPACED, r' \g<0> ', text)


def bleu(hyps, refs):
    """
    Corpus BLEU, 0 to 100, the official code's: sacreBLEU's in lower case with effective order, of
    texts with single characters where words have no spaces between them.
    """
    import sacrebleu
    hyps, refs = [*map(apart, hyps)], [*map(apart, refs)]
    return sacrebleu.corpus_bleu(hyps, [refs], lowercase=True, use_effective_order=True).score


def rouge(hyps, refs):
    """
    ROUGE-1, -2 and -L, stemmed: F-measure * 100 of each pair, then the plain mean. rouge-score sees
    a to z and 0 to 9 alone; where most letters of the targets are others its tokens are words of
    any script, not stemmed, and single characters as for BLEU. A pair of one-word texts has no
    pairs of words: its ROUGE-2 is 0 even where they are equal.
    """
    from rouge_score import rouge_scorer
    kinds = ('rouge1', 'rouge2', 'rougeL')
    tokenizer = None
    if mean([x.isascii() for x in ''.join(refs) if x.isalpha()]) < 0.5:
        tokenizer = SimpleNamespace(
            tokenize=lambda text: regex.findall(r'[\p{L}\p{M}\p{N}]+', apart(text.lower())))
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True, tokenizer=tokenizer)
    scores = [scorer.score(ref, hyp) for hyp, ref in zip(hyps, refs, strict=True)]
    return {kind: mean([score[kind].fmeasure * 100 for score in scores]) for kind in kinds}


def exact_match(hyps, refs):
    """Share of texts that equal their target, white space at the ends aside."""
    return mean([hyp.strip() == ref.strip() for hyp, ref in zip(hyps, refs, strict=True)])


def errors(hyps, refs):
    """
    How texts miss their targets, by words -> 'length': share of those that miss which have another
    number of words; 'first_wrong': the median place, from 1, of their first wrong word.
    """
    pairs = zip(map(str.split, hyps), map(str.split, refs))
    wrong = [(hyp, ref) for hyp, ref in pairs if hyp != ref]
    places = [1 + len(os.path.commonprefix(pair)) for pair in wrong]
    return dict(length=mean([len(hyp) != len(ref) for hyp, ref in wrong]),
                first_wrong=median(places or [math.nan]))


# --------------------------------------------------------------------------------------------------
# the judge without a download: interpolated n-grams, Witten-Bell smoothed, of 5 characters and of 3
# tokens: where tokens are words, five characters see hardly more than one of them

def train_ngram(sequences, n=5):
    """
    Count within each text or tuple of ids -> per context, of up to n - 1 items, how often each item
    followed it, and how often any did.
    """
    followers = defaultdict(Counter)
    for sequence in sequences:
        for k in range(n):
            for gram in ngrams(sequence, k + 1):
                followers[gram[:k]][gram[k:]] += 1
    return followers, {context: seen.total() for context, seen in followers.items()}


def ngram_p(item, context, ngram):
    """
    P(item | context), both texts or tuples: a context h seen N times with K different followers
    gives (count(h item) + K * P(item | h without its first)) / (N + K). Below the empty context:
    uniform over the alphabet and one item for all others.
    """
    followers, totals = ngram
    p = 1 / (len(followers[item[:0]]) + 1)
    for start in range(len(context), -1, -1):
        h = context[start:]
        if h not in totals:
            break               # longer ones were not seen, or not counted, either
        kinds = len(followers[h])
        p = (followers[h][item] + kinds * p) / (totals[h] + kinds)
    return p


def ngram_nats(sequences, ngram):
    """Mean -log P of all items, nats; each text starts without context. nan if there are none."""
    return mean([-math.log(ngram_p(sequence[i:i + 1], sequence[:i], ngram))
                 for sequence in sequences for i in range(len(sequence))])

# --------------------------------------------------------------------------------------------------
# the judge of the paper: a causal LM

@lru_cache
def load_judge(name, device):
    """A causal LM from a folder or hub id, float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    with from_hub("no judge, a causal LM (--judge=ngram needs no download)", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().to(device)
    return model, tokenizer


def load_gpt2(source):
    """
    GPT-2's tokenizer without GPT-2, from its two files in a folder or of a hub id -> encode(text)
    -> ids. UserError if they are not there.
    """
    from tiktoken import Encoding
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    from transformers.utils import cached_file
    os.environ['TIKTOKEN_CACHE_DIR'] = ''       # its copies go by the path, whatever is there now
    with from_hub("no encoder files of GPT-2, merges.txt and vocab.json", source):
        names = ('merges.txt', 'vocab.json')
        if os.path.exists(f'{source}/vocab.bpe'):
            names = ('vocab.bpe', 'encoder.json')       # as OpenAI published them
        ranks = data_gym_to_mergeable_bpe_ranks(*(cached_file(source, name) for name in names))
    encoding = Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                        special_tokens={'<|endoftext|>': len(ranks)})
    return partial(encoding.encode, allowed_special='all')


def judge_ids(texts, encode, max_length=1024):
    """The texts that are not blank as the judge's ids, cut to max_length -> list of lists."""
    return [encode(text)[:max_length] for text in texts if text.strip()]


def count_ids(rows):
    """Of texts as the judge's ids: entropy, nats, mean over the texts; distinct-4 -> dict."""
    return dict(entropy=mean([*map(entropy, rows)]), distinct_4_judge=distinct(rows))


@torch.no_grad()
def gen_ppl(texts, judge, device='cpu'):
    """
    Generative perplexity, the official JAX protocol [utils/metrics_utils.py] -> dict. Blank texts
    are left out. The judge's (GPT-2's) ids, cut to 1024, filled with EOS to the longest of
    the set. Scored: every token but a row's first that is no EOS or the first EOS, so the first
    fill token too. gen_ppl = exp(sum nll / sum tokens) over all texts. entropy: nats over the ids
    without fill, mean over texts.
    """
    model, tokenizer = load_judge(judge, device)
    eos = tokenizer.eos_token_id
    limit = min(1024, getattr(model.config, 'max_position_embeddings', 1024))
    encode = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    rows = judge_ids(texts, encode, limit)
    width = max(map(len, rows), default=0)
    nll = 0.0
    tokens = 0
    # for what is sampled device.py may have allowed TF32, which is coarser
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    # a text at a time: its float32 logits take 0.2 GB; of the fill no token but the first counts
    for row in tqdm(rows, desc='judge', disable=None, leave=False):
        ids = torch.tensor(row + [eos] * (len(row) < width), device=device)         # (T,)
        logits = model(ids[None]).logits[0]                                         # (T, V)
        of_each = F.cross_entropy(logits[:-1], ids[1:], reduction='none').cpu().double()
        is_eos = (ids == eos).cpu()
        scored = of_each[(~is_eos | (is_eos.cumsum(0) == 1))[1:]]
        nll += scored.sum().item()
        tokens += len(scored)
    torch.set_float32_matmul_precision(precision)
    ppl = math.exp(nll / tokens) if tokens else math.nan
    return dict(gen_ppl=ppl, tokens=tokens) | count_ids(rows)

# --------------------------------------------------------------------------------------------------
# all of it, and the table; rows: dicts with 'generated', 'ids' and perhaps 'target'

def find_targets(rows):
    """The 'target' (or 'output') of all rows -> list of texts; [] if there is one without."""
    targets = [row.get('target', row.get('output')) for row in rows]
    return targets if all(isinstance(target, str) for target in targets) else []


def make_judges(judge, gpt2, train, device):
    """
    eval.py's settings judge and gpt2 -> one after the other functions of texts and their ids that
    give metrics, dicts. train: for judge 'ngram', rows of training text.
    """
    if judge == 'ngram':
        of_chars = train_ngram([row['generated'] for row in train], 5)
        of_tokens = train_ngram([tuple(row['ids']) for row in train], 3)
        yield lambda texts, ids: dict(
            nats_per_char=ngram_nats(texts, of_chars),
            nats_per_token=ngram_nats(map(tuple, ids), of_tokens))
    elif judge != 'none':
        load_judge(judge, device)       # if it is missing, that shows now
        yield lambda texts, ids: gen_ppl(texts, judge, device=device)
    if gpt2:
        encode = load_gpt2(gpt2)
        yield lambda texts, ids: count_ids(judge_ids(texts, encode))


def measure(rows, judges, n):
    """
    All metrics of one line of the table -> dict. Texts with targets are held against these; of
    others variety counts: entropy_own is over the ids given, mean over the texts that are not
    blank; n: texts that distinct_4 looks at, 0 = all. judges: functions of texts and their ids that
    give more metrics.
    """
    texts = [row['generated'] for row in rows]
    ids = [row['ids'] for row in rows]
    full = [row['ids'] for row in rows if row['generated'].strip()]
    out = dict(texts=len(rows), empty=len(rows) - len(full), repetition=repetition(ids))
    for judge in judges:
        out |= judge(texts, ids)
    if targets := find_targets(rows):
        exact = exact_match(texts, targets)
        error = math.sqrt(exact * (1 - exact) / len(rows))
        return out | rouge(texts, targets) | errors(texts, targets) | dict(
            bleu=bleu(texts, targets), exact=exact, exact_stderr=error)
    return out | dict(entropy_own=mean([*map(entropy, full)]), distinct_4=distinct(ids[:n or None]))


COLUMNS = ('exact exact_stderr length first_wrong bleu rouge1 rouge2 rougeL '
           'nats_per_char nats_per_token gen_ppl entropy distinct_4_judge entropy_own distinct_4 '
           'repetition empty').split()


def print_table(results):
    """
    {name: metrics} -> a line for each, standard errors below it if there are any, without the
    columns that none has; in blocks of 100 columns.
    """
    lines = {}
    for name, row in results.items():
        lines[name] = row
        if 'stderr' in row:
            lines[name + ' +-'] = row['stderr']
    # object: whole numbers stay whole
    table = DataFrame.from_dict(lines, 'index', object, COLUMNS)
    table = table.dropna(axis='columns', how='all')
    print(f"\n{table.to_string(float_format='{:#.4g}'.format, na_rep='', line_width=100)}\n")


def over_runs(results):
    """Metrics of each run -> their means, and with several runs the standard errors of these."""
    if len(results) == 1:
        return results[0]
    means, stderr = DataFrame(results).agg(['mean', 'sem'], skipna=False).to_dict('records')
    return means | dict(stderr=stderr, by_seed=results)
