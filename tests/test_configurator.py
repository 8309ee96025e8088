"""
configurator.py: every rule of config files and --name=value, as a user's command line meets them,
and errors in one line.
    python -m pytest -q tests/test_configurator.py
"""
import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from huggingface_hub import errors
from huggingface_hub.utils import httpx

from configurator import UserError, configure
from parts.process import from_hub, one_line, one_line_errors

SCRIPT = '''"""A script with settings."""
import math
import sys
sys.path.insert(0, ROOT)
from configurator import UserError, configure

batch_size = 64             # rows per step
learning_rate = 6e-4        # peak, 0 = off
offset = -1                 # negative
compile = False             # faster # or not
out_dir = 'out'             # where it goes
empty = 3
start = ''
_hidden = 1
sizes = [1, 2]
CHOICES = dict(start=('', 'a', 'b', '42', 'true', 'é', '--x "y" # é\\n'))
MAY_BE_0 = ('empty',)
AT_MOST_1 = ABOVE_0 = ('learning_rate',)
MAY_BE_NEGATIVE = ('offset',)

def helper():
    local = 3

if __name__ == '__main__':
    settings = configure(globals())
    print('RESULT', batch_size, repr(settings))
    if out_dir == 'fail':
        raise UserError("one reason")
    if out_dir == 'bug':
        raise KeyError("a bug")
'''.replace('ROOT', repr(ROOT))
DEFAULTS = dict(batch_size=64, learning_rate=6e-4, offset=-1, compile=False, out_dir='out',
                empty=3, start='')


@pytest.fixture
def script(tmp_path, monkeypatch):
    """configure() for SCRIPT, in a folder with config/c.py -> settings, globals, names given."""
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'config').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)      # configure() replaces it
    (tmp_path / 'config.yml').write_text('batch_size: 32')
    monkeypatch.setattr(sys, 'path', sys.path[:])

    def run(*args, config=''):
        (tmp_path / 'config/c.py').write_text(config)
        g, given = {'__file__': str(tmp_path / 'script.py'), '__name__': 'script'}, set()
        exec(SCRIPT, g)
        streams = sys.stdout, sys.stderr        # these, too
        try:
            monkeypatch.setattr(sys, 'argv', ['script.py', *args])
            return configure(g, given), g, given
        finally:
            sys.stdout, sys.stderr = streams
    return run


@pytest.mark.parametrize('args, config, changed', [
    ([], '', {}),
    (['--batch_size=32'], '', dict(batch_size=32)),
    (['--batch_size=1_000', '--offset=-5'], '', dict(batch_size=1000, offset=-5)),
    (['--empty=0'], '', dict(empty=0)),
    (['--learning_rate=1'], '', dict(learning_rate=1.0)),                       # int to float
    (['--learning_rate=5e-5'], '', dict(learning_rate=5e-5)),                   # a number, not text
    (['--learning_rate=.5'], '', dict(learning_rate=0.5)),
    (['--out_dir=~/x', '--start=a'], '', dict(out_dir=os.path.expanduser('~/x'), start='a')),
    (['--compile=true'], '', dict(compile=True)),
    (['--compile=True'], '', dict(compile=True)),
    (['--compile=true', '--compile=false'], '', {}),
    (['--out_dir=a=b==c'], '', dict(out_dir='a=b==c')),                         # values with =
    (['--start=42'], '', dict(start='42')),                                     # text stays text
    (['--start=true', '--out_dir='], '', dict(start='true', out_dir='')),
    (['--start=--x "y" # é\n'], '', dict(start='--x "y" # é\n')),
    (['--batch_size=1', '--batch_size=2'], '', dict(batch_size=2)),             # left to right
    (['config/c.py', '--batch_size=2'], 'batch_size = 1', dict(batch_size=2)),
    (['--batch_size=2', 'config/c.py'], 'batch_size = 1', dict(batch_size=1)),
    (['config/c.py'], 'learning_rate = 1', dict(learning_rate=1.0)),    # int to float from a file
    (['config/c.py'], 'compile = True\nout_dir = "x"', dict(compile=True, out_dir='x')),
    (['config/c.py'], 'import os\n_n = 8\ndef f(x): return x * 2\nbatch_size = f(_n)',
     dict(batch_size=16)),
    (['config/c.py'], 'from math import sqrt\nbatch_size = int(sqrt(64))', dict(batch_size=8)),
])
def test_accepted(script, capsys, args, config, changed):
    settings, g, _ = script(*args, config=config)
    assert settings == DEFAULTS | changed and list(settings) == list(DEFAULTS)
    for name, value in settings.items():
        assert g[name] == value and type(value) is type(DEFAULTS[name])
    out = capsys.readouterr().out       # says what differs from the defaults, and nothing else
    assert all((f"{name}=" in out) == (name in changed) for name in DEFAULTS)


