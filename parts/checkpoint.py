"""
What lies on disk with weights in it: our checkpoints and runs, and where those of others are found.

ckpt.pt and the one before it, ckpt_prev.pt, are written whole or not at all and hold all that a run
needs to go on, in tensors and plain types only. A tokenizer and an encoder that are no names on the
hub lie beside them, in tokenizer/ and encoder/, so that the folder can be moved and used anywhere.
"""
import errno
import os
import re
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file

from parts.data import sha256, to_json
from parts.official import from_official_names, read_config_yml, read_sizes
from parts.process import UserError, from_hub, one_line, rank_and_world

# -------------------------------------------------------------------------------------------------
# ours: whole or not at all

def make_out_dir(out_dir):
    """Make the folder, and sure, before hours of work, that it can be written to. UserError."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as e:
        raise UserError(f"the folder {out_dir!r} cannot be written: {e.strerror}") from None


def lock(out_dir):
    """Let one run at a time write out_dir -> its lock, which ends with the process. UserError."""
    make_out_dir(out_dir)
    held = FileLock(f'{out_dir}/lock', fallback_to_soft=False)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another run is writing {out_dir}; "
                        "stop it or choose another --out_dir") from None
    except OSError as e:        # Lustre and NFS may come without
        if e.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        print(f"no file locks here: take care that only one run writes {out_dir}")
    return held


@contextmanager
def whole(path):
    """A name to write a file or folder under, that becomes path: whole or not at all. UserError."""
    aside = path + '.unfinished'
    try:
        shutil.rmtree(aside, ignore_errors=True)        # of one that was killed
        yield aside
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as e:       # three for a full disk
        raise UserError(f"could not write {path}: {one_line(e)}; "
                        "what was there before is intact") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        Path(aside).unlink(missing_ok=True)


def save_checkpoint(out_dir, ckpt, keep_as=''):
    """Write out_dir/ckpt.pt; the one before stays as ckpt_prev.pt; keep_as: a name for a copy."""
    path = f'{out_dir}/ckpt.pt'
    with whole(path) as aside:
        with open(aside, 'wb') as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.lexists(path):
            os.replace(path, f'{out_dir}/ckpt_prev.pt')
    if keep_as:
        with whole(f'{out_dir}/{keep_as}') as aside:
            shutil.copyfile(path, aside)


def newest_checkpoint(out_dir):
    """The newest whole checkpoint that a run can go on from -> path, dict. UserError if none."""
    for path in checkpoints_in(out_dir):
        find_checkpoint(path)       # what may not be read, or is a link to nothing, is not damaged
        try:
            ckpt = load_checkpoint(path)
        except UserError as e:
            print(f"SKIPPED: {e}")
            continue
        if 'optimizer' in ckpt:
            return path, ckpt
    raise UserError(f"nothing to resume in {out_dir}: no ckpt.pt that is whole and has more than "
                    "weights, from which --init_from=scratch or --init_from=FILE can start")


def checkpoints_in(out_dir):
    """Paths of the checkpoints of the run in out_dir that are there, the newest first."""
    paths = f'{out_dir}/ckpt.pt', f'{out_dir}/ckpt_prev.pt'
    return [path for path in paths if os.path.lexists(path)]


def load_checkpoint(path):
    """The dict in a file, tensors and plain types only. UserError if damaged or if it has code."""
    with from_hub('no readable checkpoint of tensors and plain types alone', path):
        if path.endswith('.safetensors'):
            return load_file(path)
        # torch.load reads on past a wrong checksum, or where a flipped bit says "folder"
        with zipfile.ZipFile(path) as z:
            if z.testzip() or any(x.external_attr for x in z.infolist()):
                raise ValueError("its checksums do not fit")
        return dict(torch.load(path, map_location='cpu', weights_only=True))

# -------------------------------------------------------------------------------------------------
# a run: where it starts, what it may change, how it ends

# a resumed run may change what is only seen or saved
MAY_CHANGE = (
    'out_dir', 'init_from', 'overwrite', 'log_interval', 'eval_interval', 'eval_iters',
    'save_interval', 'keep_interval', 'sample_interval', 'wandb_log', 'wandb_project', 'data_dir',
    'max_minutes', 'max_epochs', 'dtype', 'gradient_checkpointing',
    'sampler', 'steps', 'gamma', 'w', 'cfg', 'grid', 'bins')
# and, said so, how long it runs, and where
WHERE_IT_RUNS = ('ranks', 'device', 'bf16', 'compile', 'batch_size', 'gradient_accumulation_steps')


def where_to_start(init_from, out_dir, overwrite):
    """Decide what init_from means here -> 'scratch', 'resume' or weights. Work is never lost."""
    there = checkpoints_in(out_dir)
    kind, _, weights = init_from.partition(':')
    if kind == 'auto':
        return 'resume' if there else weights or 'scratch'
    if there and init_from != 'resume' and not overwrite:
        raise UserError(f"{there[0]} is there already; go on with --init_from=resume, "
                        "choose another --out_dir, or --overwrite=true")
    return init_from


def fingerprint(meta):
    """What of a dataset must be the same when a run goes on -> flat dict of plain values."""
    found = {name: meta[name] for name in ('rows', 'vocab_size', 'latent_mean', 'latent_std')}
    found |= meta['checksums']
    for part in PARTS:
        paths = [Path(meta[part], name)
                 for name in ('model.safetensors', 'tokenizer.json', 'spiece.model')]
        sums = {f'{part}/{path.name}': sha256(path) for path in paths if path.exists()}
        found |= sums or {part: meta[part]}         # a name on the hub
    return found


def check_resume(path, ckpt, config):
    """
    UserError if a run would go on with other mathematics or on other data than its checkpoint's
    -> list of what else is not as it was, in words. config: settings, what runs them, the bins.
    """
    # older versions kept the bins elsewhere
    was, now = [x | x.get('bins', {}) for x in (ckpt['config'], config)]
    for x in (was, now):
        x['rows_per_step'] = x['batch_size'] * x['gradient_accumulation_steps']
    changed = {name: f"{name} was {x!r}, now {now[name]!r}" for name, x in was.items()
               if name not in MAY_CHANGE and now.get(name, x) != x}
    told = [*changed.values()]
    if changed.keys() - {'max_iters', *WHERE_IT_RUNS}:
        raise UserError(f"{path} was trained with other settings or bins: {'; '.join(told)}; drop "
                        "the override, prepare the bins as they were, or choose another --out_dir")
    if changed.keys() - {'max_iters'}:
        told.append("the same rows a step, perhaps by other draws; not the same bit for bit")
    return told


def begin_run(out_dir, resumed, config, c):
    """
    From here on files are written: lock out_dir, put the run aside that is not resumed, copy
    tokenizer and encoder -> the lock; log(iter=.., **numbers), a line of metrics.jsonl and perhaps
    of Weights & Biases; the model's settings for its checkpoints. Only the first rank writes.
    """
    if rank_and_world()[0]:
        return None, lambda **numbers: None, None
    if config['wandb_log']:
        from wandb import init      # not the folder that its runs leave behind
        run = init(project=config['wandb_project'], name=out_dir, config=config)
    locked = lock(out_dir)
    if not resumed:
        put_aside(out_dir)
    elif resumed != checkpoints_in(out_dir)[0]:
        # damaged: the next save must not let it replace the good one before it
        os.replace(f'{out_dir}/ckpt.pt', f'{out_dir}/damaged_ckpt.pt')
    model_args = asdict(carry(c, out_dir))
    metrics = open(f'{out_dir}/metrics.jsonl', 'a', encoding='utf-8', buffering=1)
    if resumed:
        metrics.write('\n')     # ends a line that a kill may have cut

    def log(**numbers):
        metrics.write(to_json(numbers) + '\n')
        if config['wandb_log']:
            run.log(numbers, step=numbers['iter'])
    return locked, log, model_args


def put_aside(out_dir):
    """Move the run in out_dir, if there is one, into old_1, old_2, ... in it; nothing is lost."""
    number = 1
    while os.path.exists(old := f'{out_dir}/old_{number}'):
        number += 1
    for name in os.listdir(out_dir):
        path = f'{out_dir}/{name}'
        if name != 'lock' and (name in PARTS or os.path.isfile(path)):
            os.renames(path, f'{old}/{name}')

# -------------------------------------------------------------------------------------------------
# whole: a tokenizer and an encoder of one's own lie beside the checkpoint

PARTS = ('tokenizer', 'encoder')
NOT_CARRIED = dict(encoder=shutil.ignore_patterns('.*', '*.h5', '*.msgpack'),
                   tokenizer=shutil.ignore_patterns('.*', '*.bin', '*.safetensors'))


def carry(c, out_dir):
    """
    Copy the tokenizer and the encoder that an ELFConfig names into out_dir, if they are folders
    here and it has none, each whole or not at all -> the config that a checkpoint in out_dir holds:
    it names them 'tokenizer' and 'encoder'; hub ids stay. UserError.
    """
    for part in PARTS:
        source = getattr(c, part)
        copy = f'{out_dir}/{part}'
        if not os.path.isdir(source):
            continue
        if not os.path.exists(copy):        # else of the run that goes on: see check_resume
            with whole(copy) as aside:
                shutil.copytree(source, aside, ignore=NOT_CARRIED[part])
                os.chmod(aside, 0o755)      # the source may be read-only
        c = replace(c, **{part: part})
    return c

# -------------------------------------------------------------------------------------------------
# where: a file, a folder, the hub

# names of checkpoints, first choice first
KINDS = (r'checkpoint_\d+', r'ckpt\.pt', r'ckpt_prev\.pt', r'.*\.safetensors',
         r'last\.ckpt', r'.*\.ckpt')


def step_in(name):
    """The number of steps that a file's name tells, 0 if it tells none."""
    found = re.search(r'(?:checkpoint_|step=?)(\d+)', os.path.basename(name))
    return int(found[1]) if found else 0


