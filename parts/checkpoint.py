"""
What lies on disk with weights in it: our checkpoints and runs, and where those of others are found.

ckpt.pt and the one before it, ckpt_prev.pt, are written whole or not at all and hold all that a run
needs to go on, in tensors and plain types only.
"""
import glob
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile

import torch

from configurator import UserError, from_hub, one_line
from parts import device
from parts.data import sha256, to_json
from parts.official import from_official_names, read_config_yml, read_sizes

# -------------------------------------------------------------------------------------------------
# ours: whole or not at all

def make_out_dir(out_dir):
    """Make the folder, and sure, before hours of work, that it can be written to. UserError."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as e:
        raise UserError(f"out_dir={out_dir!r} cannot be written: {e.strerror}") from None


def lock(out_dir):
    """Let one run at a time write out_dir -> open file; the system unlocks it when the run ends."""
    make_out_dir(out_dir)
    f = open(os.path.join(out_dir, 'lock'), 'a')
    try:
        import fcntl
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        raise UserError(f"another run is writing {out_dir}; "
                        "stop it or choose another --out_dir") from None
    except (ImportError, OSError):      # Windows; Lustre and NFS may come without
        print(f"no file locks here: take care that only one run writes {out_dir}")
    return f


def save_checkpoint(out_dir, ckpt, keep_as=''):
    """Write out_dir/ckpt.pt; the one before stays as ckpt_prev.pt; keep_as: a name for a copy."""
    path, kept = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, keep_as)
    device.saving = True
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            before = 'ckpt_prev.pt'
            if damage(path):        # it must not replace the good one from which the run went on
                before = 'damaged_ckpt.pt'
                print(f"{path} is damaged ({damage(path)}); it is {before} now")
            os.replace(path, os.path.join(out_dir, before))
        os.replace(path + '.tmp', path)
        if keep_as:
            shutil.copyfile(path, kept + '.tmp')
            os.replace(kept + '.tmp', kept)
    except (OSError, RuntimeError) as e:        # a full disk is a RuntimeError inside torch.save
        for aside in (path + '.tmp', kept + '.tmp'):
            if os.path.exists(aside):
                os.remove(aside)
        raise UserError(f"could not write {path}: {str(e).splitlines()[0]}; "
                        "what was there before is intact") from None
    finally:
        device.saving = False


def newest_checkpoint(out_dir):
    """The newest readable checkpoint that a run can go on from -> path, dict. UserError if none."""
    for name in ('ckpt.pt', 'ckpt_prev.pt'):
        path = os.path.join(out_dir, name)
        if not os.path.exists(path):
            continue
        try:
            ckpt = load_checkpoint(path)
        except UserError as e:
            print(f"SKIPPED: {e}")
            continue
        needed = {'model', 'ema', 'optimizer', 'config', 'model_args', 'iter_num'}
        if not needed <= ckpt.keys():
            raise UserError(f"{path} has weights only, no state to resume from; "
                            f"start from them with --init_from={path}")
        return path, ckpt
    raise UserError(f"nothing to resume in {out_dir}: no readable ckpt.pt; "
                    "start with --init_from=scratch")


def damage(path):
    """Read a zip of torch.save's against its checksums -> what is wrong with it, '' if nothing."""
    try:
        with zipfile.ZipFile(path) as z:
            for part in z.infolist():
                # where one flipped bit says "folder" or "compressed", torch reads noise
                if part.compress_type or part.external_attr or part.file_size != part.compress_size:
                    return f"the entry of {part.filename}"
            bad = z.testzip()
            return f"the checksum of {bad}" if bad else ''
    except Exception as e:      # a damaged file can raise nearly anything
        return one_line(e)