def test_what_was_given_is_told_even_where_it_is_the_default(script):
    _, _, given = script('config/c.py', '--start=', config='import os\n_n = 1\nbatch_size = 64')
    assert given == {'batch_size', 'start'}


@pytest.mark.parametrize('args, config, says', [
    (['--batchsize=32'], '', ["--batchsize=32", "setting 'batchsize'", 'did you mean batch_size?']),
    (['config/c.py'], 'learning_rat = 1.0', ['config/c.py', "'learning_rat'", 'learning_rate?']),
    (['--zzz=1'], '', ["'zzz'", '--help']),
    (['--batch_size=big'], '', ["'big'", 'type int', 'default 64']),
    (['--batch_size=1.5'], '', ["1.5", 'type int', 'default 64']),
    (['--batch_size=true'], '', ["'true'", 'default 64']),
    (['--batch_size='], '', ['type int', 'default 64']),
    (['--batch_size={[]:1}'], '', ['type int']),
    (['--learning_rate=fast'], '', ["'fast'", 'type float', 'default 0.0006']),
    (['--compile=ture'], '', ["'ture'", 'bool', 'default False']),
    (['--compile=1'], '', ["'1'", 'bool']),
    (['config/c.py'], 'batch_size = 1.5', ['config/c.py', 'batch_size=1.5', 'default 64']),
    (['config/c.py'], 'batch_size = True', ['batch_size=True', 'type int']),
    (['config/c.py'], 'batch_size = "32"', ["batch_size='32'", 'type int']),
    (['config/c.py'], 'compile = 1', ['compile=1', 'bool']),
    (['config/c.py'], 'out_dir = 3', ['out_dir=3', 'type str', "default 'out'"]),
    (['config/c.py'], 'batch_size = None', ['batch_size=None', 'default 64']),
    (['config/c.py'], 'def compile(): pass', ['compile', 'bool']),     # is no helper
    (['--learning_rate=1e400'], '', ['and 1 (default']),
    (['config/c.py'], 'learning_rate = float("nan")', ['between 1e-09 and 1']),
    (['config/c.py'], 'batch_size = 10**16', ['must lie between 1 and 1e+15', 'default: 64']),
    (['--batch_size=0'], '', ['batch_size', "'0'", 'must lie between 1 and']),
    (['--learning_rate=0'], '', ['between 1e-09 and', 'default: 0.0006']),
    (['--learning_rate=1.5'], '', ['and 1 (default']),
    (['--start=c'], '', ["'c' is not one of '', 'a', 'b'"]),
    (['--block_size=9'], '', ['unknown setting', '--help']),        # this script has no max_length
    # what is Python by chance, or none, and sets nothing
    (['config/c.py'], 'batch_size: 32', ['config/c.py sets no setting']),
    (['config/c.py'], '{"batch_size": 32}', ['config/c.py sets no setting']),
    (['config/c.py'], 'class Config:\n    batch_size = 32', ['config/c.py sets no setting']),
    (['config.yml'], '', ['config.yml sets no setting; a config file is Python']),
    (['config/c.py'], 'max_length: 1024\nencoder: t5-small', ['no config file that runs']),
    # no settings: names of Python, imports, functions, lists, what main assigns
    *[([f'--{name}=1'], '', [f"unknown setting '{name}'"]) for name in (
        '__name__', '__file__', '_hidden', 'math', 'configure', 'helper', 'local', 'sizes',
        'settings')],
    (['config/none.py'], '', ['config/none.py', 'No such file']),
    (['batch_size=32'], '', ['batch_size=32', 'no config file that runs', '--name=value']),
    (['--batch_size', '32'], '', ['--batch_size: settings are given as --name=value']),
    (['--'], '', ['--name=value']),
    (['config/c.py'], 'batch_size = 1 / 0', ['c.py is no config file', 'ZeroDivisionError']),
    (['config/c.py'], 'batch_size = = 1', ['c.py is no config file', 'SyntaxError']),
    (['config/c.py'], 'import no_such_module', ['no config file that runs', 'ModuleNotFoundError']),
])
def test_refused(script, args, config, says):
    with pytest.raises(UserError) as e:
        script(*args, config=config)
    assert all(s in str(e.value) for s in says) and '\n' not in str(e.value), str(e.value)


