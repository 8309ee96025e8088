"""
Settings from Python config files and the command line, left to right:

    python train.py config/demo.py --batch_size=32 --compile=true

A script's settings are its top-level assignments of a number, text or true/false; configure(globals()) overrides them
and returns them as a dict. --help prints them with their comments. A config file is Python and runs in a namespace of
its own, so it may compute; helper names start with an underscore. Everything else is refused with the reason.
"""
import ast
import difflib
import errno
import os
import runpy
import sys
from types import ModuleType


class UserError(ValueError):
    """A mistake of the user's: what was given, what is allowed, what to do. Scripts print it in one line and exit with 1."""
    def __str__(self):
        return ' '.join(super().__str__().splitlines())     # what was given may have line breaks


def one_line_errors(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    elif issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
    elif issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        print(f"error: no room to write {error.filename or 'a file'}: {error.strerror}; the checkpoints there are intact", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def settings_of(script):
    """Names and comments of the settings of a script: its top-level `name = constant` lines, in order."""
    with open(script, encoding='utf-8') as f:
        source = f.read()
    lines, found = source.split('\n'), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and not node.targets[0].id.startswith('_') \
                and not node.targets[0].id.isupper():       # capitals are constants
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                continue
            if isinstance(value, (bool, int, float, str)):
                found[node.targets[0].id] = lines[node.end_lineno - 1][node.end_col_offset:].partition('#')[2].strip()
    return found


def convert(name, value, default, where):
    """value, text from the command line or an object from a file, as the type of default."""
    kind, shown = type(default), value
    if where.startswith('--') and kind is not str:          # text; a file has objects
        try:
            value = {'true': True, 'false': False}[value.lower()] if kind is bool else ast.literal_eval(value)
        except Exception:       # literal_eval can raise nearly anything
            pass
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        allowed = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text'}[kind]
        raise UserError(f"{where}: {name}={shown!r} is not {allowed} (default: {default!r})")
    return value


def configure(g, argv=None):
    """Override the settings in g, the globals of a script -> dict of all settings. UserError for anything unknown or of another type."""
    sys.excepthook = one_line_errors
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')        # texts have characters that some terminals lack
    argv = sys.argv[1:] if argv is None else argv
    comments = settings_of(g['__file__'])
    defaults = {name: g[name] for name in comments}
    if '--help' in argv or '-h' in argv:
        print((g.get('__doc__') or '').strip() + '\n\nsettings (--name=value, or name = value in a config file):')
        for name, comment in comments.items():
            print(f"  --{name}={defaults[name]!s:24} {comment}".rstrip())
        sys.exit(0)

    def override(name, value, where):
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; python {os.path.basename(g['__file__'])} --help lists the settings"
            raise UserError(f"{where}: unknown setting {name!r}{hint}")
        g[name] = convert(name, value, defaults[name], where)

    for arg in argv:
        if arg.startswith('--'):
            name, equals, value = arg[2:].partition('=')
            if not equals:
                raise UserError(f"{arg}: settings are given as --name=value, for example --{name or 'seed'}=1")
            override(name, value, arg)
        else:
            path = next((p for p in (arg, os.path.join(os.path.dirname(os.path.abspath(g['__file__'])), arg)) if os.path.isfile(p)), None)
            if path is None:
                raise UserError(f"{arg}: no such config file (settings are given as --name=value)")
            try:
                names = runpy.run_path(path)
            except Exception as e:
                raise UserError(f"{arg}: the config file does not run: {type(e).__name__}: {e}") from None
            for name, value in names.items():
                if name in defaults or not (name.startswith('_') or callable(value) or isinstance(value, ModuleType)):
                    override(name, value, arg)
    changed = {name: g[name] for name in defaults if g[name] != defaults[name]}
    if changed and os.environ.get('RANK', '0') == '0':
        print('settings: ' + ', '.join(f"{k}={v!r}" for k, v in changed.items()))
    return {name: g[name] for name in defaults}
