"""
A script as a process: its rank, its errors in one line, its streams, what it asks of the hub.
"""
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress

# Scripts import this before torch, which reads it when it is loaded: how long a thread of
# OpenMP spins for the others before it sleeps. A matter of microseconds, or two programs on one
# machine are each many times slower; not at all, and one alone is half slower.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
# a notebook's names a module that this Python may lack; matplotlib would stop at it
os.environ.pop('MPLBACKEND', None)


def rank_and_world():
    """The number of this process and how many there are: of a torchrun, else 0 and 1."""
    # a lone RANK, left by a scheduler or an old export, is no launch
    if {'RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'} <= os.environ.keys():
        return int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    return 0, 1

# -------------------------------------------------------------------------------------------------
# errors and output

class UserError(ValueError):
    """What was given, what is allowed, what to do. Exit code 1, no traceback."""
    def __str__(self):
        return one_line(super().__str__())      # what was given may have line breaks


def one_line(e):
    """A text or an exception of many lines -> one line; of an exception the kind as well."""
    text = ' '.join(str(e).split())
    return f"{type(e).__name__} {text}"[:400] if isinstance(e, Exception) else text


def one_line_errors(kind, error, traceback):
    """The sys.excepthook of all scripts: a traceback is for mistakes of the program alone."""
    text = one_line(str(error))
    if kind is KeyboardInterrupt:
        return print("\ninterrupted", file=sys.stderr)
    if 'out of memory' in text or "can't allocate memory" in text:
        text = text[:200] + "; lower batch_size or sizes, or set --gradient_checkpointing=true"
    elif issubclass(kind, ImportError):
        text += "; pip install it, or what requirements.txt has"
    elif not issubclass(kind, (UserError, OSError)):        # of the system: a full disk, no right
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
        with suppress(OSError, ValueError):     # nobody reads, no room; closed by the program
            self.stream.write(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def begin():
    """Errors in one line; stdout and stderr that never raise, whatever they are connected to."""
    sys.excepthook = one_line_errors
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name) or open(os.devnull, 'w')        # None without a console
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')    # texts have characters that some terminals lack
        setattr(sys, name, Unwatched(stream))


@contextmanager
def from_hub(what, source):
    """Around a call of a Hugging Face client: whatever it raises becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:      # the clients have a dozen kinds, and wrap each other's
        cause = e
        while deeper := cause.__cause__ or cause.__context__:
            cause = deeper
        why = "is a path here that is not usable" if os.path.exists(source) else (
            "is no file or folder here, and the hub did not give it: check the spelling and the "
            "network (is HF_HUB_OFFLINE set?); if it is private, or gated and you accepted its "
            "terms on its page: hf auth login")
        raise UserError(f"{what}: {source!r} {why} ({one_line(cause)})") from None
