"""
Settings from Python config files and the command line, left to right:

    python train.py config/numbers.py --batch_size=32 --compile=true

A script's settings are its top-level assignments of a number, text or true/false;
configure(globals()) overrides them and returns them as a dict. --help prints them with their
comments. A config file is Python and runs in a namespace of its own, so it may compute; helper
names start with an underscore. Everything else is refused with the reason, in one line.
"""
# before torch: see there
from parts.process import UserError, begin, one_line, rank_and_world

import ast
import difflib
import os
import re
import runpy
import sys
from functools import lru_cache

# what people who come from nanoGPT type
NANOGPT = dict(
    block_size='max_length', lr_decay_iters='max_iters', decay_lr='lr_schedule', start='prompt',
    max_new_tokens='max_length')
# name = a number, quoted text, True or False, at the margin, perhaps with a comment
SETTING = re.compile(r"^([a-z][a-z0-9_]*) *= *"
                     r"""(-?[\d._]+(?:[eE][+-]?\d+)?|'[^'\n]*'|"[^"\n]*"|True|False)"""
                     r" *(?:# *(.*))?$", re.MULTILINE)
# lowest values; of other whole numbers it is 1, of other fractions 0
LOWEST = dict(MAY_BE_0=0, AT_LEAST_2=2, ABOVE_0=1e-9, MAY_BE_NEGATIVE=-1e15)


@lru_cache
def settings_of(script):
    """A script's top-level `name = constant` lines -> {name: (default, comment)}, in order."""
    with open(script, encoding='utf-8-sig') as f:     # as Python reads it, Notepad's mark or not
        found = SETTING.findall(f.read())
    return {name: (ast.literal_eval(value), comment) for name, value, comment in found}


def check_value(g, name, value, where):
    """
    A value given for a setting of the script with the globals g -> the value, parsed if it is from
    a command line. UserError for another type, or outside its range. CHOICES, and AT_MOST_1 and the
    tables of LOWEST, where g has them, say the ranges. The default is always allowed.
    """
    default, _ = settings_of(g['__file__'])[name]
    kind = type(default)
    shown = f"{where}: {name}={value!r}"
    if isinstance(value, str) and where.startswith('--') and kind is not str:
        try:
            value = ast.literal_eval(value.capitalize())        # true, too
        except Exception:       # it can raise nearly anything
            pass
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{shown} is not of type {kind.__name__}, as the default {default!r} is")
    choices = g.get('CHOICES', {}).get(name, [value])
    if value not in choices:
        raise UserError(f"{shown} is not one of {', '.join(map(repr, choices))}")
    if kind is str:
        return os.path.expanduser(value)
    low = int(kind is int)
    high = 1 if name in g.get('AT_MOST_1', ()) else 1e15
    for table, lowest in LOWEST.items():
        if name in g.get(table, ()):
            low = lowest
    if not low <= value <= high and value != default:       # nan is not, either
        raise UserError(f"{shown} must lie between {low:g} and {high:g} (default: {default!r})")
    return value


def run_config_file(arg, script):
    """The settings that a config file makes -> {name: value}; it may lie beside the script."""
    beside = os.path.join(os.path.dirname(os.path.abspath(script)), arg)
    try:
        names = runpy.run_path(arg if os.path.exists(arg) else beside)
    except Exception as e:
        raise UserError(f"{arg} is no config file that runs ({one_line(e)}): such a file is "
                        "Python, name = value a line; without one, settings are --name=value"
                        ) from None
    settings = settings_of(script)
    found = {name: value for name, value in names.items() if name in settings
             or name[0] != '_' and isinstance(value, (int, float, str))}
    if not found:
        raise UserError(f"{arg} sets no setting; a config file is Python, name = value a line")
    return found


def configure(g, given=None):
    """
    Override the settings in g, the globals of a script -> dict of all settings. given: a set that
    takes the names that were set. UserError for anything unknown, of another type or out of range,
    or that nothing would read: READ_WITH in g says what a setting needs, 'other' or 'other=value'.
    """
    begin()
    given = set() if given is None else given
    settings = settings_of(g['__file__'])

    if '--help' in sys.argv or '-h' in sys.argv:
        print(g['__doc__'].strip())
        print("\nsettings (--name=value, or name = value in a config file):")
        for name, (default, comment) in settings.items():
            print(f"  {f'--{name}={default}':34} {comment}".rstrip())
        sys.exit(0)
    for arg in sys.argv[1:]:
        name, equals, value = arg.removeprefix('--').partition('=')
        if not arg.startswith('--'):
            layer = run_config_file(arg, g['__file__'])
        elif equals:
            layer = {name: value}
        else:
            raise UserError(f"{arg}: settings are given as --name=value, such as {arg}=1")
        for name, value in layer.items():
            if name not in settings:
                near = difflib.get_close_matches(NANOGPT.get(name, name), settings, n=1)
                hint = f"did you mean {near[0]}?" if near else "--help lists the settings"
                raise UserError(f"{arg}: unknown setting {name!r}; {hint}")
            g[name] = check_value(g, name, value, arg)
            given.add(name)
    changed = {name: f"{name}={g[name]!r}" for name, (default, _) in settings.items()
               if g[name] != default}
    for name, reader in g.get('READ_WITH', {}).items():
        other, equals, value = reader.partition('=')
        if name in changed and (g[other] != value if equals else not g[other]):
            needs = f"with {reader}" if value or not equals else f"without {other}"
            raise UserError(f"{changed[name]} is read only {needs}; "
                            f"leave it at {settings[name][0]!r}")
    if changed and rank_and_world()[0] == 0:
        print('settings: ' + ', '.join(changed.values()))
    return {name: g[name] for name in settings}