def load_checkpoint(path):
    """The dict in a file, tensors and plain types only. UserError if damaged or if it has code."""
    try:
        if path.endswith('.safetensors'):
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path) and damage(path):       # torch.load itself does not check
            raise ValueError(f"{damage(path)} is damaged")
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:      # unpickling a damaged file can raise nearly anything
        reason = one_line(e).split('. ')[0]     # torch goes on to advise how to run it
        if called := re.search(r'GLOBAL (\S+)', str(e)):
            reason = f"it would run {called[1]}"
        raise UserError(f"{path} is not a readable checkpoint "
                        f"(only tensors and plain types are loaded): {reason}") from None
    if not isinstance(ckpt, dict):
        raise UserError(f"{path} holds a {type(ckpt).__name__}, not a dict of weights")
    return ckpt

# -------------------------------------------------------------------------------------------------
# a run: where it starts, what it may change, how it ends

# a resumed run may change max_iters on purpose, what is only seen or saved, and where it runs
MAY_CHANGE_ON_RESUME = (
    'out_dir', 'init_from', 'overwrite', 'log_interval', 'eval_interval', 'eval_iters',
    'save_interval', 'keep_interval', 'sample_interval', 'wandb_log', 'wandb_project', 'data_dir',
    'verify_data', 'max_iters', 'max_minutes', 'max_bad_steps', 'max_epochs', 'dtype',
    'gradient_checkpointing', 'sampler', 'steps', 'gamma', 'w', 'cfg', 'grid', 'bins')
# these too, but then sums are in another order, and it is not the same bit for bit
ORDER_OF_SUMS = ('ranks', 'device', 'bf16', 'compile', 'batch_size', 'gradient_accumulation_steps')


