"""
How good are the texts? Sample a checkpoint, or take a file of texts, and measure.

    python eval.py --out_dir=out/demo --dataset=pydocs --judge=ngram    # no download; reference rows beside the samples
    python eval.py --init_from=embedded-language-flows/ELF-B-owt-torch  # 1000 texts, GPT-2 Large, the official protocol
    python eval.py --samples=out/samples.jsonl                          # score what exists; with 'target': BLEU and ROUGE

Read the columns together: repetition lowers the perplexity of a judge, and entropy and distinct-4 with it.
"""
import json
import math
import os
import re
import statistics
import sys
import time
from collections import Counter
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from configurator import UserError, configure
from model import TextEncoder, hub_error
from sample import cut, load_model, load_tokenizer, make_out_dir, pack_linears, pick_device, read_inputs, read_jsonl, resolve_sampling, sample_texts, write_texts
from train import estimate_loss, get_rows, open_bins

# ---------------------------------------------------------------------------------------------------------------------
out_dir = 'out'             # the model of this folder's ckpt.pt (EMA); samples_eval.jsonl and metrics.jsonl go here
init_from = ''              # instead: a published checkpoint, file, folder or hub id
samples = ''                # instead of sampling: a JSONL file, one object a line with 'generated' or 'text', perhaps 'target'
references = ''             # for texts without 'target': a JSONL or save_to_disk folder that has it, text i its row i
input_file = ''             # conditions and targets of a conditional model, '' = val.jsonl of the dataset
data_dir = 'data'
dataset = ''                # bins under data_dir: reference rows, training text of the n-gram judge, validation loss
num_samples = 1000
batch_size = 16             # rows sampled at once; changes memory and speed, not the texts
steps = -1                  # forward passes per text, -1 = the checkpoint's default, as below
sampler = ''                # 'ode' or 'sde', '' = the default
gamma = -1.0                # of the SDE: how much is re-noised
w = -1.0                    # self-conditioning guidance strength
cfg = -1.0                  # classifier-free guidance on the condition, 1 = off
grid = 'logit_normal'       # times: 'logit_normal', 'quantile', 'uniform'
judge = 'auto'              # causal LM (folder or hub id), 'ngram' (no download), 'none'; 'auto' = gpt2-large, none if there are targets
judge_batch_size = 16       # texts judged at once
eval_iters = 10             # batches of the validation loss, 0 = none
seed = 1337                 # text i depends on (seed, i) alone
seeds = ''                  # several, such as 42,123,456: mean and standard error over them
device = 'auto'             # 'cuda', 'mps', 'cpu', 'auto' = the first of these that is there
dtype = 'auto'              # of sampling: 'float32' or 'bfloat16'; the judge is always float32
# ---------------------------------------------------------------------------------------------------------------------
# metrics that need no judge; ids are lists of tokens

def entropy(ids):
    """Unigram entropy of one list of ids, nats: log of the number of equally likely tokens it amounts to. 0.0 when empty."""
    return -sum(n / len(ids) * math.log(n / len(ids)) for n in Counter(ids).values()) + 0.0


def repetition(ids_list):
    """Share of tokens that lie in a 5-gram that its own text holds three times or more; all texts as one pool."""
    inside = 0
    for ids in ids_list:
        grams = [tuple(ids[i:i + 5]) for i in range(len(ids) - 4)]
        counts = Counter(grams)
        inside += len({i + k for i, gram in enumerate(grams) if counts[gram] >= 3 for k in range(5)})
    return inside / max(1, sum(map(len, ids_list)))


def duplicates(texts):
    """Share of texts that equal an earlier one."""
    return 1 - len(set(texts)) / len(texts) if texts else 0.0


def distinct(ids_list, n=4, limit=None):
    """
    Share of different ones among all n-grams of a set of texts, none across two texts. The share falls as a set grows:
    compare sets of as many tokens, the first `limit` of each.
    """
    grams, left = [], math.inf if limit is None else limit
    for ids in ids_list:
        ids = ids[:int(min(left, len(ids)))]
        left -= len(ids)
        grams += [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def bleu(hyps, refs, cased=False):
    """Corpus BLEU, 0 to 100: the official code's (lower case, effective order), or sacreBLEU's standard cased one."""
    import sacrebleu
    assert len(hyps) == len(refs), f"{len(hyps)} texts, {len(refs)} references"
    return sacrebleu.corpus_bleu(hyps, [refs], **({} if cased else dict(lowercase=True, use_effective_order=True))).score


def rouge(hyps, refs):
    """ROUGE-1, -2 and -L, stemmed: F-measure * 100 of each pair, then the plain mean."""
    from rouge_score import rouge_scorer
    assert len(hyps) == len(refs) > 0, f"{len(hyps)} texts, {len(refs)} references"
    kinds = ('rouge1', 'rouge2', 'rougeL')
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(ref, hyp) for hyp, ref in zip(hyps, refs)]
    return {k: sum(s[k].fmeasure * 100 for s in scores) / len(scores) for k in kinds}