def command(tmp_path, *args, cwd=None, **env):
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'config').mkdir(exist_ok=True)
    (tmp_path / 'config/c.py').write_text('batch_size = 7')
    return subprocess.run([sys.executable, str(tmp_path / 'script.py'), *args], text=True,
                          cwd=cwd or tmp_path, capture_output=True, env=os.environ | env)


def test_any_working_directory(tmp_path):
    elsewhere = tmp_path / 'else'
    (elsewhere / 'mine').mkdir(parents=True)
    (elsewhere / 'mine/d.py').write_text('batch_size = 9')
    for config, size in (('config/c.py', 7), ('../config/c.py', 7), ('mine/d.py', 9),
                         (str(tmp_path / 'config/c.py'), 7)):
        assert f'RESULT {size} ' in command(tmp_path, config, cwd=elsewhere).stdout


def test_help(tmp_path):
    r = command(tmp_path, '--batch_size=3', '--help')
    assert r.returncode == 0 and r.stderr == '' and 'RESULT' not in r.stdout
    assert r.stdout.startswith('A script with settings.')
    lines = [line.split('=', 1) for line in r.stdout.splitlines() if line.startswith('  --')]
    assert [name[4:] for name, _ in lines] == list(DEFAULTS)
    shown = dict(lines)
    assert shown['  --batch_size'].split(maxsplit=1) == ['64', 'rows per step']
    assert shown['  --compile'].endswith(' faster # or not')


def test_a_script_saved_with_a_byte_order_mark(tmp_path):
    """As Notepad saves it; Python runs it, so its settings must be found, too."""
    (tmp_path / 'script.py').write_text(SCRIPT, encoding='utf-8-sig')
    r = subprocess.run([sys.executable, str(tmp_path / 'script.py'), '--batch_size=3'], text=True,
                       capture_output=True)
    assert 'RESULT 3 ' in r.stdout, r.stderr


@pytest.mark.parametrize('args, says', [
    (['--batchsize=3'], 'did you mean batch_size?'), (['--out_dir=fail'], 'one reason'),
    (['none.py'], 'No such file'), (['--a\nb=1'], '--a b=1: unknown')])
def test_one_line_and_exit_code_1(tmp_path, args, says):
    r = command(tmp_path, *args)
    assert r.returncode == 1 and r.stderr.startswith('error: ') and says in r.stderr
    assert len(r.stderr.splitlines()) == 1


def test_a_bug_keeps_its_traceback(tmp_path):
    r = command(tmp_path, '--out_dir=bug')
    assert r.returncode == 1 and 'Traceback' in r.stderr and 'KeyError' in r.stderr


def test_only_rank_0_prints_the_changes(tmp_path):
    assert 'settings: batch_size=3' in command(tmp_path, '--batch_size=3').stdout
    ranks = dict(RANK='1', WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='1')
    assert 'settings:' not in command(tmp_path, '--batch_size=3', **ranks).stdout
    # left behind by a scheduler, without the rest of it
    assert 'settings:' in command(tmp_path, '--batch_size=3', RANK='1').stdout


def test_nanogpt_names_get_the_right_hint(monkeypatch):
    import train
    for name in ('excepthook', 'stdout', 'stderr'):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    for name, ours in dict(block_size='max_length', lr_decay_iters='max_iters').items():
        with pytest.raises(UserError, match=f'did you mean {ours}'):
            monkeypatch.setattr(sys, 'argv', ['train.py', f'--{name}=1'])
            configure(vars(train).copy())


PRINTS = '''"""A script."""
import os, sys
sys.path.insert(0, ROOT)
from configurator import configure
answer = 1                  # of everything
if __name__ == '__main__':
    configure(globals())
    for i in range(50000):
        print('a line of a log', i, flush=True)
    print('and an error', file=sys.stderr)
    open('result', 'w').write('done')
'''.replace('ROOT', repr(ROOT))


