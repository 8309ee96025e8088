"""
A Hugging Face hub on this machine, for tests: enough of its protocol for huggingface_hub,
transformers and datasets.

    hub = Hub({('model', 'org/elf'): folder, ('dataset', 'org/ids'): folder})
    HF_ENDPOINT=hub.url python sample.py --init_from=org/elf;   hub.got counts the files it sent
"""
import hashlib
import json
import os
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = 'c0ffee' * 6 + 'c0de'          # of every repository: 40 hex digits


class Hub:
    def __init__(self, repos):
        self.repos = repos              # ('model' or 'dataset', id) -> folder
        self.refused = {}               # id -> error code, such as GatedRepo
        self.cut = set()                # files that break off half way, as 'org/name/path'
        self.got = Counter()            # files sent, as 'org/name/path'
        self.port = 0
        self.up()

    def up(self):
        handler = type('Bound', (Handler,), dict(hub=self))
        self.server = ThreadingHTTPServer(('127.0.0.1', self.port), handler)
        self.port = self.server.server_port
        self.url = f'http://127.0.0.1:{self.port}'
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self):
        self.server.shutdown()
        self.server.server_close()      # from now on the port refuses


def etag(file):
    with open(file, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def reply(self, status, body=b'', size=None, **headers):
        """Send it; size: what is promised, if that is not what is sent."""
        self.send_response(status)
        headers['Content-Length'] = len(body) if size is None else size
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)
            self.close_connection = size is not None

    def reply_json(self, content):
        self.reply(200, json.dumps(content).encode(), Content_Type='application/json')

    def refuse(self, status, code, **headers):
        self.reply(status, json.dumps(dict(error=code)).encode(),
                   X_Error_Code=code, X_Error_Message=code, **headers)

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        is_api = path.startswith('/api/')
        if is_api:
            kind, rest = re.fullmatch(r'/api/(model|dataset)s/(.*)', path).groups()
        else:       # '/cdn' in front: where the large files are
            kind, rest = re.fullmatch(r'(?:/cdn)?/(datasets/)?(.*)', path).groups()
            kind = 'dataset' if kind else 'model'
        ids = [r for k, r in self.hub.repos if k == kind and f'{rest}/'.startswith(f'{r}/')]
        if not ids:
            return self.refuse(401, 'RepoNotFound')     # missing or private, a stranger is not told
        repo = ids[0]
        code = self.hub.refused.get(repo)
        if code and not (is_api and code == 'GatedRepo'):       # all may see what is gated
            return self.refuse(401, code)
        folder, rest = self.hub.repos[kind, repo], rest.removeprefix(f'{repo}/')
        if is_api:
            self.describe(repo, folder, '' if rest == repo else rest, parse_qs(url.query))
        else:
            self.send_file(repo, folder, rest, path.startswith('/cdn'))

    do_HEAD = do_GET

    def describe(self, repo, folder, rest, query):
        """The answers to '', 'revision/<revision>' and 'tree/<revision>/<path inside>'."""
        names = sorted(os.path.relpath(os.path.join(at, f), folder)
                       for at, _, files in os.walk(folder) for f in files)
        what, _, rest = rest.partition('/')
        revision, _, inside = rest.partition('/')
        if revision not in ('', 'main', COMMIT):
            return self.refuse(404, 'RevisionNotFound')
        if what in ('', 'revision'):
            return self.reply_json(dict(id=repo, sha=COMMIT, private=False, gated=False, tags=[],
                                        siblings=[dict(rfilename=name) for name in names]))
        names = [name for name in names if not inside or name.startswith(f'{inside}/')]
        if what != 'tree' or not names:
            return self.refuse(404, 'EntryNotFound')
        deep = query.get('recursive', ['false'])[0].lower() in ('true', '1')
        top = inside.count('/') + 1 + bool(inside)      # parts in the names of the first level
        shown = set()
        for parts in (name.split('/') for name in names):
            shown |= {'/'.join(parts[:i]) for i in range(top, len(parts) + 1 if deep else top + 1)}
        entries = []
        for name in sorted(shown):
            file = os.path.join(folder, name)
            if os.path.isdir(file):
                entries.append(dict(type='directory', path=name, oid='0' * 40, size=0))
            else:
                size = os.path.getsize(file)
                entries.append(dict(type='file', path=name, oid=etag(file), size=size))
        self.reply_json(entries)

    def send_file(self, repo, folder, rest, from_cdn):
        """The answer to 'resolve/<revision>/<name>': the file, or where it is."""
        _, revision, name = rest.split('/', 2)
        file, where = os.path.join(folder, name), f'{repo}/{name}'
        if revision not in ('main', COMMIT):
            return self.refuse(404, 'RevisionNotFound')
        if not os.path.isfile(file):
            return self.refuse(404, 'EntryNotFound', X_Repo_Commit=COMMIT)
        tag, size = f'"{etag(file)}"', os.path.getsize(file)
        if not name.endswith(('.json', '.txt', '.yml')) and not from_cdn:
            return self.reply(302, Location=f'{self.hub.url}/cdn{urlsplit(self.path).path}',
                              X_Repo_Commit=COMMIT, X_Linked_Etag=tag, X_Linked_Size=size)
        headers = dict(ETag=tag, X_Repo_Commit=COMMIT)
        if self.command == 'HEAD':
            return self.reply(200, size=size, Accept_Ranges='bytes', **headers)
        with open(file, 'rb') as f:
            data = f.read()
        first, end = 0, size
        part = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if part:
            first, end = int(part[1]), int(part[2] or size - 1) + 1
            headers['Content_Range'] = f'bytes {first}-{end - 1}/{size}'
        self.hub.got[where] += first == 0
        sent = data[first:min(end, size // 2) if where in self.hub.cut else end]
        promised = end - first if len(sent) < end - first else None
        self.reply(206 if part else 200, sent, promised, **headers)