# ---------------------------------------------------------------------------------------------------------------------
# the judge without a download: an interpolated character n-gram, Witten-Bell smoothed

def train_ngram(texts, n=5):
    """Counts of all 1- to n-grams within each text; per context the characters that followed it, all and different ones."""
    grams = Counter(text[i:i + k] for text in texts for k in range(1, n + 1) for i in range(len(text) - k + 1))
    followers = {}
    for gram, count in grams.items():
        total, kinds = followers.get(gram[:-1], (0, 0))
        followers[gram[:-1]] = total + count, kinds + 1
    return dict(n=n, grams=grams, followers=followers)


def ngram_p(char, context, ngram):
    """
    P(char | context): a context h seen N times with K different followers gives (count(h char) + K * P(char | h without
    its first character)) / (N + K). Below the empty context: uniform over the alphabet and one sign for all others.
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
    """Mean -log P of all characters of texts, nats; each text starts without context. nan if there are none."""
    reach, chars = ngram['n'] - 1, sum(map(len, texts))
    nats = -sum(math.log(ngram_p(ch, text[max(0, i - reach):i], ngram)) for text in texts for i, ch in enumerate(text))
    return nats / chars if chars else math.nan

# ---------------------------------------------------------------------------------------------------------------------
# the judge of the paper: a causal LM with GPT-2's vocabulary

def gpt2_bpe(source):
    """Folder or hub id with vocab.json and merges.txt (or encoder.json, vocab.bpe): its byte-level BPE -> tiktoken.Encoding."""
    import tiktoken
    from huggingface_hub import hf_hub_download
    from tiktoken_ext.openai_public import r50k_pat_str
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    names = ('vocab.json', 'merges.txt')
    if os.path.isfile(os.path.join(source, 'encoder.json')):
        names = ('encoder.json', 'vocab.bpe')
    try:
        paths = [os.path.join(source, f) if os.path.isdir(source) else hf_hub_download(source, f) for f in names]
        vocab, merges = (open(path, encoding='utf-8').read() for path in paths)
        vocab = json.loads(vocab)
        byte_of = {ch: byte for byte, ch in bytes_to_unicode().items()}     # the files write each byte as a visible sign
        lines = [line for line in merges.split('\n') if line and not line.startswith('#version')]
        merged = dict.fromkeys(line.replace(' ', '') for line in lines)
        ranks = {bytes(byte_of[ch] for ch in token): vocab[token] for token in (*byte_of, *merged)}
        assert sorted(merged, key=vocab.get) == list(merged), "its ids are not in the order of its merges"
        special = {'<|endoftext|>': vocab['<|endoftext|>']}
        return tiktoken.Encoding(source, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    except Exception as e:      # no file, no network, no such token: the clients have a dozen kinds
        raise UserError(f"no judge with GPT-2's vocabulary (vocab.json and merges.txt): {hub_error(source, e)}; --judge=ngram needs no download") from None


@lru_cache(maxsize=1)
def load_judge(name, device):
    """A causal LM from a folder or hub id, float32, and its BPE."""
    from transformers import AutoModelForCausalLM
    bpe = gpt2_bpe(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().to(device)
    except Exception as e:      # the hub's clients have a dozen kinds
        raise UserError(f"no judge (a causal LM): {hub_error(name, e)}") from None
    if bpe.n_vocab > model.config.vocab_size:
        raise UserError(f"judge {name!r} has {model.config.vocab_size} embeddings but a vocabulary of {bpe.n_vocab}")
    return model, bpe


@torch.no_grad()
def gen_ppl(texts, judge, batch_size=16, device='cpu', max_length=1024):
    """
    Generative perplexity, the official JAX protocol [utils/metrics_utils.py], and the port's beside it -> dict.
    Blank texts are left out, counted in 'empty'. GPT-2 ids, cut to max_length, filled with EOS to the longest of the set.
    Scored: every token but a row's first that is no EOS or the first EOS, so the first fill token too.
    gen_ppl = exp(sum nll / sum tokens) over all texts. The port adds its two masks as numbers (JAX: or), so gen_ppl_port
    counts tokens between the first and the second EOS twice. entropy: nats over the ids without fill, mean over texts.
    """
    model, bpe = load_judge(judge, str(device))
    torch.set_float32_matmul_precision('highest')       # of a GPU: pick_device may have allowed TF32
    eos, kept = bpe.eot_token, [text for text in texts if text.strip()]
    max_length = min(max_length, getattr(model.config, 'max_position_embeddings', max_length))
    rows = [bpe.encode(text, allowed_special='all')[:max_length] for text in kept]
    width, sums = max(map(len, rows), default=0), torch.zeros(4, dtype=torch.float64)     # nll and tokens, JAX then port
    for i in tqdm(range(0, len(rows), batch_size), desc='judge', disable=None, leave=False):
        part = rows[i:i + batch_size]
        ids = torch.tensor([row + [eos] * (width - len(row)) for row in part], device=device)           # (B, T)
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=device)
        logits = model(ids, attention_mask=real).logits                                                 # (B, T, V)
        # row by row: the float32 logits of a batch are gigabytes already
        nll = torch.stack([F.cross_entropy(row[:-1], target[1:], reduction='none') for row, target in zip(logits, ids)])
        nll, token = nll.cpu().double(), (ids != eos).cpu()
        first = (~token).cumsum(1) == 1                             # from the first EOS to before the second
        for at, weight in ((0, token | first), (2, token.double() + first.double())):
            sums[at:at + 2] += torch.stack(((nll * weight[:, 1:]).sum(), weight[:, 1:].sum()))
    ppl = [float(np.exp(nll / tokens)) if tokens else math.nan for nll, tokens in sums.view(2, 2).tolist()]
    return dict(gen_ppl=ppl[0], gen_ppl_port=ppl[1], entropy=sum(map(entropy, rows)) / len(rows) if rows else math.nan,
                tokens=int(sums[1]), empty=len(texts) - len(kept))

# ---------------------------------------------------------------------------------------------------------------------
# texts in

def read_samples(file, references=''):
    """
    A JSONL file -> list of dicts with 'generated', perhaps 'target': its own, or that of the row of references (a JSONL, or a
    folder of save_to_disk) with the number 'id', by default the line's own. UserError names file and line.
    """
    rows, targets = [], None
    if references and os.path.isdir(references):
        from datasets import load_from_disk
        try:
            targets = load_from_disk(references)['target'][:]
        except Exception as e:      # the client has a dozen kinds
            raise UserError(f"references={references!r} is no save_to_disk folder with a column 'target': {type(e).__name__} {' '.join(str(e).split())[:200]}") from None
    elif references:
        targets = [row.get('target', row.get('output')) for _, row in read_jsonl(references)]
    for where, row in read_jsonl(file):
        text, number = row.get('generated', row.get('text')), row.get('id', len(rows))
        if targets is not None:
            if not isinstance(number, int) or not 0 <= number < len(targets):
                raise UserError(f"{where} has id {number!r}, {references} has {len(targets)} rows")
            row['target'] = targets[number]
        if not isinstance(text, str) or not isinstance(row.get('target', ''), str):
            raise UserError(f"{where} needs a text under 'generated' or 'text', and under 'target' if it has one")
        if rows and ('target' in row) != ('target' in rows[0]):
            raise UserError(f"{where}: some lines have a 'target' and some have none; all or none")
        rows.append(row | dict(generated=text.encode('utf-8', 'replace').decode()))     # half a surrogate pair: '?'
    if not rows:
        raise UserError(f"{file} has no texts")
    return rows


def bin_rows(meta, split, n, max_length):
    """Up to n rows of a split, evenly spaced over it -> lists of ids without fill, cut at the first EOS."""
    rows = np.linspace(0, meta['rows'][split], min(n, meta['rows'][split]), endpoint=False).astype(int)
    ids, valid, _ = get_rows(meta, split, rows, max_length)
    return [cut(row[ok].tolist(), meta['eos_id']) for row, ok in zip(ids, valid)]


def measure(texts, ids, judge, ngram, limit, batch_size, device):
    """All metrics of one row of the table. entropy_own is over the ids given, mean over the texts that are not blank."""
    written = [entropy(i) for text, i in zip(texts, ids) if text.strip()]
    out = dict(texts=len(texts), empty=len(texts) - len(written), entropy_own=sum(written) / len(written) if written else math.nan,
               distinct_4=distinct(ids, 4, limit), repetition=repetition(ids), duplicates=duplicates(texts))
    if ngram:
        out['nats_per_char'] = ngram_nats(texts, ngram)
    elif judge != 'none':
        out |= gen_ppl(texts, judge, batch_size, device)
    return out

COLUMNS = [('nats_per_char', 'nats/char', '.3f'), ('gen_ppl', 'gen. ppl', '.2f'), ('gen_ppl_port', 'ppl (port)', '.2f'),
           ('entropy', 'entropy', '.3f'), ('entropy_own', 'own entropy', '.3f'), ('distinct_4', 'distinct-4', '.3f'),
           ('repetition', 'repetition', '.3f'), ('duplicates', 'duplicates', '.3f'), ('bleu', 'BLEU', '.2f'), ('bleu_cased', 'cased BLEU', '.2f'),
           ('rouge1', 'ROUGE-1', '.2f'), ('rouge2', 'ROUGE-2', '.2f'), ('rougeL', 'ROUGE-L', '.2f'), ('texts', 'texts', '.0f'), ('empty', 'empty', '.0f')]


if __name__ == '__main__':
    configure(globals())
    if min(num_samples, batch_size, judge_batch_size) < 1 or min(seed, eval_iters) < 0:
        raise UserError(f"num_samples={num_samples}, batch_size={batch_size}, judge_batch_size={judge_batch_size} start at 1, "
                        f"seed={seed}, eval_iters={eval_iters} at 0")
    if seeds and not re.fullmatch(r'\d+(,\d+)*', seeds):
        raise UserError(f"seeds={seeds!r}: whole numbers with commas between them, such as 42,123,456")
    rank, world, local_rank = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    say = print if rank == 0 else lambda *a: None
    if world > 1 and device in ('auto', 'cuda') and torch.cuda.is_available():
        device = f'cuda:{local_rank}'
        torch.cuda.set_device(device)

    # ---- what is missing or wrong shows here, before the sampling --------------------------------------------------------
    device, ctx, decided = pick_device(device, dtype)
    meta = open_bins(data_dir, dataset) if dataset else None
    runs, model, inputs = {}, None, None
    if samples:
        runs['samples'] = read_samples(samples, references)
    else:
        model = load_model(init_from, out_dir).to(device)
        pack_linears(model, decided)
        c, encoder = model.config, None
        if meta and meta['vocab_size'] != c.vocab_size:
            raise UserError(f"{meta['dir']} has {meta['vocab_size']} tokens in its vocabulary, the model {c.vocab_size}; name the --dataset it was trained on")
        if c.max_input_length:
            if not input_file and not meta:
                raise UserError(f"{init_from or out_dir} is a model with conditions; give --dataset=<folder under data_dir> or --input_file=x.jsonl with 'input' and 'target'")
            inputs = read_inputs(input_file or os.path.join(meta['dir'], 'val.jsonl'))[:num_samples]
            num_samples = len(inputs)
        tokenizer = load_tokenizer(c.tokenizer)
        if inputs or meta and eval_iters:
            encoder = TextEncoder(c.encoder, c.latent_mean, c.latent_std).to(device)
    targets = [t.get('target', t.get('output')) for t in inputs or runs.get('samples', ())]
    paired = bool(targets) and all(isinstance(t, str) for t in targets)
    judge = judge if judge != 'auto' else 'none' if paired else 'gpt2-large'
    if judge == 'ngram' and (not meta or inputs):
        raise UserError("--judge=ngram learns from training text without conditions; name its bins: --dataset=<folder under data_dir>")
    if judge not in ('ngram', 'none') and rank == 0:
        load_judge(judge, str(device))
    make_out_dir(out_dir)
    report = dict(source=samples or init_from or out_dir, judge=judge, **(dict(seeds=seeds) if seeds else dict(seed=seed)))
    say(f"device: {decided}, {world} rank{'s' * (world > 1)}; judge: {judge}")

    # ---- the texts: each rank writes its share, the first measures ---------------------------------------------------------
    if samples:
        # 'own' ids: those of the dataset's tokenizer if one is named, else words
        max_length, unit, code = 1024, 'words', str.split
        if meta:
            max_length, unit, tokenizer = meta['max_length'], f"tokens of {meta['dir']}", load_tokenizer(meta['tokenizer'])
            code = lambda text: tokenizer(text, add_special_tokens=False)['input_ids']
        runs['samples'] = [t | dict(ids=code(t['generated'])) for t in runs['samples']]
    else:
        if world > 1:
            dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        max_length, unit = c.max_length, "the model's tokens"
        how = resolve_sampling(c, steps, sampler, gamma, w, cfg) | dict(grid=grid)
        report |= how | dict(nfe=how['steps'] * (1 if how['cfg'] == 1 else 2), seconds=0.0)
        if meta and eval_iters:
            with ctx:
                report['val'] = estimate_loss(model, encoder, meta, eval_iters, batch_size, device, rank, world)
            say("validation: " + ', '.join(f"{k} {report['val'][k]:.4f}" for k in ('loss', 'l2', 'ce')))
        for seed in map(int, seeds.split(',')) if seeds else [seed]:
            start, name = time.time(), f'seed {seed}' if seeds else 'samples'
            with ctx, tqdm(total=num_samples, desc=name, disable=None if rank == 0 else True) as bar:
                texts = sample_texts(model, tokenizer, num_samples, batch_size, seed, device, progress=lambda n: bar.update(n * world), rank=rank, world=world,
                                     inputs=[row['input'] for row in inputs] if inputs else None, encoder=encoder, **how)
            if paired:
                texts = [t | dict(target=target) for t, target in zip(texts, targets)]
            runs[name], report['seconds'] = texts, report['seconds'] + time.time() - start
            if rank == 0:
                file = os.path.join(out_dir, f'samples_eval_{seed}.jsonl' if seeds else 'samples_eval.jsonl')
                write_texts(file, texts)
                print(f"{len(texts)} texts in {file}, {time.time() - start:.1f} s, {report['nfe']} forward passes each (NFE): " + ', '.join(f'{k}={v}' for k, v in how.items()))
        if world > 1:
            dist.destroy_process_group()
    if rank:
        sys.exit()

    # ---- reference rows: real validation text, and tokens drawn one by one from the training text, in texts of the same lengths
    sets, ngram = {name: ([t['generated'] for t in texts], [t['ids'] for t in texts]) for name, texts in runs.items()}, None
    if meta and not inputs:
        decode = lambda rows: [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        real = bin_rows(meta, 'val', len(next(iter(runs.values()))), max_length)
        # a million tokens are enough for a 5-gram
        rows = 1 + 1_000_000 * meta['rows']['train'] // max(1, meta['tokens']['train'])
        train_rows, rng = bin_rows(meta, 'train', rows, max_length), np.random.default_rng(seed)
        pool = np.concatenate(train_rows)
        unigram = [rng.choice(pool, len(row)).tolist() for row in real]
        sets |= {'real text': (decode(real), real), 'unigram text': (decode(unigram), unigram)}
        ngram = train_ngram(decode(train_rows)) if judge == 'ngram' else None

    # ---- the table -----------------------------------------------------------------------------------------------------------
    limit = min(sum(map(len, rows)) for _, rows in sets.values())       # distinct-4 on as many tokens of each set
    results = {name: measure(*pair, judge, ngram, limit, judge_batch_size, device) for name, pair in sets.items()}
    if paired:
        for name in runs:
            results[name] |= dict(bleu=bleu(sets[name][0], targets), bleu_cased=bleu(sets[name][0], targets, cased=True)) | rouge(sets[name][0], targets)
    mean = {k: statistics.mean(results[name][k] for name in runs) for k in results[next(iter(runs))]}
    report |= mean
    table = dict(results)
    if len(runs) > 1:
        report['stderr'] = {k: statistics.stdev(results[name][k] for name in runs) / len(runs) ** 0.5 for k in mean}
        report['by_seed'] = {name.split()[1]: results[name] for name in runs}
        table |= {'mean': mean, 'std. error': report['stderr']}
    columns = [column for column in COLUMNS if column[0] in mean]
    print('\n' + ' ' * 14 + ''.join(f'{title:>12}' for _, title, _ in columns))
    for name, row in table.items():
        print(f'{name:<14}' + ''.join(f'{row[key]:>12{form}}' if key in row else ' ' * 12 for key, _, form in columns))
    print(f"own entropy, distinct-4 and repetition over {unit}; entropies in nats")
    report |= {name.split()[0]: row for name, row in results.items() if name not in runs}
    if ngram:
        nats, real_nats, unigram_nats = mean['nats_per_char'], results['real text']['nats_per_char'], results['unigram text']['nats_per_char']
        report['gap_closed'] = (unigram_nats - nats) / (unigram_nats - real_nats) if unigram_nats != real_nats else math.nan
        share = mean['distinct_4'] / max(1e-9, results['real text']['distinct_4'])
        print(f"gap closed: {report['gap_closed']:.3f} of the way from unigram to real text; distinct-4 {share:.2f} of real text's")
    line = json.dumps(json.loads(json.dumps(report), parse_constant=lambda nan: None))      # JSON has no nan: null
    with open(os.path.join(out_dir, 'metrics.jsonl'), 'a', encoding='utf-8') as f:
        f.write(line + '\n')
    print(line)
