"""
How good are the texts? Sample a checkpoint, or take a file of texts, and measure.

    python eval.py --out_dir=out/demo --dataset=pydocs --judge=ngram    # no download
    python eval.py --init_from=embedded-language-flows/ELF-B-owt-torch  # the official protocol
    python eval.py --samples=out/samples.jsonl    # score what exists; with 'target': BLEU and ROUGE

Read the columns together: repetition lowers the perplexity of a judge, and entropy and distinct-4
with it; what is copied from the training text is made of words and has a low perplexity, too.
"""
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from functools import lru_cache
from operator import itemgetter

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import make_out_dir
from configurator import UserError, configure, from_hub
from data import (check_vocabulary, cut_at_eos, get_rows, load_tokenizer, open_bins, open_split,
                  read_inputs, read_jsonl, read_row, to_json, write_jsonl)
from device import (autocast, describe, gather, join_ranks, own_device, pack_linears, pick_device,
                    print0, rank_and_world)
from distill import distill_loss, draw_times
from model import TextEncoder, compute_loss, draw, encode_rows
from sample import load_model, resolve_sampling, sample_texts

# --------------------------------------------------------------------------------------------------
out_dir = 'out'             # the model in its ckpt.pt (EMA); texts and metrics.jsonl go here
init_from = ''              # instead: a published checkpoint, file, folder or hub id
samples = ''                # instead of sampling: a JSONL file, one object a line, with
                            # 'generated' or 'text', perhaps 'target'
references = ''             # for texts without 'target': a JSONL or save_to_disk folder that
                            # has it, text i its row i
input_file = ''             # conditions and targets of a conditional model, '' = val.jsonl of
                            # the dataset
data_dir = 'data'
dataset = ''                # bins under data_dir: validation loss, real text beside the
                            # samples, training text for the n-gram judge, words and copies
num_samples = 1000
batch_size = 16             # rows sampled at once; changes memory and speed, not the texts
steps = -1                  # forward passes per text, -1 = the checkpoint's default, as below
sampler = ''                # 'ode' or 'sde', '' = the default
gamma = -1.0                # of the SDE: how much is re-noised
w = -1.0                    # self-conditioning guidance strength
cfg = -1.0                  # classifier-free guidance on the condition, 1 = off
grid = 'logit_normal'       # times: 'logit_normal', 'quantile', 'uniform'
judge = 'auto'              # causal LM (folder or hub id), 'ngram' (no download), 'none';
                            # 'auto' = gpt2-large, none if there are targets
judge_batch_size = 16       # texts judged at once
eval_iters = 10             # batches of the validation loss, 0 = none
seed = 1337                 # text i depends on (seed, i) alone
seeds = ''                  # several, such as 42,123,456: mean and standard error over them
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # of sampling: 'float32' or 'bfloat16'; the judge is always float32
# --------------------------------------------------------------------------------------------------
# metrics that need no judge; ids are lists of tokens

def mean(numbers):
    """Average a list of numbers; nan if it is empty."""
    return sum(numbers) / len(numbers) if numbers else math.nan


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
        grams = [tuple(ids[i:i + 5]) for i in range(len(ids) - 4)]
        counts = Counter(grams)
        repeated = set()
        for i, gram in enumerate(grams):
            if counts[gram] >= 3:
                repeated.update(range(i, i + 5))
        inside += len(repeated)
    return inside / max(1, sum(map(len, ids_list)))


def duplicates(texts):
    """Share of texts that equal an earlier one."""
    return 1 - len(set(texts)) / len(texts) if texts else 0.0


