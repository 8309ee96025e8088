"""
Settings from Python config files and the command line, left to right:

    python train.py config/demo.py --batch_size=32 --compile=true

A script's settings are its top-level assignments of a number, text or true/false;
configure(globals()) overrides them and returns them as a dict. --help prints them with their
comments. A config file is Python and runs in a namespace of its own, so it may compute; helper
names start with an underscore. Everything else is refused with the reason. What a user did wrong
ends in one line: UserError, and the hook for it.
"""
import ast
import difflib
import errno
import os
import runpy
import signal
import sys
import time
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

# Scripts import this file before torch, which reads this when it is loaded: how long a thread of
# OpenMP spins for the others before it sleeps. A matter of microseconds, or two programs on one
# machine are each many times slower; not at all, and one alone is half slower.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
# a notebook's names a module that this Python may lack; matplotlib would stop at it
os.environ.pop('MPLBACKEND', None)


def rank_and_world():
    """The number of this process and how many there are: of a torchrun, else 0 and 1."""
    # a lone RANK, left by a scheduler or an old export, is no launch
    needed = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
    if not all(name in os.environ for name in needed):
        return 0, 1
    return int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])

# -------------------------------------------------------------------------------------------------
# errors and output

class UserError(ValueError):
    """What was given, what is allowed, what to do. Exit code 1, no traceback."""
    def __str__(self):
        return one_line(super().__str__())      # what was given may have line breaks


def one_line(e):
    """A text or an exception of many lines -> one line; of an exception the kind as well."""
    text = ' '.join(str(e).split())
    return f"{type(e).__name__} {text}"[:200] if isinstance(e, Exception) else text


def one_line_errors(kind, error, traceback):
    """The sys.excepthook of all scripts."""
    text = str(error)
    if issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text = (f"no room to write {error.filename or 'a file'}: {error.strerror}; "
                "the checkpoints there are intact")
    elif issubclass(kind, RuntimeError) and ('out of memory' in text
                                             or "can't allocate memory" in text):
        text = (f"out of memory: {one_line(text)[:120]}; lower batch_size or the sizes, "
                "or set --gradient_checkpointing=true")
    elif issubclass(kind, KeyboardInterrupt):
        return print("\ninterrupted", file=sys.stderr)
    elif not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, traceback)
    if rank_and_world()[0]:
        # all ranks find the same mistake: torchrun ends this one when the first has said it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(f"error: {text}", file=sys.stderr)


class Unwatched:
    """A stream for which work goes on when nobody reads it any more: head, a full log."""
    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, f, *args):
        try:
            f(*args)
        except BrokenPipeError:     # for good: what is still in its buffer goes nowhere, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (OSError, ValueError):       # no room, a lost terminal; closed by the program
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def open_streams():
    """stdout and stderr that never raise, whatever they are connected to."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name) or open(os.devnull, 'w')        # None without a console
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')    # texts have characters that some terminals lack
        if not isinstance(stream, Unwatched):
            setattr(sys, name, Unwatched(stream))

@contextmanager
def from_hub(what, source):
    """Around a call of a Hugging Face client: whatever it raises becomes a UserError, what: why."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:      # the clients have a dozen kinds, and wrap each other's
        raise UserError(f"{what}: {hub_hint(source, e)}") from None


