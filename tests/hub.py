"""
A Hugging Face hub on this machine, for tests: enough of its protocol for huggingface_hub, transformers and datasets.

    hub = Hub({('model', 'org/elf'): folder, ('dataset', 'org/ids'): folder})
    HF_ENDPOINT=hub.url python sample.py --init_from=org/elf;   hub.got has the files that were downloaded
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
        self.server = ThreadingHTTPServer(('127.0.0.1', self.port), type('Bound', (Handler,), dict(hub=self)))
        self.port = self.server.server_port
        self.url = f'http://127.0.0.1:{self.port}'
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self):
        self.server.shutdown()
        self.server.server_close()      # from now on the port refuses


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def reply(self, status, body=b'', size=None, **headers):
        self.send_response(status)
        for k, v in {'Content-Length': len(body) if size is None else size, **headers}.items():
            self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)
        self.close_connection = size is not None and self.command != 'HEAD'      # less was sent than promised

    def refuse(self, status, code, **headers):
        self.reply(status, json.dumps(dict(error=code)).encode(), X_Error_Code=code, X_Error_Message=code, **headers)

    def do_GET(self):
        url = urlsplit(self.path)
        path, api = unquote(url.path), False
        if path.startswith('/api/'):
            path, api = path[4:], True
            kind, rest = re.fullmatch(r'/(model|dataset)s/(.*)', path).groups()
        else:       # '/cdn' in front: where the large files are
            kind, rest = re.fullmatch(r'(?:/cdn)?/(datasets/)?(.*)', path).groups()
            kind = 'dataset' if kind else 'model'
        repo = next((r for k, r in self.hub.repos if k == kind and (rest + '/').startswith(r + '/')), None)
        if repo is None:
            return self.refuse(401, 'RepoNotFound')     # missing or private, a stranger is not told
        if repo in self.hub.refused and not (api and self.hub.refused[repo] == 'GatedRepo'):     # all may see what is gated
            return self.refuse(401, self.hub.refused[repo])
        folder, rest = self.hub.repos[kind, repo], rest[len(repo) + 1:]
        if api:
            names = sorted(os.path.relpath(os.path.join(at, f), folder) for at, _, fs in os.walk(folder) for f in fs)
            what, _, rest = rest.partition('/')
            revision, _, inside = rest.partition('/')
            if revision not in ('', 'main', COMMIT):
                return self.refuse(404, 'RevisionNotFound')
            if what in ('', 'revision'):
                info = dict(id=repo, sha=COMMIT, private=False, gated=False, tags=[], siblings=[dict(rfilename=n) for n in names])
                return self.reply(200, json.dumps(info).encode(), Content_Type='application/json')
            names = [n for n in names if not inside or n.startswith(inside + '/')]
            if what != 'tree' or not names:
                return self.refuse(404, 'EntryNotFound')
            top = inside.count('/') + bool(inside)
            if parse_qs(url.query).get('recursive', ['false'])[0].lower() not in ('true', '1'):
                entries = {n if n.count('/') == top else '/'.join(n.split('/')[:top + 1]) for n in names}
            else:
                entries = {'/'.join(n.split('/')[:i]) for n in names for i in range(top + 1, n.count('/') + 2)}
            entries = [dict(type='directory', path=n, oid='0' * 40, size=0) if os.path.isdir(os.path.join(folder, n)) else
                       dict(type='file', path=n, oid=self.etag(os.path.join(folder, n)), size=os.path.getsize(os.path.join(folder, n))) for n in sorted(entries)]
            return self.reply(200, json.dumps(entries).encode(), Content_Type='application/json')
        _, revision, name = rest.split('/', 2)      # resolve/<revision>/<name>
        file, where = os.path.join(folder, name), f'{repo}/{name}'
        if revision not in ('main', COMMIT):
            return self.refuse(404, 'RevisionNotFound')
        if not os.path.isfile(file):
            return self.refuse(404, 'EntryNotFound', X_Repo_Commit=COMMIT)
        etag, size = self.etag(file), os.path.getsize(file)
        if not name.endswith(('.json', '.txt', '.yml')) and not path.startswith('/cdn'):
            return self.reply(302, Location=f'{self.hub.url}/cdn{url.path}', X_Repo_Commit=COMMIT, X_Linked_Etag=f'"{etag}"', X_Linked_Size=size)
        if self.command == 'HEAD':
            return self.reply(200, size=size, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges='bytes')
        with open(file, 'rb') as f:
            data = f.read()
        part = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        a, b = (int(part[1]), int(part[2] or size - 1) + 1) if part else (0, size)
        self.hub.got[where] += a == 0
        end = min(b, size // 2) if where in self.hub.cut else b
        self.reply(206 if part else 200, data[a:end], None if end == b else b - a, ETag=f'"{etag}"', X_Repo_Commit=COMMIT,
                   **(dict(Content_Range=f'bytes {a}-{b - 1}/{size}') if part else {}))

    do_HEAD = do_GET

    def etag(self, file):
        with open(file, 'rb') as f:
            return hashlib.sha256(f.read()).hexdigest()