def distinct(ids_list, n=4, limit=None):
    """
    Share of different ones among all n-grams of a set of texts, none across two texts. The share
    falls as a set grows: compare sets of as many tokens, the first `limit` of each.
    """
    grams, left = [], sum(map(len, ids_list)) if limit is None else limit
    for ids in ids_list:
        ids = ids[:left]
        left -= len(ids)
        grams += [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def words(texts, vocabulary):
    """
    Share of the inner words of texts that are in vocabulary, a set, and the same share of those
    longer than three letters. Inner: neither a text's first nor its last, which may be cut. nan
    where there are none.
    """
    inner = [word for text in texts for word in text.split()[1:-1]]
    long = [word for word in inner if len(word) > 3]
    return mean([word in vocabulary for word in inner]), mean([word in vocabulary for word in long])


@lru_cache(maxsize=1)
def pieces(text, k):
    """All runs of k characters of a text -> set."""
    return {text[i:i + k] for i in range(len(text) - k + 1)}


def known_stretches(text, known, k):
    """The runs of a text whose pieces of k characters are all in known -> list, longest first."""
    stretches, start = [], 0
    for end in range(k, len(text) + 1):
        if text[end - k:end] not in known:
            stretches.append(text[start:end - 1])
            start = end - k + 1
    stretches.append(text[start:])
    return sorted(stretches, key=len, reverse=True)


def copied(texts, training_text, k=12):
    """
    The longest run of characters that each text shares with training_text -> list of lengths, 0 for
    less than k. White space of any kind and length counts as one space.
    """
    training_text = ' '.join(training_text.split())
    known, lengths = pieces(training_text, k), []
    for text in texts:
        longest = k - 1
        # a shared run lies in such a stretch: that spares nearly all searches, which are slow
        for stretch in known_stretches(' '.join(text.split()), known, k):
            at = 0
            for end in range(longest + 1, len(stretch) + 1):
                # where the run only grew at its end, it is nowhere before the shorter one's place
                found = training_text.find(stretch[end - longest - 1:end], at)
                at = max(found, 0)
                if found >= 0:
                    longest += 1
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
    assert len(hyps) == len(refs) > 0, f"{len(hyps)} texts, {len(refs)} references"
    kinds = ('rouge1', 'rouge2', 'rougeL')
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(ref, hyp) for hyp, ref in zip(hyps, refs)]
    return {kind: mean([score[kind].fmeasure * 100 for score in scores]) for kind in kinds}

# --------------------------------------------------------------------------------------------------
# the judge without a download: an interpolated character n-gram, Witten-Bell smoothed

def train_ngram(texts, n=5):
    """
    Counts of all 1- to n-grams within each text; per context the characters that followed it, all
    and different ones.
    """
    grams = Counter()
    for text in texts:
        for k in range(1, n + 1):
            grams.update(text[i:i + k] for i in range(len(text) - k + 1))
    followers = {}
    for gram, count in grams.items():
        total, kinds = followers.get(gram[:-1], (0, 0))
        followers[gram[:-1]] = total + count, kinds + 1
    return dict(n=n, grams=grams, followers=followers)


def ngram_p(char, context, ngram):
    """
    P(char | context): a context h seen N times with K different followers gives (count(h char) +
    K * P(char | h without its first character)) / (N + K). Below the empty context: uniform over
    the alphabet and one sign for all others.
    """
    grams, followers = ngram['grams'], ngram['followers']
    p = 1 / (followers.get('', (0, 0))[1] + 1)
    for k in range(len(context) + 1):
        h = context[len(context) - k:]
        if h not in followers:
            break               # longer ones were not seen either
        total, kinds = followers[h]
        p = (grams.get(h + char, 0) + kinds * p) / (total + kinds)
    return p


def ngram_nats(texts, ngram):
    """
    Mean -log P of all characters of texts, nats; each text starts without context. nan if there are
    none.
    """
    reach, nats = ngram['n'] - 1, 0.0
    for text in texts:
        for i, char in enumerate(text):
            nats -= math.log(ngram_p(char, text[max(0, i - reach):i], ngram))
    chars = sum(map(len, texts))
    return nats / chars if chars else math.nan

# --------------------------------------------------------------------------------------------------
# the judge of the paper: a causal LM with GPT-2's vocabulary