def hub_hint(source, e):
    """What a client raised while it fetched source -> what is wrong and what to do."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx
    chain = [e]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)

    def seen(*kinds):
        return any(isinstance(x, kinds) for x in chain)

    codes = [getattr(getattr(x, 'response', None), 'status_code', 0) for x in chain]
    if os.path.exists(source):
        return f"{source!r} is not usable: {one_line(e)}"
    if seen(errors.GatedRepoError):
        return f"{source!r} is gated: accept the terms on its page on the hub, then: hf auth login"
    if seen(errors.RepositoryNotFoundError, errors.HFValidationError):
        return (f"{source!r} is neither a folder nor a file here, nor on the hub; check the "
                "spelling; if it is private: hf auth login")
    if 401 in codes or 403 in codes:
        return (f"the hub refuses {source!r} to your token; renew it: hf auth login, "
                "or do without: hf auth logout")
    if seen(httpx.RemoteProtocolError) or 'Consistency check failed' in str(chain):
        return f"the download of {source!r} broke off; run again, nothing incomplete was kept"
    if seen(httpx.TransportError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = ("HF_HUB_OFFLINE is set; unset it" if constants.is_offline_mode() else
               "the hub cannot be reached; connect")
        return f"{source!r} is no path here and not in the cache, and {why} once to download"
    return f"{source!r} is no path here, and the hub did not give it: {one_line(e)}"

# -------------------------------------------------------------------------------------------------
# settings

# what people who come from nanoGPT type
NANOGPT = dict(
    block_size='max_length', lr_decay_iters='max_iters', decay_lr='lr_schedule', start='prompt',
    max_new_tokens='max_length', wandb_run_name='out_dir', checkpoint='init_from')


@lru_cache
def settings_of(script):
    """A script's top-level `name = constant` lines -> {name: (default, comment)}, in order."""
    with open(script, encoding='utf-8') as f:
        source = f.read()
    lines, found = source.split('\n'), {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            continue
        # capitals are constants
        if isinstance(value, (bool, int, float, str)) and name.islower() and name[0] != '_':
            after = lines[node.end_lineno - 1][node.end_col_offset:]
            found[name] = value, after.partition('#')[2].strip()
    return found


def parse(text, kind):
    """What stands on a command line -> a value of this kind, or the text if it is none."""
    if kind is bool:
        return {'true': True, 'false': False}.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except Exception:       # literal_eval can raise nearly anything
        return text


def check_value(g, name, value, where):
    """
    A value given for a setting of the script with the globals g -> the value, parsed if it is from
    a command line. UserError for another type, or outside its range. CHOICES, AT_LEAST_1,
    AT_MOST_1, ABOVE_0 and MAY_BE_NEGATIVE in g say the ranges; other numbers start at 0. The
    default is always allowed.
    """
    default, _ = settings_of(g['__file__'])[name]
    kind, shown = type(default), f"{where}: {name}={value!r}"
    if isinstance(value, str) and where.startswith('--') and kind is not str:
        value = parse(value, kind)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        kinds = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text'}
        raise UserError(f"{shown} is not {kinds[kind]} (default: {default!r})")
    choices = g.get('CHOICES', {}).get(name)
    if choices and value not in choices:
        raise UserError(f"{shown} is not one of {', '.join(map(repr, choices))}")
    if kind is str:
        return os.path.expanduser(value) if value.startswith('~/') else value
    if kind is bool or value == default:
        return value
    low = -1e15 if name in g.get('MAY_BE_NEGATIVE', ()) else int(name in g.get('AT_LEAST_1', ()))
    high = 1 if name in g.get('AT_MOST_1', ()) else 1e15
    above_0 = name in g.get('ABOVE_0', ())
    if not low <= value <= high or above_0 and value == 0:      # nan is not, either
        raise UserError(f"{shown} must lie between {low:g}{', itself excluded,' * above_0} and "
                        f"{high:g} (default: {default!r})")
    return value


def run_config_file(arg, script):
    """The settings that a config file makes -> {name: value}; it may lie beside the script."""
    beside = os.path.join(os.path.dirname(os.path.abspath(script)), arg)
    path = next((p for p in (arg, beside) if os.path.isfile(p)), None)
    if path is None:
        raise UserError(f"{arg}: no such config file (settings are given as --name=value)")
    if not path.endswith('.py'):
        raise UserError(f"{arg}: a config file is Python, name = value a line, and ends in .py; "
                        "the official config.yml is read where it lies beside weights")
    try:
        names = runpy.run_path(path)
    except Exception as e:
        raise UserError(f"{arg}: the config file does not run: {one_line(e)}") from None
    settings = settings_of(script)
    found = {name: value for name, value in names.items() if name in settings or not (
        name[0] == '_' or callable(value) or isinstance(value, ModuleType))}
    if not found:
        raise UserError(f"{arg} sets no setting; write them as name = value, one a line")
    return found


def configure(g, argv=None, given=None):
    """
    Override the settings in g, the globals of a script -> dict of all settings. given: a set that
    takes the names that were set. UserError for anything unknown, of another type or out of range.
    """
    sys.excepthook = one_line_errors
    open_streams()
    argv = sys.argv[1:] if argv is None else argv
    given = set() if given is None else given
    script = g['__file__']
    settings = settings_of(script)

    if '--help' in argv or '-h' in argv:
        print((g.get('__doc__') or '').strip())
        print("\nsettings (--name=value, or name = value in a config file):")
        for name, (default, comment) in settings.items():
            print(f"  --{name}={default!s:24} {comment}".rstrip())
        sys.exit(0)
    for arg in argv:
        name, equals, value = arg[2:].partition('=')
        if not arg.startswith('--'):
            layer = run_config_file(arg, script)
        elif equals:
            layer = {name: value}
        else:
            raise UserError(f"{arg}: settings are given as --name=value, "
                            f"for example --{name or 'seed'}=1")
        for name, value in layer.items():
            if name not in settings:
                near = difflib.get_close_matches(NANOGPT.get(name, name), settings, n=1)
                hint = (f"did you mean {near[0]}?" if near else
                        f"python {os.path.basename(script)} --help lists the settings")
                raise UserError(f"{arg}: unknown setting {name!r}; {hint}")
            g[name] = check_value(g, name, value, arg)
            given.add(name)
    changed = [f"{name}={g[name]!r}" for name, (default, _) in settings.items()
               if g[name] != default]
    if changed and rank_and_world()[0] == 0:
        print('settings: ' + ', '.join(changed))
    return {name: g[name] for name in settings}