def choose(names, source, inside=''):
    """
    The first choice of KINDS among names of files in the folder inside, '' for all; of several
    steps the largest. A name that is inside itself is taken, whatever it is. UserError.
    """
    names = sorted(name.removesuffix('/_METADATA') for name in names)   # an Orbax folder is one
    if inside in names:
        return inside
    names = [name for name in names if Path(name).is_relative_to(inside)]
    for kind in KINDS:
        if found := [name for name in names if re.fullmatch(kind, os.path.basename(name))]:
            return max(found, key=step_in)
    raise UserError(f"no checkpoint in {source}: expected checkpoint_<step>, ckpt.pt, "
                    "a .safetensors or a .ckpt file")


def find_checkpoint(source):
    """
    A file, a folder or a hub id (org/repo, org/repo/path/inside) -> path of the weights here: a
    file, or an Orbax folder. What is named exactly is taken, whatever it is called; in a folder or
    repository, see KINDS. Paths here come before hub ids. UserError if there is nothing.
    """
    with from_hub('no checkpoint', source):
        path = source if os.path.lexists(source) else download(source)
        if os.path.isdir(path) and not os.path.exists(f'{path}/_METADATA'):
            path = os.path.join(path, choose(os.listdir(path), source))
        if not os.path.isdir(path):
            open(path, 'rb').close()        # or it says why not
        return path


