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
import sys
from contextlib import contextmanager
from types import ModuleType

# OpenMP reads this when torch is loaded, so scripts import this file first: how long a thread spins
# for the others before it sleeps. A matter of microseconds, or two programs on one machine are each
# many times slower; not at all, and one alone is half slower.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
# a notebook's names a module that this Python may lack; matplotlib would stop at it
os.environ.pop('MPLBACKEND', None)

# -------------------------------------------------------------------------------------------------
# errors

class UserError(ValueError):
    """
    A mistake of the user's: what was given, what is allowed, what to do. Exit code 1, no
    traceback.
    """
    def __str__(self):
        return one_line(super().__str__())      # what was given may have line breaks


def one_line(e):
    """
    A text or an exception, perhaps of many lines -> one line; of an exception the kind as well.
    """
    text = ' '.join(str(e).split())
    return f"{type(e).__name__} {text}"[:200] if isinstance(e, Exception) else text


def one_line_errors(kind, error, traceback):
    """The sys.excepthook of all scripts."""
    no_room = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    no_memory = 'out of memory' in str(error) or "can't allocate memory" in str(error)
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    elif issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
    elif issubclass(kind, OSError) and error.errno in no_room:
        print(f"error: no room to write {error.filename or 'a file'}: {error.strerror}; "
              "the checkpoints there are intact", file=sys.stderr)
    elif issubclass(kind, RuntimeError) and no_memory:
        print(f"error: out of memory: {one_line(error)[:120]}; lower batch_size or the sizes, "
              "or set --gradient_checkpointing=true", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


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

def settings_of(script):
    """
    The settings of a script, its top-level `name = constant` lines -> {name: comment}, in order.
    """
    with open(script, encoding='utf-8') as f:
        source = f.read()
    lines, found = source.split('\n'), {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        if name.startswith('_') or name.isupper():      # capitals are constants
            continue
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            continue
        if isinstance(value, (bool, int, float, str)):
            after = lines[node.end_lineno - 1][node.end_col_offset:]
            found[name] = after.partition('#')[2].strip()
    return found


def parse(text, kind):
    """What stands on a command line -> a value of this kind, or the text if it is none."""
    if kind is bool:
        return {'true': True, 'false': False}.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except Exception:       # literal_eval can raise nearly anything
        return text


def check_type(name, value, default, where):
    """The value, an int where a float is meant made one. UserError if it is of another type."""
    kind, shown = type(default), value
    if where.startswith('--') and kind is not str:      # text; a file has objects
        value = parse(value, kind)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        kinds = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text'}
        raise UserError(f"{where}: {name}={shown!r} is not {kinds[kind]} (default: {default!r})")
    if kind in (int, float) and not abs(value) < 1e15:      # nan is not, either
        raise UserError(f"{where}: {name}={shown!r} is no number to work with "
                        f"(default: {default!r})")
    return value


def run_config_file(arg, script):
    """The names that a config file leaves behind -> {name: value}; it may lie beside the script."""
    beside = os.path.join(os.path.dirname(os.path.abspath(script)), arg)
    path = next((p for p in (arg, beside) if os.path.isfile(p)), None)
    if path is None:
        raise UserError(f"{arg}: no such config file (settings are given as --name=value)")
    try:
        return runpy.run_path(path)
    except Exception as e:
        raise UserError(f"{arg}: the config file does not run: {one_line(e)}") from None


def is_helper(name, value):
    """What a config file may define without meaning a setting."""
    return name.startswith('_') or callable(value) or isinstance(value, ModuleType)


def configure(g, argv=None, given=None):
    """
    Override the settings in g, the globals of a script -> dict of all settings. given: a set that
    takes the names that were set. UserError for anything unknown or of another type.
    """
    sys.excepthook = one_line_errors
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')    # texts have characters that some terminals lack
    argv = sys.argv[1:] if argv is None else argv
    given = set() if given is None else given
    script = g['__file__']
    comments = settings_of(script)
    defaults = {name: g[name] for name in comments}

    def override(name, value, where):
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = (f"did you mean {near[0]}?" if near else
                    f"python {os.path.basename(script)} --help lists the settings")
            raise UserError(f"{where}: unknown setting {name!r}; {hint}")
        g[name] = check_type(name, value, defaults[name], where)
        given.add(name)

    if '--help' in argv or '-h' in argv:
        print((g.get('__doc__') or '').strip())
        print("\nsettings (--name=value, or name = value in a config file):")
        for name, comment in comments.items():
            print(f"  --{name}={defaults[name]!s:24} {comment}".rstrip())
        sys.exit(0)
    for arg in argv:
        if not arg.startswith('--'):
            for name, value in run_config_file(arg, script).items():
                if name in defaults or not is_helper(name, value):
                    override(name, value, arg)
            continue
        name, equals, value = arg[2:].partition('=')
        if not equals:
            raise UserError(f"{arg}: settings are given as --name=value, "
                            f"for example --{name or 'seed'}=1")
        override(name, value, arg)
    changed = [f"{name}={g[name]!r}" for name in defaults if g[name] != defaults[name]]
    if changed and os.environ.get('RANK', '0') == '0':
        print('settings: ' + ', '.join(changed))
    return {name: g[name] for name in defaults}