@pytest.mark.parametrize('reader', ['| head -1', '> /dev/full', '>&-', '2>&1 | true'])
def test_work_goes_on_when_nobody_reads(tmp_path, reader):
    (tmp_path / 'script.py').write_text(PRINTS)
    shell = f'{sys.executable} script.py {reader}; exit ${{PIPESTATUS[0]}}'
    r = subprocess.run(['bash', '-c', shell], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / 'result').read_text() == 'done' and r.returncode == 0
    assert 'Error' not in r.stderr and 'Traceback' not in r.stderr


def test_help_into_a_closed_pipe_is_silent(tmp_path):
    (tmp_path / 'script.py').write_text(PRINTS)
    shell = f'{sys.executable} script.py --help | true; exit ${{PIPESTATUS[0]}}'
    r = subprocess.run(['bash', '-c', shell], cwd=tmp_path, capture_output=True, text=True)
    assert (r.returncode, r.stderr) == (0, '')


@pytest.mark.parametrize('script', ['train', 'sample', 'eval', 'prepare', 'convert', 'bench'])
def test_torch_is_loaded_after_the_environment_is_set(script):
    """OpenMP reads how long to spin when torch is loaded: what a script imports first counts."""
    with open(os.path.join(ROOT, f'{script}.py'), encoding='utf-8') as f:
        imports = [node for node in ast.parse(f.read()).body
                   if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports[0].module in ('configurator', 'parts.process')


@pytest.mark.parametrize('given, want', [
    ({}, '1000 False\n'), (dict(GOMP_SPINCOUNT='7'), '7 False\n')])
def test_how_long_threads_spin_unless_it_is_set(given, want):
    code = ('import configurator, os, sys; '
            'print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules)')
    environment = {k: v for k, v in os.environ.items() if k != 'GOMP_SPINCOUNT'} | given
    got = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, text=True,
                         check=True, capture_output=True)
    assert got.stdout == want


def test_the_backend_of_a_notebook_is_not_asked_for():
    """A notebook tells its shell commands of a module that only its own Python may have."""
    code = 'import configurator; from matplotlib.figure import Figure'
    environment = os.environ | dict(MPLBACKEND='module://only_in_the_notebook')
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, check=True)


def test_texts_that_the_terminal_lacks(tmp_path):
    r = command(tmp_path, '--start=é', PYTHONIOENCODING='ascii')
    assert r.returncode == 0 and 'RESULT' in r.stdout

# --------------------------------------------------------------------------------------------------
# errors of others in one line

def test_one_line():
    assert one_line(' a\n  b ') == 'a b' == str(UserError('a\nb'))
    assert one_line(KeyError('a\nb')) == r"KeyError 'a\nb'"
    assert one_line(ValueError('a\nb')) == 'ValueError a b'
    assert len(one_line(ValueError('x' * 999))) == 400


def test_a_package_that_is_missing_is_no_traceback(capsys):
    one_line_errors(ModuleNotFoundError, ModuleNotFoundError("No module named 'wandb'"), None)
    assert capsys.readouterr().err.startswith("error: No module named 'wandb'; pip install it")


@pytest.mark.parametrize('source, error, says', [
    (ROOT, OSError('no\nconfig'), 'is not usable .OSError no config'),
    ('org/x', ValueError('new'), 'is no file or folder here, .* HF_HUB_OFFLINE .*ValueError new'),
    ('org/x', errors.LocalEntryNotFoundError('x'), 'the network .* hf auth login .LocalEntry'),
    ('org/x', httpx.ConnectError('x'), 'the network .* ConnectError|the network .*.ConnectError')])
def test_what_a_client_of_the_hub_raises(source, error, says):
    with pytest.raises(UserError, match=says) as e, from_hub('no model', source):
        raise error
    assert str(e.value).startswith('no model: ') and source in str(e.value)
    with pytest.raises(UserError, match=says), from_hub('no model', source):
        raise OSError('see above') from error       # transformers wraps what the hub's client says
    with pytest.raises(UserError, match='^mine$'), from_hub('no model', source):
        raise UserError('mine')