def download(source):
    """
    A hub id -> the path in the hub's cache of the checkpoint that is meant; what belongs to it lies
    there, too. Without a network, what the cache has.
    """
    from huggingface_hub import get_cached_repo_tree, list_repo_files, snapshot_download
    org, name, *inside = source.rstrip('/').split('/')
    repo = f'{org}/{name}'
    try:
        names = list_repo_files(repo)
    except Exception:       # of many kinds; if the cache has nothing either, from_hub tells it
        names = [entry.path for entry in get_cached_repo_tree(repo)]
    file = choose(names, source, '/'.join(inside))
    beside = file.removesuffix(os.path.basename(file))
    wanted = [file, file + '/*'] + [beside + x for x in ('config.yml', 'tokenizer/*', 'encoder/*')]
    return os.path.join(snapshot_download(repo, allow_patterns=wanted), file)


def is_jax(path):
    """Whether it is an Orbax folder, or flax's msgpack: a small map."""
    if os.path.isdir(path):
        return True
    with open(path, 'rb') as f:
        return b'\x81' <= f.read(1) <= b'\x8f' and not path.endswith('.safetensors')


def networks_in(ckpt):
    """The EMA and the weights in a checkpoint, ours or theirs, or in bare weights; of one both."""
    names = ('ema', 'ema_params1', 'model', 'params')
    found = [ckpt[name] for name in names if ckpt.get(name)] or [ckpt]
    return found[0], found[-1]


def load_weights(source):
    """
    What find_checkpoint finds -> its path; settings for an ELFConfig, as read_settings has them;
    weights under our names, float32, the EMA if there is one. UserError for what is no ELF.
    """
    path = find_checkpoint(source)
    if is_jax(path) or 'state_dict' in (ckpt := load_checkpoint(path)):
        raise UserError(f"{path} is a JAX or Lightning checkpoint; convert it first: "
                        f"python convert.py {source} FOLDER")
    with from_hub('no weights of an ELF', path):
        state = from_official_names(networks_in(ckpt)[0])
        state = {name: x.float() for name, x in state.items()}
        return path, read_settings(path, ckpt, state), state


def read_settings(path, ckpt, state):
    """
    A checkpoint and its weights under our names -> settings for an ELFConfig. Sizes are those of
    the weights, all else our model_args, or the official config.yml beside the file, or, said so,
    the published OpenWebText ones; the tokenizer and the encoder that a run carries are those
    beside the file. UserError if they are gone.
    """
    sizes = read_sizes(state)
    settings = (ckpt.get('model_args') or read_config_yml(path, sizes)) | sizes
    for part in PARTS:
        if settings.get(part) == part:      # no hub id, no folder that the user named
            settings[part] = beside = os.path.join(os.path.dirname(path), part)
            if not os.path.isdir(beside):
                raise UserError(f"{path} needs its {part}; copy the one that it was trained with "
                                f"to {beside}")
    return settings