def gpt2_bpe(source):
    """
    Folder or hub id with vocab.json and merges.txt (or encoder.json, vocab.bpe): its byte-level BPE
    -> tiktoken.Encoding.
    """
    import tiktoken
    from huggingface_hub import hf_hub_download
    from tiktoken_ext.openai_public import r50k_pat_str
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    names = ('vocab.json', 'merges.txt')
    if os.path.isfile(os.path.join(source, 'encoder.json')):
        names = ('encoder.json', 'vocab.bpe')
    what = "no judge with GPT-2's vocabulary (--judge=ngram needs no download)"
    with from_hub(what, source):
        contents = []
        for name in names:
            here = os.path.isdir(source)
            path = os.path.join(source, name) if here else hf_hub_download(source, name)
            with open(path, encoding='utf-8') as f:
                contents.append(f.read())
        vocab = json.loads(contents[0])
        # the files write each byte as a visible sign
        byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
        merged = {}
        for line in contents[1].split('\n'):
            if line and not line.startswith('#version'):
                merged[line.replace(' ', '')] = True
        assert sorted(merged, key=vocab.get) == list(merged), "ids are not in the order of merges"
        ranks = {}
        for token in (*byte_of, *merged):
            ranks[bytes(byte_of[char] for char in token)] = vocab[token]
        special = {'<|endoftext|>': vocab['<|endoftext|>']}
        return tiktoken.Encoding(source, pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens=special)