def launch():
    """What the processes of one torchrun share, over all its restarts."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"


def where_to_start(init_from, out_dir, overwrite):
    """Decide what init_from means here -> 'scratch', 'resume' or weights. Work is never lost."""
    names = [os.path.join(out_dir, name) for name in ('ckpt.pt', 'ckpt_prev.pt')]
    there = [name for name in names if os.path.exists(name)]
    if init_from == 'auto' or init_from.startswith('auto:'):
        return 'resume' if there else init_from[5:] or 'scratch'
    # torchrun --max-restarts begins again with the same command line: what it began goes on
    settings = os.path.join(out_dir, 'settings.json')
    if there and int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) and os.path.exists(settings):
        with open(settings, encoding='utf-8') as f:
            if json.load(f).get('launch') == launch():
                return 'resume'
    if there and init_from != 'resume' and not overwrite:
        raise UserError(f"{there[0]} is there already; go on with --init_from=resume, "
                        "choose another --out_dir, or --overwrite=true")
    return init_from


def fingerprint(meta):
    """What of a dataset must be the same when a run goes on -> flat dict of plain values."""
    found = {name: meta[name] for name in ('rows', 'vocab_size', 'latent_mean', 'latent_std')}
    found |= meta['checksums']
    for part in ('encoder', 'tokenizer'):
        if not os.path.isdir(meta[part]):
            found[part] = meta[part]
            continue
        for name in ('model.safetensors', 'tokenizer.json', 'spiece.model'):
            file = os.path.join(meta[part], name)
            if os.path.exists(file):
                found[f'{part}/{name}'] = sha256(file)
    return found


def check_resume(path, ckpt, config):
    """
    UserError if a run would go on with other mathematics or on other data than its checkpoint's
    -> list of what else is not as it was, in words. config: settings, what runs them, the bins.
    """
    found = device.gather((os.path.basename(path), ckpt['iter_num']))
    if len(set(found)) > 1:
        raise UserError(f"the ranks see different checkpoints in {os.path.dirname(path)}: {found}; "
                        "it must be one folder that all of them share")
    data = ckpt.get('data', {})         # it stood apart, as did what ran them, in older versions
    was = ckpt['config'] | ckpt.get('layout', {})
    bins = was.get('bins') or data | data.get('checksums', {})
    now = config['bins']
    if changed := [name for name in bins if name in now and now[name] != bins[name]]:
        raise UserError(f"{path} was trained on other bins than those of --dataset="
                        f"{config['dataset']} now ({', '.join(changed)} differ); prepare them as "
                        "they were, or start anew")
    differs = [name for name in was if config.get(name, was[name]) != was[name]]
    changed = {name: f"{name} was {was[name]!r}, now {config[name]!r}" for name in differs}
    rows, rows_now = (x['batch_size'] * x['gradient_accumulation_steps'] for x in (was, config))
    other = [name for name in differs if name not in MAY_CHANGE_ON_RESUME + ORDER_OF_SUMS]
    if rows != rows_now:
        other += [name for name in ORDER_OF_SUMS[-2:] if name in differs]
    if other:
        raise UserError(f"{path} was trained with other settings: "
                        f"{'; '.join(changed[name] for name in other)}; "
                        "drop the override or choose another --out_dir")
    notes = []
    if 'max_iters' in differs and config['lr_schedule'] == 'cosine':
        notes.append(f"{changed['max_iters']}: the cosine of the learning rate jumps")
    moved = [changed[name] for name in differs if name in ORDER_OF_SUMS]
    why = "the same rows a step, but sums in another order, so not bit for bit"
    if 'batch_size' in differs:
        why += ", and other draws for them"
    return notes + [f"{'; '.join(moved)}: {why}"] * bool(moved)


def begin_run(out_dir, resumed, config, model_args):
    """
    From here on files are written: lock out_dir, move the checkpoints of a run that is not resumed
    aside, write settings.json -> the lock, and log(iter=.., **numbers), a line of metrics.jsonl and
    perhaps one for Weights & Biases. Only the first rank writes; the others' lock is None.
    """
    if device.rank_and_world()[0]:
        return None, lambda **numbers: None
    if config['wandb_log']:
        try:
            import wandb
        except ImportError:
            raise UserError("wandb_log=True, but wandb is not installed; pip install wandb, "
                            "or drop it") from None
    locked = lock(out_dir)
    for name in ('ckpt.pt', 'ckpt_prev.pt', 'metrics.jsonl'):
        path = os.path.join(out_dir, name)
        if not resumed and os.path.exists(path):
            os.replace(path, os.path.join(out_dir, 'old_' + name))
    with open(os.path.join(out_dir, 'settings.json'), 'w', encoding='utf-8') as f:
        json.dump(dict(config=config, model_args=model_args, launch=launch(), command=sys.argv,
                       torch=torch.__version__, python=sys.version), f, indent=1)
    metrics = open(os.path.join(out_dir, 'metrics.jsonl'), 'a', encoding='utf-8', buffering=1)
    metrics.write('\n' if resumed else '')      # ends a line that a kill may have cut
    if config['wandb_log']:
        wandb.init(project=config['wandb_project'], name=out_dir, config=config)

    def log(**numbers):
        metrics.write(to_json(numbers) + '\n')
        if config['wandb_log']:
            wandb.log(numbers, step=numbers['iter'])
    return locked, log

# -------------------------------------------------------------------------------------------------
# where: a file, a folder, the hub

# names of checkpoints, first choice first; not old_ckpt.pt, of a run that was overwritten
KINDS = (r'checkpoint_\d+', r'ckpt\.pt', r'ckpt_prev\.pt', r'.*\.safetensors',
         r'last\.ckpt', r'.*step=?\d+.*\.ckpt', r'.*\.ckpt')


def step_in(name):
    """The number of steps that a file's name tells, 0 if it tells none."""
    found = re.search(r'(?:checkpoint_|step=?)(\d+)', os.path.basename(name))
    return int(found[1]) if found else 0


def choose(names, where):
    """The first choice among names of files; of several steps the largest. UserError if none is."""
    for kind in KINDS:
        found = [name for name in sorted(names) if re.fullmatch(kind, os.path.basename(name))]
        if found:
            return max(found, key=step_in)
    raise UserError(f"no checkpoint in {where}: expected checkpoint_<step>, ckpt.pt, "
                    "a .safetensors or a .ckpt file")


