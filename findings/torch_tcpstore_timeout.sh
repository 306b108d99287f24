#!/bin/sh
# torch.distributed.TCPStore(.., timeout=..): how long does a call wait for a server that does not answer at all?
#
# One would guess `timeout`. What happens: get() of a missing key, check() and compare_set() all wait for as long as TCP
# itself tries, about 15 minutes, where the server's host is cut off, and for ever where its process is stopped. The
# timeout is one for a key to appear on a server that answers; when it is over, get() asks the server to forget the
# request and waits for the answer to that, without a limit. torchrun's agents make these calls in their heartbeats, so
# an agent that is cut off from the head of its job hangs. Here the server is stopped, and three clients have 3 seconds.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat >"$folder/server.py" <<'PYTHON'
import time

import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
PYTHON
cat >"$folder/client.py" <<'PYTHON'
import datetime
import sys

import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=datetime.timedelta(seconds=3))
print("connected", flush=True)
sys.stdin.readline()
eval(sys.argv[2])
PYTHON
cat >"$folder/stopped.py" <<'PYTHON'
import os
import signal
import subprocess
import sys
import time

import torch

print(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
server = subprocess.Popen([sys.executable, "server.py"], stdout=subprocess.PIPE, text=True)
port = server.stdout.readline().strip()
calls = ("store.get('missing')", "store.check(['any'])", "store.compare_set('any', '', 'new')")
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
clients = [subprocess.Popen([sys.executable, "client.py", port, call], **pipes) for call in calls]
for client in clients:
    client.stdout.readline()
os.kill(server.pid, signal.SIGSTOP)
for client in clients:
    client.stdin.write("\n")
    client.stdin.flush()
time.sleep(15)
waiting = [client.poll() is None for client in clients]
for call, waits in zip(calls, waiting):
    print(f"  {call}, with a timeout of 3 s: {'waits' if waits else 'has ended'} after 15 s")
for process in (*clients, server):
    process.kill()
if not all(waiting):
    print("CHANGED: expected all of them to wait")
    sys.exit(1)
print("as described")
PYTHON
cd "$folder"
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" "$folder/env/bin/python" stopped.py