@lru_cache(maxsize=1)
def load_judge(name, device):
    """A causal LM from a folder or hub id, float32, and its BPE."""
    from transformers import AutoModelForCausalLM
    bpe = gpt2_bpe(name)
    with from_hub("no judge (a causal LM)", name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().to(device)
    if bpe.n_vocab > model.config.vocab_size:
        raise UserError(f"judge {name!r} has {model.config.vocab_size} embeddings but a vocabulary "
                        f"of {bpe.n_vocab}")
    return model, bpe


def judge_ids(texts, bpe, max_length=1024):
    """The texts that are not blank as GPT-2 ids, cut to max_length -> list of lists."""
    return [bpe.encode(text, allowed_special='all')[:max_length] for text in texts if text.strip()]


@torch.no_grad()
def gen_ppl(texts, judge, batch_size=16, device='cpu', max_length=1024):
    """
    Generative perplexity, the official JAX protocol [utils/metrics_utils.py], and the port's beside
    it -> dict. Blank texts are left out, counted in 'empty'. GPT-2 ids, cut to max_length, filled
    with EOS to the longest of the set. Scored: every token but a row's first that is no EOS or the
    first EOS, so the first fill token too. gen_ppl = exp(sum nll / sum tokens) over all texts. The
    port adds its two masks as numbers (JAX: or), so gen_ppl_port counts tokens between the first
    and the second EOS twice. entropy: nats over the ids without fill, mean over texts.
    """
    model, bpe = load_judge(judge, str(device))
    torch.set_float32_matmul_precision('highest')   # of a GPU: pick_device may have allowed TF32
    eos = bpe.eot_token
    limit = getattr(model.config, 'max_position_embeddings', max_length)
    rows = judge_ids(texts, bpe, min(max_length, limit))
    width = max(map(len, rows), default=0)
    nll_sum, tokens = Counter(), Counter()
    for first in tqdm(range(0, len(rows), batch_size), desc='judge', disable=None, leave=False):
        part = rows[first:first + batch_size]
        ids = torch.tensor([row + [eos] * (width - len(row)) for row in part], device=device)
        lengths = torch.tensor([len(row) for row in part], device=device)
        real = (torch.arange(width, device=device) < lengths[:, None]).long()           # (B, T)
        logits = model(ids, attention_mask=real).logits                                 # (B, T, V)
        # row by row: the float32 logits of a batch are gigabytes already
        nll = torch.stack([F.cross_entropy(row[:-1], target[1:], reduction='none')
                           for row, target in zip(logits, ids)]).cpu().double()         # (B, T-1)
        token = (ids != eos).cpu()
        first_eos = (~token).cumsum(1) == 1         # from the first EOS to before the second
        for protocol, weight in (('jax', (token | first_eos).double()),
                                 ('port', token.double() + first_eos.double())):
            nll_sum[protocol] += (nll * weight[:, 1:]).sum().item()
            tokens[protocol] += weight[:, 1:].sum().item()
    ppl = {}
    for protocol in ('jax', 'port'):
        n = tokens[protocol]
        ppl[protocol] = float(np.exp(nll_sum[protocol] / n)) if n else math.nan
    return dict(gen_ppl=ppl['jax'], gen_ppl_port=ppl['port'], entropy=mean([*map(entropy, rows)]),
                tokens=int(tokens['jax']), empty=len(texts) - len(rows))

# --------------------------------------------------------------------------------------------------
# the validation loss, and the curves of a run

T_BINS = 5      # of equal probability under the training distribution of t


def t_edges(c):
    """Edges of the bins of t -> list of T_BINS + 1 numbers from 0 to 1."""
    quantiles = torch.linspace(0, 1, T_BINS + 1, dtype=torch.float64)
    return torch.sigmoid(c.t_mean + c.t_std * torch.special.ndtri(quantiles)).tolist()


@torch.no_grad()
def estimate_loss(net, encoder, meta, eval_iters, batch_size, device, rank=0, world=1,
                  distill=None):
    """
    Validation loss on fixed rows with fixed draws -> {'loss', 'l2', 'ce', 'l2_bins'}, numbers, the
    same on every rank and for every number of ranks. Batch k has its t in bin k % T_BINS, so that
    the bins come for free and l2, their mean, is the training loss with less variance.
    distill: the teacher, distill_steps and distill_substeps of a student, whose l2 is its own.
    """
    c = net.config
    batches = math.ceil(eval_iters / T_BINS) * T_BINS
    parts = {}                  # of batch k: {'l2': number, 'ce': number}
    for k in range(rank, batches, world):
        generator = torch.Generator().manual_seed(k)
        draws = draw(c, batch_size, c.max_length, generator, device)
        uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        normal = torch.special.ndtri((k % T_BINS + uniform) / T_BINS)
        draws.t = torch.sigmoid(c.t_mean + c.t_std * normal).float().to(device)
        rows = np.arange(k * batch_size, (k + 1) * batch_size) % meta['rows']['val']
        batch = encode_rows(encoder, get_rows(meta, 'val', rows, c), draws, c, device)
        if distill:
            teacher, *steps = distill
            times = draw_times(c, draws.t, *steps, generator)
            _, part = distill_loss(net, teacher, *batch, draws, times)
        else:
            _, part = compute_loss(net, *batch, draws)
        parts[k] = {name: x.item() for name, x in part.items()}
    for share in gather(parts, dist.group.WORLD if world > 1 else None):
        parts |= share

    # in the order of the batches, whoever computed them: a sum's last bits depend on it
    losses = defaultdict(list)
    for k in range(batches):
        for name, x in parts[k].items():
            losses[k % T_BINS if name == 'l2' else name].append(x)
    l2_bins = [mean(losses.pop(i, [])) for i in range(T_BINS)]
    means = dict(l2=mean([x for x in l2_bins if not math.isnan(x)]), ce=math.nan)
    means |= {name: mean(values) for name, values in losses.items()}
    loss = 0.0
    for share, name in ((1 - c.decoder_prob, 'l2'), (c.decoder_prob, 'ce')):
        loss += share * means[name] if share else 0.0       # a branch that is off has no mean
    return dict(loss=loss, **means, l2_bins=l2_bins)


def describe_val(val, c):
    """What estimate_loss found, for the log."""
    edges = t_edges(c)
    bins = [f"{a:.2f}-{b:.2f}: {x:.3f}" for a, b, x in zip(edges, edges[1:], val['l2_bins'])]
    parts = [f"{k} {x:.4f}" for k, x in val.items() if k not in ('loss', 'l2_bins')]
    return f"val loss {val['loss']:.4f} ({', '.join(parts)}) | l2 by t {' '.join(bins)}"


def read_series(file):
    """
    metrics.jsonl -> {name: {iteration: number}}. A run that was resumed has written again what came
    after its checkpoint: the last line of an iteration counts. A kill can cut a line: what is no
    JSON is left out, and said.
    """
    series, broken = defaultdict(dict), 0
    with open(file, encoding='utf-8', errors='replace') as f:
        for line in filter(str.strip, f):
            try:
                row = json.loads(line)
                iteration = row.get('iter')
            except (ValueError, AttributeError):
                broken += 1
                continue
            for name, x in row.items():
                if iteration is not None and isinstance(x, (int, float)):
                    series[name][iteration] = x
    if broken:
        print(f"{file}: {broken} lines are no JSON objects, left out")
    return series


def plot_losses(out_dir):
    """metrics.jsonl -> loss.png."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    series = read_series(os.path.join(out_dir, 'metrics.jsonl'))
    titles = dict(l2='denoise: l2 of the velocity', ce='decode: cross-entropy, nats per token')
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for axis, (part, title) in zip(axes, titles.items()):
        train, val = sorted(series[part].items()), sorted(series['val_' + part].items())
        if train:
            axis.plot(*zip(*train), alpha=0.6, linewidth=1, label='train')
        if val:
            axis.plot(*zip(*val), marker='o', markersize=3, label='validation')
        if train or val:
            axis.legend()
        axis.set(title=title, xlabel='iteration', yscale='log')
        axis.grid(alpha=0.3)
    file = os.path.join(out_dir, 'loss.png')
    fig.savefig(file + '.tmp', dpi=120, format='png')
    os.replace(file + '.tmp', file)
    plt.close(fig)

# --------------------------------------------------------------------------------------------------
# texts in: a list of dicts with 'generated', 'ids' and perhaps 'target'

def read_samples(file, references=''):
    """
    A JSONL file -> list of dicts with 'generated', perhaps 'target': its own, or that of the row of
    references (a JSONL, or a folder of save_to_disk) with the number 'id', by default the line's
    own. UserError names file and line.
    """
    targets = read_targets(references) if references else None
    rows = []
    for where, row in read_jsonl(file):
        if targets is not None:
            number = row.get('id', len(rows))
            if not isinstance(number, int) or not 0 <= number < len(targets):
                raise UserError(f"{where} has id {number!r}, {references} has {len(targets)} rows")
            row['target'] = targets[number]
        text = row.get('generated', row.get('text'))
        if not isinstance(text, str) or not isinstance(row.get('target', ''), str):
            raise UserError(f"{where} needs a text under 'generated' or 'text', and under 'target' "
                            "if it has one")
        if rows and ('target' in row) != ('target' in rows[0]):
            raise UserError(f"{where}: some lines have a 'target' and some have none; all or none")
        row['generated'] = text.encode('utf-8', 'replace').decode()     # half a surrogate pair: '?'
        rows.append(row)
    if not rows:
        raise UserError(f"{file} has no texts")
    return rows


def read_targets(references):
    """A JSONL with 'target' (or 'output') or a save_to_disk folder with that column -> list."""
    if not os.path.isdir(references):
        return [row.get('target', row.get('output')) for _, row in read_jsonl(references)]
    from datasets import load_from_disk
    with from_hub("references: no save_to_disk folder with a column 'target'", references):
        return load_from_disk(references)['target'][:]


def find_targets(rows):
    """The 'target' (or 'output') of all rows -> list of texts; [] if there is one without."""
    targets = [row.get('target', row.get('output')) for row in rows]
    return targets if all(isinstance(target, str) for target in targets) else []


def add_ids(rows, tokenizer):
    """Give each text its 'ids': the tokenizer's, or without one its words."""
    for row in rows:
        text = row['generated']
        if tokenizer:
            row['ids'] = tokenizer(text, add_special_tokens=False)['input_ids']
        else:
            row['ids'] = text.split()
    return rows


def read_conditions(c, meta):
    """
    What a model with conditions gets -> list of dicts with 'input' and perhaps 'target',
    num_samples at most; [] for a model without.
    """
    if not c.max_input_length:
        return []
    if not input_file and not meta:
        raise UserError(f"{init_from or out_dir} is a model with conditions; give "
                        "--dataset=<folder under data_dir> or --input_file=x.jsonl with 'input' "
                        "and 'target'")
    return read_inputs(input_file or os.path.join(meta['dir'], 'val.jsonl'))[:num_samples]


def sample_runs(model, tokenizer, encoder, conditions, how, device, group):
    """
    Sample num_samples texts, or one for each condition, for each seed -> {name of the run: rows}.
    Every rank samples its share and gets all of them; the first one writes them to out_dir.
    """
    rank, world = rank_and_world()
    inputs = [row['input'] for row in conditions] or None
    targets = find_targets(conditions)
    count = len(conditions) or num_samples
    names = {int(s): f'seed {s}' for s in seeds.split(',')} if seeds else {seed: 'samples'}
    runs = {}
    for run_seed, name in names.items():
        rows = []
        with tqdm(total=count, desc=name, disable=None if rank == 0 else True) as bar:
            for row in sample_texts(model, tokenizer, range(rank, count, world), batch_size,
                                    run_seed, device, how, inputs, encoder):
                rows.append(row)
                bar.update(min(world, count - bar.n))
        rows = sorted(sum(gather(rows, group), []), key=itemgetter('id'))
        for row, target in zip(rows, targets):
            row['target'] = target
        runs[name] = rows
        if rank == 0:
            file = f'samples_eval_{run_seed}.jsonl' if seeds else 'samples_eval.jsonl'
            write_jsonl(os.path.join(out_dir, file), rows)
            print(f"{len(rows)} texts in {os.path.join(out_dir, file)}")
    return runs


def bin_rows(meta, split, n, max_length):
    """Up to n rows of a split, evenly spaced -> lists of their target ids, cut at the first EOS."""
    ids, index = open_split(meta, split)
    numbers = np.linspace(0, len(index), min(n, len(index)), endpoint=False).astype(int)
    rows = []
    for r in numbers:
        _, target = read_row(ids, index, r)
        rows.append(cut_at_eos(target[:max_length].tolist(), meta['eos_id']))
    return rows


def reference_texts(meta, tokenizer, n, max_length):
    """
    What the texts of a model without conditions are held against -> {'real': n rows of the
    validation split, 'unigram': as many tokens, each drawn from those of the training text}, and
    the training text, a list of texts; a million tokens of it are enough for a 5-gram.
    """
    real = bin_rows(meta, 'val', n, max_length)
    rows = 1 + 1_000_000 * meta['rows']['train'] // max(1, meta['tokens']['train'])
    train = bin_rows(meta, 'train', rows, max_length)
    pool, rng = np.concatenate(train), np.random.default_rng(seed)
    unigram = [rng.choice(pool, len(ids)).tolist() for ids in real]

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    sets = {}
    for name, ids_list in (('real', real), ('unigram', unigram)):
        sets[name] = [dict(generated=decode(ids), ids=ids) for ids in ids_list]
    return sets, [decode(ids) for ids in train]

# --------------------------------------------------------------------------------------------------
# numbers out

def count_tokens(rows):
    return sum(len(row['ids']) for row in rows)


def measure(rows, limit, train_texts, ngram, device):
    """
    All metrics of one line of the table -> dict. entropy_own is over the ids given, mean over the
    texts that are not blank; limit: tokens that distinct-4 looks at. Words and copies are looked up
    in train_texts, if there are any, joined by spaces: rows are packed in order, so a run may cross
    from one to the next; a word that was cut between two is then its two parts.
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
        out['nats_per_char'] = ngram_nats(texts, ngram)
    elif judge != 'none':
        out |= gen_ppl(texts, judge, judge_batch_size, device)
    targets = find_targets(rows)
    if targets:
        out['bleu'], out['bleu_cased'] = bleu(texts, targets), bleu(texts, targets, cased=True)
        out |= rouge(texts, targets)
    return out


COLUMNS = [                             # key, title, format
    ('nats_per_char', 'nats/char', '.3f'),
    ('gen_ppl', 'ppl', '.2f'),
    ('gen_ppl_port', 'port', '.2f'),
    ('entropy', 'entropy', '.3f'),
    ('entropy_own', 'own ent', '.3f'),
    ('distinct_4', 'dist-4', '.3f'),
    ('repetition', 'repeat', '.3f'),
    ('duplicates', 'dupl', '.3f'),
    ('words', 'words', '.3f'),
    ('long_words', 'long', '.3f'),
    ('copied_median', 'copied', '.0f'),
    ('copied_max', 'max', '.0f'),
    ('bleu', 'BLEU', '.2f'),
    ('bleu_cased', 'cased', '.2f'),
    ('rouge1', 'R-1', '.2f'),
    ('rouge2', 'R-2', '.2f'),
    ('rougeL', 'R-L', '.2f'),
    ('texts', 'texts', '.0f'),
    ('empty', 'empty', '.0f'),
]


def print_table(results, unit):
    """{name: metrics} -> a line for each, but no columns that none has. unit: what the ids are."""
    used = [column for column in COLUMNS if any(column[0] in row for row in results.values())]
    lines = [['', *(title for _, title, _ in used)]]
    for name, row in results.items():
        lines.append([name])
        for key, _, form in used:
            lines[-1].append(f'{row[key]:{form}}' if key in row else '')
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for name, *numbers in lines:
        print(name.ljust(widths[0]), *(x.rjust(width) for x, width in zip(numbers, widths[1:])))
    print(f"own ent, dist-4, repeat: over {unit}; entropies in nats")
    if any('words' in row for row in results.values()):
        print("words, long: share that the training text has too; long ones have over 3 letters")
        print("copied, max: characters in a row as in the training text, median and most of a text")


def over_runs(results):
    """A list of metrics, one of each run -> their means and the standard errors of these."""
    means, errors = {}, {}
    for key in results[0]:
        numbers = [row[key] for row in results]
        means[key] = float(np.mean(numbers))
        errors[key] = float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers))
    return means, errors

# --------------------------------------------------------------------------------------------------

def check_settings():
    """All that is wrong with the settings whatever the model: UserError."""
    for name, value, least in (('num_samples', num_samples, 1), ('batch_size', batch_size, 1),
                               ('judge_batch_size', judge_batch_size, 1), ('seed', seed, 0),
                               ('eval_iters', eval_iters, 0)):
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}")
    if seeds and not re.fullmatch(r'\d+(,\d+)*', seeds):
        raise UserError(f"seeds={seeds!r}: whole numbers with commas between, such as 42,123,456")


def choose_judge(targets, meta):
    """The setting judge, with 'auto' resolved. UserError if an n-gram has nothing to learn from."""
    if judge == 'auto':
        return 'none' if targets else 'gpt2-large'
    if judge == 'ngram' and (not meta or meta.get('conditional')):
        raise UserError("--judge=ngram learns from training text without conditions; name its "
                        "bins: --dataset=<folder under data_dir>")
    return judge


def print_gap(results, own):
    """How near texts come to real ones under the n-gram judge -> share of the way from unigram."""
    real, unigram = results['real'], results['unigram']
    way = unigram['nats_per_char'] - real['nats_per_char']
    gap = (unigram['nats_per_char'] - own['nats_per_char']) / way if way else math.nan
    share = own['distinct_4'] / max(1e-9, real['distinct_4'])
    print(f"gap closed: {gap:.3f} of the way from unigram to real text; "
          f"distinct-4 {share:.2f} of real text's")
    return gap


if __name__ == '__main__':
    configure(globals())
    check_settings()
    rank, world = rank_and_world()
    if samples and rank:
        sys.exit()                      # one rank is enough to read a file
    device, bf16, hardware = pick_device(own_device(device), dtype)
    meta = open_bins(data_dir, dataset) if dataset else None
    make_out_dir(out_dir)

    # ---- what is missing or wrong shows here, before the sampling --------------------------------
    if samples:
        given = read_samples(samples, references)
        tokenizer = load_tokenizer(meta['tokenizer'], meta['vocab_size']) if meta else None
        unit = f"tokens of {meta['dir']}" if meta else 'words'
        runs = {'samples': add_ids(given, tokenizer)}
    else:
        model, encoder, unit = load_model(init_from, out_dir).to(device), None, "the model's tokens"
        c = model.config
        if meta:
            check_vocabulary(meta, c, init_from or out_dir)
        given = read_conditions(c, meta)
        tokenizer = load_tokenizer(c.tokenizer, c.vocab_size)
        if given or meta and eval_iters:
            encoder = TextEncoder(c.encoder, c.latent_mean, c.latent_std).to(device)
        group = join_ranks(device)
    judge = choose_judge(find_targets(given), meta)
    if judge not in ('ngram', 'none') and rank == 0:
        load_judge(judge, str(device))      # the other ranks wait for it at the first exchange
    print0(f"device: {describe(device, bf16, hardware, dtype)}, ranks: {world}; judge: {judge}")
    report = dict(source=samples or init_from or out_dir, judge=judge)
    report |= dict(seeds=seeds) if seeds else dict(seed=seed)

    # ---- the texts: each rank samples its share, the first one measures --------------------------
    if not samples:
        how = resolve_sampling(c, steps, sampler, gamma, w, cfg) | dict(grid=grid)
        nfe = how['steps'] * (1 if how['cfg'] == 1 else 2)
        print0("sampling: " + ', '.join(f'{k}={v}' for k, v in how.items()) + f", NFE={nfe}")
        pack_linears(model, bf16)
        with autocast(device, bf16):
            if meta and eval_iters:
                report['val'] = estimate_loss(model, encoder, meta, eval_iters, batch_size, device,
                                              rank, world)
                print0(describe_val(report['val'], c))
            start = time.time()
            runs = sample_runs(model, tokenizer, encoder, given, how, device, group)
        report |= how | dict(nfe=nfe, seconds=time.time() - start)
        if group:
            dist.destroy_process_group()
    if rank:
        sys.exit()

    # ---- beside them real text, and tokens of the training text drawn one by one -----------------
    others, train_texts, ngram = {}, [], None
    if meta and not meta.get('conditional'):
        first_run = next(iter(runs.values()))
        length = meta['max_length'] if samples else c.max_length
        others, train_texts = reference_texts(meta, tokenizer, len(first_run), length)
        ngram = train_ngram(train_texts) if judge == 'ngram' else None

    # ---- the table, and the same as a line of JSON -----------------------------------------------
    limit = min(count_tokens(rows) for rows in (runs | others).values())
    results = {}
    for name, rows in (runs | others).items():
        results[name] = measure(rows, limit, train_texts, ngram, device)
    of_runs = [results[name] for name in runs]
    report |= of_runs[0]
    if len(runs) > 1:
        results['mean'], results['std err'] = over_runs(of_runs)
        report |= results['mean'] | dict(stderr=results['std err'])
        report['by_seed'] = {name.split()[1]: results[name] for name in runs}
    report |= {name: results[name] for name in others}
    print_table(results, unit)
    if ngram:
        report['gap_closed'] = print_gap(results, report)
    with open(os.path.join(out_dir, 'metrics.jsonl'), 'a', encoding='utf-8') as f:
        f.write(to_json(report) + '\n')
    print(to_json(report))