def find_checkpoint(source):
    """
    A file, a folder or a hub id (org/repo, org/repo/path/inside) -> path of the weights here: a
    file, or an Orbax folder. What is named exactly is taken, whatever it is called; in a folder or
    repository, see KINDS. Paths here come before hub ids. UserError if there is nothing.
    """
    if os.path.isfile(source) or is_orbax(source):
        return source
    if os.path.isdir(source):
        paths = [os.path.join(source, name) for name in os.listdir(source)]
        return choose([p for p in paths if os.path.isfile(p) or is_orbax(p)], source)
    parts = source.split('/')
    if len(parts) < 2 or not all(parts) or source[0] in './~':
        raise UserError(f"{source!r} is no file or folder here, and no hub id (org/repo); "
                        "nothing to load")
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    repo, inside = '/'.join(parts[:2]), '/'.join(parts[2:])
    try:
        with from_hub('no checkpoint', source):
            names = HfApi().list_repo_files(repo)
    except UserError as refused:        # no network: what the cache has of it, if anything
        try:        # [] asks for no file, only for the folder
            folder = snapshot_download(repo, allow_patterns=[], local_files_only=True)
            names = glob.glob('**', root_dir=folder, recursive=True)
            names = [n for n in names if os.path.isfile(os.path.join(folder, n))]
            return os.path.join(folder, choose_inside(names, inside, source))
        except (OSError, ValueError):
            raise refused from None
    name = choose_inside(names, inside, source)
    beside = os.path.join(os.path.dirname(name), 'config.yml')
    wanted = [n for n in names if n in (name, beside) or n.startswith(f'{name}/')]
    with from_hub('no checkpoint', source):
        paths = [hf_hub_download(repo, file) for file in wanted]
    return os.path.join(paths[0][:-len(wanted[0])], name)


def choose_inside(names, inside, source):
    """As choose(), among what a hub repository holds inside a path, '' for all of it."""
    names = {name.removesuffix('/_METADATA') for name in names}     # an Orbax folder is one name
    if inside in names:
        return inside
    return choose([n for n in names if not inside or n.startswith(f'{inside}/')], source)


def is_orbax(folder):
    return os.path.isfile(os.path.join(folder, '_METADATA'))


def is_jax(path):
    """Whether it is an Orbax folder, or flax's msgpack: a small map whose first key is text."""
    if os.path.isdir(path):
        return True
    with open(path, 'rb') as f:
        start = f.read(2)
    return len(start) == 2 and 0x81 <= start[0] <= 0x8f and 0xa1 <= start[1] <= 0xbf


def load_weights(source, known=None):
    """
    What find_checkpoint finds -> settings for an ELFConfig, weights under our names, float32, the
    EMA if there is one. Sizes are read off the weights; the other settings are our model_args, else
    those of the official config.yml beside the file, else the published OpenWebText ones, said so.
    known: the names of settings that the caller has. UserError for others, and for what is no ELF.
    """
    path = find_checkpoint(source)
    convert_first = f"convert it first: python convert.py {source} FOLDER"
    if is_jax(path):
        raise UserError(f"{path} is a JAX checkpoint; {convert_first}")
    ckpt = load_checkpoint(path)
    if 'state_dict' in ckpt:
        raise UserError(f"{path} is a Lightning checkpoint; {convert_first}")
    places = ('ema', 'ema_params1', 'params', 'model')
    state = next((ckpt[k] for k in places if isinstance(ckpt.get(k), dict)), ckpt)
    state = {name: x.float() for name, x in from_official_names(state).items()}
    sizes = read_sizes(state, path)
    settings = ckpt.get('model_args') or read_config_yml(path, sizes)
    if known is not None:
        check_known(settings, known, path)
    return settings | sizes, state


def check_known(settings, known, path):
    """UserError if there are settings that the caller does not have."""
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"{path} has settings that this code does not know: {', '.join(unknown)}; "
                        "was it written by a later version?")
